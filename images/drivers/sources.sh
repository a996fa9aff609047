#!/bin/sh
# sources.sh ROOT INPUT: adds the parts of the archive that INPUT/driver-sources
# names ("SUITE COMPONENT...") to the tree ROOT's own archive, for a driver's
# packages, and keeps DKMS from building modules when they are installed: that
# would be for the host's kernel. An mmdebstrap customize hook.
set -eu
root=$1 input=$2
list=$root/etc/apt/sources.list.d/driver.list
archive=$(sed -n 's/^deb \(\[[^]]*] \)\{0,1\}\([^ ]*\) .*/\2/p' "$root/etc/apt/sources.list" | head -n 1)
[ -n "$archive" ] || { echo 'E: the image names no archive'; exit 1; }
while read -r suite components; do
	echo "deb $archive $suite $components"
done <"$input/driver-sources" >"$list"
mkdir -p "$root/etc/dkms"
touch "$root/etc/dkms/no-autoinstall"
echo 'PHASE: read the package lists of the driver'
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get update
