package main

import (
	"context"
	_ "embed"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/testenv"
)

//go:embed testdata/gpu-rig.sh
var gpuRig string

//go:embed testdata/gpu-rig-guest.sh
var gpuRigGuest string

// rigNVMe makes the card one of three functions.
var rigNVMe = []string{"-device", "nvme,serial=inside,bus=rp0,addr=0x0.0x2"}

// rigGuestSays is what the kernel of a machine with the card makes of it.
var rigGuestSays = []string{
	"guest function 0: 1af4:1050, class 0x038000, regions 2, driver virtio-pci",
	"guest function 1: 8086:293e, class 0x040300, regions 1, driver none",
	"guest function 2: 1b36:0010, class 0x010802, regions 1, driver nvme",
	"guest function 2 is live, serial inside, interrupts some", "guest done",
}

const (
	rigUser   = 1878982656 // that root's machines run as
	rigMemory = 192 << 20  // bytes of the machine
)

// rigMachine is a machine that has the rig's card.
func rigMachine(t *testing.T, store instance.Store, name, id string, boot time.Duration) {
	t.Helper()
	inst, err := store.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join("/var/lib/agentvm/instances", name)
	run := "/run/agentvm/" + id[:8] + "/vm"
	spec := instance.Spec{Name: name, ID: id, BootTimeout: boot, Guest: instance.Guest{User: "agent", Home: "/home/agent"},
		Machine: vm.Machine{
			Name: name, UUID: id, CPUs: 1, Memory: rigMemory, HugePages: 2 << 20, Accel: vm.AccelTCG, Ports: 1,
			Boot: vm.Boot{Kernel: "/vmlinux", Initrd: "/guest.initrd",
				Cmdline: "console=ttyS0 loglevel=1 no_timer_check nokaslr mitigations=off tsc=reliable cryptomgr.notests nowatchdog oops=panic panic=-1"},
			NICs:    []vm.NIC{{MAC: "5a:94:ef:e4:0c:ee", Socket: run + "/net.sock"}},
			Console: home + "/console.log", QMP: run + "/qmp.sock", RunAs: &vm.Owner{UID: rigUser, GID: rigUser},
			Slots: []vm.Slot{{Functions: []vm.Function{
				{Address: "0000:01:00.0", ID: "1af4:1050", Regions: []vm.Region{{Size: 16 << 10, Bits64: true, Prefetchable: true}}},
				{Address: "0000:01:00.1", ID: "8086:293e", HideROM: true},
				{Address: "0000:01:00.2", ID: "1b36:0010", HideROM: true},
			}}},
		}}
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{lifecycle.ClientKeyFile, lifecycle.HostKeyFile} {
		key, err := cloudinit.GenerateKey("rig")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(inst.Path(file), key.Private, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// innerQEMU copies this host's QEMU, and what it loads, into a tree.
func innerQEMU(t *testing.T, tree string) {
	t.Helper()
	const script = `
put() { for f; do [ ! -e "$f" ] || { mkdir -p "$tree$(dirname "$f")" && cp -L "$f" "$tree$f"; }; done; }
tree=$1
qemu=$(command -v qemu-system-x86_64)
put "$qemu" /usr/lib/*/qemu/accel-tcg-x86_64.so /usr/share/seabios/bios-256k.bin /usr/share/qemu/bios-256k.bin /usr/share/qemu/kvmvapic.bin /usr/share/qemu/pvh.bin
put $(ldd "$qemu" | grep -o '/[^ ]*')`
	if out, err := exec.Command("sh", "-euc", script, "sh", tree).CombinedOutput(); err != nil {
		t.Fatalf("copy QEMU: %v\n%s", err, out)
	}
}

// runRig boots the rig, with more devices, and returns what it says, and its console.
func runRig(t *testing.T, debian, initrd, cmdline string, limit time.Duration, devices ...string) (said []string, console string) {
	t.Helper()
	console = bootRig(t, limit, append([]string{"-m", "2048",
		"-kernel", filepath.Join(debian, "boot/vmlinuz"), "-initrd", initrd, "-append", rigCmdline + " " + cmdline,
		"-device", "pcie-root-port,id=rp1,chassis=2", "-device", "pcie-pci-bridge,id=old,bus=rp1",
		"-device", "virtio-gpu-pci,bus=old,addr=0x1", "-device", "virtio-rng-pci,bus=old,addr=0x2"}, devices...)...)
	return rigSaid(console), console
}

// rigSaid picks from a console what is for the test.
func rigSaid(console string) (said []string) {
	for line := range strings.Lines(console) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "rig "); ok {
			said = append(said, text)
		}
	}
	return said
}

// rigCmdline makes the rig's kernel use the IOMMU, and end where it fails.
const rigCmdline = "console=ttyS0 loglevel=1 no_timer_check intel_iommu=on iommu=pt oops=panic panic=-1"

// bootRig runs a machine that has an IOMMU and a card until it ends, and returns
// its console. Under emulation a kernel can fail while it patches its own code
// as another processor runs it. That is QEMU's fault, and the rig begins anew.
func bootRig(t *testing.T, limit time.Duration, args ...string) (console string) {
	t.Helper()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		qemu := exec.CommandContext(ctx, qemuBinary, append([]string{"-M", "q35,kernel-irqchip=split", "-accel", "tcg", "-cpu", "max", "-smp", "2",
			"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
			"-device", "intel-iommu,intremap=on,caching-mode=on", "-device", "pcie-root-port,id=rp0,chassis=1",
			"-device", "virtio-gpu-pci,bus=rp0,addr=0x0.0x0,multifunction=on", "-device", "ich9-intel-hda,bus=rp0,addr=0x0.0x1"}, args...)...)
		out, err := qemu.CombinedOutput()
		if err != nil {
			t.Errorf("the rig: %v", err)
		}
		console = string(out)
		if !strings.Contains(console, "Oops: int3:") {
			break
		}
		t.Log("the rig's kernel failed while it patched itself")
	}
	return console
}

