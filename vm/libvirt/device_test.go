package libvirt

import (
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestDevicesGolden renders the cards that package qemu renders.
func TestDevicesGolden(t *testing.T) {
	for name, tt := range map[string]struct {
		slots  []vm.Slot
		change func(*vm.Machine)
	}{
		"turing": {[]vm.Slot{testenv.Turing}, nil},
		"a100":   {[]vm.Slot{testenv.A100}, nil},
		"h100":   {[]vm.Slot{testenv.H100}, nil},
		"h200-board-uefi": {testenv.H200s(), func(m *vm.Machine) {
			m.Boot = vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: "/s/vars.fd"}
			m.HugePages, m.Near, m.Memory = 1<<30, &vm.Node{ID: 1, CPUs: []int{8, 9}}, 64<<30
		}},
		"mi300x":        {[]vm.Slot{testenv.MI300X}, func(m *vm.Machine) { m.Near = &vm.Node{} }},
		"arc":           {[]vm.Slot{testenv.Arc}, nil},
		"vf":            {[]vm.Slot{testenv.VF}, nil},
		"mdev-emulated": {[]vm.Slot{testenv.Mdev}, func(m *vm.Machine) { m.Accel = vm.AccelTCG }},
		"card-emulated": {[]vm.Slot{testenv.Turing, testenv.A100}, func(m *vm.Machine) {
			m.Accel = vm.AccelTCG // whose processors have addresses of 40 bits
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m, c := testMachine(), testConfig()
			m.Accel, m.Slots = vm.AccelKVM, tt.slots
			if tt.change != nil {
				tt.change(&m)
			}
			if text := golden(t, name, m, c); !strings.Contains(text, `<memballoon model="none">`) {
				t.Error("memory that a device reaches may be given back")
			}
		})
	}
}
