package qemu

import (
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

const iommuDevice = "/dev/iommu"

// usesIOMMUFD reports whether the machine opens devices through /dev/iommu.
func usesIOMMUFD(m vm.Machine) bool { return m.IOMMUFD && m.HasDevices() }

// CanIOMMUFD reports whether QEMU can open devices through /dev/iommu when it
// runs as runAs, or with nil as the calling user. The kernel makes that root's.
func CanIOMMUFD(caps Caps, runAs *vm.Owner) bool { return canIOMMUFD("/", caps, runAs) }

func canIOMMUFD(root string, caps Caps, runAs *vm.Owner) bool {
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

// vfioNodes is the kernel's name for nodes of devices, and not of groups
// (drivers/vfio/device_cdev.c).
var vfioNodes = regexp.MustCompile(`(?m)^ *[0-9]+ vfio-dev$`)

// hasDeviceNodes reports whether VFIO makes a node for each device. /dev/vfio/devices
// would not tell before the first device is bound. file is /proc/devices.
func hasDeviceNodes(file string) bool {
	list, err := os.ReadFile(file)
	return err == nil && vfioNodes.Match(list)
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
