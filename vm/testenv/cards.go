package testenv

import (
	"fmt"

	"github.com/agentvm/agentvm/vm"
)

const (
	kib = int64(1) << 10
	mib = kib << 10
	gib = mib << 10
)

func pref(size int64) vm.Region    { return vm.Region{Size: size, Bits64: true, Prefetchable: true} }
func plain64(size int64) vm.Region { return vm.Region{Size: size, Bits64: true} }
func plain32(size int64) vm.Region { return vm.Region{Size: size} }

// Card is a device of one function.
func Card(address string, regions ...vm.Region) vm.Slot {
	return vm.Slot{Functions: []vm.Function{{Address: address, Regions: regions, HideROM: true}}}
}

// Cards for golden files, which every backend renders: real ones, from what people have shown of them.
var (
	// Turing with audio, USB and UCSI: github.com/cloud-hypervisor/cloud-hypervisor/issues/4353
	Turing = vm.Slot{Functions: []vm.Function{
		{Address: "0000:65:00.0", Regions: []vm.Region{plain32(16 * mib), pref(256 * mib), pref(32 * mib)}},
		{Address: "0000:65:00.1", Regions: []vm.Region{plain32(16 * kib)}, HideROM: true},
		{Address: "0000:65:00.2", Regions: []vm.Region{pref(256 * kib), pref(64 * kib)}, HideROM: true},
		{Address: "0000:65:00.3", Regions: []vm.Region{plain32(4 * kib)}, HideROM: true},
	}}
	// A100 PCIe: github.com/kata-containers/kata-containers/pull/4358
	A100 = Card("0000:d8:00.0", plain32(16*mib), pref(64*gib), pref(32*mib))
	// H100 SXM: github.com/fastfetch-cli/fastfetch/issues/1658
	H100 = Card("0000:3b:00.0", pref(16*mib), pref(128*gib), pref(32*mib))
	// Arc A770: github.com/ProjectPhysX/OpenCL-Benchmark/pull/19
	Arc = vm.Slot{Functions: []vm.Function{{Address: "0000:03:00.0", Regions: []vm.Region{plain64(16 * mib), pref(16 * gib)}, ROM: "/roms/arc, new.rom"}}}
	// A virtual function of Alder Lake's graphics: github.com/stefanpartheym/archlinux-ipu6-webcam/pull/42
	VF = Card("0000:00:02.3", plain64(16*mib), pref(512*mib))
	// MI300X: BARs as documented for its kind (rocm.docs.amd.com, how-to/Bar-Memory), the largest as its memory of 192 GiB makes it.
	MI300X = Card("0000:05:00.0", pref(256*gib), pref(2*mib), plain32(512*kib))
	Mdev   = vm.Slot{Functions: []vm.Function{{Mediated: "c2177883-f1bb-47f0-914d-32a22e3a8804", HideROM: true}}}
)

// H200s is a whole board, by the addresses of
// github.com/bigstack-oss/cubecos/issues/259: eight cards, with the BARs that one
// shows (h200 in the tests of gpu), and the NVSwitches.
func H200s() (slots []vm.Slot) {
	for _, bus := range []string{"18", "2a", "3a", "5d", "9a", "ab", "ba", "db"} {
		slots = append(slots, Card("0000:"+bus+":00.0", pref(16*mib), pref(256*gib), pref(32*mib)))
	}
	for bus := 5; bus <= 8; bus++ {
		slots = append(slots, Card(fmt.Sprintf("0000:%02x:00.0", bus), pref(32*mib)))
	}
	return slots
}