// TestGPURig takes a card from a real kernel's driver, in a machine with an
// emulated IOMMU, and gives it back: after it was asked to, while somebody has it
// open, after kill -9 at each step, and when the host has gone down meanwhile.
func TestGPURig(t *testing.T) {
	t.Parallel()
	debian, program := rig(t)
	tree := t.TempDir()
	copyFile(t, program, filepath.Join(tree, "agentvm"))
	rigProgram(t, tree, "vfio")
	said, console := runRig(t, debian, testenv.Initrd(t, debian, gpuRig, tree), "rig=host", 8*time.Minute)
	const free = "driver virtio-pci, override (null), second , journals "
	const taken = "driver vfio-pci, override vfio-pci, second vfio-pci, journals 2"
	want := []string{"listed", "check: exit 0", "first: " + free + "0", "group before: no group of VFIO's",
		"bind: exit 0", "bound: " + taken, "group after: viable", "again: exit 3",
		"held: exit 3", "held: " + taken, "release: exit 0", "released: " + free + "0", "group at last: no group of VFIO's",
		"release of what is open: exit 3", "blocked: driver , journals 1", "listed as blocked",
		"check of what is blocked: exit 3", "recover of what is blocked: exit 3",
		"recover of what is let go: exit 0", "unblocked: " + free + "0"}
	for range 8 {
		want = append(want, "killed: "+free+"0")
	}
	want = append(want, "killed: in the middle",
		"a stranger in the group: exit 3", "refused: virtio-pci and virtio-pci, journals 0",
		"group that is half taken: not viable",
		"the whole group: exit 0", "taken: vfio-pci and vfio-pci, journals 2", "group that is all taken: viable",
		"the group's release: exit 0", "given: virtio-pci and virtio-pci, journals 0",
		"when the host goes down: "+taken, "done")
	if diff := cmp.Diff(want, said); diff != "" {
		t.Fatalf("it says (-want +got):\n%s\nits console:\n%s", diff, console)
	}

	// What the disk keeps of that.
	dir := filepath.Join(tree, gpu.JournalDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	journals := regexp.MustCompile(`rig-journal (\S+) (\S+)`).FindAllStringSubmatch(console, -1)
	if len(journals) != 2 {
		t.Fatalf("%d journals", len(journals))
	}
	for _, j := range journals {
		data, err := base64.StdEncoding.DecodeString(j[2])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, j[1]), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	said, console = runRig(t, debian, testenv.Initrd(t, debian, gpuRig, tree), "rig=again", 4*time.Minute)
	want = []string{"after a crash of the host: " + free + "2",
		"recover: 0000:01:00.1: the host has booted since, which undid the binding",
		"recover: 0000:01:00.0: the host has booted since, which undid the binding",
		"recovered: " + free + "0", "done"}
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("after a crash it says (-want +got):\n%s\nits console:\n%s", diff, console)
	}
}

