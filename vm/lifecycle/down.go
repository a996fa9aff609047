package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// Stop ends the machine: in good order within grace, else by force; grace 0
// is force at once. It reports whether there was anything to stop.
func (m *Manager) Stop(ctx context.Context, inst *instance.Instance, grace time.Duration, wait func()) (stopped bool, err error) {
	// A start under way holds the lock until it is done; ending it must not
	// wait for that.
	if stopped, err := m.stop(ctx, inst, grace); stopped || err != nil {
		return stopped, err
	}
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return false, err
	}
	defer release()
	return m.stop(ctx, inst, grace)
}

func (m *Manager) stop(ctx context.Context, inst *instance.Instance, grace time.Duration) (bool, error) {
	status, err := inst.Status()
	if err != nil {
		return false, err
	}
	if !status.State.Live() {
		// After an interrupted command it may still be going.
		err := m.gone(ctx, inst, status.Supervisor)
		if errors.Is(err, vm.ErrTimeout) {
			err = errors.Join(status.Supervisor.Kill(), m.gone(ctx, inst, status.Supervisor))
		}
		m.tidyDevices(ctx, nil)
		return false, err
	}
	spec, err := inst.Spec()
	if err != nil {
		return false, err
	}
	bounded, cancel := context.WithTimeout(ctx, grace+slack(spec))
	defer cancel()
	err = m.client(inst, spec).Stop(bounded, grace, "stopped on request")
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return false, ctx.Err()
	case errors.Is(err, control.ErrGone), errors.Is(err, vm.ErrTimeout):
		// Not even the supervisor answers: end it the way a crash would. The
		// kernel ends its children. Who waits for the machine must not boot it then.
		if asked := status; asked.Restoring && asked.To(instance.Stopping, "stopped on request") == nil {
			if err := inst.WriteStatus(asked); err != nil {
				return false, err
			}
		}
		if err := status.Supervisor.Kill(); err != nil {
			return false, err
		}
	default:
		return false, fmt.Errorf("stop %q: %w", inst.Name, err)
	}
	err = m.gone(ctx, inst, status.Supervisor)
	m.tidyDevices(ctx, nil)
	if err != nil || status.State != instance.Saving {
		return true, err
	}
	// It was to be stopped, also if it had to be killed.
	if status, err = inst.Status(); err == nil && status.State != instance.Suspended {
		err = m.discardSaved(inst)
	}
	return true, err
}

// gone waits until the supervisor's process has ended.
func (m *Manager) gone(ctx context.Context, inst *instance.Instance, p vm.ProcID) error {
	bounded, cancel := context.WithTimeout(ctx, stopSlack)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if !p.Alive() {
			s, err := inst.Status() // buries what was killed
			// The lock goes with a killed process's last thread, a moment later.
			if err != nil || !s.State.Live() || s.Supervisor != p {
				return err
			}
		}
		select {
		case <-bounded.Done():
			return vm.WithHint(vm.Classify(vm.ErrTimeout, fmt.Errorf("the supervisor of %q does not end", inst.Name)), fmt.Sprintf("kill -9 %d", p.PID))
		case <-tick.C:
		}
	}
}

// Delete ends the machine and removes its files. The workspace is kept.
func (m *Manager) Delete(ctx context.Context, inst *instance.Instance, wait func()) error {
	if _, err := m.stop(ctx, inst, 0); err != nil && vm.Hint(err) == "" {
		return err // a damaged instance is deleted all the same
	}
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return err
	}
	defer release()
	if _, err := m.stop(ctx, inst, 0); err != nil && vm.Hint(err) == "" {
		return err
	}
	if spec, err := inst.Spec(); err == nil && spec.Backend == config.BackendLibvirt {
		if err := m.Leftover(ctx, spec); err != nil {
			return err
		}
	}
	m.tidyKilled(inst)
	return inst.Remove()
}

// Start starts an existing machine as it is recorded.
func (m *Manager) Start(ctx context.Context, inst *instance.Instance, report Report) (Result, error) {
	spec, err := inst.Spec()
	if err != nil {
		return Result{}, err
	}
	p := defaultProject(spec.Workspace)
	if spec.Config != "" {
		if p, err = LoadProject(spec.Config); err != nil {
			return Result{}, err
		}
	}
	return m.Up(ctx, p, UpOptions{Name: inst.Name, AllowWide: true}, report)
}
