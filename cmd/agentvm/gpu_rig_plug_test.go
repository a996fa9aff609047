package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestGPUPlugRig lets a machine go on from what was saved outside of the rig,
// before it had a card: the real supervisor plugs the card into it, the kernel
// that has been running all along drives it, and it comes back.
func TestGPUPlugRig(t *testing.T) {
	t.Parallel()
	debian, program := rig(t)
	tree := t.TempDir()
	innerQEMU(t, tree)
	store := instance.Store{Dirs: instance.Dirs{State: filepath.Join(tree, "var/lib/agentvm"), Cache: t.TempDir(), Run: t.TempDir()}}
	const id = "2a0b0c0d-89ab-cdef-0123-456789abcdef"
	rigMachine(t, store, "restored", id, 20*time.Minute)
	inst, err := store.Get("restored")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	spec.RestoreTimeout = 20 * time.Minute
	m := &spec.Machine
	m.HugePages, m.Saved, m.Line = 0, "/saved", filepath.Join(filepath.Dir(m.QMP), "line.sock")
	m.Slots, _ = m.SlotsForLater()
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(inst.Path(instance.CallFile), []byte(`{"function":"clone","data":{}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	copyFile(t, program, filepath.Join(tree, "agentvm"))
	boot := vm.Boot{Kernel: testenv.Vmlinux(t, debian), Initrd: testenv.Initrd(t, debian, gpuRigGuest, ""), Cmdline: m.Boot.Cmdline}
	copyFile(t, boot.Kernel, filepath.Join(tree, "vmlinux"))
	copyFile(t, boot.Initrd, filepath.Join(tree, "guest.initrd"))
	saveWaiting(t, *m, boot, filepath.Join(tree, "saved"))

	script := strings.ReplaceAll(gpuRig, "$VMUSER", fmt.Sprint(rigUser))
	said, console := runRig(t, debian, testenv.Initrd(t, debian, script, tree), "rig=plug", 20*time.Minute, rigNVMe...)
	const free = "driver virtio-pci, override (null), second , journals 0"
	want := append(slices.Clone(rigGuestSays),
		"in a machine: driver vfio-pci, override vfio-pci, second vfio-pci, journals 3",
		fmt.Sprintf("qemu: user %d, may lock %d", rigUser, rigMemory+1<<30), "locked: all memory",
		"stop: exit 0", "stopped: "+free, "done")
	if diff := cmp.Diff(want, said); diff != "" {
		t.Fatalf("it says (-want +got):\n%s\nits console:\n%s", diff, console)
	}
}

// saveWaiting boots the machine without anything in its slots until its guest
// waits for it, and saves it in dir.
func saveWaiting(t *testing.T, m vm.Machine, boot vm.Boot, dir string) {
	t.Helper()
	run, err := os.MkdirTemp("", "rig") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	path := func(name string) string { return filepath.Join(run, name) }
	_, m.Slots = m.SlotsForLater()
	m.Boot, m.Saved, m.RunAs = boot, "", nil
	m.Console, m.QMP, m.Line = path("console"), path("qmp"), path("line")
	m.NICs[0].Socket = path("net")
	network, err := net.Listen("unix", m.NICs[0].Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer network.Close()
	caps, err := probeQEMU(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	memory, err := newMemory(&m)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	argv, err := qemu.Argv(m, caps)
	if err != nil {
		t.Fatal(err)
	}
	process, err := qemu.Start(t.Context(), argv, qemu.Options{ExtraFiles: []*os.File{memory}})
	if err != nil {
		t.Fatal(err)
	}
	defer process.Kill()
	monitor, err := process.Connect(t.Context(), m.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Close()
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		console, err := os.ReadFile(m.Console)
		if err != nil || time.Since(began) > 4*time.Minute {
			t.Fatalf("the guest does not wait: %v\n%s", err, console)
		}
		if bytes.Contains(console, []byte("guest waits")) {
			break
		}
	}
	state, err := qemu.Save(t.Context(), monitor, path("state"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := saved.Write(dir, memory, bytes.NewReader(state)); err != nil {
		t.Fatal(err)
	}
}
