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
	"time"

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
	Address string `json:"address"` // or the UUID of a mediated device
	Action  Action `json:"action"`
	Detail  string `json:"detail"`
}

// Release is of [Taker].
func (m *Manager) Release(ctx context.Context, addresses ...string) (outcomes []Outcome, err error) {
	err = m.locked(ctx, func() error {
		inv, err := m.Host.Inventory()
		if err != nil {
			return err
		}
		journals, err := m.Journals()
		if err != nil {
			return err
		}
		var wanted []*Journal
		for _, address := range addresses {
			unit := address
			if d := inv.Get(address); d != nil { // else it is gone, and its journal here
				unit = inv.Unit(d)[0].Address
			}
			found := false
			for _, j := range journals {
				if j.Address != address && j.Unit != unit {
					continue
				}
				found = true
				if m.User != 0 && j.User != m.User {
					return vm.Classify(vm.ErrHost, fmt.Errorf("%s was taken by %s, and is not yours to give back", j.Address, j.Owner.Name))
				}
				if !slices.Contains(wanted, j) {
					wanted = append(wanted, j)
				}
			}
			if !found {
				return vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%s was not taken by agentvm", address)), "agentvm gpu ls shows what was")
			}
		}
		outcomes, err = m.giveBack(ctx, inv, journals, wanted)
		return err
	})
	return outcomes, err
}

// Recover is of [Taker].
func (m *Manager) Recover(ctx context.Context) (outcomes []Outcome, err error) {
	err = m.locked(ctx, func() error {
		inv, err := m.Host.Inventory()
		if err != nil {
			return err
		}
		journals, unreadable := m.Journals()
		boot := m.boot()
		var left []*Journal
		for _, j := range journals {
			if stale(journals, j, boot) {
				left = append(left, j)
				continue
			}
			outcomes = append(outcomes, Outcome{j.Address, Left, "it is held by " + j.Owner.Name})
		}
		restored, err := m.giveBack(ctx, inv, journals, left)
		outcomes = append(outcomes, restored...)
		return errors.Join(unreadable, err)
	})
	return outcomes, err
}

// Stale lists the addresses that Recover would look at. It needs no privilege.
func (m *Manager) Stale() (addresses []string, err error) {
	journals, err := m.Journals()
	boot := m.boot()
	for _, j := range journals {
		if stale(journals, j, boot) {
			addresses = append(addresses, j.Address)
		}
	}
	return addresses, err
}

// stale reports whether nobody stands behind a journal, one of all, any more.
func stale(all []*Journal, j *Journal, boot string) bool {
	return j.Boot != boot || !kept(all, j) && !j.Owner.Process.Alive()
}

// kept reports whether a function stays taken after the process that took it
// has ended. A process can be killed between any two journals; so one of a bind
// that says so stands for all of it, and one of a unit that is being given back
// for all of that.
func kept(all []*Journal, j *Journal) bool {
	says := false
	for _, o := range all {
		if o.Bind != j.Bind {
			continue
		}
		says = says || o.Step == StepKept
		if o.Unit == j.Unit && o.leaving() {
			return false
		}
	}
	return says
}

func (j *Journal) leaving() bool {
	return slices.Contains([]Step{StepRelease, StepReset, StepRebind, StepVerify}, j.Step)
}

// giveBack restores each function, the last taken first. A unit that cannot be
// given back does not keep the others from it.
func (m *Manager) giveBack(ctx context.Context, inv *Inventory, all, wanted []*Journal) (outcomes []Outcome, err error) {
	if err := m.settle(all); err != nil {
		return nil, err
	}
	var problems []error
	failed := func(j *Journal, err error) {
		problems = append(problems, err)
		outcomes = append(outcomes, Outcome{j.Address, Failed, err.Error()})
	}
	var free []*Journal
	inUse := map[string]error{} // by unit
	for _, j := range wanted {
		if err := inUseBy(inv, j); err != nil {
			inUse[j.Unit] = err
		}
	}
	for _, j := range wanted {
		if err := inUse[j.Unit]; err != nil {
			failed(j, err)
			continue
		}
		free = append(free, j)
	}
	// All are marked before the first is done, so that whoever is killed here
	// leaves no unit of which a part is kept.
	for _, j := range free {
		if j.Boot != m.boot() || j.leaving() {
			continue
		}
		if err := m.record(j, StepRelease); err != nil {
			return outcomes, vm.Classify(vm.ErrHost, err)
		}
	}
	for _, j := range slices.Backward(free) {
		if o, err := m.restore(ctx, j); err != nil {
			failed(j, err)
		} else {
			outcomes = append(outcomes, o)
		}
	}
	return outcomes, vm.Classify(vm.ErrHost, distinct(problems))
}

