set -eu
umask 022
cd /
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run/build/home LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive
mkdir -p "$HOME"
echo 'PHASE: run command 1 of 2'
sh -c 'set -eu
dpkg --purge $(dpkg-query --show --showformat '\''${Package}\n'\'' '\''linux-image-*cloud-amd64'\'')
rm -rf /lib/modules/*cloud-amd64
[ "$(ls /lib/modules | wc -l)" = 1 ] || { echo "E: there is not one kernel: $(ls /lib/modules)"; exit 1; }
depmod "$(ls /lib/modules)"' || { echo "E: run command 1 failed with status $?"; exit 1; }
echo 'PHASE: run command 2 of 2'
sh -c 'rm -f /etc/dkms/no-autoinstall
release=$(ls /lib/modules)
modinfo -k "$release" i915 >/dev/null || { echo "E: the module i915 is not there"; exit 1; }
modinfo -k "$release" xe >/dev/null || { echo "E: the module xe is not there"; exit 1; }' || { echo "E: run command 2 failed with status $?"; exit 1; }
