package qemu

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

const (
	kib = int64(1) << 10
	mib = kib << 10
	gib = mib << 10
)

func pref(size int64) vm.Region    { return vm.Region{Size: size, Bits64: true, Prefetchable: true} }
func plain32(size int64) vm.Region { return vm.Region{Size: size} }

var (
	card  = testenv.Card
	h200s = testenv.H200s

	turing, a100, h100, arc = testenv.Turing, testenv.A100, testenv.H100, testenv.Arc
	vf, mi300x, mdev        = testenv.VF, testenv.MI300X, testenv.Mdev
)

func deviceMachine(slots ...vm.Slot) vm.Machine {
	m := testMachine()
	m.Accel, m.Slots = vm.AccelKVM, slots
	return m
}

func deviceCaps() Caps {
	c := testCaps()
	c.Devices = append(c.Devices, "vfio-pci")
	return c
}

func TestDevicesGolden(t *testing.T) {
	for name, tt := range map[string]struct {
		slots  []vm.Slot
		change func(*vm.Machine, *Caps)
	}{
		"turing":       {[]vm.Slot{turing}, nil},
		"a100":         {[]vm.Slot{a100}, nil},
		"h100-iommufd": {[]vm.Slot{h100}, func(m *vm.Machine, _ *Caps) { m.IOMMUFD = true }},
		"h200-board-uefi": {h200s(), func(m *vm.Machine, _ *Caps) {
			m.Boot = vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: "/s/vars.fd"}
			m.HugePages, m.Near, m.Memory = 1<<30, &vm.Node{ID: 1, CPUs: []int{8, 9}}, 64<<30
		}},
		"mi300x": {[]vm.Slot{mi300x}, func(m *vm.Machine, _ *Caps) { m.Near = &vm.Node{} }},
		"arc":    {[]vm.Slot{arc}, nil},
		"vf":     {[]vm.Slot{vf}, nil},
		"mdev":   {[]vm.Slot{mdev}, nil},
		"card-emulated": {[]vm.Slot{turing, a100}, func(m *vm.Machine, _ *Caps) {
			m.Accel = vm.AccelTCG // whose processors have addresses of 40 bits
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m, caps := deviceMachine(tt.slots...), deviceCaps()
			if tt.change != nil {
				tt.change(&m, &caps)
			}
			argv, err := Argv(m, caps)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, argv)
			if line := strings.Join(argv, " "); strings.Contains(line, "balloon") || strings.Contains(line, "mem-path") {
				t.Error("memory that a device reaches is in a file or may be given back")
			}
		})
	}
}

func TestDevicesRefused(t *testing.T) {
	for name, change := range map[string]func(*vm.Machine){
		"address":       func(m *vm.Machine) { m.Slots = []vm.Slot{card("01:00.0")} },
		"option":        func(m *vm.Machine) { m.Slots = []vm.Slot{card("0000:01:00.0,x-vga=on")} },
		"UUID":          func(m *vm.Machine) { m.Slots[0].Functions[0] = vm.Function{Mediated: "../x"} },
		"both":          func(m *vm.Machine) { m.Slots[0].Functions[0].Mediated = mdev.Functions[0].Mediated },
		"neither":       func(m *vm.Machine) { m.Slots[0].Functions[0].Address = "" },
		"twice":         func(m *vm.Machine) { m.Slots = append(m.Slots, m.Slots[0]) },
		"room":          func(m *vm.Machine) { m.Slots[0] = vm.Slot{Room: 3 << 10} },
		"size":          func(m *vm.Machine) { m.Slots[0].Functions[0].Regions[0].Size = 3 },
		"ROM":           func(m *vm.Machine) { m.Slots[0].Functions[0].ROM, m.Slots[0].Functions[0].HideROM = "rom", false },
		"hidden ROM":    func(m *vm.Machine) { m.Slots[0].Functions[0].ROM = "/rom" },
		"pages in file": func(m *vm.Machine) { m.HugePages, m.MemoryFile = 2<<20, "/m" },
		"part of pages": func(m *vm.Machine) { m.HugePages, m.Memory = 1<<30, 1536<<20 },
		"node":          func(m *vm.Machine) { m.Near = &vm.Node{ID: -1} },
		"too many":      func(m *vm.Machine) { m.Slots = append(h200s(), h200s()...) },
	} {
		m := deviceMachine(card("0000:01:00.0", pref(mib)))
		change(&m)
		if argv, err := Argv(m, deviceCaps()); err == nil {
			t.Errorf("%s: made %v", name, argv)
		}
	}
	if _, err := Argv(deviceMachine(a100), testCaps()); err == nil || !strings.Contains(err.Error(), "vfio-pci") {
		t.Error("a QEMU without vfio-pci:", err)
	}
}

// TestEmptySlots: a machine has the same ports before anything is plugged into
// them, and when it goes on from a saved state.
func TestEmptySlots(t *testing.T) {
	ports := func(m vm.Machine) (list []string) {
		t.Helper()
		argv, err := Argv(m, deviceCaps())
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range argv {
			if strings.Contains(w, "=dp") || strings.Contains(w, "hole64") || strings.Contains(w, "host-phys-bits") {
				list = append(list, w)
			}
		}
		return list
	}
	m := deviceMachine(turing, h100)
	m.MemoryFile = "/memory"
	saved, empty := m, m
	saved.Saved = "/saved"
	saved.Slots, empty.Slots = m.SlotsForLater()
	want := []string{"host,host-phys-bits=on", fmt.Sprintf("q35-pcihost.pci-hole64-size=%d", 512*gib+545*mib+2*48*mib),
		fmt.Sprintf("pcie-root-port,id=dp0,chassis=5,slot=5,pref64-reserve=%d", 545*mib),
		fmt.Sprintf("pcie-root-port,id=dp1,chassis=6,slot=6,pref64-reserve=%d", 256*gib+48*mib)}
	for name, m := range map[string]vm.Machine{"empty": empty, "saved": saved} {
		if diff := cmp.Diff(want, ports(m)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if LockedMemory(empty) != 0 || LockedMemory(saved) == 0 {
		t.Error("memory is locked for what is in the slots")
	}
}

func TestRoomForDevices(t *testing.T) {
	for _, tt := range []struct {
		name          string
		slots         []vm.Slot
		reserve, hole int64
	}{
		{"turing", []vm.Slot{turing}, 512 * mib, gib},
		{"a100", []vm.Slot{a100}, 128 * gib, 256 * gib}, // 32 MiB more than 64 GiB
		{"h200", h200s()[:1], 512 * gib, 1024 * gib},    // 48 MiB more than 256 GiB
		{"h200s", h200s(), 512 * gib, 9*512*gib + 4*32*mib},
		{"no 64-bit region", []vm.Slot{card("0000:01:00.0", plain32(mib))}, 0, 0},
		{"mdev", []vm.Slot{mdev}, 0, 0},
	} {
		if r, h := tt.slots[0].Window(), hole64(vm.Machine{Slots: tt.slots}); r != tt.reserve || h != tt.hole {
			t.Errorf("%s: %d and %d, want %d and %d", tt.name, r, h, tt.reserve, tt.hole)
		}
	}
}

func TestLockedMemory(t *testing.T) {
	m := deviceMachine(a100)
	if n := LockedMemory(m); n != uint64(5*gib) {
		t.Error(n)
	}
	m.IOMMUFD = true
	if n := LockedMemory(m); n != uint64(5*gib+64*gib+48*mib) {
		t.Error(n)
	}
	if n := LockedMemory(testMachine()); n != 0 {
		t.Error(n)
	}
}
