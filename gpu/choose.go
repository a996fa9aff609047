package gpu

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Want is a machine's wish for cards.
type Want struct {
	Use   string // as Select takes it, or the UUID of a mediated device
	Count int    // how many; 0 is 1
	ROM   string // file with the option ROM that the guest sees; empty: the card's own
}

// NoNode is any NUMA node.
const NoNode = -1

// Choose finds devices for all wants, or fails with what is in the way of the
// first that it cannot fulfil. Of several it takes those that are free, on node
// first, and then on the node of those that were chosen before. taken tells who
// has what, as [Manager.Taken] does. It looks at nothing else but the inventory.
func Choose(inv *Inventory, wants []Want, node int, taken map[string]Claim) ([]vm.Slot, error) {
	c := chooser{inv: inv, node: node, taken: taken}
	var slots []vm.Slot
	for _, w := range wants {
		if uuid := strings.ToLower(w.Use); IsUUID(uuid) {
			m, err := c.part(uuid)
			if err != nil {
				return nil, err
			}
			slots = append(slots, m.slot())
			continue
		}
		devices, err := c.choose(w)
		if err != nil {
			return nil, err
		}
		for _, d := range devices {
			slots = append(slots, inv.slot(d, w.ROM))
		}
	}
	// Only all together show whether a group goes to one machine whole.
	for _, d := range c.chosen {
		if f := inTheWay(Check(inv, d, nil, c.chosen...)); f != nil {
			return nil, refusal(d.Address, *f)
		}
	}
	return slots, nil
}

type chooser struct {
	inv    *Inventory
	node   int
	taken  map[string]Claim
	chosen []*Device
	parts  []*Mdev // chosen too
}

// part finds a mediated device that is free.
func (c *chooser) part(uuid string) (*Mdev, error) {
	m, err := c.inv.FindMediated(uuid)
	if err != nil {
		return nil, err
	}
	if slices.Contains(c.parts, m) {
		return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("%s is named twice", uuid))
	}
	c.parts = append(c.parts, m)
	if claim, ok := c.taken[uuid]; ok {
		return nil, takenAlready(uuid, claim)
	}
	return m, m.free(c.inv)
}

func (c *chooser) choose(w Want) ([]*Device, error) {
	candidates, err := c.candidates(w)
	if err != nil {
		return nil, err
	}
	var found []*Device
	var reasons []error
	for len(candidates) > 0 && len(found) < max(1, w.Count) {
		// What was chosen may say on which node the next one is best.
		best := slices.MinFunc(candidates, c.compare)
		candidates = slices.DeleteFunc(candidates, func(d *Device) bool { return d == best })
		if err := c.free(best); err != nil {
			reasons = append(reasons, err)
			continue
		}
		found, c.chosen = append(found, best), append(c.chosen, best)
	}
	switch n := max(1, w.Count); {
	case len(found) == n:
		return found, nil
	case len(reasons) == 0:
		return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%d devices are wanted as %q, and this host has %d", n, w.Use, len(found))), "agentvm gpu ls lists them")
	case len(reasons) == 1 && n == 1:
		return nil, reasons[0]
	default:
		err := fmt.Errorf("%d of %d devices that %q names are free:\n%w", len(found), len(found)+len(reasons), w.Use, errors.Join(reasons...))
		return nil, vm.WithHint(vm.Classify(vm.ErrHost, err), hintOf(reasons))
	}
}

// candidates are all devices that a want can mean.
func (c *chooser) candidates(w Want) ([]*Device, error) {
	if strings.ToLower(w.Use) != Auto {
		return Select(c.inv, w.Use, nil) // also what is taken, to say who has it
	}
	list := c.inv.Cards()
	if len(list) == 0 {
		return nil, noCard()
	}
	return list, nil
}

// compare puts the better device first.
func (c *chooser) compare(a, b *Device) int {
	near := func(d *Device) int {
		switch {
		case c.node != NoNode && d.NUMANode == c.node:
			return 0
		case len(c.chosen) > 0 && d.NUMANode == c.chosen[0].NUMANode:
			return 1
		}
		return 2
	}
	display := func(d *Device) int {
		if d.Class>>8 == 0x0300 {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(near(a), near(b)), cmp.Compare(display(a), display(b)), cmp.Compare(b.Memory(), a.Memory()), cmp.Compare(a.Address, b.Address))
}

// free says what is in the way of a device by itself; who shares its group is
// seen when all are chosen.
func (c *chooser) free(d *Device) error {
	for _, f := range c.inv.Unit(d) {
		for _, o := range c.chosen {
			if slices.Contains(c.inv.Unit(o), f) {
				return vm.Classify(vm.ErrUsage, fmt.Errorf("%s is named twice", f.Address))
			}
		}
	}
	if f := c.inv.takenOf(d, c.taken); f != nil {
		return takenAlready(f.Address, c.taken[f.Address])
	}
	if f := inTheWay(Check(c.inv, d, nil)); f != nil && f.Code != Companions {
		return refusal(d.Address, *f)
	}
	return nil
}

func inTheWay(findings []Finding) *Finding {
	for i, f := range findings {
		if f.Severity == Problem {
			return &findings[i]
		}
	}
	return nil
}

func refusal(name string, f Finding) error {
	return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s cannot be taken: %s", cmp.Or(f.Device, name), f.Detail)), f.Fix)
}

// slot describes a device, with every function of its slot, to a machine.
func (inv *Inventory) slot(d *Device, rom string) (s vm.Slot) {
	for _, f := range inv.Unit(d) {
		v := vm.Function{Address: f.Address, ID: f.ID(), Name: f.Title(), Group: f.Group, HideROM: f.Class>>8 != 0x0300}
		if f == d && rom != "" {
			v.ROM, v.HideROM = rom, false
		}
		for _, b := range f.BARs {
			if !b.IO && b.Index != romIndex {
				v.Regions = append(v.Regions, vm.Region{Size: int64(b.Size), Bits64: b.Bits64, Prefetchable: b.Prefetchable})
			}
		}
		s.Functions = append(s.Functions, v)
	}
	return s
}
