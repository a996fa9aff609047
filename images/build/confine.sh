#!/bin/sh
# confine.sh ROOT: runs ROOT's /run/build/install.sh as root with nothing of the
# host in reach but the network. The commands come from package scripts and
# profiles, and a chroot holds back no root. So: own process and mount
# namespaces (the caller made them), the host's files unmounted, /proc
# read-only, no /sys, and none of the capabilities that reach the kernel or devices.
set -eu
root=$1

mount --rbind "$root" "$root"
cd "$root"
umount --lazy sys
umount --lazy proc
mount -t proc -o ro,nosuid,nodev,noexec proc proc
mkdir run/host
pivot_root . run/host
exec chroot . /bin/sh -euc '
	umount --lazy /run/host
	rmdir /run/host
	exec setpriv --no-new-privs --inh-caps=-all \
		--bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setfcap \
		env -i /bin/sh /run/build/install.sh'
