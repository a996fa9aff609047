package testenv

import (
	"crypto/sha256"
	_ "embed"
	"fmt"
	"path/filepath"
	"testing"
)

// rigConfig is all that the kernel has, beyond what nothing runs without.
//
//go:embed rigkernel.config
var rigConfig string

// buildKernel builds the source that Debian has for its kernel. What its
// configuration asks for and does not get would be missed only when it runs.
const buildKernel = aptTrixie + `source=$(apt-cache "$@" depends linux-source | sed -n 's/^ *Depends: \(linux-source-[^ ]*\).*/\1/p' | head -n 1)
cd apt/cache/archives
apt-get "$@" download "$source"
cd ../../..
dpkg-deb -x apt/cache/archives/*.deb unpacked
rm -rf apt
tar -xf unpacked/usr/src/$source.tar.xz --exclude='*/drivers/gpu/drm/amd/*.[ch]' --exclude='*/tools/testing/*'
rm -rf unpacked
cat >config <<'END'
` + "%s" + `END
KCONFIG_ALLCONFIG="$PWD/config" make -s -C "$source" allnoconfig
grep '=y$' config | while read -r option; do grep -qx "$option" "$source/.config" || { echo "lost $option"; exit 1; }; done
make -s -C "$source" -j "$(nproc)" vmlinux
mv "$source/vmlinux" vmlinux
rm -rf "$source"
touch complete
`

// RigKernel builds a small kernel that has what Debian's have not, IOMMUFD,
// mediated devices and a graphics driver without a module, and returns its file,
// which QEMU starts by its PVH entry.
func RigKernel(t testing.TB) string {
	t.Helper()
	Require(t, "gcc", "make", "flex", "bison", "bc", "perl")
	script := fmt.Sprintf(buildKernel, rigConfig)
	name := fmt.Sprintf("rig-kernel-%x", sha256.Sum256([]byte(script)))[:23]
	return filepath.Join(fromTrixie(t, name, script), "vmlinux")
}

// What a process loads is asked of its own loader, as the host's is not Debian 13's.
const fetchQEMU = aptTrixie + `apt-get "$@" -y --download-only install qemu-system-x86
for deb in apt/cache/archives/*.deb; do dpkg-deb -x "$deb" unpacked; done
libraries=$PWD/unpacked/usr/lib/x86_64-linux-gnu
binary=unpacked/usr/bin/qemu-system-x86_64
mkdir -p root/usr/bin root/usr/share root/usr/lib/x86_64-linux-gnu root/lib64
cp "$binary" root/usr/bin
cp -L unpacked/usr/lib64/ld-linux-x86-64.so.2 root/lib64
unpacked/usr/lib64/ld-linux-x86-64.so.2 --library-path "$libraries" --list "$binary" | sed -n 's/.* => \(\/[^ ]*\).*/\1/p' | while read -r library; do
	cp -L "$library" root/usr/lib/x86_64-linux-gnu
done
mkdir root/usr/share/qemu root/usr/share/seabios
cp unpacked/usr/share/qemu/kvmvapic.bin unpacked/usr/share/qemu/pvh.bin root/usr/share/qemu
cp unpacked/usr/share/seabios/bios-256k.bin root/usr/share/seabios
rm -rf apt unpacked
touch complete
`

// QEMU13 returns a directory with Debian 13's QEMU, and what it loads, in it.
func QEMU13(t testing.TB) string {
	t.Helper()
	return filepath.Join(fromTrixie(t, "trixie-qemu", fetchQEMU), "root")
}
