#!/bin/busybox sh
# The init of the machine in the machine: says what its kernel sees of the card,
# which is all that lies behind a bridge there. A program costs seconds here, so
# that nearly all is done without.
echo # the firmware's last line has no end
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
# A card that is plugged in later is there when its last driver has it.
echo "guest waits"
until [ -e /sys/bus/pci/devices/0000:0[1-9]:00.2/driver ]; do /bin/busybox sleep 1; done
for function in /sys/bus/pci/devices/0000:0[1-9]:*; do
	cd -P $function
	number=${PWD##*.}
	read vendor <vendor
	read device <device
	read class <class
	regions=0
	while read start end flags; do
		[ $start = 0x0000000000000000 ] || regions=$((regions + 1))
	done <resource
	driver=none
	[ ! -e driver ] || { cd -P driver && driver=${PWD##*/}; }
	echo "guest function $number: ${vendor#0x}:${device#0x}, class $class, regions $regions, driver $driver"
done
nvme=/sys/class/nvme/nvme0
for second in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19; do
	read state <$nvme/state
	[ "$state" != live ] || break
	/bin/busybox sleep 3
done
read serial <$nvme/serial # the device wrote that into the guest's memory
interrupts=none
while read irq count chip edge queue; do
	[ "$queue" != nvme0q0 ] || [ $count = 0 ] || interrupts=some
done </proc/interrupts
echo "guest function 2 is $state, serial $serial, interrupts $interrupts"
echo guest done
exec /bin/busybox sleep 100000
