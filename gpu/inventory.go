package gpu

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Device is a PCI function as the host shows it.
type Device struct {
	Address     string   `json:"address"` // domain:bus:device.function
	Vendor      uint16   `json:"vendor"`
	Device      uint16   `json:"device"`
	Subsystem   string   `json:"subsystem"` // vendor:device
	Class       uint32   `json:"class"`     // with the programming interface, 0x030200
	Revision    uint8    `json:"revision"`
	VendorName  string   `json:"vendorName,omitempty"`
	Name        string   `json:"name,omitempty"`
	Modalias    string   `json:"modalias,omitempty"`
	Driver      string   `json:"driver,omitempty"`
	Variant     string   `json:"variant,omitempty"`        // module of a VFIO driver made for it
	Override    string   `json:"driverOverride,omitempty"` // "" when unset
	PowerState  string   `json:"powerState,omitempty"`
	Group       string   `json:"group,omitempty"` // IOMMU group's number
	Members     []string `json:"members,omitempty"`
	ResetMethod string   `json:"resetMethod,omitempty"`
	NUMANode    int      `json:"numaNode"` // -1: none
	LinkSpeed   string   `json:"linkSpeed,omitempty"`
	LinkWidth   string   `json:"linkWidth,omitempty"`
	BootVGA     bool     `json:"bootVGA,omitempty"`
	Framebuffer string   `json:"framebuffer,omitempty"` // fb0, where the card shows a console
	BARs        []BAR    `json:"bars,omitempty"`
	PhysFn      string   `json:"physfn,omitempty"` // of a virtual function: the card's address
	NumVFs      int      `json:"sriovNumVFs,omitempty"`
	TotalVFs    int      `json:"sriovTotalVFs,omitempty"`
	MdevTypes   []string `json:"mdevTypes,omitempty"`
	Mediated    []string `json:"mediated,omitempty"`      // UUIDs of the mediated devices that it gives away
	Nodes       []string `json:"nodes,omitempty"`         // of /dev
	Holders     []Holder `json:"holders,omitempty"`       // who has a node open
	Hidden      bool     `json:"holdersHidden,omitempty"` // others may have, whose open files only root sees
	Bridge      bool     `json:"bridge,omitempty"`
	Blocked     bool     `json:"blocked,omitempty"` // a driver starts, or does not let it go; override and virtual functions cannot be read
}

// ID is vendor:device in four digits each.
func (d *Device) ID() string { return fmt.Sprintf("%04x:%04x", d.Vendor, d.Device) }

// Title is the name of the device, or its id.
func (d *Device) Title() string {
	switch {
	case d.Name != "" && d.VendorName != "":
		return d.VendorName + " " + d.Name
	case d.Name != "":
		return d.Name
	}
	return d.ID()
}

// Memory is the size of the largest memory BAR, in bytes.
func (d *Device) Memory() (size uint64) {
	for _, b := range d.BARs {
		if !b.IO && b.Index != romIndex {
			size = max(size, b.Size)
		}
	}
	return size
}

// slot is the address without its function.
func (d *Device) slot() string {
	slot, _, _ := strings.Cut(d.Address, ".")
	return slot
}

const nvidia = 0x10de

// Endpoint reports whether this is something to pass on: a display
// controller, a processing accelerator, or NVIDIA's switch between its cards.
func (d *Device) Endpoint() bool {
	switch d.Class >> 8 {
	case 0x0300, 0x0302, 0x0380, 0x1200:
		return true
	case 0x0680:
		return d.Vendor == nvidia
	}
	return false
}

// IsSwitch reports whether this is an NVSwitch, which computes nothing.
func (d *Device) IsSwitch() bool { return d.Class>>8 == 0x0680 }

// Inventory is what a host has, at one moment.
type Inventory struct {
	Devices  []*Device // every PCI function, by address
	Mediated []*Mdev   // by UUID

	IOMMU         bool   // there are IOMMU groups
	CPUVendor     string // GenuineIntel, AuthenticAMD, …
	Virtual       bool   // the host is a virtual machine itself
	VFIOLoaded    bool   // the kernel has the vfio-pci driver
	VFIOAvailable bool   // it could load it
	Memlock       uint64 // bytes that this user may lock; MaxUint64 is all
	User          int    // who looks; others' open files are seen by root only
}

// GPUs lists the cards, accelerators and switches.
func (inv *Inventory) GPUs() (list []*Device) {
	for _, d := range inv.Devices {
		if d.Endpoint() {
			list = append(list, d)
		}
	}
	return list
}

// Cards are the GPUs without the switches between them.
func (inv *Inventory) Cards() []*Device { return slices.DeleteFunc(inv.GPUs(), (*Device).IsSwitch) }

// Get finds a function by its full address.
func (inv *Inventory) Get(address string) *Device {
	for _, d := range inv.Devices {
		if d.Address == address {
			return d
		}
	}
	return nil
}

// Unit lists what is passed on together with a device: every function of its
// slot. A virtual function is a unit of its own, wherever its address lies.
func (inv *Inventory) Unit(d *Device) []*Device {
	if d.PhysFn != "" {
		return []*Device{d}
	}
	var unit []*Device
	for _, o := range inv.Devices {
		if o.slot() == d.slot() && o.PhysFn == "" && !o.Bridge {
			unit = append(unit, o)
		}
	}
	return unit
}

