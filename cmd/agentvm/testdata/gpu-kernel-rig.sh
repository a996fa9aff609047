#!/bin/busybox sh
# What gpu-rig.sh runs besides, on a kernel that has what Debian's has not:
# /dev/iommu, mediated devices and a graphics driver.

opened() { # opened: by which nodes QEMU has the card
	for fd in /proc/$qemu/fd/*; do readlink $fd; done | sed -n 's/\(vfio\/\)[0-9][0-9]*$/\1GROUP/; s/^\/dev\/\(iommu\|vfio\/.*\)/rig opened: \1/p' | sort
	# What is locked by /dev/iommu is not counted as VmLck.
	pinned=$(sed -n 's/^VmPin:[^0-9]*\([0-9]*\) kB/\1/p' /proc/$qemu/status)
	[ "$pinned" -ge 196608 ] && echo "rig pinned: all memory" || echo "rig pinned: $pinned kB"
}
may() { # may WHEN: whether QEMU may open /dev/iommu, as its user
	echo "rig $1, /dev/iommu: $(/iommufd /run $VMUSER)"
}

lend() { # lends /dev/iommu, as the udev rule of docs/gpu.md does
	may "as the kernel makes it"
	chown 0:36 /dev/iommu
	chmod 660 /dev/iommu
	may "with a group"
}

iommufd() {
	begin long
	is "in a machine"
	opened
	for node in /dev/vfio/devices/*; do echo "rig node: $(stat -c 'of user %u, mode %a' $node)"; done
	meet long
	does "release under a machine" gpu release $card
	is "still in a machine"
	kill -9 $life
	wait $life
	while kill -0 $qemu; do sleep 0.1; done # whose guard has seen it
	does recover gpu recover
	is "supervisor killed"
	begin long
	is "in a machine again"
	does stop stop --force long
	is stopped
}

part=$PART
types=/sys/class/mbochs/mbochs/mdev_supported_types
make_part() { echo $part >$types/mbochs-small/create; }
part_is() { # part_is WHAT: whose its nodes are
	nodes=/dev/vfio/$(readlink /sys/bus/mdev/devices/$part/iommu_group | grep -o '[^/]*$')
	for node in /sys/bus/mdev/devices/$part/vfio-dev/*; do nodes="$nodes /dev/vfio/devices/${node##*/}"; done
	echo "rig part $1: nodes of $(stat -c %u $nodes | tr '\n' ' ')journals $(ls $journals 2>/dev/null | wc -l)"
}
mediated() {
	does "no part" gpu check $part
	make_part
	/agentvm gpu ls | grep $part | sed 's/  */ /g; s/ [0-9]* - -$/ GROUP - -/; s/^/rig part listed: /'
	does "check part" gpu check $part
	does "bind part" gpu bind $part
	part_is bound
	does "bind part again" gpu bind $part
	group=$(readlink /sys/bus/mdev/devices/$part/iommu_group | grep -o '[^/]*$')
	sh -c "exec 3<>/dev/vfio/$group; sleep 1000" &
	sleep 1
	does "release held part" gpu release $part
	kill $!
	wait $!
	does "release part" gpu release $part
	part_is released
	/agentvm gpu bind $part &
	while kill -0 $! && [ "$(ls $journals)" = "" ]; do :; done
	kill -9 $!
	wait $!
	does "recover part" gpu recover
	/agentvm gpu release $part # where the killed one had just finished
	part_is recovered

	for name in parted grouped; do
		begin $name
		part_is "in a machine"
		opened
		meet $name
		does "stop" stop --force $name
		part_is stopped
	done

	does "bind part" gpu bind $part
	echo 1 >/sys/bus/mdev/devices/$part/remove
	make_part
	/agentvm gpu release $part 2>&1 | sed 's/^/rig release: /'
	part_is "made anew"
	does "bind part" gpu bind $part
	echo 1 >/sys/bus/mdev/devices/$part/remove
	/agentvm gpu release $part 2>&1 | sed 's/^/rig release: /'
	echo "rig removed: journals $(ls $journals | wc -l)"
}

screen=0000:02:00.0
screen_is() {
	echo "rig screen $1: driver $(driver $screen), nodes $(ls /dev/dri 2>/dev/null | grep card | wc -l), journals $(ls $journals 2>/dev/null | wc -l)"
}
native() {
	screen_is first
	sh -c "exec 3<>/dev/dri/card0; exec sleep 1000" &
	holder=$!
	sleep 1
	/agentvm gpu check $screen | sed -n "s/^  problem  \(.*\)process $holder,/rig screen held: \1process N,/p"
	does "check held" gpu check $screen
	does "bind held" gpu bind $screen
	screen_is "in use"
	kill $holder
	wait $holder
	does "check free" gpu check $screen
	does "bind free" gpu bind $screen
	screen_is taken
	does "release" gpu release $screen
	screen_is "given back"

	sh -c "exec 3<>/dev/dri/card0; exec sleep 1000" &
	holder=$!
	sleep 1
	does "bind by force" gpu bind --force $screen
	screen_is "taken by force"
	does "release" gpu release $screen
	kill $holder
	wait $holder
	screen_is "given back"
}

kernel() {
	native
	lend
	iommufd
	mediated
}
