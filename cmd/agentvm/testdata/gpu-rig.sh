#!/bin/busybox sh
# The init of a machine with an IOMMU of QEMU's: takes a display controller of
# two functions from its driver, gives it to a machine of its own, and gets it
# back, by the real program. What starts with "rig " is for the test.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm && mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
export PATH=/bin:/usr/bin HOME=/root
exec </dev/null
# Whoever packed this was another user; QEMU runs as one of its own.
chown -R 0:0 /var/lib
chmod -R a+rX /usr /lib* /vmlinux /guest.initrd 2>/dev/null; chmod 755 / /var /var/lib
chmod 711 /var/lib/agentvm /var/lib/agentvm/instances /var/lib/agentvm/instances/* 2>/dev/null
mkdir -m 711 /run/agentvm
for module in irqbypass vfio vfio_iommu_type1 vfio-pci-core vfio-pci; do [ ! -e /proc/modules ] || insmod /$module.ko; done

card=0000:01:00.0
pci=/sys/bus/pci/devices
journals=/var/lib/agentvm/gpu
group=$(readlink $pci/$card/iommu_group)
group=${group##*/}
driver() { readlink $pci/$1/driver | grep -o '[^/]*$'; }
is() { # is WHAT: how the card is
	echo "rig $1: driver $(driver $card), override $(cat $pci/$card/driver_override), second $(driver 0000:01:00.1), journals $(ls $journals 2>/dev/null | wc -l)"
}
viable() { # viable WHAT ADDRESS: what the kernel says of the group
	number=$(readlink $pci/$2/iommu_group)
	echo "rig group $1: $(/vfio viable ${number##*/})"
}
does() { # does NAME ARGUMENT...: the program's exit code
	name=$1
	shift
	/agentvm "$@"
	echo "rig $name: exit $?"
}

again() { # the host went down while the card was taken
	is "after a crash of the host"
	/agentvm gpu recover 2>&1 | sed 's/^agentvm: /rig recover: /'
	is recovered
}

blocked() { # nobody is seen to have it open, and vfio-pci waits for whoever has
	/agentvm gpu bind $card
	/vfio hide $group $card >/run/hide &
	hider=$!
	until [ -s /run/hide ]; do sleep 0.1; done
	cat /run/hide
	does "release of what is open" gpu release $card
	echo "rig blocked: driver $(driver $card), journals $(ls $journals | wc -l)" # the kernel keeps the rest to itself
	# Some kernels keep a part to themselves until then: 6.1 does, 6.12.117 does not.
	/agentvm gpu ls --json | grep -q '"blocked": *true' && echo "rig listed as blocked"
	does "check of what is blocked" gpu check $card
	does "recover of what is blocked" gpu recover
	kill $hider
	sleep 2
	does "recover of what is let go" gpu recover
	is unblocked
}

host() {
	/agentvm gpu ls | grep $card | grep -q virtio-pci && echo "rig listed"
	does check gpu check $card
	is first
	viable "before" $card
	does bind gpu bind $card
	is bound
	viable "after" $card
	does again gpu bind $card
	sh -c "exec 3<>/dev/vfio/$group; sleep 1000" &
	sleep 1
	does held gpu release $card
	is held
	kill $!
	sleep 1
	does release gpu release $card
	is released
	viable "at last" $card
	blocked
	caught=0
	for step in override unbind probe bound probe override unbind kept; do
		/agentvm gpu bind $card &
		while kill -0 $! 2>/dev/null && ! grep -qs "\"step\":\"$step\"" $journals/*; do :; done
		kill -9 $!
		wait $!
		[ "$(ls $journals)" = "" ] || caught=$((caught + 1))
		/agentvm gpu recover
		/agentvm gpu release $card # where the killed one had just finished
		is killed
	done
	[ $caught -ge 4 ] && echo "rig killed: in the middle"

	# Two devices behind a bridge of the old kind have one group.
	one=$(ls $pci | sed -n 's/.*\(0000:03:0[1-9].0\)/\1/p' | head -n 1)
	other=$(ls $pci | sed -n 's/.*\(0000:03:0[1-9].0\)/\1/p' | tail -n 1)
	pair() { echo "rig $1: $(driver $one) and $(driver $other), journals $(ls $journals | wc -l)"; }
	does "a stranger in the group" gpu bind $one
	pair refused
	drivers=/sys/bus/pci/drivers
	echo vfio-pci >$pci/$one/driver_override # as who does not look would
	echo $one >$drivers/virtio-pci/unbind
	echo $one >$drivers/vfio-pci/bind
	viable "that is half taken" $one
	echo $one >$drivers/vfio-pci/unbind
	echo >$pci/$one/driver_override
	echo $one >$drivers/virtio-pci/bind
	does "the whole group" gpu bind $one $other
	pair taken
	viable "that is all taken" $one
	does "the group's release" gpu release $one $other
	pair given

	/agentvm gpu bind $card
	for j in $journals/*; do echo "rig-journal ${j##*/} $(base64 -w 0 $j)"; done
	is "when the host goes down"
}

