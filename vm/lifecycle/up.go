package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/probes"
	"github.com/agentvm/agentvm/vm/template"
)

// Manager does what the commands ask for.
type Manager struct {
	Store     instance.Store
	Agents    *agent.Set
	Images    func() (*images.Cache, error) // opened when first needed
	Templates template.Store
	Probes    probes.Store // what is remembered of the host
	// Hardware names everything of a machine that its guest can observe, paths
	// on the host aside, and of the program that runs it.
	Hardware func(ctx context.Context, machine vm.Machine) (string, error)
	// Libvirt names the libvirt that is meant by a configured URI, which may be
	// empty, and with connect makes sure that it can be used.
	Libvirt func(ctx context.Context, uri string, connect bool) (string, error)
	// Leftover ends what the machine of spec may have left in its libvirt.
	Leftover func(ctx context.Context, spec instance.Spec) error
	// Accel finds how the guest can run here; img may give a kernel to try it with.
	Accel func(ctx context.Context, img *images.Image, runAs *vm.Owner) (vm.Accel, string, error)
	// ChooseDevices finds devices of the host for what the configuration asks, and
	// a machine with that many bytes of memory that runs as runAs; it fails with
	// what is in the way, and changes nothing.
	ChooseDevices func(ctx context.Context, want config.GPU, memory int64, runAs *vm.Owner) (Devices, error)
	// RecoverDevices gives the host back what killed supervisors have left, and
	// says what it did.
	RecoverDevices func(ctx context.Context) ([]string, error)
	// Executable is this program, started again as the supervisor.
	Executable string
	Home       string
	// Pool reads how many machines are kept waiting to be claimed. A mistake in
	// that must not keep anybody from stopping a machine.
	Pool func() (int, error)
}

// UpOptions are the wishes of one `up`.
type UpOptions struct {
	Name      string // empty: found or made from the workspace
	AllowWide bool   // share / or a home directory all the same
	Recreate  bool   // a new root disk
	Cold      bool   // boot, even where a template could be used
	Agent     string // instead of the configured one; remembered by the instance
	DryRun    bool   // decide, and act on nothing but image builds

	BootTimeout time.Duration // 0: by accelerator and memory

	connect bool // a backend that is a service must answer
}

// Report follows an `up`. Build gets the progress of image builds.
type Report interface {
	images.Progress
	Note(format string, args ...any) // one line that the user should read
	State(instance.Status)
}

// Result is what `up` found or made.
type Result struct {
	Instance *instance.Instance
	Spec     instance.Spec
	Status   instance.Status
	Already  bool // it was running before
	Created  bool
}

// Up makes sure that the project's machine runs and is ready.
func (m *Manager) Up(ctx context.Context, p Project, opt UpOptions, report Report) (_ Result, err error) {
	ws, err := CheckDirectory(p.Workspace(), m.Home, opt.AllowWide)
	if err != nil {
		return Result{}, err
	}
	inst, created, err := m.claim(p, ws, opt)
	if err != nil {
		return Result{}, err
	}
	release, err := inst.Lock(ctx, func() { report.Note("another command works on %q; waiting for it", inst.Name) })
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) { // the other command deleted it
			return m.Up(ctx, p, opt, report)
		}
		return Result{}, err
	}
	defer release()
	if _, err := inst.Spec(); err == nil {
		created = false // made meanwhile by the command that was waited for
	}
	started := false
	if created {
		defer func() {
			// One that did not boot is kept: its logs say why.
			if opt.DryRun || err != nil && (!started || ctx.Err() != nil) {
				_ = inst.Remove()
			}
		}()
	}
	old, oldErr := inst.Spec()
	if oldErr != nil && !created && !errors.Is(oldErr, fs.ErrNotExist) {
		return Result{}, oldErr
	}
	status, err := m.settled(ctx, inst, old, report)
	if err != nil {
		return Result{}, err
	}
	m.tidyDevices(ctx, report)
	if !opt.DryRun {
		m.tidyKilled(inst)
	}
	if opt.Recreate && status.State.Live() {
		return Result{}, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q runs, and its disk is in use", inst.Name)), "agentvm stop "+inst.Name+" comes first")
	}
	if status.State == instance.Failed && status.Reason != "" && !created {
		report.Note("the last run of %q failed: %s", inst.Name, status.Reason)
	}
	if inst.Suspended() && !opt.Cold && !opt.Recreate && !status.State.Live() {
		res, boot, err := m.resumeFirst(ctx, inst, old, status, opt, report)
		if err != nil || !boot {
			return res, err
		}
		status = res.Status
	}
	opt.connect = !status.State.Live()
	plan, err := m.plan(ctx, p, ws, inst, old, opt, report)
	if err != nil {
		return Result{}, err
	}
	res := Result{Instance: inst, Spec: plan.spec, Status: status, Created: created}
	if opt.DryRun {
		return res, nil
	}
	if status.State.Live() {
		return m.join(ctx, res, old, report)
	}
	res.Spec, res.Status, err = m.bring(ctx, p, inst, plan, opt, func() { started = true }, report)
	return res, err
}

