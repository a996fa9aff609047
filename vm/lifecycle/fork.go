package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/tree"
)

// forkDir is where a fork's machine is kept while it is made, among the
// snapshots under a name that none can have.
const forkDir = ".fork"

// Fork makes n machines that go on from where the running machine is, each with
// an identity of its own and a copy of the workspace beside it; with view they
// see the workspace itself, and cannot write to it. The machine is suspended
// while everything is copied, so that nothing moves under the copy: a guest
// that swaps a directory for a link would otherwise have files of the host
// copied. It goes on whatever comes of it.
func (m *Manager) Fork(ctx context.Context, inst *instance.Instance, n int, view bool, report Report, wait func()) (forks []Result, err error) {
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return nil, err
	}
	defer release()
	m.tidyKilled(inst)
	spec, status, err := m.saveable(ctx, inst, true)
	if err != nil {
		return nil, err
	}
	if spec.Backend == config.BackendLibvirt {
		return nil, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("libvirt runs %q, and holds what it has saved to be that machine: its memory can only be its own", inst.Name)),
			"agentvm snapshot create saves this one; backend: qemu has forks")
	}
	targets, err := m.forkTargets(inst, spec, n, view)
	if err != nil {
		return nil, err
	}
	if !view {
		if err := m.ownWorkspace(inst, spec); err != nil {
			return nil, err
		}
	}
	if err := m.checkFork(ctx, inst, spec, view, report); err != nil {
		return nil, err
	}
	made := Snapshot{Name: inst.Name, Memory: true, Spec: spec, dir: snapshotDir(inst, forkDir)}
	defer func() { err = errors.Join(err, os.RemoveAll(made.dir), dropCopies(inst)) }()
	if err := os.RemoveAll(made.dir); err != nil { // of a killed command
		return nil, fmt.Errorf("fork: %w", err)
	}
	if err := m.suspend(ctx, inst); err != nil {
		return nil, err
	}
	if err = keepSaved(inst, made.dir); err == nil {
		err = m.copyForks(ctx, inst, spec, targets, report)
	}
	if _, goneOn := m.resume(context.WithoutCancel(ctx), inst, spec, report); goneOn != nil {
		err = errors.Join(err, fmt.Errorf("%q did not go on: %w", inst.Name, goneOn))
	}
	if err != nil {
		return nil, err
	}
	for _, t := range targets {
		res, err := m.forkTo(ctx, t, made, status.Provisioned, report)
		if err != nil {
			return forks, err
		}
		forks = append(forks, res)
	}
	return forks, nil
}

// copyForks copies the workspace for each fork that is to have a copy. The copies
// have no names yet: a command that is killed must not leave what looks whole.
func (m *Manager) copyForks(ctx context.Context, inst *instance.Instance, spec instance.Spec, targets []forkTarget, report Report) error {
	if targets[0].view {
		return nil
	}
	release, err := m.copying(ctx, inst, spec, func() { report.Note("a machine is being started; waiting for that") })
	if err != nil {
		return err
	}
	defer release()
	if err := announceCopies(inst, targets); err != nil {
		return err
	}
	for _, t := range targets {
		report.Note("copying %s to %s", spec.Workspace, t.dir)
		if err := tree.Copy(ctx, t.copy, spec.Workspace); err != nil {
			return err
		}
	}
	return nil
}

// forkTarget is where one fork goes.
type forkTarget struct {
	name, dir string
	copy      string // what dir is until the fork is started; empty: nothing is copied
	config    string // path of the configuration, of the copy's if there is one; empty: there is none
	view      bool   // dir is the original's, and only looked at
}

// forkTargets finds names and directories for n forks.
func (m *Manager) forkTargets(inst *instance.Instance, spec instance.Spec, n int, view bool) (list []forkTarget, err error) {
	if !view && spec.Config != "" && filepath.Dir(spec.Config) != spec.Workspace {
		return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("%q cannot be forked: its configuration %s does not lie at the top of its workspace, so that a copy would not have it", inst.Name, spec.Config))
	}
	if !view && within(spec.ImageID, spec.Workspace) {
		return nil, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q cannot be forked: its image %s lies in its workspace, and a copy would have its own", inst.Name, spec.ImageID)), "agentvm fork --readonly copies nothing")
	}
	for i := 1; len(list) < n; i++ {
		t := forkTarget{name: fmt.Sprintf("%s-fork-%d", inst.Name, i), dir: fmt.Sprintf("%s-fork-%d", spec.Workspace, i)}
		if err := vm.ValidName(t.name); err != nil {
			return nil, vm.Classify(vm.ErrUsage, err)
		}
		if view {
			t.dir, t.config, t.view = spec.Workspace, spec.Config, true
		} else if spec.Config != "" {
			t.config = filepath.Join(t.dir, filepath.Base(spec.Config))
		}
		_, dirErr := os.Lstat(t.dir)
		if view {
			dirErr = fs.ErrNotExist // nothing is made
		}
		_, nameErr := m.Store.Get(t.name)
		if errors.Is(dirErr, fs.ErrNotExist) && errors.Is(nameErr, vm.ErrNotFound) {
			list = append(list, t)
		}
	}
	return list, nil
}

