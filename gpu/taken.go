package gpu

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Claim is that of who has taken a device by agentvm.
type Claim struct {
	Owner string // a machine, or gpu bind; through the helper "… of USER"
	Kept  bool   // bound by hand, until it is released
	Left  bool   // nobody stands behind it any more
}

// Taken tells who has which function, by its address, and which mediated device,
// by its UUID. Beside an error it tells of the journals that could be read.
func (m *Manager) Taken() (map[string]Claim, error) {
	journals, err := m.Journals()
	boot := m.boot()
	taken := map[string]Claim{}
	for _, j := range journals {
		taken[j.Address] = claimOf(journals, j, boot)
	}
	return taken, err
}

// claimOf is what a journal, one of all, says of who has the device.
func claimOf(all []*Journal, j *Journal, boot string) Claim {
	return Claim{Owner: j.Owner.Name, Kept: j.Owner.Keep, Left: stale(all, j, boot)}
}

// who tells people of the owner.
func (c Claim) who() string {
	who := cmp.Or(c.Owner, "another process")
	if c.Kept && strings.HasPrefix(who, "gpu bind") {
		who = "agentvm " + who
	}
	if c.Left {
		who += ", which has left it behind"
	}
	return who
}

// fix is how the device is got back. The name of a machine has no spaces.
func (c Claim) fix(device string) string {
	machine, _, _ := strings.Cut(c.Owner, " ")
	switch {
	case c.Left:
		return "agentvm gpu recover"
	case c.Kept || machine == "":
		return "agentvm gpu release " + device
	}
	return "agentvm stop " + machine
}

// takenAlready refuses what somebody has.
func takenAlready(name string, c Claim) error {
	return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s is taken already, by %s", name, c.who())), c.fix(name))
}

// takenOf finds the function of d's slot that is taken; nil: none is.
func (inv *Inventory) takenOf(d *Device, taken map[string]Claim) *Device {
	for _, f := range inv.Unit(d) {
		if _, ok := taken[f.Address]; ok {
			return f
		}
	}
	return nil
}

// checkTaken says who has a device.
func checkTaken(name string, c Claim) Finding {
	return Finding{Code: Taken, Severity: Problem, Device: name, Detail: "it is taken already, by " + c.who(), Fix: c.fix(name)}
}
