package main

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/testenv"
)

//go:embed testdata/gpu-helper-rig.sh
var gpuHelperRig string

// packHelperRig makes an initial ram disk with busybox, VFIO's modules, the
// program, and the host's sudo with all that it loads.
const packHelperRig = `
debian=$1 program=$2
busybox=$debian/usr/bin/busybox; [ -e "$busybox" ] || busybox=$debian/bin/busybox
mkdir root && cd root && mkdir -p bin dev proc sys run root var/lib usr/bin usr/lib usr/lib64 && ln -s usr/lib usr/lib64 .
cp "$busybox" bin/busybox && cp "$debian"/*.ko . && cp "$program" usr/bin/agentvm && mv ../init .
sudo=$(readlink -f "$(command -v sudo)")
plugins=$(find /usr/libexec/sudo /usr/lib/sudo -name '*.so*' 2>/dev/null || :)
permit=$(find /usr/lib /lib -path '*/security/pam_permit.so' 2>/dev/null | head -n 1)
for file in "$sudo" $plugins "$permit" $(ldd "$sudo" $plugins "$permit" 2>/dev/null | grep -o '/[^ ]*\.so[^ ):]*'); do
	[ -e ".$file" ] || { mkdir -p ".${file%/*}" && cp -L "$file" ".$file"; }
done
[ "$sudo" = /usr/bin/sudo ] || ln -s "$sudo" usr/bin/sudo
chmod -R go-w . && chmod 4755 ".$sudo"
find . | ./bin/busybox cpio -o -H newc -R 0:0 >../initrd`

// TestGPUHelperRig: on a real kernel, ordinary users take a card through the
// real sudo, or are refused.
func TestGPUHelperRig(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	testenv.RequireQEMU(t)
	testenv.Require(t, "sudo", "ldd")
	program, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	debian := testenv.Debian13(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "init"), []byte(gpuHelperRig), 0o755); err != nil {
		t.Fatal(err)
	}
	pack := exec.Command("sh", "-euc", packHelperRig, "sh", debian, program)
	pack.Dir = dir
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("pack an initrd: %v\n%s", err, out)
	}
	console := bootRig(t, 4*time.Minute, "-m", "1024",
		"-kernel", filepath.Join(debian, "boot/vmlinuz"), "-initrd", filepath.Join(dir, "initrd"), "-append", rigCmdline)
	var said []string
	for line := range strings.Lines(console) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "rig "); ok {
			said = append(said, text)
		}
	}
	const free = "driver virtio-pci, override (null), node of , journals 0"
	const taken = "driver vfio-pci, override vfio-pci, node of 1000, journals 2"
	want := []string{
		"not let by sudo: exit 3", "setup: exit 0", "own arguments: exit 1", "another command: exit 1",
		"bind: exit 0", "bound: " + taken, "open: exit 0", "bob opens: exit 1",
		"bob releases: exit 3", "eve releases: exit 5", "eve recovers: exit 5", "bob pretends: exit 3", "still bound: " + taken,
		"release while open: exit 3", "release: exit 0", "released: " + free,
		"bind under limits: exit 0", "bound under limits: " + taken, "release under limits: exit 0", "released under limits: " + free,
		"for another's process: exit 0", "for a process: exit 0", "bound for a process: " + taken,
		"recover while it lives: exit 0", "recover after it: exit 0", "recovered: " + free,
		"list that all write: exit 5", "program that all replace: exit 3", "end: " + free,
		"log: 600 0, 14 asked, 7 done, 4 refused, 3 failed",
		"helper: group /, caller's 1, state S",
		"killed: " + free, "killed: " + free, "killed: " + free, "killed: " + free, "done",
	}
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("(-want +said)\n%s\nits console:\n%s", diff, console)
	}
}
