#!/bin/busybox sh
# The init of a machine with an IOMMU of QEMU's: takes a display controller of
# two functions from its driver and gives it back, by the real program. What
# starts with "rig " is for the test.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
export PATH=/bin HOME=/root
exec </dev/null
for module in irqbypass vfio vfio_iommu_type1 vfio-pci-core vfio-pci; do insmod /$module.ko; done

card=0000:01:00.0
at=/sys/bus/pci/devices/$card
is() { # is WHAT: how the card is
	driver=$(readlink $at/driver)
	echo "rig $1: driver ${driver##*/}, override $(cat $at/driver_override), second $(readlink $at/../0000:01:00.1/driver | grep -o '[^/]*$'), journals $(ls /var/lib/agentvm/gpu 2>/dev/null | wc -l)"
}
does() { # does NAME ARGUMENT...: the program's exit code
	name=$1
	shift
	/agentvm gpu "$@"
	echo "rig $name: exit $?"
}

does check check $card
is first
does bind bind $card
is bound
does again bind $card
group=$(readlink $at/iommu_group)
sh -c "exec 3<>/dev/vfio/${group##*/}; sleep 1000" &
sleep 1
does held release $card
is held
kill $!
sleep 1
does release release $card
is released
for wait in 0.1 0.2 0.25 0.3 0.35 0.4 0.5 0.6; do
	/agentvm gpu bind $card &
	sleep $wait
	kill -9 $!
	wait $!
	/agentvm gpu recover
	/agentvm gpu release $card # where the killed one had just finished
	is killed
done
echo rig done
poweroff -f
