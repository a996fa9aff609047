package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What ls and check say of an H200 in a virtual machine that has it without an
// IOMMU, without VFIO and without a database of names, while somebody uses it.
const (
	h200Ls = `DEVICE        ID         NAME         DRIVER  GROUP  BAR     USED BY
0000:00:06.0  10de:2335  NVIDIA H200  nvidia  -      256GiB  python3 (765)
`
	h200Wide = `DEVICE        ID         NAME         DRIVER  GROUP  BAR     CLASS   NUMA  LINK           RESET  VFS  USED BY
0000:00:06.0  10de:2335  NVIDIA H200  nvidia  -      256GiB  030200  -     32.0 GT/s x16  flr    -    python3 (765)
`
	h200Check = `0000:00:06.0 NVIDIA H200: cannot be taken, with 0000:00:06.0
  problem  the host has no IOMMU groups; without an IOMMU a device reaches all of the host's memory
           fix: this host is a virtual machine: have its hypervisor give it an IOMMU, add intel_iommu=on to the kernel's command line, and boot again
  problem  this kernel has no vfio-pci driver
           fix: boot a kernel with CONFIG_VFIO_PCI, such as Debian's linux-image-amd64
  problem  it is in use by python3 (process 765, /dev/nvidia0)
           fix: stop them
  warning  MIG slices are not PCI functions and cannot be passed on one by one; binding takes the whole card
           fix: where MIG is in use, end it first: sudo nvidia-smi -mig 0
`
)

func TestGPUsOfH200Host(t *testing.T) {
	a, stdout, stderr := cardHost(t)
	a.gpuRoot = t.TempDir()
	const card = "sys/bus/pci/devices/0000:00:06.0/"
	for path, text := range map[string]string{
		card + "vendor": "0x10de", card + "device": "0x2335", card + "class": "0x030200", card + "reset_method": "flr", card + "numa_node": "-1",
		card + "current_link_speed": "32.0 GT/s PCIe", card + "current_link_width": "16",
		card + "resource": "0x0000104002000000 0x0000104002ffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 0x0000000000000000\n" +
			"0x0000100000000000 0x0000103fffffffff 0x000000000014220c\n0x0000000000000000 0x0000000000000000 0x0000000000000000\n0x0000104000000000 0x0000104001ffffff 0x000000000014220c",
		"proc/cpuinfo": "vendor_id\t: GenuineIntel\nflags\t\t: fpu hypervisor lahf_lm", "proc/765/comm": "python3",
		"proc/driver/nvidia/gpus/0000:00:06.0/information": "Model: \t\t NVIDIA H200\nDevice Minor: \t 0",
	} {
		file := filepath.Join(a.gpuRoot, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for path, target := range map[string]string{card + "driver": "../../drivers/nvidia", "proc/765/fd/3": "/dev/nvidia0"} {
		file := filepath.Join(a.gpuRoot, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, file); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		command, want string
		code          int
	}{
		{"ls", h200Ls, exitOK}, {"ls --wide", h200Wide, exitOK}, {"check", h200Check, exitHost}, {"check h200", h200Check, exitHost}, {"check auto", h200Check, exitNotFound},
	} {
		stdout.Reset()
		if err := a.run(append([]string{"gpu"}, strings.Fields(tt.command)...)...); exitCode(err) != tt.code {
			t.Error(tt.command, err)
		}
		got := stdout.String()
		if os.Geteuid() != 0 { // whom check warns of more
			got = inBoth(got, tt.want)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || stderr.Len() > 0 {
			t.Error(tt.command, diff, stderr)
		}
	}
}

// inBoth are the lines of a text that another has too.
func inBoth(text, other string) (both string) {
	for line := range strings.Lines(text) {
		if strings.Contains(other, line) {
			both += line
		}
	}
	return both
}
