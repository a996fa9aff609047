package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// rigLibvirt gives the rig a libvirt, and a machine that it runs.
func rigLibvirt(t *testing.T, store instance.Store, tree string) {
	t.Helper()
	testenv.Require(t, "libvirtd")
	innerLibvirt(t, tree)
	rigMachine(t, store, "managed", "3a0b0c0d-89ab-cdef-0123-456789abcdef", 20*time.Minute)
	inst, err := store.Get("managed")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	spec.Backend, spec.URI = config.BackendLibvirt, "qemu:///system"
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
}

// innerLibvirt copies this host's libvirt, what it loads and its own files into
// a tree that has QEMU.
func innerLibvirt(t *testing.T, tree string) {
	t.Helper()
	const script = `
put() { for f; do [ ! -e "$f" ] || { mkdir -p "$tree$(dirname "$f")" && cp -L "$f" "$tree$f"; }; done; }
tree=$1
PATH=$PATH:/usr/sbin
libvirtd=$(command -v libvirtd)
driver=$(echo /usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so)
put "$libvirtd" "$driver" $(ldd "$libvirtd" "$driver" | grep -o '/[^ :]* (' | tr -d '(')
mkdir -p "$tree/usr/share" "$tree/etc/libvirt" "$tree/var/lib/libvirt" "$tree/usr/bin"
cp -a /usr/share/libvirt "$tree/usr/share"
printf 'root:x:0:0::/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/:/bin/sh\n' >"$tree/etc/passwd"
printf 'root:x:0:\nlibvirt-qemu:x:64055:\n' >"$tree/etc/group"
printf 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n' >"$tree/etc/libvirt/libvirtd.conf"
printf 'stdio_handler = "file"\n' >"$tree/etc/libvirt/qemu.conf"`
	if out, err := exec.Command("sh", "-euc", script, "sh", tree).CombinedOutput(); err != nil {
		t.Fatalf("copy libvirt: %v\n%s", err, out)
	}
}

// TestGPULibvirtRig gives the card to a machine that libvirt runs, by the real
// supervisor, libvirtd and QEMU: libvirt lets QEMU lock all memory, and the card
// comes back when the machine is stopped, and when QEMU, the supervisor or libvirtd
// is killed.
func TestGPULibvirtRig(t *testing.T) {
	t.Parallel()
	debian, program := rig(t)
	tree := t.TempDir()
	innerQEMU(t, tree)
	store := instance.Store{Dirs: instance.Dirs{State: filepath.Join(tree, "var/lib/agentvm"), Cache: t.TempDir(), Run: t.TempDir()}}
	rigLibvirt(t, store, tree)
	copyFile(t, program, filepath.Join(tree, "agentvm"))
	copyFile(t, testenv.Vmlinux(t, debian), filepath.Join(tree, "vmlinux"))
	copyFile(t, testenv.Initrd(t, debian, gpuRigGuest, ""), filepath.Join(tree, "guest.initrd"))
	script := strings.ReplaceAll(gpuRig, "$VMUSER", fmt.Sprint(rigUser))
	said, console := runRig(t, debian, testenv.Initrd(t, debian, script, tree), "rig=managed", 20*time.Minute, rigNVMe...)
	const free = "driver virtio-pci, override (null), second , journals 0"
	const taken = "driver vfio-pci, override vfio-pci, second vfio-pci, journals 3"
	want := []string{"in a machine of libvirt's: " + taken, fmt.Sprintf("qemu: user %d, may lock %d", rigUser, rigMemory+1<<30), "locked: all memory"}
	want = append(want, rigGuestSays...)
	want = append(want,
		"stop by libvirt: exit 0", "back from libvirt: "+free,
		"QEMU killed: "+free,
		"recover after libvirt: exit 0", "supervisor killed: "+free,
		"stop without libvirt: exit 0", "libvirtd killed: "+free, "libvirtd is there again: "+free,
		"done")
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("it says (-want +got):\n%s\nits console:\n%s", diff, console)
	}
}
