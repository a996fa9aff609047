#!/bin/sh
# Makes a Debian 13 guest the plain way: the packages that a tutorial names, with
# everything that they bring and turn on. As root or not; mmdebstrap knows.
#
# usage: stock.sh DIRECTORY   leaves disk.raw, vmlinuz and initrd.img there
set -eu
out=$1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
chmod 777 "$tmp" # the hook may run as a subordinate user
mkdir "$tmp/tree" "$tmp/out"
chmod 777 "$tmp/tree" "$tmp/out"
export tmp

mmdebstrap --quiet --variant=minbase \
	--include=linux-image-cloud-amd64,initramfs-tools,systemd-sysv,udev,dbus,openssh-server,cloud-init,sudo,iproute2,ca-certificates,git,python3,netplan.io,systemd-resolved,e2fsprogs,curl,kmod,procps,iputils-ping \
	--customize-hook='chroot "$1" systemctl -q enable systemd-networkd' \
	--customize-hook='echo "datasource_list: [NoCloud]" >"$1/etc/cloud/cloud.cfg.d/90.cfg"' \
	--customize-hook='echo "LABEL=root / ext4 defaults 0 1" >"$1/etc/fstab"' \
	--customize-hook='cp "$1"/boot/vmlinuz-* "$tmp/out/vmlinuz"; cp "$1"/boot/initrd.img-* "$tmp/out/initrd.img"' \
	--customize-hook='mount --bind "$1" "$tmp/tree"; mke2fs -q -t ext4 -L root -d "$tmp/tree" "$tmp/out/disk.raw" 3G; umount "$tmp/tree"' \
	trixie /dev/null

mkdir -p "$out"
for file in vmlinuz initrd.img disk.raw; do
	cp --sparse=always "$tmp/out/$file" "$out/"
done
