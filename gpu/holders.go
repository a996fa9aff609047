package gpu

import (
	"cmp"
	"fmt"
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

// String tells people of a holder.
func (h Holder) String() string {
	return fmt.Sprintf("%s (process %d, %s)", h.Command, h.PID, h.Path)
}

func holders(list []Holder) string {
	var who []string
	for _, h := range list {
		who = append(who, h.String())
	}
	return strings.Join(who, ", ")
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
	if isVFIO(d.Driver) {
		nodes = append(nodes, h.vfioNodes(d.Group, filepath.Join(pciDevices, d.Address))...)
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
	type watched struct {
		nodes   []string
		holders *[]Holder
	}
	var all []watched
	for _, d := range inv.Devices {
		if len(d.Nodes) > 0 {
			all = append(all, watched{d.Nodes, &d.Holders})
		}
	}
	for _, m := range inv.Mediated {
		all = append(all, watched{m.Nodes, &m.Holders})
	}
	if len(all) == 0 {
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
			for _, w := range all {
				if slices.ContainsFunc(w.nodes, func(node string) bool { ok, _ := filepath.Match(node, target); return ok }) {
					*w.holders = append(*w.holders, Holder{PID: pid, Command: h.text("/proc", name, "comm"), Path: target})
				}
			}
		}
	}
	for _, w := range all {
		slices.SortFunc(*w.holders, func(a, b Holder) int {
			return cmp.Or(cmp.Compare(a.PID, b.PID), cmp.Compare(a.Path, b.Path))
		})
	}
}