dir=/var/lib/agentvm/instances
begin() { # begin NAME: the life of a machine that has the card
	: >$dir/$1/console.log
	chown $VMUSER $dir/$1/console.log
	/agentvm supervise $dir/$1 >/run/$1.log 2>&1 &
	life=$!
	# Until its supervisor has begun, the status is that of a life that was killed.
	while ! { qemu=$(/agentvm status $1 --json | grep -o '"qemu":[0-9]*' | grep -o '[0-9]*') && kill -0 $qemu 2>/dev/null; }; do
		kill -0 $life || { cat /run/$1.log; break; }
		sleep 0.5
	done
}

locks() { # how QEMU has the machine's memory
	echo "rig qemu: user $(sed -n 's/^Uid:.\([0-9]*\).*/\1/p' /proc/$qemu/status), may lock $(sed -n 's/^Max locked memory *\([0-9]*\) .*/\1/p' /proc/$qemu/limits)"
	locked=$(sed -n 's/^VmLck:[^0-9]*\([0-9]*\) kB/\1/p' /proc/$qemu/status)
	[ "$locked" -ge 196608 ] && echo "rig locked: all memory" || echo "rig locked: $locked kB"
}
meet() { # meet NAME: waits until the guest has met the card
	while kill -0 $qemu && ! grep -q '^guest done' $dir/$1/console.log; do sleep 1; done
	cat -v $dir/$1/console.log
	kill -0 $qemu || cat /run/$1.log
	tr -d '\r' <$dir/$1/console.log | grep '^guest [fd]' | sed 's/^/rig /'
}

plug() { # into a machine that goes on from what was saved without the card
	begin restored
	meet restored
	is "in a machine"
	locks
	does stop stop --force restored
	is stopped
}

libvirt() { # starts the host's libvirt
	/usr/sbin/libvirtd -f /etc/libvirt/libvirtd.conf &
	libvirtd=$!
	while [ ! -S /run/libvirt/libvirt-sock ] && kill -0 $libvirtd; do sleep 0.5; done
}

ended() { # ended NAME: waits until the supervisor has given everything back
	wait $life
	is "$1"
}

managed() { # a machine of libvirt's
	echo 96 >/proc/sys/vm/nr_hugepages
	mkdir -p /dev/hugepages
	mount -t hugetlbfs -o pagesize=2M huge /dev/hugepages
	libvirt
	begin managed
	is "in a machine of libvirt's"
	locks
	meet managed
	does "stop by libvirt" stop --force managed
	ended "back from libvirt"

	begin managed
	kill -9 $qemu
	ended "QEMU killed"

	begin managed
	kill -9 $life
	wait $life
	while kill -0 $qemu; do sleep 0.1; done # whose guard has seen it
	does "recover after libvirt" gpu recover
	is "supervisor killed"

	begin managed
	kill -9 $libvirtd
	rm /run/libvirt/libvirt-sock
	does "stop without libvirt" stop --force managed
	ended "libvirtd killed"
	libvirt
	sleep 5 # it looks at what it had before
	is "libvirtd is there again"
	kill $libvirtd
}

machine() {
	echo 96 >/proc/sys/vm/nr_hugepages
	begin long
	is "in a machine"
	echo "rig node: of user $(stat -c %u /dev/vfio/$group)"
	locks
	pages=/sys/kernel/mm/hugepages/hugepages-2048kB
	echo "rig huge pages: $(cat $pages/free_hugepages) free"
	meet long
	does "release under a machine" gpu release $card
	is "still in a machine"
	kill -9 $life
	wait $life
	is "supervisor killed"
	/agentvm doctor >/run/doctor.log
	grep -o '^ok  *cards: .* was left behind' /run/doctor.log | sed 's/^/rig doctor: /'
	is "after doctor"
	echo "rig huge pages: $(cat $pages/free_hugepages) free"

	begin short
	wait $life
	is "after a failed boot"
	echo "rig short: $(/agentvm status short --json | grep -o '"state":"[a-z]*"')"

	begin long
	is "in a machine again"
	does stop stop --force long
	is stopped
}

[ ! -e /more.sh ] || . /more.sh
$(sed -n 's/.*rig=\([a-z]*\).*/\1/p' /proc/cmdline)
echo rig done
poweroff -f
