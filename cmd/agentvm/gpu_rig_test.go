package main

import (
	"bytes"
	"context"
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

//go:embed testdata/gpu-rig.sh
var gpuRig string

// TestGPURig takes a card from a real kernel's driver, in a machine with an
// emulated IOMMU, and gives it back: after it was asked to, while somebody has it
// open, and after kill -9 at many moments.
func TestGPURig(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	testenv.RequireQEMU(t)
	program, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	debian := testenv.Debian13(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "init"), []byte(gpuRig), 0o755); err != nil {
		t.Fatal(err)
	}
	pack := exec.Command("sh", "-euc", `
busybox=$1/usr/bin/busybox; [ -e "$busybox" ] || busybox=$1/bin/busybox
mkdir root && cd root && mkdir -p bin dev proc sys run root var/lib
cp "$busybox" bin/busybox && cp "$1"/*.ko . && cp "$2" agentvm && mv ../init .
find . | ./bin/busybox cpio -o -H newc >../initrd`, "sh", debian, program)
	pack.Dir = dir
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("pack an initrd: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	qemu := exec.CommandContext(ctx, qemuBinary, "-M", "q35,kernel-irqchip=split", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-smp", "2",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", filepath.Join(debian, "boot/vmlinuz"), "-initrd", filepath.Join(dir, "initrd"),
		"-append", "console=ttyS0 loglevel=1 no_timer_check intel_iommu=on iommu=pt",
		"-device", "intel-iommu,intremap=on,caching-mode=on", "-device", "pcie-root-port,id=rp0,chassis=1",
		"-device", "virtio-gpu-pci,bus=rp0,addr=0x0.0x0,multifunction=on", "-device", "ich9-intel-hda,bus=rp0,addr=0x0.0x1")
	var out bytes.Buffer
	qemu.Stdout, qemu.Stderr = &out, &out
	runErr := qemu.Run()
	var said []string
	for line := range strings.Lines(out.String()) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "rig "); ok {
			said = append(said, text)
		}
	}
	const free = "driver virtio-pci, override (null), second , journals 0"
	const taken = "driver vfio-pci, override vfio-pci, second vfio-pci, journals 2"
	want := []string{"check: exit 0", "first: " + free, "bind: exit 0", "bound: " + taken, "again: exit 3",
		"held: exit 3", "held: " + taken, "release: exit 0", "released: " + free}
	for range 8 {
		want = append(want, "killed: "+free)
	}
	want = append(want, "done")
	if got := strings.Join(said, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("it says\n%s\nwant\n%s\n%v, its console:\n%s", got, strings.Join(want, "\n"), runErr, &out)
	}
}
