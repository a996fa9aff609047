#!/bin/sh
# initrd.sh ROOT OUT: writes the initial ram disk for the tree ROOT: a static
# busybox, the kernel modules that a boot needs, and a short /init. Runs outside
# the tree, as root or as root of a user namespace. It makes no device node: the
# kernel's own built-in initramfs brings /dev/console.
set -eu
root=$1 out=$2

set -- "$root"/lib/modules/*
release=${1##*/}
work=$(mktemp -d "$root/tmp/initrd.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/dev" "$work/sys" "$work/root" "$work/modules"
cp "$root/bin/busybox" "$work/bin/busybox"
ln -s busybox "$work/bin/sh"

# modprobe prints dependencies first, in the order in which they must be
# inserted, and "builtin" for what the kernel already has.
n=10
chroot "$root" modprobe --set-version "$release" --show-depends --all \
	virtio_pci virtio_blk virtio_net virtio_rng virtiofs ext4 isofs button evdev |
	awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
	while read -r module; do
		name=${module##*/}
		case $name in
		*.xz) xz -dc "$root$module" >"$work/modules/$n-${name%.xz}" ;;
		*.zst) zstd -qdc "$root$module" >"$work/modules/$n-${name%.zst}" ;;
		*) cp "$root$module" "$work/modules/$n-$name" ;;
		esac
		n=$((n + 1))
	done

cat >"$work/init" <<'EOF'
#!/bin/sh
# Mounts the disk whose virtio serial is "root" and hands over to its init. The
# disk "seed" goes where cloud-init looks for local data; its secrets are root's.
export PATH=/bin
busybox mount -t devtmpfs dev /dev
busybox mount -t sysfs sys /sys
for module in /modules/*; do busybox insmod "$module"; done

die() {
	echo "initrd: $1" >/dev/console
	busybox poweroff -f
}

find_disk() { # find_disk SERIAL: sets disk
	for dir in /sys/block/vd*; do
		serial=
		[ ! -f "$dir/serial" ] || read -r serial <"$dir/serial" || :
		[ "$serial" != "$1" ] || { disk=/dev/${dir##*/} && return; }
	done
	return 1
}

tries=0
until find_disk root; do
	tries=$((tries + 1))
	[ $tries -lt 100 ] || die 'no disk with serial "root"'
	busybox sleep 0.05
done
busybox mount -t ext4 -o noatime $disk /root || die "cannot mount $disk"
if find_disk seed; then
	busybox mount -t iso9660 -o ro,nosuid,nodev,noexec,mode=0400,dmode=0500,overriderockperm \
		$disk /root/var/lib/cloud/seed/nocloud || die "cannot mount $disk"
fi
busybox mount --move /dev /root/dev
busybox mount --move /sys /root/sys
exec busybox switch_root /root /sbin/init
EOF
chmod 755 "$work/init"
find "$work" -exec touch -h -d @0 {} +
chroot "$root" sh -c 'cd "$1" && find . | LC_ALL=C sort | busybox cpio -o -H newc -R 0:0 2>/dev/null' \
	sh "${work#"$root"}" >"$out"
