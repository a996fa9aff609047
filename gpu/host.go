package gpu

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Host is where devices are looked for and bound.
type Host struct {
	Root string // "/", or a test's stand-in for it

	// Write writes a file below /sys, given by its path on the host. Nil
	// writes for real, with a deadline.
	Write func(ctx context.Context, path, data string) error

	Patience time.Duration // with one write, or with what keeps a value from being read; 0: 30 s, as drivers of large cards take seconds to let go

	// Blocked reports whether a function's lock is held, where Root is a stand-in.
	// Nil means never.
	Blocked func(address string) bool

	// Chown gives a node of /dev to a user. Nil does so for real.
	Chown func(path string, uid int) error

	// Load loads a module. Nil does so for real.
	Load func(ctx context.Context, module string) error

	// Viable reports why the kernel does not let an IOMMU group be used. Nil
	// asks the kernel.
	Viable func(group string) error
}

// at is the path of a host's file below the root.
func (h Host) at(path ...string) string {
	return filepath.Join(append([]string{h.Root}, path...)...)
}

// text reads a file of one value; "" when there is none.
func (h Host) text(path ...string) string {
	data, err := os.ReadFile(h.at(path...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// number reads a file of one number, decimal or 0x…; -1 when there is none.
func (h Host) number(path ...string) int64 {
	n, err := strconv.ParseInt(h.text(path...), 0, 64)
	if err != nil {
		return -1
	}
	return n
}

// link is the last element of what a symbolic link points to, or "".
func (h Host) link(path ...string) string {
	target, err := os.Readlink(h.at(path...))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

// names lists a directory's entries, sorted; none when there is none.
func (h Host) names(path ...string) (names []string) {
	entries, err := os.ReadDir(h.at(path...))
	if err != nil {
		return nil
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (h Host) exists(path ...string) bool {
	_, err := os.Lstat(h.at(path...))
	return err == nil
}

func (h Host) patience() time.Duration { return cmp.Or(h.Patience, 30*time.Second) }

const (
	pciDevices = "/sys/bus/pci/devices"
	pciDrivers = "/sys/bus/pci/drivers"
	iommuDir   = "/sys/kernel/iommu_groups"

	vfioDriver = "vfio-pci"
)
