package gpu

import (
	"fmt"
	"slices"
	"strings"
)

// Severity grades a Finding.
type Severity string

const (
	Problem Severity = "problem" // the device cannot be bound
	Warning Severity = "warning" // it can, and something is worth knowing
)

// Finding is one thing that speaks against binding a device, or that whoever
// binds it should know.
type Finding struct {
	Code     string   `json:"code"`
	Severity Severity `json:"severity"`
	Device   string   `json:"device,omitempty"` // address; "" for what the host lacks
	Detail   string   `json:"detail"`           // what is wrong
	Fix      string   `json:"fix,omitempty"`    // what to do about it
	Forcible bool     `json:"forcible,omitempty"`
}

// Codes of findings.
const (
	NoIOMMU       = "no-iommu"
	NoVFIO        = "no-vfio"
	NoGroup       = "no-group"
	Companions    = "group-companions"
	BootVGA       = "boot-vga"
	Framebuffer   = "framebuffer"
	Held          = "held"
	Blocked       = "blocked"
	OtherOverride = "other-override"
	HoldersHidden = "holders-hidden"
	MemlockLow    = "memlock"
	NoReset       = "no-reset"
	Prebound      = "prebound"
	VirtualFn     = "virtual-function"
	HasVirtualFns = "has-virtual-functions"
	HasMediated   = "has-mediated-devices"
	MIG           = "mig"
	Mediated      = "mediated"
	VGPU          = "vgpu"
	VariantDriver = "variant-driver"
	Taken         = "taken"
)

// memlockWanted is what a machine of the default size needs to lock: its
// 2 GiB of memory, all of which the card may reach, and 1 GiB besides.
const memlockWanted = 3 << 30

// Check says what speaks against binding d, with every function of its slot,
// together with others. taken tells who has what, as [Manager.Taken] does. It
// looks at nothing else but the inventory.
func Check(inv *Inventory, d *Device, taken map[string]Claim, others ...*Device) []Finding {
	findings := checkHost(inv)
	if f := inv.takenOf(d, taken); f != nil { // one function stands for the slot
		findings = append(findings, checkTaken(f.Address, taken[f.Address]))
	}
	unit := inv.Unit(d)
	together := slices.Clone(unit)
	for _, o := range others {
		together = append(together, inv.Unit(o)...)
	}
	findings = append(findings, checkGroups(inv, d, unit, together)...)
	for _, f := range unit {
		_, ours := taken[f.Address]
		findings = append(findings, checkUse(f, ours)...)
	}
	findings = append(findings, checkKind(inv, d, unit)...)
	return findings
}

// checkHost looks at what every device needs.
func checkHost(inv *Inventory) (findings []Finding) {
	if !inv.IOMMU {
		bios, kernel := "the IOMMU (VT-d or AMD-Vi)", "intel_iommu=on or amd_iommu=on"
		switch inv.CPUVendor {
		case "GenuineIntel":
			bios, kernel = "VT-d", "intel_iommu=on"
		case "AuthenticAMD":
			bios, kernel = "AMD-Vi (IOMMU)", "amd_iommu=on"
		}
		switchOn := "switch " + bios + " on in the firmware's setup"
		if inv.Virtual {
			switchOn = "this host is a virtual machine: have its hypervisor give it an IOMMU"
		}
		findings = append(findings, Finding{Code: NoIOMMU, Severity: Problem, Detail: "the host has no IOMMU groups; without an IOMMU a device reaches all of the host's memory",
			Fix: switchOn + ", add " + kernel + " to the kernel's command line, and boot again"})
	}
	switch {
	case inv.VFIOLoaded:
	case inv.VFIOAvailable:
		findings = append(findings, Finding{Code: NoVFIO, Severity: Problem, Detail: "the driver vfio-pci is not loaded", Fix: "sudo modprobe vfio-pci"})
	default:
		findings = append(findings, Finding{Code: NoVFIO, Severity: Problem, Detail: "this kernel has no vfio-pci driver", Fix: "boot a kernel with CONFIG_VFIO_PCI, such as Debian's linux-image-amd64"})
	}
	return append(findings, checkMemlock(inv)...)
}

// checkMemlock looks at what may be locked, as a machine's memory is for a device.
func checkMemlock(inv *Inventory) (findings []Finding) {
	if inv.Memlock < memlockWanted {
		findings = append(findings, Finding{Code: MemlockLow, Severity: Warning,
			Detail: fmt.Sprintf("you may lock %d KiB of memory; a machine with a card locks all of its memory and 1 GiB besides", inv.Memlock>>10),
			Fix:    "under systemd LimitMEMLOCK=infinity in the service or in /etc/systemd/system/user@.service.d/memlock.conf below [Service]; else the lines \"* soft memlock unlimited\" and \"* hard memlock unlimited\" in /etc/security/limits.conf; then log in again"})
	}
	return findings
}

// checkGroups looks for what else is in the IOMMU groups of the unit: all of
// a group goes to one machine.
func checkGroups(inv *Inventory, d *Device, unit, together []*Device) (findings []Finding) {
	if !inv.IOMMU {
		return nil
	}
	var groups, strangers []string
	for _, f := range unit {
		if f.Group == "" {
			findings = append(findings, Finding{Code: NoGroup, Severity: Problem, Device: f.Address, Detail: "it is in no IOMMU group", Fix: "look for the IOMMU's messages in dmesg"})
			continue
		}
		if slices.Contains(groups, f.Group) {
			continue
		}
		groups = append(groups, f.Group)
		for _, address := range f.Members {
			m := inv.Get(address)
			switch {
			case m == nil:
				strangers = append(strangers, address)
			case m.Bridge: // stays on its own driver, and the kernel does not mind
			case !slices.Contains(together, m):
				strangers = append(strangers, address+" "+m.ID())
			}
		}
	}
	if len(strangers) > 0 {
		findings = append(findings, Finding{Code: Companions, Severity: Problem, Device: d.Address,
			Detail: fmt.Sprintf("IOMMU group %s holds other devices too: %s", strings.Join(groups, ", "), strings.Join(strangers, ", ")),
			Fix:    "name them all in one bind where they can all be spared, or move the card to another slot; ACS in the firmware's setup makes groups smaller"})
	}
	return findings
}

