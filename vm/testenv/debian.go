package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// CacheDir is where tests keep what is dear to make or to fetch: AGENTVM_TEST_CACHE,
// or a directory of the user's own; root's is one that others can pass through.
func CacheDir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("AGENTVM_TEST_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if os.Getuid() == 0 {
			base, err = "/var/cache", nil
		}
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(base, "agentvm-test")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// aptTrixie begins a script that fills its directory $1 from packages of Debian
// 13, by an apt whose state is its own, so that the host's is left alone.
const aptTrixie = `set -eu
cd "$1"; shift
mkdir -p apt/lists/partial apt/cache/archives/partial apt/parts
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" > apt/sources.list
: > apt/status
set -- -q -o Dir::Etc::sourcelist="$PWD/apt/sources.list" -o Dir::Etc::sourceparts="$PWD/apt/parts" \
  -o Dir::Etc::preferencesparts="$PWD/apt/parts" -o Dir::State="$PWD/apt" -o Dir::State::lists="$PWD/apt/lists" \
  -o Dir::Cache="$PWD/apt/cache" -o Dir::State::status="$PWD/apt/status" -o Debug::NoLocking=1 \
  -o APT::Sandbox::User= -o APT::Install-Recommends=0
apt-get "$@" update
`

const fetchTrixie = aptTrixie + `apt-get "$@" -y --download-only install virtiofsd
kernel=$(apt-cache "$@" depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
cd apt/cache/archives
apt-get "$@" download "$kernel" busybox-static
cd ../../..
for deb in apt/cache/archives/*.deb; do dpkg-deb -x "$deb" root; done
mv root/boot/vmlinuz-* root/boot/vmlinuz
for module in irqbypass vfio vfio_iommu_type1 vfio-pci-core vfio-pci; do
	file=$(find root -name "$module.ko*" | head -n 1)
	case $file in
	*.xz) xz -dc "$file" >"root/$module.ko" ;;
	?*) cp "$file" "root/$module.ko" ;;
	esac
done
rm -rf apt root/lib/modules root/usr/lib/modules
touch complete
`

// Debian13 returns a directory with Debian 13's virtiofsd, cloud kernel, that
// kernel's VFIO modules and static busybox in it.
func Debian13(t testing.TB) string {
	t.Helper()
	return filepath.Join(fromTrixie(t, "trixie-vfio", fetchTrixie), "root")
}

// fromTrixie returns the directory of the cache with that name, which script
// makes out of packages of Debian 13 if it is not there.
func fromTrixie(t testing.TB, name, script string) string {
	t.Helper()
	dir := filepath.Join(CacheDir(t), name)
	if _, err := os.Stat(filepath.Join(dir, "complete")); err == nil {
		return dir
	}
	Require(t, "apt-get", "apt-cache", "dpkg-deb", "xz")
	tmp, err := os.MkdirTemp(CacheDir(t), "trixie-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	if out, err := exec.Command("sh", "-c", script, "sh", tmp).CombinedOutput(); err != nil {
		Unavailable(t, "cannot make %s out of packages of Debian 13: %v\n%s", name, err, out)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, dir); err != nil && !os.IsExist(err) { // another test run may have been faster
		t.Fatal(err)
	}
	return dir
}
