package gpu

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/agentvm/agentvm/vm"
)

// Mdev is a mediated device: a part of a card that the card's driver gives
// away, and keeps. Nothing is bound for it, only its nodes change hands, under
// a journal as a card's do.
type Mdev struct {
	UUID    string   `json:"uuid"`
	Type    string   `json:"type"`
	Group   string   `json:"group,omitempty"`
	Driver  string   `json:"driver,omitempty"`        // that has it; a VFIO driver
	Card    *Device  `json:"-"`                       // whose part it is; nil where that is no PCI device
	Nodes   []string `json:"nodes,omitempty"`         // of /dev
	Holders []Holder `json:"holders,omitempty"`       // who has a node open
	Hidden  bool     `json:"holdersHidden,omitempty"` // as a card's
}

// mdevDevices is where the kernel lists mediated devices.
const mdevDevices = "/sys/bus/mdev/devices"

// uuidPattern is how the kernel names them.
var uuidPattern = vm.Pattern(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// IsUUID reports whether a name is that of a mediated device.
func IsUUID(name string) bool { return uuidPattern().MatchString(name) }

// mediated lists the mediated devices, and notes at their cards that they are there.
func (h Host) mediated(inv *Inventory) (list []*Mdev) {
	for _, uuid := range h.names(mdevDevices) {
		if !IsUUID(uuid) {
			continue
		}
		dir := filepath.Join(mdevDevices, uuid)
		m := &Mdev{UUID: uuid, Type: cmp.Or(h.text(dir, "mdev_type", "name"), h.link(dir, "mdev_type")), Group: h.link(dir, "iommu_group"), Driver: h.link(dir, "driver")}
		m.Nodes = h.vfioNodes(m.Group, dir)
		// The link leads to …/CARD/UUID.
		if target, err := os.Readlink(h.at(dir)); err == nil {
			m.Card = inv.Get(filepath.Base(filepath.Dir(target)))
		}
		if m.Card != nil {
			m.Card.Mediated = append(m.Card.Mediated, uuid)
		}
		list = append(list, m)
	}
	return list
}

// vfioNodes are the nodes by which a device of VFIO is opened: its group, and
// on newer kernels the device itself. A kernel may have either kind alone.
func (h Host) vfioNodes(group, dir string) (nodes []string) {
	if group != "" {
		nodes = append(nodes, "/dev/vfio/"+group)
	}
	for _, name := range h.names(dir, "vfio-dev") {
		nodes = append(nodes, "/dev/vfio/devices/"+name)
	}
	return nodes
}

// GetMediated finds a mediated device by its UUID; nil: there is none.
func (inv *Inventory) GetMediated(uuid string) *Mdev {
	for _, m := range inv.Mediated {
		if m.UUID == uuid {
			return m
		}
	}
	return nil
}

// FindMediated is GetMediated, with an error where there is none.
func (inv *Inventory) FindMediated(uuid string) (*Mdev, error) {
	if m := inv.GetMediated(uuid); m != nil {
		return m, nil
	}
	return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("this host has no mediated device %s", uuid)),
		"make one: echo "+uuid+" | sudo tee /sys/class/mdev_bus/ADDRESS/mdev_supported_types/TYPE/create")
}

// CheckMediated says what speaks against giving a mediated device to a machine.
// taken tells who has what, as [Manager.Taken] does.
func CheckMediated(inv *Inventory, m *Mdev, taken map[string]Claim) (findings []Finding) {
	if c, ok := taken[m.UUID]; ok {
		findings = append(findings, checkTaken(m.UUID, c))
	}
	problem := func(code, detail, fix string) {
		findings = append(findings, Finding{Code: code, Severity: Problem, Device: m.UUID, Detail: detail, Fix: fix})
	}
	if m.Driver == "" {
		problem(NoVFIO, "no driver has it", "see that the module of its VFIO driver is loaded")
	}
	if m.Group == "" {
		problem(NoGroup, "it is in no IOMMU group", "look for its driver's messages in dmesg")
	}
	if len(m.Holders) > 0 {
		problem(Held, "it is in use by "+holders(m.Holders), stopHolders(m.Holders))
	}
	findings = append(findings, checkMemlock(inv)...)
	if m.Hidden {
		findings = append(findings, Finding{Code: HoldersHidden, Severity: Warning, Device: m.UUID, Detail: "only your own processes were looked at for open files of it", Fix: "sudo agentvm gpu check " + m.UUID})
	}
	return findings
}

// free refuses what CheckMediated finds a problem with.
func (m *Mdev) free(inv *Inventory) error {
	if f := inTheWay(CheckMediated(inv, m, nil)); f != nil {
		return refusal(m.UUID, *f)
	}
	return nil
}

// slot describes a mediated device to a machine.
func (m *Mdev) slot() vm.Slot {
	return vm.Slot{Functions: []vm.Function{{Mediated: m.UUID, Name: m.Type, Group: m.Group, HideROM: true}}}
}

// parts lists the mediated devices among names.
func (inv *Inventory) parts(names []string) (list []*Mdev, err error) {
	for _, name := range names {
		if !IsUUID(name) {
			continue
		}
		m, err := inv.FindMediated(name)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(list, m) {
			list = append(list, m)
		}
	}
	return list, nil
}

// mediated reports whether a journal is that of a mediated device.
func (j *Journal) mediated() bool { return IsUUID(j.Address) }

// restoreMediated takes the nodes back, as far as they are still those of the
// device: one that was removed took its group along, and the kernel may have
// given its number to another, whose user it is not ours to change.
func (m *Manager) restoreMediated(j *Journal) (action Action, detail string, err error) {
	if !m.Host.exists(mdevDevices, j.Address) {
		return Dropped, "the mediated device is gone, and its nodes with it", nil
	}
	dir := filepath.Join(mdevDevices, j.Address)
	still := m.Host.vfioNodes(m.Host.link(dir, "iommu_group"), dir)
	gone := func(g Grant) bool { return !slices.Contains(still, g.Path) }
	if len(j.Grants) > 0 && !slices.ContainsFunc(j.Grants, func(g Grant) bool { return !gone(g) }) {
		return Dropped, "it was made anew meanwhile, and is the host's", nil
	}
	given := *j
	given.Grants = slices.DeleteFunc(slices.Clone(j.Grants), gone)
	return Restored, "it is the host's again", m.revoke(&given)
}