// TestGPUMachineRig gives the card to a machine, by the real supervisor and QEMU:
// all memory is locked in huge pages, a kernel in the machine drives it, and it
// comes back when the machine is stopped, when it does not come up, and when its
// supervisor is killed. The card has an NVMe function, because Debian's kernel
// has a driver for that: one that needs the card to write to the machine's memory
// and to interrupt it.
func TestGPUMachineRig(t *testing.T) {
	t.Parallel()
	debian, program := rig(t)
	tree := t.TempDir()
	innerQEMU(t, tree)
	store := instance.Store{Dirs: instance.Dirs{State: filepath.Join(tree, "var/lib/agentvm"), Cache: t.TempDir(), Run: t.TempDir()}}
	rigMachine(t, store, "long", "0a0b0c0d-89ab-cdef-0123-456789abcdef", 20*time.Minute)
	rigMachine(t, store, "short", "1a0b0c0d-89ab-cdef-0123-456789abcdef", 3*time.Second)
	copyFile(t, program, filepath.Join(tree, "agentvm"))
	copyFile(t, testenv.Vmlinux(t, debian), filepath.Join(tree, "vmlinux"))
	copyFile(t, testenv.Initrd(t, debian, gpuRigGuest, ""), filepath.Join(tree, "guest.initrd"))
	script := strings.ReplaceAll(gpuRig, "$VMUSER", fmt.Sprint(rigUser))
	said, console := runRig(t, debian, testenv.Initrd(t, debian, script, tree), "rig=machine", 20*time.Minute,
		rigNVMe...)
	const free = "driver virtio-pci, override (null), second , journals 0"
	const taken = "driver vfio-pci, override vfio-pci, second vfio-pci, journals 3"
	want := []string{
		"in a machine: " + taken, fmt.Sprintf("node: of user %d", rigUser),
		fmt.Sprintf("qemu: user %d, may lock %d", rigUser, rigMemory+1<<30), "locked: all memory", "huge pages: 0 free",
	}
	want = append(want, rigGuestSays...)
	want = append(want,
		"release under a machine: exit 3", "still in a machine: "+taken,
		"supervisor killed: "+taken,
		"doctor: ok    cards: 0000:01:00.2 was left behind",
		"doctor: ok    cards: 0000:01:00.1 was left behind", "doctor: ok    cards: 0000:01:00.0 was left behind", "after doctor: "+free,
		"huge pages: 96 free",
		"after a failed boot: "+free, `short: "state":"failed"`,
		"in a machine again: "+taken, "stop: exit 0", "stopped: "+free,
		"done")
	if diff := cmp.Diff(want, said); diff != "" {
		t.Fatalf("it says (-want +got):\n%s\nits console:\n%s", diff, console)
	}
}

// rig returns what every rig is made of.
func rig(t *testing.T) (debian, program string) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots virtual machines")
	}
	testenv.RequireQEMU(t)
	program, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return testenv.Debian13(t), program
}

// rigProgram builds one of the rig's own programs into a tree.
func rigProgram(t *testing.T, tree, name string) {
	t.Helper()
	build := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(tree, name), "./testdata/"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
