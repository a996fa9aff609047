package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/console"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// boot waits until the guest is usable, and makes it ready for its user.
// first is false after a restart from inside.
func (s *Supervisor) boot(ctx context.Context, first bool) error {
	bounded, cancel := context.WithTimeoutCause(ctx, s.spec.BootTimeout, errNotReady)
	defer cancel()
	bounded, abort := context.WithCancelCause(bounded)
	defer abort(nil)
	// A guest that mounts a dead share would hang until the deadline.
	lost := s.lost // it is another one once the machine has been saved
	go func() {
		select {
		case l := <-lost:
			lost <- l
			abort(l)
		case <-bounded.Done():
		}
	}()
	began := time.Now()
	guest, err := s.parts.Guest(bounded, s.inst, s.spec, s.network.Dial)
	if err != nil {
		return s.bootError(bounded, "log in to the guest", err)
	}
	s.setGuest(guest)
	s.trace("ssh", began)
	began = time.Now()
	warnings, err := s.settle(bounded, guest)
	if err != nil {
		return s.bootError(bounded, "wait for the guest's own start-up", err)
	}
	s.trace("cloud-init", began)
	return s.ready(ctx, guest, warnings, first)
}

// ready gives the user's things to a guest that is up, and says that it is ready.
func (s *Supervisor) ready(ctx context.Context, guest Guest, warnings []string, first bool) error {
	if err := s.serveSSH(guest); err != nil {
		return err
	}
	warnings = append(warnings, s.provision(ctx, guest, first)...)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	for _, sh := range s.shares {
		warnings = append(warnings, sh.Warnings()...)
	}
	s.change(func(st *instance.Status) {
		for _, why := range st.Lost {
			warnings = append(warnings, why)
		}
		for i := range warnings {
			warnings[i] = plain(warnings[i])
		}
		st.Warnings = warnings
	})
	s.consoleBefore = console.Size(s.spec.Machine.Console)
	if len(warnings) > 0 {
		s.to(instance.Degraded, warnings[0])
	} else {
		s.to(instance.Ready, "")
	}
	return nil
}

// maxWarnings are as many of the guest's findings as somebody would read.
const maxWarnings = 20

var errNotReady = errors.New("the guest did not become ready in time")

// bootError prefers the reason that ended the wait over its symptom.
func (s *Supervisor) bootError(ctx context.Context, what string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		if errors.Is(cause, errNotReady) {
			return vm.Classify(vm.ErrTimeout, fmt.Errorf("%s: %w (%v): %w", what, cause, s.spec.BootTimeout, err))
		}
		return cause
	}
	return fmt.Errorf("%s: %w", what, err)
}

// settleScript waits until cloud-init has done this boot's work, then says
// what is missing: a line of result.json, and a line for each share that is
// not mounted. result.json lies in /run, so an older boot's cannot be meant
// (https://docs.cloud-init.io/en/latest/explanation/boot.html).
const settleScript = `
while [ ! -e /run/cloud-init/result.json ]; do sleep 0.2; done
if ! grep -q '"errors": \[\]' /run/cloud-init/result.json; then
	printf 'cloud-init: '; tr -d '\n' </run/cloud-init/result.json; echo
fi
for m in %s; do
	grep -q " $m virtiofs " /proc/mounts || echo "not mounted: $m"
done
`

// settle waits for cloud-init and checks the mounts. What it returns without
// an error is lost comfort, to be shown.
func (s *Supervisor) settle(ctx context.Context, guest Guest) ([]string, error) {
	var targets []string
	for _, sh := range s.spec.Shares {
		targets = append(targets, mountsEscape(sh.Target))
	}
	var out head
	code, err := guest.Run(ctx, fmt.Sprintf(settleScript, strings.Join(targets, " ")), &out)
	if err != nil {
		return nil, err
	}
	if code != 0 {
		return nil, fmt.Errorf("the check ended with exit code %d: %s", code, strings.TrimSpace(out.String()))
	}
	lines := strings.FieldsFunc(strings.TrimSpace(out.String()), func(r rune) bool { return r == '\n' })
	return lines[:min(len(lines), maxWarnings)], nil
}

// mountsEscape writes a path as /proc/mounts does (proc_pid_mounts(5)), in
// single quotes for the shell and with its backslashes kept from grep.
func mountsEscape(path string) string {
	path = strings.NewReplacer(" ", `\\040`, "\t", `\\011`, "\n", `\\012`, `\`, `\\134`, ".", `\.`, "[", `\[`, "*", `\*`).Replace(path)
	return vm.ShellQuote(path)
}

// serveSSH lets SSH clients on the host use the connection.
func (s *Supervisor) serveSSH(guest Guest) (err error) {
	if s.ssh != nil { // after a restart from inside: the old proxy ended with its connection
		s.ssh.Close()
	}
	if s.ssh, err = s.listen(control.SSHSocket); err != nil {
		return err
	}
	go func(l interface{ Close() error }) {
		if err := guest.Serve(s.ssh); err != nil {
			s.log.Warn("ssh proxy", "error", err)
		}
		l.Close()
	}(s.ssh)
	return nil
}

// provision copies what the agent is to have and runs the project's commands.
func (s *Supervisor) provision(ctx context.Context, guest Guest, first bool) (warnings []string) {
	g := s.spec.Guest
	if first {
		for _, c := range g.Copies {
			if err := guest.Copy(ctx, c.Source, c.Target); err != nil {
				warnings = append(warnings, fmt.Sprintf("copy %s into the guest: %v", c.Source, err))
			}
		}
	}
	if s.Status().Provisioned || len(g.Run) == 0 {
		return warnings
	}
	defer s.trace("provision", time.Now())
	for i, script := range g.Run {
		var out tail
		code, err := guest.Run(ctx, "cd "+vm.ShellQuote(g.Directory)+" && "+script, &out)
		s.log.Info("provision", "command", script, "exit", code, "output", out.String())
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d: %s", code, lastLine(out.String()))
		}
		if err != nil {
			return append(warnings, fmt.Sprintf("provision.run[%d] failed: %v", i, err))
		}
	}
	s.change(func(st *instance.Status) { st.Provisioned = true })
	return warnings
}

// reconnect follows a guest that restarted, or whose connection broke.
func (s *Supervisor) reconnect(ctx context.Context, why error) error {
	// A guest that shuts down closes the connection first; QEMU follows.
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(500 * time.Millisecond):
	}
	reason := fmt.Sprintf("the connection to the guest ended (%v); it may be restarting", why)
	if said := console.Panic(s.spec.Machine.Console, s.consoleBefore); said != "" {
		s.log.Warn("the guest's kernel has failed", "said", said)
		s.change(func(st *instance.Status) { st.Panic = &instance.Panic{Said: said, At: time.Now()} })
		reason = "the guest's kernel has failed, and starts over: " + said
	}
	s.to(instance.Booting, reason)
	err := s.boot(ctx, false)
	if errors.Is(err, errNotReady) {
		return fmt.Errorf("the guest came not back: %w", err)
	}
	return err
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
