package gpu

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/agentvm/agentvm/vm"
)

// Holder is a process that has a device's node open.
type Holder struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	Path    string `json:"path"`
	Service string `json:"service,omitempty"` // of the host's systemd, that runs it
}

// String tells people of a holder.
func (h Holder) String() string {
	return fmt.Sprintf("%s (process %d, %s)", h.Command, h.PID, h.Path)
}

// stopHolders says how to stop holders, services by their names: each would be
// started again by systemd otherwise.
func stopHolders(list []Holder) string {
	var services []string
	others := false
	for _, h := range list {
		if others = others || h.Service == ""; h.Service != "" && !slices.Contains(services, h.Service) {
			services = append(services, h.Service)
		}
	}
	if len(services) == 0 {
		return "stop them"
	}
	fix := "sudo systemctl stop " + strings.Join(services, " ")
	if others {
		fix += ", and stop the others"
	}
	return fix
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
		if minor := h.nvidiaSays(d.Address, "Device Minor"); minor != "" { // of /dev/nvidia0, 1, …
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

// nvidiaSays is what NVIDIA's driver says of a card, or "".
func (h Host) nvidiaSays(address, key string) string {
	for line := range strings.Lines(h.text("/proc/driver/nvidia/gpus", address, "information")) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
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
					*w.holders = append(*w.holders, Holder{PID: pid, Command: printable(h.text("/proc", name, "comm")), Path: target, Service: h.service(name)})
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

// hideHolders notes what nobody but root can know all holders of.
func (inv *Inventory) hideHolders() {
	for _, d := range inv.Devices {
		d.Hidden = inv.User != 0 && len(d.Nodes) > 0
	}
	for _, m := range inv.Mediated {
		m.Hidden = inv.User != 0 && len(m.Nodes) > 0
	}
}

// servicePattern is a service of the host, not of a user's session, as the name of
// its control group in either hierarchy.
var servicePattern = vm.Pattern(`^[0-9]+:(?:|name=systemd):/system\.slice/(?:[^/]+\.slice/)*([A-Za-z0-9:_.@\\-]+\.service)$`)

// service is the systemd service that a process is of, or "".
func (h Host) service(pid string) string {
	for line := range strings.Lines(h.text("/proc", pid, "cgroup")) {
		if m := servicePattern().FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			return m[1]
		}
	}
	return ""
}

// printable is a name without what could drive a terminal: processes choose their
// names themselves.
func printable(name string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, name)
}
