package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/template"
)

// Manager does what the commands ask for.
type Manager struct {
	Store     instance.Store
	Agents    *agent.Set
	Images    func() (*images.Cache, error) // opened when first needed
	Templates template.Store
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
	// a machine with that many bytes of memory; it fails with what is in the way,
	// and changes nothing.
	ChooseDevices func(ctx context.Context, want config.GPU, memory int64) (Devices, error)
	// RecoverDevices gives the host back what killed supervisors have left, and
	// says what it did.
	RecoverDevices func(ctx context.Context) ([]string, error)
	// Executable is this program, started again as the supervisor.
	Executable string
	Home       string
	Pool       int // how many machines are kept waiting to be claimed
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
	status, err := inst.Status()
	if err != nil {
		return Result{}, err
	}
	m.tidyDevices(ctx, report)
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
	if err := m.Store.Dirs.Reachable(); err != nil {
		return Result{}, err
	}
	if err := m.discardSaved(inst); err != nil {
		return Result{}, err
	}
	if plan.spec.Machine.HugePages == 0 { // those are set aside
		if err := checkMemory(plan.spec.Machine.Memory); err != nil {
			return Result{}, err
		}
	}
	if plan.emulated != "" {
		report.Note("WARNING: no usable KVM (%s): the guest is emulated, which is slow, and QEMU does not promise isolation for emulated guests", plan.emulated)
	}
	from, err := m.templateFor(ctx, plan, opt, report)
	if err != nil {
		return Result{}, err
	}
	if plan.newDisk {
		if err := discardDisk(inst); err != nil {
			return Result{}, err
		}
	}
	res.Spec, res.Status, err = m.launch(ctx, inst, plan, from, func() { started = true }, report)
	if err == nil && from != nil && m.Pool > 0 {
		if err := m.fillLater(p, opt); err != nil {
			report.Note("%v", err)
		}
	}
	return res, err
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
			if err := discardDisk(inst); err != nil {
				return spec, status, err
			}
		}
		spec = plan.spec
		spec.Machine.Saved = from.Dir
		status, err = m.attempt(ctx, inst, spec, plan, from, begun, report)
		if err == nil || ctx.Err() != nil || !status.RestoreFailed && !errors.Is(err, template.ErrDisk) {
			return spec, status, err
		}
		why := cmp.Or(status.Reason, err.Error())
		report.Note("%q could not go on from template %s, which is deleted: it boots instead (%s)", inst.Name, from.ID, why)
		if err := m.Templates.Remove(from); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return spec, status, err
		}
		if err := discardDisk(inst); err != nil {
			return spec, status, err
		}
	}
	status, err := m.attempt(ctx, inst, plan.spec, plan, nil, begun, report)
	return plan.spec, status, err
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

// plan is a decision: what to run, and what it is made from.
type plan struct {
	spec     instance.Spec
	image    *images.Image
	host     Host
	facts    cloudinit.Facts
	git      cloudinit.Git
	newDisk  bool   // there is none, or the old one has to go
	emulated string // why there is no hardware virtualization; empty: there is

	roms map[string]string // option ROMs to copy into the machine's directory, from where
}

