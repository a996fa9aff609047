package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// packInitrd makes $4 from busybox and the VFIO modules of Debian13's directory $1, the
// script $2 as init and, below the root, what is in the directory $3.
const packInitrd = `set -eu
busybox=$1/usr/bin/busybox; [ -e "$busybox" ] || busybox=$1/bin/busybox
mkdir -p root/bin root/dev root/proc root/sys root/run root/root root/tmp root/var/lib
cp "$busybox" root/bin/busybox
cp "$1"/*.ko root
[ -z "$3" ] || cp -a "$3"/. root
cp "$2" root/init && chmod 755 root/init
cd root
find . | ./bin/busybox cpio -o -H newc >"$4" 2>/dev/null
`

// Initrd packs an init script, and the files below the directory tree if that
// is not empty, beside busybox into the first file system of a guest that runs
// the kernel of Debian13.
func Initrd(t testing.TB, debian, script, tree string) (file string) {
	t.Helper()
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	file = filepath.Join(dir, "initrd")
	if err := os.WriteFile(init, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", packInitrd, "sh", debian, init, tree, file)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pack an initrd: %v\n%s", err, out)
	}
	return file
}