// checkUse looks at who uses a function now. Of one that agentvm has taken its
// journal knows what driver it goes back to.
func checkUse(f *Device, ours bool) (findings []Finding) {
	if f.BootVGA {
		findings = append(findings, Finding{Code: BootVGA, Severity: Problem, Forcible: true, Device: f.Address, Detail: "the host booted with this card as its display",
			Fix: "choose another card for the display in the firmware's setup; --force takes it all the same, and the display stays dark"})
	}
	if f.Framebuffer != "" {
		findings = append(findings, Finding{Code: Framebuffer, Severity: Problem, Forcible: true, Device: f.Address, Detail: "the host's console is on it (" + f.Framebuffer + ")",
			Fix: "add video=efifb:off to the kernel's command line, or keep the card's driver from loading; --force takes it all the same"})
	}
	if len(f.Holders) > 0 {
		findings = append(findings, Finding{Code: Held, Severity: Problem, Forcible: !isVFIO(f.Driver), Device: f.Address, Detail: "it is in use by " + holders(f.Holders),
			Fix: stopHolders(f.Holders)})
	}
	if f.Blocked {
		findings = append(findings, Finding{Code: Blocked, Severity: Problem, Device: f.Address, Detail: "the kernel does not let it be looked at: its driver is starting, or does not let it go",
			Fix: "end what has it open, or wait"})
	}
	if f.Driver != "" && !isVFIO(f.Driver) && f.Override != "" && f.Override != f.Driver {
		// The kernel would not let us give it back to the driver it has.
		findings = append(findings, Finding{Code: OtherOverride, Severity: Problem, Device: f.Address, Detail: "it is bound to " + f.Driver + ", and its driver_override names " + f.Override,
			Fix: "settle that first: echo | sudo tee " + pciDevices + "/" + f.Address + "/driver_override"})
	}
	if isVFIO(f.Driver) && !ours {
		findings = append(findings, Finding{Code: Prebound, Severity: Warning, Device: f.Address, Detail: "it is bound to " + f.Driver + " already, and stays so when it is released"})
	}
	return findings
}

// checkKind explains what is particular about a device.
func checkKind(inv *Inventory, d *Device, unit []*Device) (findings []Finding) {
	add := func(code string, s Severity, detail, fix string) {
		findings = append(findings, Finding{Code: code, Severity: s, Device: d.Address, Detail: detail, Fix: fix})
	}
	if d.ResetMethod == "" {
		add(NoReset, Warning, "the kernel knows no way to reset it", "expect to boot the host again before it is usable a second time")
	}
	if d.PhysFn != "" {
		add(VirtualFn, Warning, "it is a virtual function of "+d.PhysFn+", and is passed on by itself; the card stays with the host, whose driver must stay", "")
	}
	for _, f := range unit {
		if f.NumVFs > 0 {
			findings = append(findings, Finding{Code: HasVirtualFns, Severity: Problem, Device: f.Address, Detail: fmt.Sprintf("%d virtual functions live on it and need its driver", f.NumVFs),
				Fix: "bind one of those instead, or end them with echo 0 | sudo tee " + pciDevices + "/" + f.Address + "/sriov_numvfs"})
		}
		if len(f.Mediated) > 0 {
			findings = append(findings, Finding{Code: HasMediated, Severity: Problem, Device: f.Address, Detail: "mediated devices live on it and need its driver: " + strings.Join(f.Mediated, ", "),
				Fix: "take one of those instead, by its UUID, or end them with echo 1 | sudo tee " + mdevDevices + "/" + f.Mediated[0] + "/remove"})
		}
	}
	findings = append(findings, checkParts(d)...)
	if d.Variant != "" && !isVFIO(d.Driver) {
		add(VariantDriver, Warning, "the kernel has a VFIO driver made for it, "+d.Variant+", which takes it instead of vfio-pci where it can be loaded", "")
	}
	if d.Hidden {
		add(HoldersHidden, Warning, "only your own processes were looked at for open files of it", "sudo agentvm gpu check "+d.Address)
	}
	return findings
}

// checkParts explains what a card can be divided into, and which of that can
// be passed on.
func checkParts(d *Device) (findings []Finding) {
	add := func(code, detail, fix string) {
		findings = append(findings, Finding{Code: code, Severity: Warning, Device: d.Address, Detail: detail, Fix: fix})
	}
	if len(d.MdevTypes) > 0 {
		add(Mediated, "it can be divided into mediated devices ("+strings.Join(d.MdevTypes, ", ")+"), which are not PCI functions and go by their UUID; binding takes all of it", "")
	}
	if d.Vendor == nvidia && d.Class>>8 == 0x0302 && d.Driver == "nvidia" {
		add(MIG, "MIG slices are not PCI functions and cannot be passed on one by one; binding takes the whole card", "where MIG is in use, end it first: sudo nvidia-smi -mig 0")
	}
	if d.Vendor == nvidia && d.TotalVFs > 0 && d.PhysFn == "" {
		add(VGPU, fmt.Sprintf("it has up to %d virtual functions, which are vGPUs: they need NVIDIA's vGPU manager on the host, a licence, and the matching driver in the guest; without those take the whole card", d.TotalVFs), "")
	}
	return findings
}
