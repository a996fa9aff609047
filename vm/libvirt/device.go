package libvirt

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qemu"
)

// rootPort is the index of the PCIe root port that slot i lies in, which is the
// number of its bus too. The root bus itself is 0, and libvirt gives out the
// numbers that follow.
func rootPort(i int) uint { return uint(i + 1) }

// portAlias is the name of that port; libvirt leaves names with this prefix to
// its users.
func portAlias(i int) string { return fmt.Sprintf("ua-dp%d", i) }

// passThrough gives a domain the host's devices in their ports, as package qemu
// does, with the room that their memory needs.
func passThrough(d *libvirtxml.Domain, m vm.Machine) {
	if len(m.Slots) == 0 {
		return
	}
	// What a device of the host may reach cannot be given back.
	d.Devices.MemBalloon = &libvirtxml.DomainMemBalloon{Model: "none"}
	if m.Accel == vm.AccelKVM {
		// Large cards lie beyond the terabyte that guests have by default.
		d.CPU.MaxPhysAddr = &libvirtxml.DomainCPUMaxPhysAddr{Mode: "passthrough"}
	}
	hole, window := qemu.AddressSpace(m)
	if hole > 0 {
		root := uint(0)
		d.Devices.Controllers = append(d.Devices.Controllers, libvirtxml.DomainController{
			Type: "pci", Model: "pcie-root", Index: &root,
			PCI: &libvirtxml.DomainControllerPCI{Hole64: &libvirtxml.DomainControllerPCIHole64{Size: uint64((hole + 1023) >> 10), Unit: "KiB"}},
		})
	}
	if window > 0 {
		// libvirt knows no name of the firmware's own.
		d.QEMUCommandline.Args = append(d.QEMUCommandline.Args, libvirtxml.DomainQEMUCommandlineArg{Value: "-fw_cfg"},
			libvirtxml.DomainQEMUCommandlineArg{Value: fmt.Sprintf("name=opt/ovmf/X-PciMmio64Mb,string=%d", window)})
	}
	for i, s := range m.Slots {
		index := rootPort(i)
		d.Devices.Controllers = append(d.Devices.Controllers, libvirtxml.DomainController{
			Type: "pci", Model: "pcie-root-port", Index: &index, Alias: &libvirtxml.DomainAlias{Name: portAlias(i)},
		})
		if size := s.Window(); size > 0 {
			override(d, portAlias(i), "pref64-reserve", size)
		}
		for n, f := range s.Functions {
			h := hostDevice(i, n, s)
			if f.Mediated != "" && f.HideROM { // of these libvirt does not pass it on
				h.ROM, h.Alias = nil, &libvirtxml.DomainAlias{Name: fmt.Sprintf("ua-dev%d-%d", i, n)}
				override(d, h.Alias.Name, "rombar", 0)
			}
			d.Devices.Hostdevs = append(d.Devices.Hostdevs, h)
		}
	}
}

// override sets a property of QEMU's device for which libvirt has no element.
func override(d *libvirtxml.Domain, alias, property string, value int64) {
	if d.QEMUOverride == nil {
		d.QEMUOverride = &libvirtxml.DomainQEMUOverride{}
	}
	d.QEMUOverride.Devices = append(d.QEMUOverride.Devices, libvirtxml.DomainQEMUOverrideDevice{
		Alias: alias,
		Frontend: libvirtxml.DomainQEMUOverrideFrontend{Properties: []libvirtxml.DomainQEMUOverrideProperty{
			{Name: property, Type: "unsigned", Value: strconv.FormatInt(value, 10)},
		}},
	})
}

// hostDevice is function n of slot i.
func hostDevice(i, n int, s vm.Slot) libvirtxml.DomainHostdev {
	f := s.Functions[n]
	bus, slot, function := rootPort(i), uint(0), uint(qemu.FunctionNumber(s, n))
	h := libvirtxml.DomainHostdev{Address: &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{Bus: &bus, Slot: &slot, Function: &function}}}
	if n == 0 && len(s.Functions) > 1 {
		h.Address.PCI.MultiFunction = "on"
	}
	switch {
	case f.HideROM:
		h.ROM = &libvirtxml.DomainROM{Bar: "off"}
	case f.ROM != "":
		h.ROM = &libvirtxml.DomainROM{File: &f.ROM}
	}
	if f.Mediated != "" {
		h.SubsysMDev = &libvirtxml.DomainHostdevSubsysMDev{Model: "vfio-pci", Source: &libvirtxml.DomainHostdevSubsysMDevSource{Address: &libvirtxml.DomainAddressMDev{UUID: f.Mediated}}}
		return h
	}
	// It is with vfio-pci when libvirt sees it, which then leaves the driver as it is.
	h.Managed = "yes"
	h.SubsysPCI = &libvirtxml.DomainHostdevSubsysPCI{
		Driver: &libvirtxml.DomainHostdevSubsysPCIDriver{Name: "vfio"},
		Source: &libvirtxml.DomainHostdevSubsysPCISource{Address: hostAddress(f.Address)},
	}
	return h
}

// hostAddress reads an address that package qemu has checked.
func hostAddress(text string) *libvirtxml.DomainAddressPCI {
	var parts [4]uint
	for i, digits := range strings.FieldsFunc(text, func(r rune) bool { return r == ':' || r == '.' })[:4] {
		n, _ := strconv.ParseUint(digits, 16, 32)
		parts[i] = uint(n)
	}
	return &libvirtxml.DomainAddressPCI{Domain: &parts[0], Bus: &parts[1], Slot: &parts[2], Function: &parts[3]}
}

// memoryBacking is where guest memory lies.
func memoryBacking(m vm.Machine) *libvirtxml.DomainMemoryBacking {
	b := &libvirtxml.DomainMemoryBacking{
		// vhost-user servers map guest memory, so it must be shared.
		MemorySource: &libvirtxml.DomainMemorySource{Type: "memfd"},
		MemoryAccess: &libvirtxml.DomainMemoryAccess{Mode: "shared"},
	}
	if m.HugePages > 0 {
		b.MemoryHugePages = &libvirtxml.DomainMemoryHugepages{Hugepages: []libvirtxml.DomainMemoryHugepage{{Size: uint(m.HugePages >> 10), Unit: "KiB"}}}
	}
	return b
}

// near keeps a domain's memory and processors at a part of the host.
func near(d *libvirtxml.Domain, n *vm.Node) {
	if n == nil {
		return
	}
	d.NUMATune = &libvirtxml.DomainNUMATune{Memory: &libvirtxml.DomainNUMATuneMemory{Mode: "strict", Nodeset: strconv.Itoa(n.ID)}}
	var cpus []string
	for _, cpu := range slices.Sorted(slices.Values(n.CPUs)) {
		cpus = append(cpus, strconv.Itoa(cpu))
	}
	d.VCPU.CPUSet = strings.Join(cpus, ",")
}