// bring brings a machine to life that does not run. begun is called before
// anything of it does.
func (m *Manager) bring(ctx context.Context, p Project, inst *instance.Instance, plan plan, opt UpOptions, begun func(), report Report) (spec instance.Spec, status instance.Status, err error) {
	if err := m.Store.Dirs.Reachable(); err != nil {
		return spec, status, err
	}
	if err := m.discardSaved(inst); err != nil {
		return spec, status, err
	}
	if plan.spec.Machine.HugePages == 0 { // those are set aside
		if err := checkMemory(plan.spec.Machine.Memory); err != nil {
			return spec, status, err
		}
	}
	if plan.emulated != "" {
		report.Note("WARNING: no usable KVM (%s): the guest is emulated, which is slow, and QEMU does not promise isolation for emulated guests", plan.emulated)
	}
	pool, err := m.Pool()
	if err != nil {
		return spec, status, err
	}
	from, err := m.templateFor(ctx, plan, opt, report)
	if err != nil {
		return spec, status, err
	}
	defer from.Release()
	if plan.newDisk {
		if err := discardDisk(inst); err != nil {
			return spec, status, err
		}
	}
	spec, status, err = m.launch(ctx, inst, plan, from, begun, report)
	if err == nil && from != nil && pool > 0 && !spec.Machine.HasDevices() {
		if err := m.fillLater(p, spec.AgentChosen); err != nil {
			report.Note("%v", err)
		}
	}
	return spec, status, err
}

// launch starts the machine: one of the pool, if one waits, else from a
// template, if there is one, and by booting when that fails.
func (m *Manager) launch(ctx context.Context, inst *instance.Instance, plan plan, from *template.Template, begun func(), report Report) (instance.Spec, instance.Status, error) {
	if from != nil {
		spec, status, done, err := m.claimSpare(ctx, inst, plan, from, begun, report)
		if done && (err == nil || ctx.Err() != nil || !status.RestoreFailed) || !done && err != nil {
			return spec, status, err
		}
		if done {
			report.Note("%q could not go on from a machine of the pool (%s)", inst.Name, cmp.Or(status.Reason, err.Error()))
			if err := m.startOver(ctx, inst, plan, report); err != nil {
				return spec, status, err
			}
		}
		spec = plan.spec
		spec.Machine.Saved = from.Dir
		spec.Machine.Slots, _ = spec.Machine.SlotsForLater()
		status, err = m.attempt(ctx, inst, spec, plan, from, begun, report)
		if err == nil {
			trust(from, report)
			return spec, status, nil
		}
		if ctx.Err() != nil || !status.RestoreFailed && !errors.Is(err, template.ErrDisk) {
			return spec, status, err
		}
		if err := m.giveUp(inst, from, status, cmp.Or(status.Reason, err.Error()), report); err != nil {
			return spec, status, err
		}
		if err := m.startOver(ctx, inst, plan, report); err != nil {
			return spec, status, err
		}
	}
	status, err := m.attempt(ctx, inst, plan.spec, plan, nil, begun, report)
	return plan.spec, status, err
}

// giveUp says why the machine boots, and deletes the template unless it is sound,
// or may be, or somebody else is about to see for himself.
func (m *Manager) giveUp(inst *instance.Instance, from *template.Template, status instance.Status, why string, report Report) error {
	if status.PlugFailed {
		report.Note("%q boots instead of going on from template %s (%s)", inst.Name, from.ID, why)
		return nil
	}
	fate, err := m.condemn(from, status, report)
	report.Note("%q could not go on from template %s, which %s: it boots instead (%s)", inst.Name, from.ID, fate, why)
	return err
}

// condemn deletes a template that failed, unless the host may be to blame, and
// says what becomes of it.
func (m *Manager) condemn(from *template.Template, status instance.Status, report Report) (fate string, err error) {
	if status.RestoreCutShort {
		again, err := from.Doubt()
		if err != nil {
			report.Note("%v", err)
		}
		if !again { // a busy host must not be given a template to make as well
			return "is deleted if the next machine cannot either", nil
		}
	}
	err = m.Templates.Remove(from)
	switch {
	case errors.Is(err, template.ErrInUse):
		return "another machine is starting from", nil
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	}
	return "is deleted", err
}

// trust ends all doubt about a template. It is no reason to do without the
// machine that has just started from it.
func trust(from *template.Template, report Report) {
	if err := from.Trust(); err != nil {
		report.Note("%v", err)
	}
}

// startOver clears away what an attempt has left, for another.
func (m *Manager) startOver(ctx context.Context, inst *instance.Instance, plan plan, report Report) error {
	if plan.spec.Machine.HasDevices() { // a supervisor that was killed has not given them back
		m.tidyDevices(ctx, report)
	}
	return discardDisk(inst)
}

