package qemu

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

const (
	iommuDevice = "/dev/iommu"
	groupsIOMMU = "/dev/vfio/vfio" // by which devices that are opened as a group reach their IOMMU
)

// usesIOMMUFD reports whether the machine opens devices through /dev/iommu.
func usesIOMMUFD(m vm.Machine) bool { return m.IOMMUFD && m.HasDevices() }

// CanIOMMUFD reports whether QEMU had better open a machine's devices, of so many
// slots, through /dev/iommu when it runs as runAs, or with nil as the calling
// user. The kernel makes that root's.
func CanIOMMUFD(caps Caps, slots int, runAs *vm.Owner) bool {
	return canIOMMUFD("/", caps, slots, runAs, mayLock())
}

// canIOMMUFD leaves it where groups can do what /dev/iommu cannot:
//
//   - Devices of one machine reach each other's memory. Linux 6.12 has QEMU
//     warn that "PCI peer-to-peer transactions on BARs are not supported".
//   - A user has several machines. What all processes of a user lock is counted
//     together, against the limit of the one that locks (incr_user_locked_vm in
//     drivers/iommu/iommufd/pages.c), and by groups each process for itself. With
//     a limit that is enough for one machine, the second would not start.
func canIOMMUFD(root string, caps Caps, slots int, runAs *vm.Owner, lock uint64) bool {
	if slots > 1 || runAs == nil && lock != unix.RLIM_INFINITY {
		if _, err := os.Stat(filepath.Join(root, groupsIOMMU)); err == nil {
			return false
		}
	}
	if !caps.HasObject(iommufdType) || !hasDeviceNodes(filepath.Join(root, "proc/devices")) {
		return false
	}
	path := filepath.Join(root, iommuDevice)
	if runAs != nil {
		var st unix.Stat_t
		return unix.Stat(path, &st) == nil && opens(st, *runAs)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// LockLimit is the limit of locked memory that the machine's process gets: what
// it needs, and by /dev/iommu all that is allowed where it shares its user with
// others, for all of whom it has to be enough.
func LockLimit(m vm.Machine) uint64 { return lockLimit(m, mayLock()) }

func lockLimit(m vm.Machine, may uint64) uint64 {
	need := LockedMemory(m)
	if m.RunAs == nil && usesIOMMUFD(m) {
		return max(need, may)
	}
	return need
}

// mayLock is how many bytes this process may allow itself to lock.
func mayLock() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return 0
	}
	return limit.Max
}

// vfioNodes is the kernel's name for nodes of devices, and not of groups
// (drivers/vfio/device_cdev.c).
var vfioNodes = vm.Pattern(`(?m)^ *[0-9]+ vfio-dev$`)

// hasDeviceNodes reports whether VFIO makes a node for each device. /dev/vfio/devices
// would not tell before the first device is bound. file is /proc/devices.
func hasDeviceNodes(file string) bool {
	list, err := os.ReadFile(file)
	return err == nil && vfioNodes().Match(list)
}

// opens reports whether a node lets a process of the user's read and write, with
// the node's group if that can be lent (Groups).
func opens(st unix.Stat_t, user vm.Owner) bool {
	class := uint32(0o006)
	switch {
	case int(st.Uid) == user.UID:
		class = 0o600
	case int(st.Gid) == user.GID || lendable(st):
		class = 0o060
	}
	return st.Mode&class == class
}