// Inventory looks at the host.
func (h Host) Inventory() (*Inventory, error) {
	inv := &Inventory{
		IOMMU:      len(h.names(iommuDir)) > 0,
		CPUVendor:  h.cpuInfo("vendor_id"),
		Virtual:    slices.Contains(strings.Fields(h.cpuInfo("flags")), "hypervisor"),
		VFIOLoaded: h.exists(pciDrivers, vfioDriver),
		User:       os.Geteuid(),
		Memlock:    math.MaxUint64,
	}
	inv.VFIOAvailable = inv.VFIOLoaded || h.moduleAvailable(vfioDriver)
	if inv.User != 0 { // root is bound by none: CAP_IPC_LOCK
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err == nil {
			inv.Memlock = limit.Cur
		}
	}
	entries, err := os.ReadDir(h.at(pciDevices))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no PCI at all is fine
		return nil, fmt.Errorf("list PCI devices: %w", err)
	}
	variants := h.vfioAliases()
	for _, e := range entries {
		d, err := h.device(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // unplugged meanwhile
		} else if err != nil {
			return nil, err
		}
		d.Variant = variants.best(d.Modalias)
		inv.Devices = append(inv.Devices, d)
	}
	if err := h.readLocked(inv.Devices, glance); err != nil {
		return nil, err
	}
	inv.Mediated = h.mediated(inv)
	gpus := inv.GPUs()
	h.nameDevices(gpus)
	h.findHolders(inv)
	inv.hideHolders()
	return inv, nil
}

// device reads one function.
func (h Host) device(address string) (*Device, error) {
	dir := filepath.Join(pciDevices, address)
	resource, err := os.ReadFile(h.at(dir, "resource"))
	if err != nil {
		return nil, fmt.Errorf("read PCI device %s: %w", address, err)
	}
	bars, err := parseBARs(string(resource))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", h.at(dir, "resource"), err)
	}
	d := &Device{
		Address: address, BARs: bars,
		Vendor: uint16(h.number(dir, "vendor")), Device: uint16(h.number(dir, "device")),
		Subsystem: fmt.Sprintf("%04x:%04x", uint16(max(0, h.number(dir, "subsystem_vendor"))), uint16(max(0, h.number(dir, "subsystem_device")))),
		Class:     uint32(max(0, h.number(dir, "class"))), Revision: uint8(max(0, h.number(dir, "revision"))),
		Modalias: h.text(dir, "modalias"), Driver: h.link(dir, "driver"),
		PowerState: h.text(dir, "power_state"), Group: h.link(dir, "iommu_group"), ResetMethod: h.text(dir, "reset_method"),
		NUMANode:  int(h.number(dir, "numa_node")),
		LinkSpeed: h.text(dir, "current_link_speed"), LinkWidth: h.text(dir, "current_link_width"),
		BootVGA: h.number(dir, "boot_vga") == 1, PhysFn: h.link(dir, "physfn"),
		TotalVFs:  int(max(0, h.number(dir, "sriov_totalvfs"))),
		MdevTypes: h.names(dir, "mdev_supported_types"),
	}
	if d.Group != "" {
		d.Members = h.names(iommuDir, d.Group, "devices")
	}
	d.Bridge = h.bridge(d)
	d.Framebuffer = h.framebuffer(dir)
	d.Nodes = h.nodes(d)
	return d, nil
}

// readLocked completes functions with what the kernel may keep to itself.
func (h Host) readLocked(devices []*Device, patience time.Duration) error {
	var addresses []string
	for _, d := range devices {
		addresses = append(addresses, d.Address)
	}
	read, err := h.locked(patience, addresses...)
	if err != nil {
		return err
	}
	for _, d := range devices {
		files, ok := read[d.Address]
		d.Blocked = !ok
		d.Override = files.override()
		d.NumVFs, _ = strconv.Atoi(files.NumVFs) // there is none where it cannot have any
	}
	return nil
}

// bridge looks at the type of the configuration header, and at the class
// where that cannot be read.
func (h Host) bridge(d *Device) bool {
	const headerType = 0x0e
	config, err := os.ReadFile(h.at(pciDevices, d.Address, "config"))
	if err == nil && len(config) > headerType && config[headerType] != 0xff {
		return config[headerType]&0x7f == 1
	}
	return d.Class>>8 == 0x0604
}

// framebuffer is the console that lies on the card: the driver's own, or the
// firmware's, which newer kernels hang below the card in sysfs.
func (h Host) framebuffer(dir string) string {
	for _, pattern := range []string{"graphics/fb*", "*/graphics/fb*", "drm/card*/fb*"} {
		if found, err := filepath.Glob(h.at(dir, pattern)); err == nil && len(found) > 0 {
			return filepath.Base(found[0])
		}
	}
	return ""
}

// cpuInfo is what the kernel says of the first processor.
func (h Host) cpuInfo(name string) string {
	for line := range strings.Lines(h.text("/proc/cpuinfo")) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// moduleAvailable looks a module up among those that modprobe would find.
func (h Host) moduleAvailable(name string) bool {
	dir := filepath.Join("/lib/modules", h.text("/proc/sys/kernel/osrelease"))
	return slices.ContainsFunc([]string{"modules.dep", "modules.builtin"}, func(list string) bool {
		return strings.Contains(h.text(dir, list), "/"+name+".ko")
	})
}