// attempt makes the machine's files and starts it.
func (m *Manager) attempt(ctx context.Context, inst *instance.Instance, spec instance.Spec, plan plan, from source, begun func(), report Report) (instance.Status, error) {
	if err := copyROMs(inst, plan.roms); err != nil {
		return instance.Status{}, err
	}
	if err := prepare(ctx, inst, spec, plan, from); err != nil {
		return instance.Status{}, err
	}
	var err error
	if len(spec.Machine.Slots) == 0 { // it is never saved
		if spec.Hardware, err = m.Hardware(ctx, spec.Machine); err != nil {
			return instance.Status{}, err
		}
	}
	if err := inst.WriteSpec(spec); err != nil {
		return instance.Status{}, err
	}
	begun()
	return m.start(ctx, inst, spec, report)
}

// discardDisk removes the machine's disk, with all that was done on it.
func discardDisk(inst *instance.Instance) error {
	if err := os.Remove(inst.Path(OverlayFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the old root disk: %w", err)
	}
	return inst.Unprovisioned()
}

// settled returns the machine's state. One that is about to end or is written
// down, since another command was interrupted, is waited for.
func (m *Manager) settled(ctx context.Context, inst *instance.Instance, spec instance.Spec, report Report) (instance.Status, error) {
	passing := func(s instance.State) bool { return s == instance.Stopping || s == instance.Saving }
	status, err := inst.Status()
	if err != nil || status.State.Live() && !passing(status.State) {
		return status, err
	}
	last := status
	if passing(status.State) {
		report.Note("%q is %s; waiting for that", inst.Name, status.State)
		err = m.client(inst, spec).Watch(ctx, func(s instance.Status) bool {
			last = s
			return passing(s.State)
		})
	}
	if err != nil && (ctx.Err() != nil || !errors.Is(err, control.ErrGone)) {
		return last, err
	}
	if last.State.Usable() {
		return last, nil
	}
	if err := m.gone(ctx, inst, status.Supervisor); err != nil {
		return last, err
	}
	return inst.Status()
}

// join waits for a machine that already runs or starts.
func (m *Manager) join(ctx context.Context, res Result, old instance.Spec, report Report) (Result, error) {
	res.Already = true
	if !sameMachine(old, res.Spec) {
		report.Note("the configuration has changed since %q started; agentvm restart applies it", res.Instance.Name)
	}
	res.Spec = old
	if res.Status.State.Usable() {
		return res, nil
	}
	var err error
	res.Status, err = m.await(ctx, res.Instance, old, report)
	return res, err
}

// sameMachine reports whether two specs run the same thing.
func sameMachine(a, b instance.Spec) bool {
	a.Format, b.Format = 0, 0
	a.Created, b.Created = time.Time{}, time.Time{}
	a.BootTimeout, b.BootTimeout = 0, 0
	a.RestoreTimeout, b.RestoreTimeout = 0, 0
	a.Machine.Saved, b.Machine.Saved = "", ""
	a.Machine.Slots, _ = a.Machine.SlotsForLater()
	b.Machine.Slots, _ = b.Machine.SlotsForLater()
	a.Hardware, b.Hardware = "", ""
	return reflect.DeepEqual(a, b)
}

// claim finds the workspace's instance, or makes an empty one.
func (m *Manager) claim(p Project, ws Directory, opt UpOptions) (inst *instance.Instance, created bool, err error) {
	name := opt.Name
	if name == "" {
		name = p.Config.Name
	}
	if name == "" {
		mine, err := m.Store.ForWorkspace(ws.Path)
		if err != nil {
			return nil, false, err
		}
		if len(mine) == 1 {
			return mine[0], false, nil
		}
		if len(mine) > 1 {
			return nil, false, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%d machines share %s: %s", len(mine), ws.Path, namesOf(mine))), "choose one with --name")
		}
		base := vm.NameFor(ws.Path)
		for i := 1; ; i++ {
			name = base
			if i > 1 {
				name = fmt.Sprintf("%s-%d", base, i)
			}
			inst, err := m.Store.Create(name)
			if err == nil {
				return inst, true, nil
			}
			if !errors.Is(err, fs.ErrExist) {
				return nil, false, err
			}
			if inst, err := m.Store.Get(name); err == nil {
				_, err := inst.Spec()
				switch {
				case errors.Is(err, fs.ErrNotExist):
					return inst, true, nil // being made at this moment, or left half made by a crash
				case err != nil:
					return nil, false, err // it may well be this workspace's: no second one behind its back
				}
			}
		}
	}
	if opt.Name == "" {
		// A fork's project has the name of what it was forked from.
		if inst, err := m.forkAt(ws.Path, name); inst != nil || err != nil {
			return inst, false, err
		}
	}
	inst, err = m.Store.Create(name)
	if !errors.Is(err, fs.ErrExist) {
		return inst, true, err
	}
	if inst, err = m.Store.Get(name); err != nil {
		return nil, false, err
	}
	spec, err := inst.Spec()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return inst, true, nil
	case err != nil:
		return nil, false, err
	case spec.Workspace != ws.Path:
		return nil, false, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("the name %q is taken by the machine of %s", name, spec.Workspace)),
			"choose another with --name, or delete that one: agentvm down "+name)
	}
	return inst, false, nil
}

func namesOf(list []*instance.Instance) string {
	var names []string
	for _, i := range list {
		names = append(names, i.Name)
	}
	return strings.Join(names, ", ")
}