// settle notes of each function that is kept that it is, before the journal
// that says so for all of them may be deleted.
func (m *Manager) settle(all []*Journal) error {
	for _, j := range all {
		if j.Step == StepKept || !kept(all, j) {
			continue
		}
		if err := m.record(j, StepKept); err != nil {
			return vm.Classify(vm.ErrHost, err)
		}
	}
	return nil
}

// distinct joins errors, each text once: functions share what is in the way.
func distinct(problems []error) error {
	var once []error
	for _, p := range problems {
		if !slices.ContainsFunc(once, func(o error) bool { return o.Error() == p.Error() }) {
			once = append(once, p)
		}
	}
	return errors.Join(once...)
}

// inUseBy refuses to take a device from under those who have it open: vfio-pci
// would wait for them, and no write can be taken back. A mediated device would
// look free, and be refused to the next.
func inUseBy(inv *Inventory, j *Journal) error {
	var open []Holder
	if d, part := inv.Get(j.Address), inv.GetMediated(j.Address); part != nil {
		open = part.Holders
	} else if d != nil && !j.Prebound && isVFIO(d.Driver) {
		open = d.Holders
	}
	if len(open) == 0 {
		return nil
	}
	return vm.WithHint(fmt.Errorf("%s is in use by %s", j.Address, holders(open)), "end it first")
}

// restore gives one function back, from wherever taking it or giving it back
// had got to. What to do follows from how the device is; each step leaves
// alone what is right already, so that this can be stopped and done again.
func (m *Manager) restore(ctx context.Context, j *Journal) (Outcome, error) {
	fail := func(err error) (Outcome, error) {
		err = fmt.Errorf("give back %s: %w", j.Address, err)
		if errors.Is(err, ErrBlocked) {
			err = vm.WithHint(err, unblock)
		}
		return Outcome{}, err
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
	if j.mediated() {
		action, detail, err := m.restoreMediated(j)
		if err != nil {
			return fail(err)
		}
		return done(action, "%s", detail)
	}
	if err := m.revoke(j); err != nil {
		return fail(err)
	}
	if j.Prebound {
		return done(Restored, "it was on %s before, and stays so", j.VFIO)
	}
	if id := m.id(j.Address); id == "" {
		return done(Dropped, "the device is gone")
	} else if id != j.ID {
		return done(Dropped, "there is another device now, %s instead of %s", id, j.ID)
	}
	// libvirt, to which it was lent, has its own mind about which VFIO driver.
	vfio := j.VFIO
	if has := m.driver(j.Address); isVFIO(has) {
		vfio = has
	}
	// Whoever gave it to a third driver meanwhile meant that.
	stranger := m.driver(j.Address)
	if stranger == j.Driver || stranger == vfio {
		stranger = ""
	}
	if err := m.record(j, StepRelease); err != nil {
		return fail(err)
	}
	if err := m.unbind(ctx, j.Address, vfio); err != nil {
		return fail(err)
	}
	if err := m.record(j, StepReset); err != nil {
		return fail(err)
	}
	is, err := m.Host.override(ctx, j.Address)
	if err == nil && (stranger == "" || is == j.VFIO) {
		err = m.override(ctx, j.Address, j.Override)
	}
	if err != nil {
		return fail(err)
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
	if err := m.verify(ctx, j); err != nil {
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
	bind := filepath.Join(pciDrivers, j.Driver, "bind")
	err := m.write(ctx, bind, j.Address)
	// A driver does not take what somebody else resets at the moment, as libvirt
	// does once its QEMU has been killed.
	for deadline := time.Now().Add(m.wait()); err != nil && !errors.Is(err, ErrBlocked) && m.driver(j.Address) == "" &&
		m.Host.exists(pciDrivers, j.Driver) && time.Now().Before(deadline); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(m.wait() / 20):
		}
		err = m.write(ctx, bind, j.Address)
	}
	if errors.Is(err, ErrBlocked) {
		return err
	}
	if m.driver(j.Address) == "" && err != nil {
		return vm.WithHint(err, "see that the driver "+j.Driver+" is loaded, then: agentvm gpu recover")
	}
	return m.await(ctx, j.Address, j.Driver)
}

// verify sees that the function is what it was, and answers.
func (m *Manager) verify(ctx context.Context, j *Journal) error {
	if got := m.driver(j.Address); got != j.Driver {
		return fmt.Errorf("its driver is %q, and was %q", got, j.Driver)
	}
	if got, err := m.Host.override(ctx, j.Address); err != nil {
		return err
	} else if got != j.Override {
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
