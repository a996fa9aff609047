//go:build rigkernel

package main

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

//go:embed testdata/gpu-kernel-rig.sh
var gpuKernelRig string

//go:embed testdata/gpu-kernel-rig-guest.sh
var gpuKernelRigGuest string

const rigPart = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001" // a mediated device

// rigSpec changes what rigMachine has made.
func rigSpec(t *testing.T, store instance.Store, name string, change func(*vm.Machine)) {
	t.Helper()
	inst, err := store.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	change(&spec.Machine)
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
}

// TestGPUKernelRig tries what Debian's kernels have not, with a kernel that is
// built for it and Debian 13's QEMU: a graphics driver whose node somebody has
// open, a card that QEMU opens through /dev/iommu, and mediated devices, of the
// kernel's sample driver, which a graphics driver in the machine takes. The kernel
// takes minutes to build: make test-gpu-kernel.
func TestGPUKernelRig(t *testing.T) {
	t.Parallel()
	debian, program := rig(t)
	kernel := testenv.RigKernel(t)
	tree := t.TempDir()
	rigKernelTree(t, tree, debian, program, kernel)
	script := strings.ReplaceAll(gpuRig, "$VMUSER", fmt.Sprint(rigUser))
	console := bootRig(t, 20*time.Minute, append([]string{"-m", "2048", "-kernel", kernel, "-initrd", testenv.Initrd(t, debian, script, tree),
		"-append", rigCmdline + " rig=kernel", "-device", "pcie-root-port,id=rp1,chassis=2", "-device", "bochs-display,bus=rp1"}, rigNVMe...)...)
	if diff := cmp.Diff(rigKernelSays(), rigSaid(console)); diff != "" {
		t.Fatalf("it says (-want +got):\n%s\nits console:\n%s", diff, console)
	}
}

// rigKernelTree fills a tree with what TestGPUKernelRig boots, and its machines:
// one that has the card, and two that have a mediated device, by /dev/iommu and
// by its group.
func rigKernelTree(t *testing.T, tree, debian, program, kernel string) {
	t.Helper()
	store := instance.Store{Dirs: instance.Dirs{State: filepath.Join(tree, "var/lib/agentvm"), Cache: t.TempDir(), Run: t.TempDir()}}
	rigMachine(t, store, "long", "4a0b0c0d-89ab-cdef-0123-456789abcdef", 20*time.Minute)
	rigSpec(t, store, "long", func(m *vm.Machine) { m.IOMMUFD, m.HugePages = true, 0 })
	for name, id := range map[string]string{"parted": "5a0b0c0d-89ab-cdef-0123-456789abcdef", "grouped": "6a0b0c0d-89ab-cdef-0123-456789abcdef"} {
		rigMachine(t, store, name, id, 20*time.Minute)
		rigSpec(t, store, name, func(m *vm.Machine) {
			m.IOMMUFD, m.HugePages, m.Boot.Initrd = name == "parted", 0, "/parted.initrd"
			m.Slots = []vm.Slot{{Functions: []vm.Function{{Mediated: rigPart, HideROM: true}}}}
		})
	}
	if out, err := exec.Command("cp", "-a", testenv.QEMU13(t)+"/.", tree).CombinedOutput(); err != nil {
		t.Fatalf("copy QEMU: %v\n%s", err, out)
	}
	copyFile(t, program, filepath.Join(tree, "agentvm"))
	rigProgram(t, tree, "iommufd")
	copyFile(t, kernel, filepath.Join(tree, "vmlinux"))
	copyFile(t, testenv.Initrd(t, debian, gpuRigGuest, ""), filepath.Join(tree, "guest.initrd"))
	copyFile(t, testenv.Initrd(t, debian, gpuKernelRigGuest, ""), filepath.Join(tree, "parted.initrd"))
	more := strings.NewReplacer("$VMUSER", fmt.Sprint(rigUser), "$PART", rigPart).Replace(gpuKernelRig)
	if err := os.WriteFile(filepath.Join(tree, "more.sh"), []byte(more), 0o644); err != nil {
		t.Fatal(err)
	}
}

// rigKernelSays is what TestGPUKernelRig has to say.
func rigKernelSays() []string {
	const (
		host  = "driver bochs-drm, nodes 1, journals 0"
		guest = "driver vfio-pci, nodes 0, journals 1"
		free  = "driver virtio-pci, override (null), second , journals 0"
		taken = "driver vfio-pci, override vfio-pci, second vfio-pci, journals 3"
		ours  = "nodes of 0 0 journals "
	)
	says := []string{
		"screen first: " + host,
		"screen held: it is in use by sleep (process N, /dev/dri/card0)",
		"check held: exit 3", "bind held: exit 3", "screen in use: " + host,
		"check free: exit 0", "bind free: exit 0", "screen taken: " + guest,
		"release: exit 0", "screen given back: " + host,
		"bind by force: exit 0", "screen taken by force: " + guest,
		"release: exit 0", "screen given back: " + host,

		"as the kernel makes it, /dev/iommu: false", "with a group, /dev/iommu: true",
		"in a machine: " + taken,
		"opened: iommu", "opened: vfio/devices/vfio0", "opened: vfio/devices/vfio1", "opened: vfio/devices/vfio2", "pinned: all memory",
	}
	for range 3 {
		says = append(says, fmt.Sprintf("node: of user %d, mode 600", rigUser))
	}
	says = append(says, rigGuestSays...)
	says = append(says,
		"release under a machine: exit 3", "still in a machine: "+taken,
		"recover: exit 0", "supervisor killed: "+free,
		"in a machine again: "+taken, "stop: exit 0", "stopped: "+free,

		"no part: exit 4", "part listed: "+rigPart+" - mbochs-small mbochs GROUP - -", "check part: exit 0",
		"bind part: exit 0", "part bound: "+ours+"1", "bind part again: exit 3",
		"release held part: exit 3", "release part: exit 0", "part released: "+ours+"0",
		"recover part: exit 0", "part recovered: "+ours+"0")
	for _, opened := range [][]string{{"opened: iommu", "opened: vfio/devices/vfio0"}, {"opened: vfio/GROUP", "opened: vfio/vfio"}} {
		says = append(says, fmt.Sprintf("part in a machine: nodes of %d %[1]d journals 1", rigUser))
		says = append(says, opened...)
		// Its driver reaches the machine's memory itself, and need not lock it.
		says = append(says, "pinned: 0 kB", "guest function: 1234:1111, class 0x038000, driver bochs-drm", "guest face: card0", "guest done",
			"stop: exit 0", "part stopped: "+ours+"0")
	}
	return append(says, "bind part: exit 0", "release: agentvm: "+rigPart+": it is the host's again", "part made anew: "+ours+"0",
		"bind part: exit 0", "release: agentvm: "+rigPart+": the mediated device is gone, and its nodes with it", "removed: journals 0",
		"done")
}
