package vm

import (
	"cmp"
	"math/bits"
	"slices"
)

// Machine is the hardware of one virtual machine, described without a word of
// any backend: the direct QEMU backend renders it as arguments, another may
// render it as XML. Every path is absolute. Whoever builds a Machine has
// already decided everything; rendering it is a pure function.
type Machine struct {
	Name   string // instance name, for humans (process title, logs)
	UUID   string // SMBIOS UUID, RFC 4122 text form
	CPUs   int    // number of virtual CPUs, at least 1
	Memory int64  // guest RAM in bytes, a multiple of 1 MiB

	Accel    Accel  // how the guest's instructions are executed
	CPUModel string // backend's CPU model name; empty: the best for Accel

	Boot   Boot
	Disks  []Disk
	Shares []Share
	NICs   []NIC

	Console string // file that receives the guest's serial console
	QMP     string // unix socket on which the backend's control protocol listens
	Line    string // unix socket of a serial line into the guest; empty: none
	PIDFile string // empty: none
	RunAs   *Owner // nil: the calling user

	// Ports is the number of PCIe root ports. Share i sits in port i; a port
	// without a share takes one while the machine runs.
	Ports int

	// MemoryFile backs guest RAM with this file instead of an anonymous
	// memfd. Both are shared mappings, which vhost-user devices need.
	MemoryFile string

	// Slots are the host's PCI devices that the machine has to itself. All of its
	// memory stays where it is then, because devices reach it by its address.
	Slots []Slot

	// IOMMUFD has those opened through /dev/iommu, which the machine's user can
	// open, and not through their groups.
	IOMMUFD bool

	// HugePages is the size of the host's pages that guest memory lies in, in
	// bytes, taken from those set aside for that; 0: the usual ones.
	HugePages int64

	// Near is the part of the host that memory and CPUs come from; nil: any.
	Near *Node

	// Saved is a directory of package saved, to go on from instead of booting:
	// the machine starts paused, and without its shares, which are plugged in
	// before it resumes. Empty: boot.
	Saved string
}

// Accel names how guest code runs.
type Accel string

const (
	AccelKVM Accel = "kvm" // hardware virtualization
	AccelTCG Accel = "tcg" // emulation; QEMU makes no isolation promise for it
)

// Boot says where the guest's first code comes from. With Kernel set, it is
// loaded directly and Firmware is ignored.
type Boot struct {
	Kernel  string // bzImage
	Initrd  string // may be empty
	Cmdline string

	Firmware Firmware // for disks that bring their own boot loader
	VarsFile string   // UEFI only: this instance's private copy of the variables
}

// Firmware names the guest's platform firmware.
type Firmware string

const (
	FirmwareBIOS Firmware = "bios"
	FirmwareUEFI Firmware = "uefi"
)

// Disk is one virtio block device.
type Disk struct {
	ID       string // unique within the machine: [a-z][a-z0-9-]*
	Path     string
	Format   string // raw or qcow2; never probed, so that a guest cannot choose
	ReadOnly bool
	Serial   string // shown to the guest, at most 20 bytes
}

// Share is one virtiofs device whose server already listens.
type Share struct {
	Tag    string // virtiofs tag, at most 36 bytes
	Socket string // vhost-user unix socket
	Queues int    // request queues; 0: the backend's default
}

// NIC is one virtio network card whose frames go to a unix stream socket,
// each with a 32-bit big-endian length before it.
type NIC struct {
	MAC    string
	Socket string
	MTU    int // told to the guest's driver; 0: the guest's default
}

// Slot is a PCI device of the host, with those of its functions that the guest
// sees, together, in a port of their own. One that goes on from a saved state
// has them plugged in before it runs.
type Slot struct {
	Functions []Function // by address; none: the port is empty
	Room      int64      // bytes that the port has for what is plugged in later; 0: what is in it is there from the start
}

// prefetchable are the sizes, in bytes, of the slot's regions that bridges
// forward in one window of 64 bits.
func (s Slot) prefetchable() (sum, largest int64) {
	for _, f := range s.Functions {
		for _, r := range f.Regions {
			if r.Bits64 && r.Prefetchable {
				sum += r.Size
				largest = max(largest, r.Size)
			}
		}
	}
	return sum, largest
}

// Window is the room that the slot's port needs for 64-bit prefetchable memory,
// in bytes.
func (s Slot) Window() int64 {
	if s.Room > 0 {
		return s.Room
	}
	sum, _ := s.prefetchable()
	if sum > 1 {
		sum = 1 << bits.Len64(uint64(sum-1))
	}
	return sum
}

// ForLater is the slot with room for what is in it to be plugged in later.
// Firmware aligns a window by what is there when it looks, and regions lie at
// multiples of their size: so the largest must fit once more.
func (s Slot) ForLater() Slot {
	const granularity = 1 << 20 // of bridges' windows
	if sum, largest := s.prefetchable(); s.Room == 0 && sum > 0 {
		s.Room = (sum + largest + granularity - 1) / granularity * granularity
	}
	return s
}

// HasDevices reports whether the machine has a device of the host.
func (m Machine) HasDevices() bool {
	return slices.ContainsFunc(m.Slots, func(s Slot) bool { return len(s.Functions) > 0 })
}

// SlotsForLater are the machine's slots for what is plugged in later; empty are
// the same before.
func (m Machine) SlotsForLater() (full, empty []Slot) {
	for _, s := range m.Slots {
		s = s.ForLater()
		full = append(full, s)
		empty = append(empty, Slot{Room: s.Room})
	}
	return full, empty
}

// Function is one function of a PCI device, or a mediated device.
type Function struct {
	Address  string // domain:bus:device.function on the host; empty: mediated
	Mediated string // UUID of a mediated device (the kernel's vfio-mediated-device.rst)
	ID       string // vendor:device in four hexadecimal digits each; may be empty
	Name     string // for people; may be empty
	Group    string // IOMMU group's number
	Regions  []Region
	ROM      string // file to show as its option ROM
	HideROM  bool   // show none: computing needs none, and firmware would run it
}

// Title names the function to people.
func (f Function) Title() string { return cmp.Or(f.Name, f.ID, f.Mediated) }

// Region is memory of a function that the guest sees in its address space.
type Region struct {
	Size         int64 // bytes, a power of two
	Bits64       bool
	Prefetchable bool
}

// Mapped is the size of all memory of devices that the guest sees, in bytes.
func (m Machine) Mapped() (size int64) {
	for _, s := range m.Slots {
		for _, f := range s.Functions {
			for _, r := range f.Regions {
				size += r.Size
			}
		}
	}
	return size
}

// Node is a NUMA node of the host.
type Node struct {
	ID   int
	CPUs []int
}

// Owner is a numeric user and group on the host.
type Owner struct {
	UID, GID int
}
