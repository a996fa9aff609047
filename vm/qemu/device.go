package qemu

import (
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// defaultHole64 is what q35, and OVMF too, have of room above the memory for
// devices, in bytes (hw/pci-host/q35.c, OvmfPkg/Library/PlatformInitLib/MemDetect.c).
const defaultHole64 = 32 << 30

// powerOfTwo is the least power of two that holds n.
func powerOfTwo(n int64) int64 {
	if n <= 1 {
		return n
	}
	return 1 << bits.Len64(uint64(n-1))
}

// hole64 is the room above the memory that all ports' windows need: with the
// largest once more, so that none fails to fit for its alignment.
func hole64(m vm.Machine) (size int64) {
	var largest int64
	for _, s := range m.Slots {
		size += s.Window()
		largest = max(largest, s.Window())
	}
	return size + largest
}

// AddressSpace is what a machine's devices need beyond what there is: bytes above
// the memory, and MiB that OVMF, whose older versions do not look at what there
// is, has to be told of. 0: there is enough.
func AddressSpace(m vm.Machine) (hole, window int64) {
	if hole = hole64(m); hole <= defaultHole64 {
		return 0, 0
	}
	if needsUEFI(m) {
		window = powerOfTwo(hole) >> 20
	}
	return hole, window
}

// devices makes the ports for the host's devices, and passes on what is in them.
// That of a restored machine is plugged in later.
func (a *args) devices(m vm.Machine) {
	if len(m.Slots) == 0 {
		return
	}
	hole, window := AddressSpace(m)
	if hole > 0 {
		a.option("-global", "", "q35-pcihost.pci-hole64-size", hole)
	}
	if window > 0 {
		a.option("-fw_cfg", "", "name", "opt/ovmf/X-PciMmio64Mb", "string", window)
	}
	if usesIOMMUFD(m) {
		a.option("-object", iommufdType, "id", iommufdID)
	}
	for i, s := range m.Slots {
		window := s.Window()
		a.option("-device", "pcie-root-port", "id", devicePort(i), "chassis", m.Ports+i+1, "slot", m.Ports+i+1, "pref64-reserve", unless(window == 0, window))
		if m.Saved != "" {
			continue
		}
		for n := range s.Functions {
			a.option("-device", functionDriver, function(i, n, s, m.IOMMUFD)...)
		}
	}
}

// How a device of the host is passed on, whether it is there from the start or
// plugged in.
const (
	functionDriver = "vfio-pci"
	iommufdType    = "iommufd"
	iommufdID      = "iommufd0"
)

func devicePort(i int) string { return fmt.Sprintf("dp%d", i) }

// function returns the names and values of the properties of function n of slot i.
func function(i, n int, s vm.Slot, iommufd bool) []any {
	f := s.Functions[n]
	return []any{"host", unless(f.Address == "", f.Address), "sysfsdev", unless(f.Mediated == "", "/sys/bus/mdev/devices/"+f.Mediated),
		"id", fmt.Sprintf("dev%d-%d", i, n), "bus", devicePort(i), "addr", fmt.Sprintf("0x0.0x%d", FunctionNumber(s, n)), "multifunction", unless(len(s.Functions) == 1, n == 0),
		"rombar", unless(!f.HideROM, 0), "romfile", unless(f.ROM == "", f.ROM), "iommufd", unless(!iommufd, iommufdID)}
}

// FunctionNumber is the number that function n of a slot has in the guest: its
// own, as some drivers expect, where the slot has the function 0 that it must have.
func FunctionNumber(s vm.Slot, n int) int {
	own := func(f vm.Function) int {
		_, digit, _ := strings.Cut(f.Address, ".")
		n, err := strconv.Atoi(digit)
		if err != nil {
			return -1
		}
		return n
	}
	if own(s.Functions[0]) != 0 {
		return n
	}
	return own(s.Functions[n])
}

// memory is where guest memory lies.
func (a *args) memory(m vm.Machine) {
	// vhost-user servers map guest memory, so it must be shared.
	size := fmt.Sprintf("%dM", m.Memory>>20)
	if m.MemoryFile != "" {
		a.option("-object", "memory-backend-file", "id", "mem", "size", size, "mem-path", m.MemoryFile, "share", true)
		return
	}
	var node, policy any
	if m.Near != nil {
		node, policy = m.Near.ID, "bind"
	}
	huge := unless(m.HugePages == 0, true)
	a.option("-object", "memory-backend-memfd", "id", "mem", "size", size, "share", true, "hugetlb", huge, "hugetlbsize", unless(m.HugePages == 0, fmt.Sprintf("%dM", m.HugePages>>20)),
		"prealloc", huge, "host-nodes", node, "policy", policy) // without prealloc, a lack of huge pages kills the guest later
}

// deviceMemory is what the kernel counts as locked besides guest memory: pages
// of QEMU's own that the device may reach.
const deviceMemory = 1 << 30

// LockedMemory is how many bytes the machine's process has to be allowed to
// lock: a device may reach any of the guest's memory at any time. 0: none.
func LockedMemory(m vm.Machine) uint64 {
	if !m.HasDevices() {
		return 0
	}
	need := uint64(m.Memory) + deviceMemory
	if m.IOMMUFD { // which counts what devices map of each other
		need += uint64(m.Mapped())
	}
	return need
}

var (
	pciAddress = vm.Pattern(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)
	maxSlots   = 16
)

func checkSlots(m vm.Machine) error {
	var errs []error
	fault := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	fault(len(m.Slots) > maxSlots, "%d devices of the host", len(m.Slots))
	fault(m.HugePages < 0 || m.HugePages%(1<<20) != 0 || m.HugePages > 0 && m.Memory%m.HugePages != 0, "huge pages of %d bytes for %d bytes of memory", m.HugePages, m.Memory)
	fault((m.HugePages > 0 || m.Near != nil) && m.MemoryFile != "", "memory in a file has no pages and no node of its own")
	fault(m.Near != nil && m.Near.ID < 0, "there is no NUMA node of a negative number")
	seen := map[string]bool{}
	for _, s := range m.Slots {
		fault(len(s.Functions) > 8, "a device with %d functions", len(s.Functions))
		fault(s.Room < 0 || s.Room%(1<<20) != 0, "room of %d bytes for a device is not in whole MiB", s.Room)
		for _, f := range s.Functions {
			name := f.Address + f.Mediated
			fault((f.Address == "") == (f.Mediated == ""), "a device has either an address or the UUID of a mediated device, not %q and %q", f.Address, f.Mediated)
			fault(f.Address != "" && !pciAddress().MatchString(f.Address), "%q is not a PCI address", f.Address)
			fault(f.Mediated != "" && !uuidText().MatchString(f.Mediated), "%q is not the UUID of a mediated device", f.Mediated)
			fault(seen[name], "device %s is there twice", name)
			fault(f.ROM != "" && f.HideROM, "the ROM of %s is both given and hidden", name)
			seen[name] = true
			errs = append(errs, checkPath("ROM of "+name, f.ROM, false))
			for _, r := range f.Regions {
				fault(r.Size <= 0 || r.Size&(r.Size-1) != 0, "a region of %d bytes of %s is no power of two", r.Size, name)
			}
		}
	}
	return errors.Join(errs...)
}
