package gpu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Action is what became of a journal.
type Action string

const (
	Restored Action = "restored" // the device is as it was
	Left     Action = "left"     // somebody still stands behind it
	Dropped  Action = "dropped"  // there was nothing to give back
	Failed   Action = "failed"   // the journal is kept
)

// Outcome is what was done about one function.
type Outcome struct {
	Address string `json:"address"`
	Action  Action `json:"action"`
	Detail  string `json:"detail"`
}

// Release gives back the devices at these addresses, with the other functions
// of their slots, whoever took them.
func (m *Manager) Release(ctx context.Context, addresses ...string) (outcomes []Outcome, err error) {
	err = m.locked(ctx, func() error {
		inv, err := m.Host.Inventory()
		if err != nil {
			return err
		}
		var journals []*Journal
		for _, address := range addresses {
			unit := []string{address} // a device may be gone, and its journal here
			if d := inv.Get(address); d != nil {
				unit = nil
				for _, f := range inv.Unit(d) {
					unit = append(unit, f.Address)
				}
			}
			found := false
			for _, a := range unit {
				j, err := m.Journal(a)
				if err != nil {
					return err
				}
				if j == nil {
					continue
				}
				found = true
				if !slices.ContainsFunc(journals, func(o *Journal) bool { return o.Address == j.Address }) {
					journals = append(journals, j)
				}
			}
			if !found {
				return vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%s was not taken by agentvm", address)), "agentvm gpu ls shows what was")
			}
		}
		outcomes, err = m.giveBack(ctx, inv, journals)
		return err
	})
	return outcomes, err
}

// Recover gives back what nobody stands behind any more: what a killed
// process had, or had begun to take or to give back. The rest it leaves.
func (m *Manager) Recover(ctx context.Context) (outcomes []Outcome, err error) {
	err = m.locked(ctx, func() error {
		inv, err := m.Host.Inventory()
		if err != nil {
			return err
		}
		journals, unreadable := m.Journals()
		boot := m.boot()
		var stale []*Journal
		for _, j := range journals {
			if j.stale(boot) {
				stale = append(stale, j)
				continue
			}
			outcomes = append(outcomes, Outcome{j.Address, Left, "it is held by " + j.Owner.Name})
		}
		restored, err := m.giveBack(ctx, inv, stale)
		outcomes = append(outcomes, restored...)
		return errors.Join(unreadable, err)
	})
	return outcomes, err
}

// Stale lists the addresses that Recover would look at.
func (m *Manager) Stale() (addresses []string, err error) {
	journals, err := m.Journals()
	boot := m.boot()
	for _, j := range journals {
		if j.stale(boot) {
			addresses = append(addresses, j.Address)
		}
	}
	return addresses, err
}

// giveBack restores each function, the last taken first. One that cannot be
// does not keep the others from it.
func (m *Manager) giveBack(ctx context.Context, inv *Inventory, journals []*Journal) (outcomes []Outcome, err error) {
	var problems []error
	for _, j := range slices.Backward(journals) {
		err := free(inv, j)
		var o Outcome
		if err == nil {
			o, err = m.restore(ctx, j)
		}
		if err != nil {
			problems = append(problems, err)
			o = Outcome{j.Address, Failed, err.Error()}
		}
		outcomes = append(outcomes, o)
	}
	return outcomes, vm.Classify(vm.ErrHost, errors.Join(problems...))
}

// free refuses to take a device from under those who have it open: vfio-pci
// would wait for them, and no write can be taken back.
func free(inv *Inventory, j *Journal) error {
	d := inv.Get(j.Address)
	if d == nil || j.Prebound || d.Driver != vfioDriver || len(d.Holders) == 0 {
		return nil
	}
	h := d.Holders[0]
	return vm.WithHint(fmt.Errorf("%s is in use by %s (process %d, %s)", j.Address, h.Command, h.PID, h.Path), "end it first")
}