// plan decides what to run, building the image when it is lacking.
func (m *Manager) plan(ctx context.Context, p Project, ws Directory, inst *instance.Instance, old instance.Spec, opt UpOptions, report Report) (plan, error) {
	fail := func(err error) (plan, error) { return plan{}, err }
	chosen := opt.Agent
	if chosen == "" {
		chosen = old.AgentChosen
	}
	if chosen != "" {
		p.Config.Agent.Use = chosen
	}
	profile, err := m.Agents.Get(p.Config.Agent.Use)
	if err != nil {
		return fail(err)
	}
	if p.Config.Backend == config.BackendLibvirt {
		if p.Config.URI, err = m.Libvirt(ctx, p.Config.URI, opt.connect); err != nil {
			return fail(err)
		}
	}
	in := Inputs{Name: inst.Name, ID: old.ID, Created: old.Created, Project: p, Workspace: ws, Profile: profile, Dir: inst.Dir, View: old.View}
	for _, mount := range p.Config.Mounts {
		d, err := CheckDirectory(absolute(p.Dir, m.Home, mount.Source), m.Home, opt.AllowWide)
		if err != nil {
			return fail(fmt.Errorf("mount %s: %w", mount.Target, err))
		}
		in.Mounts = append(in.Mounts, d)
	}
	if in.ID == "" {
		in.ID, in.Created = uuid.NewString(), time.Now().UTC().Truncate(time.Second)
	}
	in.Run = inst.RunDir(in.ID)
	devices, err := m.devices(ctx, p, inst, old)
	if err != nil {
		return fail(err)
	}
	for _, note := range devices.Notes {
		report.Note("%s", note)
	}
	if in.Image, err = m.image(ctx, p, profile, old, opt, report); err != nil {
		return fail(err)
	}
	in.Host = Host{UID: os.Getuid(), GID: os.Getgid(), Home: m.Home, AgentConfig: m.agentConfig(profile, p.Config.Agent.Config == "credentials")}
	var why string
	if in.Host.Accel, why, err = m.Accel(ctx, in.Image, in.Host.runAs(in.ID)); err != nil {
		return fail(err)
	}
	if in.Image.Kernel() != "" && p.Config.Firmware != "" {
		return fail(vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("firmware: %s is for disk files; image %s is started without any", p.Config.Firmware, p.Config.Image)), "remove firmware from agentvm.yaml"))
	}
	spec := Resolve(in)
	spec.AgentChosen = chosen
	if old.Disk != 0 && old.Disk != spec.Disk && !opt.Recreate {
		report.Note("resources.disk has changed, and this machine keeps its disk; agentvm up --recreate gives it a new one (the workspace is kept)")
		spec.Disk = old.Disk
	}
	facts := cloudinit.HostProbe().Facts(ctx)
	if len(facts.CAs) > 0 {
		// Programs with a list of their own trust the host's extra CAs only so.
		for name, value := range cloudinit.CAEnv() {
			if _, set := spec.Guest.Env[name]; !set {
				spec.Guest.Env[name] = value
			}
		}
	}
	git := facts.Git
	git.SharedWorktrees = true
	git.Name = cmp.Or(p.Config.Git.Name, git.Name)
	git.Email = cmp.Or(p.Config.Git.Email, git.Email)
	roms, err := withDevices(&spec, p.Config.GPU, devices, inst.Path)
	if err != nil {
		return fail(err)
	}
	if opt.BootTimeout > 0 {
		spec.BootTimeout = opt.BootTimeout
	}
	pl := plan{spec: spec, roms: roms, image: in.Image, host: in.Host, facts: facts, git: git}
	_, err = os.Stat(inst.Path(OverlayFile))
	pl.newDisk = opt.Recreate || old.ImageID != spec.ImageID || errors.Is(err, fs.ErrNotExist)
	if in.Host.Accel == vm.AccelTCG {
		pl.emulated = why
	}
	return pl, nil
}

// image finds or builds the image. An instance keeps the one that its disk
// lies on, until it is recreated: a new base below an old overlay would tear
// the guest's file system apart.
func (m *Manager) image(ctx context.Context, p Project, profile agent.Profile, old instance.Spec, opt UpOptions, report Report) (*images.Image, error) {
	cache, err := m.Images()
	if err != nil {
		return nil, err
	}
	want := ImageSpec(p, m.Home, profile)
	if old.ImageID == "" || opt.Recreate {
		return cache.Ensure(ctx, want, report)
	}
	if img, err := cache.Resolve(ctx, want); err == nil && img.ID == old.ImageID {
		return img, nil
	}
	kept, err := keptImage(ctx, cache, old.ImageID)
	if err != nil {
		return nil, vm.WithHint(fmt.Errorf("the image below the machine's disk: %w", err), "agentvm up --recreate gives it a new disk; the workspace is kept")
	}
	report.Note("the environment has changed, and this machine keeps its disk; agentvm up --recreate gives it a new one (the workspace is kept)")
	return kept, nil
}

// keptImage finds an image by the id that an instance remembers; that of a
// disk file is its path.
func keptImage(ctx context.Context, cache *images.Cache, id string) (*images.Image, error) {
	if filepath.IsAbs(id) {
		return images.Local(ctx, id)
	}
	return cache.Get(id)
}

// agentConfig lists the profile's configuration paths that the host has.
// Those with credentials go along only when the project asks for it.
func (m *Manager) agentConfig(profile agent.Profile, credentials bool) []string {
	var have []string
	for _, c := range profile.Config {
		if _, err := os.Stat(absolute("/", m.Home, c.Path)); err == nil && (credentials || !c.Secret) {
			have = append(have, c.Path)
		}
	}
	return have
}
