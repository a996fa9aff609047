package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
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

// TestFingerprintOfSlots: what is plugged in later is not observed, its room is.
func TestFingerprintOfSlots(t *testing.T) {
	print := func(slots ...vm.Slot) string {
		t.Helper()
		m := deviceMachine(slots...)
		m.Accel = vm.AccelTCG
		got, err := Fingerprint(m, deviceCaps())
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	full, empty := vm.Machine{Slots: []vm.Slot{h100}}.SlotsForLater()
	if print(h100) != print(empty...) || print(h100) != print(full...) {
		t.Error("what is plugged in later makes a difference")
	}
	if print(h100) == print(turing) || print(h100) == print(h100, turing) || print(h100) == print() {
		t.Error("the room for it makes none")
	}
}

// TestRoomForLater: what firmware has not met needs more room than the processor
// may be able to address.
func TestRoomForLater(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cpuinfo")
	if err := os.WriteFile(file, []byte("model name\t: i9\naddress sizes\t: 39 bits physical, 48 bits virtual\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		accel vm.Accel
		slots []vm.Slot
		want  string
	}{
		{"desktop", vm.AccelKVM, []vm.Slot{turing, arc}, ""},
		{"one large card", vm.AccelKVM, []vm.Slot{a100}, ""},
		{"too large", vm.AccelKVM, []vm.Slot{h100, h100}, "the processor has 39 bits"},
		{"emulated", vm.AccelTCG, []vm.Slot{h100, a100}, ""},
		{"board, emulated", vm.AccelTCG, h200s(), "the processor has 40 bits"},
		{"none", vm.AccelKVM, nil, ""},
	} {
		m := deviceMachine(tt.slots...)
		m.Accel = tt.accel
		_, m.Slots = m.SlotsForLater()
		err := checkRoom(m, file)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !errors.Is(err, vm.ErrHost) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if err := os.WriteFile(file, []byte("model name\t: i9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkRoom(deviceMachine(turing), file); !errors.Is(err, vm.ErrHost) {
		t.Error(err)
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