// restore gives one function back, from wherever taking it or giving it back
// had got to. What to do follows from how the device is; each step leaves
// alone what is right already, so that this can be stopped and done again.
func (m *Manager) restore(ctx context.Context, j *Journal) (Outcome, error) {
	fail := func(err error) (Outcome, error) {
		return Outcome{}, fmt.Errorf("give back %s: %w", j.Address, err)
	}
	done := func(action Action, format string, args ...any) (Outcome, error) {
		if err := m.forget(j.Address); err != nil {
			return Outcome{}, err
		}
		return Outcome{j.Address, action, fmt.Sprintf(format, args...)}, nil
	}
	if j.Boot != m.boot() {
		return done(Dropped, "the host has booted since, which undid the binding")
	}
	if j.Prebound {
		return done(Restored, "it was on vfio-pci before, and stays so")
	}
	if id := m.id(j.Address); id == "" {
		return done(Dropped, "the device is gone")
	} else if id != j.ID {
		return done(Dropped, "there is another device now, %s instead of %s", id, j.ID)
	}
	// Whoever gave it to a third driver meanwhile meant that.
	stranger := m.driver(j.Address)
	if stranger == j.Driver || stranger == vfioDriver {
		stranger = ""
	}
	if err := m.record(j, StepRelease); err != nil {
		return fail(err)
	}
	if err := m.unbind(ctx, j.Address, vfioDriver); err != nil {
		return fail(err)
	}
	if err := m.record(j, StepReset); err != nil {
		return fail(err)
	}
	if stranger == "" || m.Host.override(j.Address) == vfioDriver {
		if err := m.override(ctx, j.Address, j.Override); err != nil {
			return fail(err)
		}
	}
	if stranger != "" {
		return done(Restored, "somebody bound it to %s meanwhile, and it stays so", stranger)
	}
	if err := m.record(j, StepRebind); err != nil {
		return fail(err)
	}
	if err := m.rebind(ctx, j); err != nil {
		return fail(err)
	}
	if err := m.record(j, StepVerify); err != nil {
		return fail(err)
	}
	if err := m.verify(j); err != nil {
		return fail(err)
	}
	if j.Driver == "" {
		return done(Restored, "it has no driver, as before")
	}
	return done(Restored, "it is back on %s", j.Driver)
}

// rebind gives a function back to its driver, by name: drivers_probe takes the
// first that matches, which need not be the one it had. It asks even when
// the driver seems to have it: an unbind that is still blocked holds the
// device, and this waits for it.
func (m *Manager) rebind(ctx context.Context, j *Journal) error {
	if j.Driver == "" {
		return nil
	}
	err := m.write(ctx, filepath.Join(pciDrivers, j.Driver, "bind"), j.Address)
	if errors.Is(err, ErrBlocked) {
		return err
	}
	if m.driver(j.Address) == "" && err != nil {
		return vm.WithHint(err, "see that the driver "+j.Driver+" is loaded, then: agentvm gpu recover")
	}
	return m.await(ctx, j.Address, j.Driver)
}

// verify sees that the function is what it was, and answers.
func (m *Manager) verify(j *Journal) error {
	if got := m.driver(j.Address); got != j.Driver {
		return fmt.Errorf("its driver is %q, and was %q", got, j.Driver)
	}
	if got := m.Host.override(j.Address); got != j.Override {
		return fmt.Errorf("its driver_override is %q, and was %q", got, j.Override)
	}
	config, err := os.ReadFile(m.Host.at(pciDevices, j.Address, "config"))
	if err != nil {
		return err
	}
	if len(config) < 4 || bytes.Equal(config[:4], []byte{0xff, 0xff, 0xff, 0xff}) {
		return vm.WithHint(errors.New("the device does not answer any more"), "boot the host again; a card that was not reset can need that")
	}
	return nil
}

// id is vendor:device of the function at an address, or "".
func (m *Manager) id(address string) string {
	v, d := m.Host.text(pciDevices, address, "vendor"), m.Host.text(pciDevices, address, "device")
	if v == "" || d == "" {
		return ""
	}
	return strings.TrimPrefix(v, "0x") + ":" + strings.TrimPrefix(d, "0x")
}
