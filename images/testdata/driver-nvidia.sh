set -eu
umask 022
cd /
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run/build/home LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive
mkdir -p "$HOME"
echo 'PHASE: run command 1 of 4'
sh -c '! grep -q exclude_bars /usr/src/linux-headers-*-common/include/linux/pci.h || sed -i '\''s/\(pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size\))/\1, 0)/'\'' /usr/src/nvidia-current-open-*/nvidia/nv-pci.c' || { echo "E: run command 1 failed with status $?"; exit 1; }
echo 'PHASE: run command 2 of 4'
sh -c 'set -eu
release=$(ls /lib/modules)
source=$(echo /usr/src/nvidia-current-open-[0-9]*)
dkms install nvidia-current-open/"${source##*/nvidia-current-open-}" -k "$release" || {
	cat /var/lib/dkms/nvidia-current-open/*/build/make.log 2>/dev/null | grep -m 5 -A 3 '\''error:'\'' || :
	echo "E: the modules of nvidia-current-open cannot be built for Linux $release"
	exit 1
}
rm -rf /var/lib/dkms/mok.* /var/lib/dkms/nvidia-current-open/*/build
depmod "$release"' || { echo "E: run command 2 failed with status $?"; exit 1; }
echo 'PHASE: run command 3 of 4'
sh -c 'rm -f /etc/dkms/no-autoinstall
release=$(ls /lib/modules)
modinfo -k "$release" nvidia-current-open >/dev/null || { echo "E: the module nvidia-current-open is not there"; exit 1; }
modinfo -k "$release" nvidia-current-open-uvm >/dev/null || { echo "E: the module nvidia-current-open-uvm is not there"; exit 1; }' || { echo "E: run command 3 failed with status $?"; exit 1; }
echo 'PHASE: run command 4 of 4'
sh -c 'systemctl enable nvidia-persistenced.service' || { echo "E: run command 4 failed with status $?"; exit 1; }
