#!/bin/sh
# layer.sh ROOT INPUT: bakes Debian packages and the commands of
# INPUT/install.sh into the tree ROOT. An mmdebstrap customize hook: runs outside
# the tree, as root or as root of a user namespace, with apt's lists fresh.
set -eu
root=$1 input=$2

# apt runs outside, so that the host's proxies, certificates and names serve;
# dpkg runs inside. mmdebstrap installs in the same way.
if [ -s "$input/packages" ]; then
	echo 'PHASE: install packages'
	APT_CONFIG=$MMDEBSTRAP_APT_CONFIG TMPDIR=$root/tmp xargs -a "$input/packages" \
		apt-get --yes -o Dir::Bin::dpkg=env -o DPkg::Options::=--unset=TMPDIR \
		-o DPkg::Options::=dpkg -o DPkg::Chroot-Directory="$root" install --
fi

if [ -s "$input/install.sh" ]; then
	# The input is seen inside as /run/build, and the host's resolv.conf stands in
	# for the guest's as long as commands run there.
	mkdir "$root/run/build"
	mount --bind "$input" "$root/run/build"
	[ ! -e "$root/etc/resolv.conf" ] && [ ! -L "$root/etc/resolv.conf" ] ||
		mv "$root/etc/resolv.conf" "$root/etc/resolv.conf.guest"
	cp "$input/resolv.conf" "$root/etc/resolv.conf"

	unshare --mount --pid --fork --kill-child -- "$input/build/confine.sh" "$root"

	rm "$root/etc/resolv.conf"
	[ ! -e "$root/etc/resolv.conf.guest" ] && [ ! -L "$root/etc/resolv.conf.guest" ] ||
		mv "$root/etc/resolv.conf.guest" "$root/etc/resolv.conf"
	umount "$root/run/build"
	rmdir "$root/run/build"
fi

# /usr has changed; without this the next boot takes it for an upgrade and runs
# every service with ConditionNeedsUpdate (systemd.unit(5)).
for dir in etc var; do
	[ ! -e "$root/$dir/.updated" ] || touch "$root/$dir/.updated"
done
