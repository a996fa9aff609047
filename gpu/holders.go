package gpu

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Holder is a process that has a device's node open.
type Holder struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	Path    string `json:"path"`
}

// nodes lists the files of /dev that lead to a function.
func (h Host) nodes(d *Device) (nodes []string) {
	for _, name := range h.names(pciDevices, d.Address, "drm") {
		if strings.HasPrefix(name, "card") || strings.HasPrefix(name, "renderD") {
			nodes = append(nodes, "/dev/dri/"+name)
		}
	}
	if d.Driver == "nvidia" {
		if minor := h.nvidiaMinor(d.Address); minor != "" {
			nodes = append(nodes, "/dev/nvidia"+minor)
		} else {
			nodes = append(nodes, "/dev/nvidia*")
		}
	}
	if isVFIO(d.Driver) && d.Group != "" {
		nodes = append(nodes, "/dev/vfio/"+d.Group)
	}
	if isVFIO(d.Driver) {
		for _, name := range h.names(pciDevices, d.Address, "vfio-dev") {
			nodes = append(nodes, "/dev/vfio/devices/"+name)
		}
	}
	return nodes
}

// nvidiaMinor asks NVIDIA's driver which of /dev/nvidia0, 1, … a card is.
func (h Host) nvidiaMinor(address string) string {
	for line := range strings.Lines(h.text("/proc/driver/nvidia/gpus", address, "information")) {
		if value, ok := strings.CutPrefix(line, "Device Minor:"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// findHolders notes at each device who has its nodes open. Other users'
// processes are open to root alone, and processes that end meanwhile are gone.
func (h Host) findHolders(inv *Inventory) {
	wanted := false
	for _, d := range inv.Devices {
		wanted = wanted || len(d.Nodes) > 0
	}
	if !wanted {
		return
	}
	for _, name := range h.names("/proc") {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		seen := map[string]bool{}
		for _, fd := range h.names("/proc", name, "fd") {
			target, err := os.Readlink(h.at("/proc", name, "fd", fd))
			if err != nil || !strings.HasPrefix(target, "/dev/") || seen[target] {
				continue
			}
			seen[target] = true
			for _, d := range inv.Devices {
				if slices.ContainsFunc(d.Nodes, func(node string) bool { ok, _ := filepath.Match(node, target); return ok }) {
					d.Holders = append(d.Holders, Holder{PID: pid, Command: h.text("/proc", name, "comm"), Path: target})
				}
			}
		}
	}
	for _, d := range inv.Devices {
		slices.SortFunc(d.Holders, func(a, b Holder) int {
			return cmp.Or(cmp.Compare(a.PID, b.PID), cmp.Compare(a.Path, b.Path))
		})
	}
}
