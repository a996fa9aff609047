package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// SupervisorLog is the supervisor's own log in the instance's directory.
const SupervisorLog = "supervisor.log"

// Waits of a start. The supervisor bounds the boot itself; these bound the
// supervisor.
const (
	socketTimeout = 15 * time.Second
	stopSlack     = 15 * time.Second // beyond the grace time, for taking down
)

// StartError is a machine that did not come up.
type StartError struct {
	Name    string
	Reason  string
	Console []string // the guest's last lines

	TimedOut bool // it had not come up in time
}

func (e *StartError) Error() string {
	s := fmt.Sprintf("%q did not start: %s", e.Name, e.Reason)
	if len(e.Console) > 0 {
		s += "\nthe guest's last console lines:\n  " + strings.Join(e.Console, "\n  ")
	}
	return s
}

// Unwrap classifies a start that took too long.
func (e *StartError) Unwrap() error {
	if e.TimedOut {
		return vm.ErrTimeout
	}
	return nil
}

// Hint names the next step.
func (e *StartError) Hint() string { return "agentvm logs " + e.Name + " shows more" }

// start spawns the supervisor and waits until the machine is usable. When ctx
// ends before that, the machine is ended too.
func (m *Manager) start(ctx context.Context, inst *instance.Instance, spec instance.Spec, report Report) (instance.Status, error) {
	if err := ctx.Err(); err != nil {
		return instance.Status{}, err
	}
	// The last one may still be going, and would be taken for this one.
	if status, err := inst.Status(); err == nil && !status.State.Live() {
		if err := m.gone(ctx, inst, status.Supervisor); err != nil {
			return status, err
		}
	}
	log, err := os.OpenFile(inst.Path(SupervisorLog), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return instance.Status{}, fmt.Errorf("start the supervisor: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(m.Executable, "supervise", inst.Dir)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = supervisorEnv(os.Environ())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a terminal's Ctrl-C is for us alone
	// Until its status says that it lives, who copies a workspace cannot know.
	release, err := m.Store.LockWorkspaces(ctx, false, func() { report.Note("a workspace is being copied; waiting for that") })
	if err != nil {
		return instance.Status{}, err
	}
	defer release()
	if err := closeOnExec(); err != nil {
		return instance.Status{}, fmt.Errorf("start the supervisor: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return instance.Status{}, fmt.Errorf("start the supervisor: %w", err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	if err := awaitSupervisor(ctx, inst, spec, exited); err != nil {
		// Without its socket there is no better way to tell it; SIGTERM makes
		// it take everything down.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(slack(spec)):
			_ = cmd.Process.Kill()
			<-exited
		}
		if ctx.Err() != nil {
			return instance.Status{}, err
		}
		return failure(inst, err)
	}
	release()
	status, err := m.await(ctx, inst, spec, report)
	if ctx.Err() != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), slack(spec))
		defer cancel()
		_ = m.client(inst, spec).Stop(stop, 0, "interrupted while starting")
		select {
		case <-exited:
		case <-stop.Done():
			_ = cmd.Process.Kill()
			<-exited
		}
		return status, ctx.Err()
	}
	return status, err
}

// closeOnExec keeps from a process that outlives the command what its caller
// had open: flock(1)'s lock would stay taken, a pipe's reader wait for ever.
func closeOnExec() error {
	err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) { // before Linux 5.11
		return nil
	}
	return err
}

// supervisorEnv keeps what a supervisor uses of the user's environment. The
// rest may hold secrets, which a process that lives for days need not know.
func supervisorEnv(environ []string) (kept []string) {
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		switch {
		case slices.Contains([]string{"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "AGENTVM_HOME", "GODEBUG"}, name),
			strings.HasPrefix(name, "LC_"), strings.HasPrefix(name, "XDG_"),
			slices.Contains([]string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"}, strings.ToUpper(name)):
			kept = append(kept, e)
		}
	}
	return kept
}

func (m *Manager) client(inst *instance.Instance, spec instance.Spec) *control.Client {
	return control.NewClient(filepath.Join(inst.RunDir(spec.ID), control.Socket))
}

// awaitSupervisor waits until the supervisor answers, or has ended.
func awaitSupervisor(ctx context.Context, inst *instance.Instance, spec instance.Spec, exited <-chan struct{}) error {
	c := control.NewClient(filepath.Join(inst.RunDir(spec.ID), control.Socket))
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(socketTimeout)
	for {
		if _, err := c.Status(ctx); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-exited:
			return errors.New("the supervisor ended at once")
		case <-deadline:
			return vm.Classify(vm.ErrTimeout, errors.New("the supervisor does not answer"))
		case <-tick.C:
		}
	}
}

// await follows a machine until it is usable or has ended.
func (m *Manager) await(ctx context.Context, inst *instance.Instance, spec instance.Spec, report Report) (instance.Status, error) {
	var last instance.Status
	c := m.client(inst, spec)
	if s, err := c.Status(ctx); err == nil && s.State == instance.Paused {
		if err := c.Wake(ctx); err != nil {
			return s, err
		}
	}
	err := c.Watch(ctx, func(s instance.Status) bool {
		last = s
		report.State(s)
		return !isUp(s.State) && s.State.Live()
	})
	if err != nil && (ctx.Err() != nil || !errors.Is(err, control.ErrGone)) {
		return last, err
	}
	if isUp(last.State) {
		return last, nil
	}
	// Its end shows on the socket before the kernel has cleared it away.
	if err := m.gone(ctx, inst, last.Supervisor); err != nil {
		return last, err
	}
	return failure(inst, nil)
}

// isUp reports whether a start has come to its end well.
func isUp(s instance.State) bool { return s.Usable() || s == instance.Spare }

// failure turns what the supervisor left behind into an error.
func failure(inst *instance.Instance, err error) (instance.Status, error) {
	s, statusErr := inst.Status()
	if statusErr != nil {
		return s, statusErr
	}
	if isUp(s.State) || s.State == instance.Stopped && s.Saved {
		return s, nil
	}
	reason := s.Reason
	if err != nil && s.State != instance.Failed {
		reason = err.Error()
		if tail, _ := os.ReadFile(inst.Path(SupervisorLog)); len(tail) > 0 {
			reason += ": " + lastLines(string(tail), 5)
		}
	}
	return s, &StartError{Name: inst.Name, Reason: reason, Console: s.Console, TimedOut: s.TimedOut}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
