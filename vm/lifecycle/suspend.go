package lifecycle

import (
	"context"
	"errors"
	"fmt"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/saved"
)

// Suspend writes the running machine's memory and devices down and ends it. It
// goes on from there when it is started next. Where the guest does not let go of
// its shares, it runs on, and the error says who holds them.
func (m *Manager) Suspend(ctx context.Context, inst *instance.Instance, wait func()) error {
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return err
	}
	defer release()
	m.tidyKilled(inst)
	return m.suspend(ctx, inst)
}

// suspend is Suspend for a caller that holds the lock.
func (m *Manager) suspend(ctx context.Context, inst *instance.Instance) error {
	spec, status, err := m.saveable(ctx, inst, true)
	if err != nil {
		return err
	}
	if err := m.client(inst, spec).Suspend(ctx); err != nil {
		return m.notSaved(inst, "suspended", err)
	}
	return m.gone(ctx, inst, status.Supervisor)
}

// saveable prepares a machine for being saved while it runs, with its memory or
// the disk alone.
func (m *Manager) saveable(ctx context.Context, inst *instance.Instance, memory bool) (instance.Spec, instance.Status, error) {
	status, err := inst.Status()
	if err != nil {
		return instance.Spec{}, status, err
	}
	spec, err := inst.Spec()
	if err != nil {
		return spec, status, err
	}
	if !status.State.Usable() {
		return spec, status, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q is %s; only a machine that runs has anything to save", inst.Name, status.State)), "agentvm start "+inst.Name)
	}
	if !memory {
		return spec, status, nil
	}
	if err := noMemorySaved(inst, spec); err != nil {
		return spec, status, err
	}
	if spec.Hardware == "" || spec.Machine.Line == "" {
		return spec, status, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%q was started by an older agentvm, and cannot be saved", inst.Name)), "agentvm restart "+inst.Name)
	}
	hardware, err := m.Hardware(ctx, spec.Machine)
	if err != nil {
		return spec, status, err
	}
	if hardware != spec.Hardware {
		return spec, status, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%q could not go on from its memory: QEMU or the host's processor is another one than when it was started", inst.Name)),
			"agentvm restart "+inst.Name+" starts it with this one; agentvm snapshot create --disk-only saves its disk")
	}
	if err := m.discardSaved(inst); err != nil {
		return spec, status, err
	}
	return spec, status, writeResume(inst, spec)
}

// notSaved says what has become of a machine that could not be saved.
func (m *Manager) notSaved(inst *instance.Instance, done string, err error) error {
	status, statusErr := inst.Status()
	if statusErr == nil && status.State.Usable() {
		return fmt.Errorf("%q runs on and is not %s: %w", inst.Name, done, err)
	}
	return vm.WithHint(fmt.Errorf("%q was not %s: %w", inst.Name, done, err), "agentvm status "+inst.Name+" says how it is")
}

// writeResume writes what gives a guest its shares again.
func writeResume(inst *instance.Instance, spec instance.Spec) error {
	var mounts []cloudinit.ShareMount
	for _, s := range spec.Shares {
		mounts = append(mounts, cloudinit.ShareMount{Tag: s.Tag, Target: s.Target, ReadOnly: s.ReadOnly})
	}
	call, err := cloudinit.Resume(mounts)
	return writeCall(inst, call, err)
}

// discardSaved gives up what a suspended machine would go on from, and what an
// interrupted suspension has left.
func (m *Manager) discardSaved(inst *instance.Instance) error {
	if err := saved.Discard(inst.Path(instance.SavedDir)); err != nil {
		return fmt.Errorf("discard the saved memory of %q: %w", inst.Name, err)
	}
	return nil
}

// resume goes on with a machine from where it was suspended. The caller holds
// its lock.
func (m *Manager) resume(ctx context.Context, inst *instance.Instance, spec instance.Spec, report Report) (Result, error) {
	return m.goOn(ctx, inst, spec, inst.Path(instance.SavedDir), report)
}

// resumeFirst is what `up` does with a suspended machine. boot says that it ran
// again and did not get anywhere, so that its memory is used up and its disk is
// left; the result has its status then.
func (m *Manager) resumeFirst(ctx context.Context, inst *instance.Instance, spec instance.Spec, status instance.Status, opt UpOptions, report Report) (res Result, boot bool, err error) {
	if opt.DryRun {
		return Result{Instance: inst, Spec: spec, Status: status}, false, nil
	}
	if opt.Agent != "" && opt.Agent != spec.Agent {
		report.Note("%q goes on as it was suspended, with agent %s; agentvm restart applies another", inst.Name, spec.Agent)
	}
	res, err = m.resume(ctx, inst, spec, report)
	if err == nil || inst.Suspended() || !res.Status.RestoreFailed || ctx.Err() != nil {
		return res, false, err
	}
	report.Note("%q could not go on from where it was suspended, and boots instead (%s)", inst.Name, res.Status.Reason)
	res.Status, err = inst.Status()
	return res, true, err
}

// bootInstead is always left.
const bootInstead = "agentvm up --cold boots it from its disk, and gives up what ran when it was saved"

// errOtherHardware is a saved state that this host cannot go on from.
var errOtherHardware = errors.New("QEMU or the host's processor is another one than when it was saved")

// goOn starts the machine of spec from the memory in dir, which fits its disk.
func (m *Manager) goOn(ctx context.Context, inst *instance.Instance, spec instance.Spec, dir string, report Report) (Result, error) {
	res := Result{Instance: inst, Spec: spec}
	hardware, err := m.Hardware(ctx, spec.Machine)
	if err != nil {
		return res, err
	}
	if hardware != spec.Hardware {
		return res, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%q cannot go on: %w", inst.Name, errOtherHardware)), bootInstead)
	}
	if err := m.Store.Dirs.Reachable(); err != nil {
		return res, err
	}
	if err := checkMemory(spec.Machine.Memory); err != nil {
		return res, err
	}
	if err := writeResume(inst, spec); err != nil {
		return res, err
	}
	if err := emptyConsole(inst); err != nil {
		return res, err
	}
	if err := handOver(inst, spec); err != nil {
		return res, err
	}
	spec.Machine.Saved = dir
	if err := inst.WriteSpec(spec); err != nil {
		return res, err
	}
	res.Spec = spec
	if res.Status, err = m.start(ctx, inst, spec, report); res.Status.RestoreFailed {
		err = vm.WithHint(err, bootInstead)
	}
	return res, err
}
