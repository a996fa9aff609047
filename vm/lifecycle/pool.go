package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/template"
)

// seedRoom is as large as a waiting machine's seed is made, in bytes, so that
// the seed of whoever claims the machine fits in.
const seedRoom = 1 << 20

// PoolLog is the log of what fills the pool beside an `up`, in the state
// directory.
const PoolLog = "pool.log"

// fillDelay is how long the pool waits after an `up` before it takes the
// host's processors for itself.
const fillDelay = 3 * time.Second

// A Spare is a machine of the pool that waits to be claimed.
type Spare struct {
	Instance *instance.Instance
	Spec     instance.Spec
	Status   instance.Status
}

// Spares lists the machines that wait, the one that has waited longest first.
func (m *Manager) Spares() ([]Spare, error) {
	list, err := m.Store.Spares()
	if err != nil {
		return nil, err
	}
	var spares []Spare
	for _, inst := range list {
		if s, ok := lookAtSpare(inst); ok {
			spares = append(spares, s)
		}
	}
	slices.SortFunc(spares, func(a, b Spare) int {
		return cmp.Or(a.Status.Since.Compare(b.Status.Since), cmp.Compare(a.Instance.Name, b.Instance.Name))
	})
	return spares, nil
}

func lookAtSpare(inst *instance.Instance) (Spare, bool) {
	spec, err := inst.Spec()
	if err != nil {
		return Spare{}, false
	}
	status, err := inst.Status()
	return Spare{inst, spec, status}, err == nil && status.State == instance.Spare
}

