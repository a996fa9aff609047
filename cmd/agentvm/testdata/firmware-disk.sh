#!/bin/sh
# firmware-disk.sh OUT ROOT: makes OUT/disk.raw of the Debian tree ROOT: a disk
# that BIOS and UEFI both start, by GRUB. An mmdebstrap customize hook, for a
# mount namespace of its own; the tools are the tree's.
set -eu
out=$1 root=$2
[ "$(readlink -f "$root")" != / ]
mount --bind "$out" "$root/mnt"
trap 'umount "$root/mnt"' EXIT
chroot "$root" sh -eu <<'INSIDE'
cd /mnt
mib=1048576 esp=2 system=18 size=1536 # where partitions begin and the disk ends, MiB
work=$(mktemp -d)

# GRUB needs no files but itself: the commands are in it.
cat >"$work/grub.cfg" <<CONFIG
search.fs_label root root
linux /vmlinuz root=LABEL=root rw console=ttyS0
initrd /initrd.img
boot
CONFIG
image() { # image FORMAT MODULE...
	format=$1
	shift
	grub-mkimage -O "$format" -c "$work/grub.cfg" -p / -o "$work/$format" "$@" part_gpt ext2 search_label linux boot
}
image i386-pc biosdisk
image x86_64-efi

truncate -s ${size}M disk.raw
sfdisk -q disk.raw <<TABLE
label: gpt
start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649
start=${esp}MiB, size=16MiB, type=uefi
start=${system}MiB, type=linux
TABLE

# BIOS: the boot sector loads the first sector of GRUB, which loads the rest.
# Each has the place of the next in it, put there as grub-bios-setup does:
# https://git.savannah.gnu.org/cgit/grub.git/tree/include/grub/i386/pc/boot.h
put() { dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
head -c 440 /usr/lib/grub/i386-pc/boot.img | put disk.raw 0
printf '\000\010\000\000\000\000\000\000' | put disk.raw 92            # sector 2048
printf '\001\010\000\000\000\000\000\000' | put "$work/i386-pc" 500    # sector 2049
dd if="$work/i386-pc" of=disk.raw bs=$mib seek=1 conv=notrunc status=none

# UEFI starts this file where it knows of no other.
truncate -s 16M "$work/esp"
mkfs.vfat "$work/esp" >/dev/null
mmd -i "$work/esp" ::/EFI ::/EFI/BOOT
mcopy -i "$work/esp" "$work/x86_64-efi" ::/EFI/BOOT/BOOTX64.EFI
dd if="$work/esp" of=disk.raw bs=$mib seek=$esp conv=notrunc status=none
rm -r "$work"

# The tree without what is mounted in it. GRUB does not know every feature.
rm -f /etc/hostname
: >/etc/machine-id
mount --bind / /media
mke2fs -q -t ext4 -L root -d /media -O ^metadata_csum_seed,^orphan_file -E offset=$((system * mib)) \
	disk.raw $((size - system - 1))M
umount /media
INSIDE
