#!/bin/busybox sh
# The init of a machine that has a part of a card: says what its kernel makes of it.
echo # the firmware's last line has no end
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for function in /sys/bus/pci/devices/0000:0[1-9]:*; do
	cd -P $function
	read vendor <vendor
	read device <device
	read class <class
	driver=none
	[ ! -e driver ] || { cd -P driver && driver=${PWD##*/}; }
	echo "guest function: ${vendor#0x}:${device#0x}, class $class, driver $driver"
done
node=none
[ ! -c /dev/dri/card0 ] || node=card0
echo "guest face: $node"
echo guest done
exec /bin/busybox sleep 100000
