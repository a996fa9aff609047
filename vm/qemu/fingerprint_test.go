package qemu

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/agentvm/agentvm/vm"
)

func TestFingerprint(t *testing.T) {
	print := func(change func(*vm.Machine, *Caps)) string {
		t.Helper()
		m, caps := testMachine(), testCaps()
		change(&m, &caps)
		got, err := Fingerprint(m, caps)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	same := print(func(*vm.Machine, *Caps) {})
	for name, change := range map[string]func(*vm.Machine, *Caps){
		"name":   func(m *vm.Machine, _ *Caps) { m.Name = "other" },
		"UUID":   func(m *vm.Machine, _ *Caps) { m.UUID = "" },
		"shares": func(m *vm.Machine, _ *Caps) { m.Shares = nil },
		"paths": func(m *vm.Machine, _ *Caps) {
			m.Console, m.QMP, m.Line, m.Disks[0].Path, m.NICs[0].Socket = "/a", "/b", "/c", "/d", "/e"
			m.Boot.Kernel, m.Boot.Initrd = "/f", "/g"
		},
		"user":  func(m *vm.Machine, _ *Caps) { m.RunAs = &vm.Owner{UID: 7} },
		"start": func(m *vm.Machine, _ *Caps) { m.Saved = "/t" },
	} {
		if print(change) != same {
			t.Errorf("the guest cannot observe the %s", name)
		}
	}
	for name, change := range map[string]func(*vm.Machine, *Caps){
		"CPUs":      func(m *vm.Machine, _ *Caps) { m.CPUs++ },
		"CPU model": func(m *vm.Machine, _ *Caps) { m.CPUModel = "EPYC" },
		"memory":    func(m *vm.Machine, _ *Caps) { m.Memory *= 2 },
		"accel":     func(m *vm.Machine, _ *Caps) { m.Accel = vm.AccelKVM },
		"initrd":    func(m *vm.Machine, _ *Caps) { m.Boot.Initrd = "" },
		"cmdline":   func(m *vm.Machine, _ *Caps) { m.Boot.Cmdline += " quiet" },
		"disks":     func(m *vm.Machine, _ *Caps) { m.Disks = m.Disks[:1] },
		"serial":    func(m *vm.Machine, _ *Caps) { m.Disks[0].Serial = "x" },
		"MAC":       func(m *vm.Machine, _ *Caps) { m.NICs[0].MAC = "5a:94:ef:e4:0c:ef" },
		"ports":     func(m *vm.Machine, _ *Caps) { m.Ports++ },
		"QEMU":      func(_ *vm.Machine, c *Caps) { c.Build = "another" },
		"machine":   func(_ *vm.Machine, c *Caps) { c.Machine = "pc-q35-8.0" },
	} {
		if print(change) == same {
			t.Errorf("the guest can observe the %s", name)
		}
	}
}

func TestHostCPU(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cpuinfo")
	const cpu = "processor\t: 0\nmodel name\t: Xeon\ncpu MHz\t\t: 2000.1\nflags\t\t: fpu sse\n"
	if err := os.WriteFile(file, []byte(cpu+"\nprocessor\t: 1\nmodel name\t: Other\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := hostCPU(file); err != nil || got != "model name\t: Xeon\nflags\t\t: fpu sse" {
		t.Errorf("%q, %v", got, err)
	}
}