// FillPool makes the pool hold as many machines as it is to, of the project's environment,
// after wait, and none of any other. It returns how many it has made.
func (m *Manager) FillPool(ctx context.Context, p Project, opt UpOptions, wait time.Duration, report Report) (made int, err error) {
	opt.AllowWide = true // nothing of it is shared
	ws, err := CheckDirectory(p.Workspace(), m.Home, opt.AllowWide)
	if err != nil {
		return 0, err
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	release, err := m.Store.LockPool(ctx, func() { report.Note("another command fills the pool; waiting for it") })
	if err != nil {
		return 0, err
	}
	defer release()
	size, err := m.Pool()
	if err != nil {
		return 0, err
	}
	if size == 0 {
		return 0, m.endSpares(ctx, func(Spare) bool { return false })
	}
	p.Config.GPU = config.GPU{} // a machine that waits holds no device of the host
	plan, from, err := m.environment(ctx, p, ws, opt, report)
	if err != nil {
		return 0, err
	}
	defer from.Release()
	kept := 0
	err = m.endSpares(ctx, func(s Spare) bool {
		keep := s.Spec.Spare == from.Key && kept < size
		if keep {
			kept++
		}
		return keep
	})
	if err != nil {
		return 0, err
	}
	for ; kept < size; kept++ {
		if err := checkMemory(plan.spec.Machine.Memory); err != nil {
			return made, err
		}
		if err := m.makeSpare(ctx, plan, from, report); err != nil {
			return made, err
		}
		made++
	}
	return made, nil
}

// DrainPool ends the machines of the pool, and removes what is left of others.
func (m *Manager) DrainPool(ctx context.Context, wait func()) (ended int, err error) {
	release, err := m.Store.LockPool(ctx, wait)
	if err != nil {
		return 0, err
	}
	defer release()
	before, err := m.Spares()
	if err != nil {
		return 0, err
	}
	err = m.endSpares(ctx, func(Spare) bool { return false })
	after, listErr := m.Spares()
	return len(before) - len(after), errors.Join(err, listErr)
}

// endSpares ends the machines of the pool but those to keep, and removes what
// killed programs have left of others. The caller holds the pool's lock; a
// machine that is being claimed is let alone.
func (m *Manager) endSpares(ctx context.Context, keep func(Spare) bool) error {
	list, err := m.Store.Spares()
	if err != nil {
		return err
	}
	err = m.Store.SweepClaimed()
	for _, inst := range list {
		release, ok := inst.TryLock()
		if !ok {
			continue
		}
		if s, ok := lookAtSpare(inst); !ok || !keep(s) {
			err = errors.Join(err, m.clear(ctx, inst))
		}
		release()
	}
	return err
}

// makeSpare adds a machine to the pool.
func (m *Manager) makeSpare(ctx context.Context, plan plan, from *template.Template, report Report) (err error) {
	if err := from.Touch(); err != nil {
		return err
	}
	inst, id, err := m.Store.CreateSpare()
	if err != nil {
		return err
	}
	release, ok := inst.TryLock()
	if !ok {
		return fmt.Errorf("the new machine %s is somebody else's", inst.Name)
	}
	defer release()
	defer func() {
		if err != nil {
			err = errors.Join(err, m.clear(context.WithoutCancel(ctx), inst))
		}
	}()
	plan.spec = nobodys(plan, inst, id)
	plan.spec.Spare, plan.spec.Machine.Saved = from.Key, from.Dir
	if plan.spec.Hardware, err = m.Hardware(ctx, plan.spec.Machine); err != nil {
		return err
	}
	plan.git = cloudinit.Git{}
	if err := prepare(ctx, inst, plan.spec, plan, from); err != nil {
		return err
	}
	if err := os.Truncate(inst.Path(SeedFile), seedRoom); err != nil {
		return fmt.Errorf("make room for another seed: %w", err)
	}
	if err := inst.WriteSpec(plan.spec); err != nil {
		return err
	}
	if _, err = m.start(ctx, inst, plan.spec, report); err != nil {
		return err
	}
	trust(from, report)
	return nil
}

// claimSpare makes a machine of the pool, if one waits that was made from the
// template, the instance of the plan. done is false where there is none or it
// could not be had; nothing has become of the instance then. With done, the
// error is of a machine that was claimed and did not get ready.
func (m *Manager) claimSpare(ctx context.Context, inst *instance.Instance, plan plan, from *template.Template, begun func(), report Report) (spec instance.Spec, status instance.Status, done bool, err error) {
	// A machine of the pool has keys of its own, and so has an instance that
	// gets a new disk.
	if _, err := os.Stat(inst.Path(HostKeyFile)); err == nil {
		return spec, status, false, nil
	}
	spares, err := m.Spares()
	if err != nil {
		return spec, status, false, err
	}
	for _, s := range spares {
		if s.Spec.Spare != from.Key {
			continue
		}
		release, ok := s.Instance.TryLock()
		if !ok {
			continue
		}
		spec, err = m.offer(ctx, inst, s, plan, report)
		if err == nil || !inst.WithdrawClaim() { // it may have been accepted while nobody listened any more
			begun()
			status, err = m.awaitClaimed(ctx, inst, spec, report)
			release()
			return spec, status, true, err
		}
		if ctx.Err() == nil {
			report.Note("a machine of the pool could not be used, and is ended: %v", err)
		}
		err = errors.Join(ctx.Err(), m.clear(context.WithoutCancel(ctx), s.Instance))
		release()
		if err != nil {
			return spec, status, false, err
		}
	}
	return spec, status, false, nil
}

// offer makes what a waiting machine has to know to become inst, and asks it to.
func (m *Manager) offer(ctx context.Context, inst *instance.Instance, s Spare, plan plan, report Report) (instance.Spec, error) {
	id := s.Spec.ID
	spec := place(plan.spec, inst.Name, id, inst.Dir, inst.RunDir(id), plan.host)
	spec.Hardware, spec.Machine.Saved = s.Spec.Hardware, s.Spec.Machine.Saved
	cfg := seedConfig(spec, plan)
	client, err := keyPair(s.Instance.Path(ClientKeyFile), "")
	if err != nil {
		return spec, err
	}
	host, err := keyPair(s.Instance.Path(HostKeyFile), "")
	if err != nil {
		return spec, err
	}
	cfg.AuthorizedKeys, cfg.HostKey = []string{client.Public}, host.Private
	if err := writeSeed(inst, cfg); err != nil {
		return spec, err
	}
	call, err := cloudinit.Claim(cfg)
	if err := writeCall(inst, call, err); err != nil {
		return spec, err
	}
	if err := inst.WriteClaim(spec); err != nil {
		return spec, err
	}
	release, err := m.Store.LockWorkspaces(ctx, false, func() { report.Note("a workspace is being copied; waiting for that") })
	if err != nil {
		return spec, err
	}
	defer release() // its status says by then that it lives
	return spec, m.client(inst, spec).Adopt(ctx, inst.Dir)
}

// awaitClaimed follows a machine that was claimed until it is usable or has
// ended, and ends it when ctx ends before.
func (m *Manager) awaitClaimed(ctx context.Context, inst *instance.Instance, spec instance.Spec, report Report) (instance.Status, error) {
	status, err := m.await(ctx, inst, spec, report)
	if ctx.Err() != nil {
		_, stopErr := m.stop(context.WithoutCancel(ctx), inst, 0)
		return status, errors.Join(ctx.Err(), stopErr)
	}
	return status, err
}

// fillLater starts a program of its own that fills the pool for the project's
// environment, once the command that needed a machine has left the host in peace.
func (m *Manager) fillLater(p Project, agent string) error {
	args := []string{"-C", p.Dir, "pool", "fill", "--after", fillDelay.String()}
	if p.ConfigPath != "" {
		args = append(args, "--config", p.ConfigPath)
	}
	if agent != "" {
		args = append(args, "--agent", agent)
	}
	log, err := os.OpenFile(filepath.Join(m.Store.Dirs.State, PoolLog), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("fill the pool: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(m.Executable, args...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = supervisorEnv(os.Environ())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives the terminal
	if err := errors.Join(closeOnExec(), cmd.Start()); err != nil {
		return fmt.Errorf("fill the pool: %w", err)
	}
	return cmd.Process.Release()
}
