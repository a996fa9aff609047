package gpu

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Auto selects the best card that is free.
const Auto = "auto"

// ErrNoneFree is that something is in the way of every card that auto could mean.
var ErrNoneFree = errors.New("no card of this host is free")

var (
	addressPattern = vm.Pattern(`^([0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)
	idPattern      = vm.Pattern(`^[0-9a-f]{4}:[0-9a-f]{4}$`)
)

// Select finds the devices that a user means: an address with or without its
// domain, vendor:device, a pattern of the name (as of a file, any case; a
// word without * is looked for anywhere in it) or auto. An address may be
// that of any function that is no bridge. Of what is taken, as [Manager.Taken]
// tells, it returns nothing that is not named by address, unless all that a
// name means is. It returns at least one device.
func Select(inv *Inventory, wanted string, taken map[string]Claim) ([]*Device, error) {
	w := strings.ToLower(wanted)
	var found []*Device
	switch {
	case w == "":
		return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("the name of a device is empty"))
	case w == Auto:
		return selectAuto(inv, taken)
	case addressPattern().MatchString(w):
		if strings.Count(w, ":") == 1 {
			w = "0000:" + w
		}
		d := inv.Get(w)
		if d != nil && d.Bridge {
			return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("%s is a bridge, which stays with the host", w))
		}
		if d != nil {
			found = []*Device{d}
		}
	case idPattern().MatchString(w):
		for _, d := range inv.GPUs() {
			if d.ID() == w {
				found = append(found, d)
			}
		}
	default:
		pattern := w
		if !strings.ContainsAny(w, "*?[") {
			pattern = "*" + w + "*"
		}
		if _, err := path.Match(pattern, ""); err != nil {
			return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("%q is not a pattern: %w", wanted, err))
		}
		// Names have slashes ("GA104 [GeForce RTX 3070 / 3070 Ti]"), at which a path's * ends.
		plain := strings.NewReplacer("/", " ")
		for _, d := range inv.GPUs() {
			if ok, _ := path.Match(plain.Replace(pattern), plain.Replace(strings.ToLower(d.Title()))); ok {
				found = append(found, d)
			}
		}
	}
	if len(found) == 0 {
		return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("no device of this host is %q", wanted)), "agentvm gpu ls lists them")
	}
	if free := untaken(inv, found, taken); len(free) > 0 {
		return free, nil
	}
	return found, nil // the caller can say who has them
}

// untaken are those of a list that nobody has.
func untaken(inv *Inventory, list []*Device, taken map[string]Claim) (free []*Device) {
	for _, d := range list {
		if inv.takenOf(d, taken) == nil {
			free = append(free, d)
		}
	}
	return free
}

// selectAuto takes, of the cards that nothing speaks against, one that shows
// no picture before one that does, and the one with the most memory.
func selectAuto(inv *Inventory, taken map[string]Claim) ([]*Device, error) {
	cards := inv.Cards()
	if len(cards) == 0 {
		return nil, noCard()
	}
	var best *Device
	var reasons []error
	for _, d := range cards {
		if err := inv.inTheWayOf(d, taken); err != nil {
			reasons = append(reasons, err)
		} else if best == nil || better(d, best) {
			best = d
		}
	}
	if best != nil {
		return []*Device{best}, nil
	}
	text := ": " + reasons[0].Error()
	if len(reasons) > 1 {
		text = ":\n" + errors.Join(reasons...).Error()
	}
	return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%w%s", ErrNoneFree, text)), hintOf(reasons))
}

// noCard is that there is nothing that auto could mean.
func noCard() error {
	return vm.WithHint(vm.Classify(vm.ErrNotFound, errors.New("this host has no card")), "agentvm gpu ls lists what it has")
}

// inTheWayOf refuses a device that is taken or has a problem.
func (inv *Inventory) inTheWayOf(d *Device, taken map[string]Claim) error {
	if f := inv.takenOf(d, taken); f != nil {
		return takenAlready(f.Address, taken[f.Address])
	}
	if f := inTheWay(Check(inv, d, nil)); f != nil {
		return refusal(d.Address, *f)
	}
	return nil
}

// hintOf is what to do about all of several reasons.
func hintOf(reasons []error) string {
	hint := vm.Hint(reasons[0])
	for _, err := range reasons {
		if vm.Hint(err) != hint {
			return "agentvm gpu check says what to do about each"
		}
	}
	return hint
}

func better(a, b *Device) bool {
	if ac, bc := a.Class>>8 != 0x0300, b.Class>>8 != 0x0300; ac != bc {
		return ac
	}
	return a.Memory() > b.Memory()
}