// within reports whether path a is b or lies below it.
func within(a, b string) bool { return a == b || strings.HasPrefix(a, strings.TrimSuffix(b, "/")+"/") }

// aloneWith makes sure that no other machine that runs can change dir.
func (m *Manager) aloneWith(inst *instance.Instance, dir string) error {
	list, err := m.Store.List()
	if err != nil {
		return err
	}
	for _, other := range list {
		if other.Name == inst.Name {
			continue
		}
		status, err := other.Status()
		if err != nil {
			return fmt.Errorf("whether %q works in %s is not known: %w", other.Name, dir, err)
		}
		if !status.State.Live() {
			continue
		}
		spec, err := other.Spec()
		if err != nil {
			return err
		}
		for _, s := range spec.Shares {
			if !s.ReadOnly && (within(s.Source, dir) || within(dir, s.Source)) {
				return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q works in %s too, which cannot be copied meanwhile", other.Name, s.Source)), "agentvm suspend "+other.Name)
			}
		}
	}
	return nil
}

// keepSaved keeps what the suspended machine is for others, since it deletes
// that itself when it goes on.
func keepSaved(inst *instance.Instance, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("fork: %w", err)
	}
	files, err := os.ReadDir(inst.Path(instance.SavedDir))
	if err != nil {
		return fmt.Errorf("fork: %w", err)
	}
	for _, f := range files {
		if err := os.Link(inst.Path(filepath.Join(instance.SavedDir, f.Name())), filepath.Join(dir, f.Name())); err != nil {
			return fmt.Errorf("fork: %w", err)
		}
	}
	for _, name := range diskFiles(inst) {
		if err := saved.Copy(filepath.Join(dir, name), inst.Path(name)); err != nil {
			return err
		}
	}
	return nil
}

// forkTo starts one machine from what was made.
func (m *Manager) forkTo(ctx context.Context, t forkTarget, from Snapshot, provisioned bool, report Report) (res Result, err error) {
	inst, err := m.Store.Create(t.name)
	if err != nil {
		return res, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, inst.Remove())
		}
	}()
	release, err := inst.Lock(ctx, func() {})
	if err != nil {
		return res, err
	}
	defer release()
	if t.copy != "" {
		if err := tree.Rename(t.dir, t.copy); err != nil {
			return res, err
		}
		defer func() {
			if err != nil { // nobody has worked in it
				err = errors.Join(err, tree.Remove(t.dir))
			}
		}()
	}
	plan, err := m.forkPlan(ctx, t, inst, "", from.Spec, report)
	if err != nil {
		return res, err
	}
	if err := checkMemory(plan.spec.Machine.Memory); err != nil {
		return res, err
	}
	if err := inst.WriteStatus(instance.Status{State: instance.Stopped, Provisioned: provisioned}); err != nil {
		return res, err
	}
	plan.spec.Machine.Saved = from.dir
	res = Result{Instance: inst, Spec: plan.spec, Created: true}
	res.Status, err = m.attempt(ctx, inst, plan.spec, plan, from, func() {}, report)
	return res, err
}

// forkAt finds the fork that has workspace ws, where another workspace's
// machine has the name that its project asks for.
func (m *Manager) forkAt(ws, name string) (*instance.Instance, error) {
	mine, err := m.Store.ForWorkspace(ws)
	if err != nil || len(mine) != 1 || mine[0].Name == name {
		return nil, err
	}
	inst, err := m.Store.Get(name)
	if errors.Is(err, vm.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	spec, err := inst.Spec()
	if err != nil || spec.Workspace == ws {
		return nil, nil // the caller says what is wrong with it
	}
	return mine[0], nil
}
