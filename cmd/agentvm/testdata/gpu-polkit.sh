# gpu-polkit.sh PROGRAM: in namespaces of its own, with a message bus and a polkitd
# of its own, ordinary users take a card and a part of one by the real
# pkexec. The host's /sys is a made-up one, whose card is on vfio-pci already, so
# that nothing has to be bound. What starts with "rig " is for the test.
set -eu
program=$1 made='' # the directory that was made on the host to mount on
umask 022
exec </dev/null

# What is written goes to memory: the namespace ends with this script.
dev=$(mktemp -d)
mount -t tmpfs dev "$dev"
for node in null zero urandom random; do : >"$dev/$node" && mount --bind "/dev/$node" "$dev/$node"; done
ln -s /proc/self/fd "$dev/fd" && ln -s /proc/self/fd/0 "$dev/stdin"
mount --move "$dev" /dev && rmdir "$dev"
[ -d /etc/agentvm ] || { mkdir /etc/agentvm && made=/etc/agentvm; }
actions=/usr/share/polkit-1/actions
theirs=$(mktemp -d)
mount --bind $actions "$theirs"
for dir in /run /sys /opt /var/lib /var/log /etc/agentvm $actions; do mount -t tmpfs -o mode=755 rig "$dir"; done
mkdir /run/dbus
cp "$theirs"/org.freedesktop.policykit.policy $actions && umount "$theirs" && rmdir "$theirs"
! sudo=$(command -v sudo) || mount --bind /dev/null "$sudo"
cp "$program" /opt/agentvm
[ -z "$made" ] || trap 'umount $made && rmdir $made' EXIT

# A card on vfio-pci, and one that is divided.
card=0000:01:00.0 divided=0000:02:00.0 part=c2177883-f1bb-47f0-914d-32a22e3a8804
function() { # function ADDRESS DEVICE OVERRIDE
	dir=/sys/bus/pci/devices/$1
	mkdir -p "$dir"
	echo 0x10de >"$dir/vendor" && echo "0x$2" >"$dir/device" && echo 0x030200 >"$dir/class" && echo "$3" >"$dir/driver_override"
	: >"$dir/resource" && printf '\336\020\060\043' >"$dir/config" && echo flr >"$dir/reset_method"
}
function $card 2330 vfio-pci
function $divided 1eb8 '(null)'
mkdir -p /sys/bus/pci/drivers/vfio-pci /sys/kernel/iommu_groups/1/devices/$card /sys/bus/pci/devices/$card/vfio-dev/vfio0 \
	/sys/bus/pci/devices/$divided/$part/vfio-dev/vfio7 /sys/bus/mdev/devices /dev/vfio/devices
ln -s ../../drivers/vfio-pci /sys/bus/pci/devices/$card/driver
ln -s ../../../kernel/iommu_groups/1 /sys/bus/pci/devices/$card/iommu_group
ln -s ../../pci/devices/$divided/$part /sys/bus/mdev/devices/$part
ln -s x/nvidia-vgpu-vfio /sys/bus/mdev/devices/$part/driver
ln -s x/77 /sys/bus/mdev/devices/$part/iommu_group
: >/dev/vfio/devices/vfio0 && : >/dev/vfio/devices/vfio7

# They end with the namespace.
dbus-daemon --system --nofork --nopidfile &
patiently() { # patiently COMMAND...: until it succeeds, for a minute
	n=0
	until "$@" >/dev/null 2>&1; do
		n=$((n + 1))
		[ $n -lt 300 ] || { echo "rig never: $*"; exit 1; }
		sleep 0.2
	done
}
patiently test -S /run/dbus/system_bus_socket
/usr/lib/polkit-1/polkitd --no-debug &
polkit_is_there() {
	dbus-send --system --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.NameHasOwner string:org.freedesktop.PolicyKit1 | grep -q true
}
patiently polkit_is_there

as() { # as USER NAME COMMAND...: the exit code of what USER does
	user=$1 name=$2 code=0
	shift 2
	# pkexec serves no child of process 1, which this script is.
	# shellcheck disable=SC2016 # the inner shell's
	setpriv --reuid "$user" --regid nogroup --clear-groups env -i PATH=/opt:/usr/bin:/bin sh -c '"$@"; exit $?' sh "$@" 2>&1 || code=$?
	echo "rig $name: exit $code"
}
is() { # is NAME: whose the nodes are
	echo "rig $1: card of $(stat -c %U /dev/vfio/devices/vfio0), part of $(stat -c %U /dev/vfio/devices/vfio7), journals $(find /var/lib/agentvm/gpu -name '*.json' 2>/dev/null | wc -l)"
}
as nobody "not let by polkit" agentvm gpu bind $card
setpriv --reuid nobody --regid nogroup --clear-groups env -i PATH=/opt:/usr/bin:/bin agentvm gpu helper-setup $card $part >/run/setup.sh
sh -eu /run/setup.sh
echo "rig setup: exit $?"
action_is_there() { pkaction --action-id org.agentvm.gpu-helper; }
patiently action_is_there
as nobody "own arguments" pkexec /opt/agentvm gpu-helper --force
as nobody "another command" pkexec /opt/agentvm gpu bind $card
as nobody bind agentvm gpu bind $card $part
is bound
as daemon "another's" agentvm gpu release $card
as nobody "release the part" agentvm gpu release $part
as nobody "release" agentvm gpu release $card
is released
as nobody "another card" agentvm gpu bind $divided
is end
of() { grep -c '"user":"'"$1"'","via":"pkexec"' /var/log/agentvm/gpu.jsonl; }
echo "rig log: $(of nobody) of nobody, $(of daemon) of daemon"
