// Package supervisor is the process behind one running virtual machine. It
// owns everything that must die with the machine: the network, the shares,
// QEMU and the SSH connection.
//
// It promises that every wait ends; that whatever ends a life ends in a state
// with a reason; and that afterwards no process, socket or directory of the
// running machine is left. Should the supervisor itself be killed, the kernel
// kills its children, and the next command records what happened.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/console"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// Supervisor runs one instance, once.
type Supervisor struct {
	inst  *instance.Instance
	spec  instance.Spec
	parts Parts
	log   *slog.Logger
	run   string // directory of sockets

	cancel context.CancelCauseFunc // ends the life, with why
	ended  chan struct{}           // closed when everything is down

	mu       sync.Mutex
	status   instance.Status
	watchers map[chan instance.Status]struct{}
	guest    Guest // nil while there is no connection

	// Owned by Run's goroutine.
	network        Network
	shares         []Share
	lost           chan lostShare // holds one for each share
	saves          chan saveRequest
	adoptions      chan adoptRequest
	attendance     *attendance
	unwatchShares  context.CancelFunc
	unboundConsole context.CancelFunc
	unwatchMachine context.CancelFunc
	consoleBefore  int64   // bytes of the console's log when the guest was ready
	disown         func()  // lets go of the directory that was adopted
	devices        Devices // nil: none
	machine        Machine
	control        net.Listener
	ssh            net.Listener
}

// stopRequest is the cause of a life ended on request.
type stopRequest struct {
	grace  time.Duration
	reason string
}

func (r stopRequest) Error() string { return r.reason }

// Defaults of the waits.
const (
	defaultGrace = 20 * time.Second
	earlyGrace   = 3 * time.Second
	reapTimeout  = 5 * time.Second

	disconnectTimeout = 10 * time.Second

	consoleLines = 20       // shown of a failed boot
	consoleBytes = 16 << 20 // kept of a console's log
)

// Run brings the instance to life and returns when it has ended. Its error is
// the one that the status file gives as the reason of a failure. Cancelling
// ctx stops the machine in good order.
func Run(ctx context.Context, inst *instance.Instance, parts Parts, log *slog.Logger) error {
	release, err := inst.LockLive()
	if err != nil {
		return err
	}
	defer release()
	s := &Supervisor{disown: func() {}, inst: inst, parts: parts, log: log, ended: make(chan struct{}), saves: make(chan saveRequest), adoptions: make(chan adoptRequest), attendance: newAttendance(), watchers: map[chan instance.Status]struct{}{}}
	if err := s.begin(); err != nil {
		s.fail(err)
		return err
	}
	// The life outlives ctx: its end is a request to stop.
	life, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	s.cancel = cancel
	defer cancel(nil)
	unhook := context.AfterFunc(ctx, func() { cancel(stopRequest{defaultGrace, "the supervisor was asked to end"}) })
	defer unhook()

	if s.control, err = s.listen(control.Socket); err != nil {
		s.fail(err)
		return err
	}
	served := make(chan error, 1)
	go func() { served <- control.Serve(s.control, s) }()

	s.boundConsole(life)
	err = s.start(life)
	if err == nil {
		err = s.live(life)
	}
	err = s.end(err)
	defer func() { s.disown() }()
	close(s.ended)
	s.closeWatchers()
	// Answers under way (the stop request's own) are given before the socket goes.
	time.Sleep(50 * time.Millisecond)
	s.control.Close()
	<-served
	if rmErr := os.RemoveAll(s.run); rmErr != nil {
		log.Error("remove sockets", "error", rmErr)
	}
	return err
}

// boundConsole keeps the console's log within its bound.
func (s *Supervisor) boundConsole(ctx context.Context) {
	if s.unboundConsole != nil {
		s.unboundConsole() // it lies elsewhere now
	}
	ctx, s.unboundConsole = context.WithCancel(ctx)
	go func(file string) {
		if err := console.Bound(ctx, file, consoleBytes); err != nil {
			s.log.Error("console log", "error", err)
		}
	}(s.spec.Machine.Console)
}

// begin reads what to run and takes possession of the status.
func (s *Supervisor) begin() error {
	old, err := s.inst.Status()
	if err != nil {
		return err
	}
	if s.spec, err = s.inst.Spec(); err != nil {
		return err
	}
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		return err
	}
	s.status = instance.Status{Supervisor: self, HostBoot: instance.HostBoot(), Provisioned: old.Provisioned, Children: map[string]vm.ProcID{}, Lost: map[string]string{}, Restoring: s.spec.Machine.Saved != ""}
	s.to(instance.Starting, "")
	s.run = s.inst.RunDir(s.spec.ID)
	if err := os.RemoveAll(s.run); err != nil {
		return fmt.Errorf("remove old sockets: %w", err)
	}
	return s.makeRunDir()
}

// makeRunDir makes the socket directory: the outer part is ours alone, the
// inner one belongs to the user that the machine runs as.
func (s *Supervisor) makeRunDir() error {
	mode := os.FileMode(0o700)
	if s.spec.Machine.RunAs != nil {
		mode = 0o711
	}
	if err := os.MkdirAll(filepath.Dir(s.run), mode); err != nil {
		return fmt.Errorf("create socket directory: %w", err)
	}
	for _, dir := range []string{s.run, s.socket("")} {
		if err := os.Mkdir(dir, mode); err != nil {
			return fmt.Errorf("create socket directory: %w", err)
		}
		if err := os.Chmod(dir, mode); err != nil { // whatever the umask
			return fmt.Errorf("create socket directory: %w", err)
		}
	}
	if o := s.spec.Machine.RunAs; o != nil {
		if err := os.Chown(s.socket(""), o.UID, o.GID); err != nil {
			return fmt.Errorf("hand over socket directory: %w", err)
		}
		return os.Chmod(s.socket(""), 0o700)
	}
	return nil
}

// socket is a path in the part of the run directory that the machine may use.
func (s *Supervisor) socket(name string) string { return filepath.Join(s.run, "vm", name) }

// listen opens one of the supervisor's own sockets.
func (s *Supervisor) listen(name string) (net.Listener, error) {
	l, err := net.Listen("unix", filepath.Join(s.run, name))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", name, err)
	}
	if err := os.Chmod(filepath.Join(s.run, name), 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", name, err)
	}
	return l, nil
}

// start brings everything up, in the way that the spec asks for.
func (s *Supervisor) start(ctx context.Context) error {
	var err error
	switch {
	case s.spec.Template:
		err = s.makeTemplate(ctx)
	case s.spec.Spare != "":
		err = s.startSpare(ctx)
	case s.spec.Machine.Saved != "":
		err = s.restore(ctx)
	default:
		err = s.startCold(ctx)
	}
	if err != nil && ctx.Err() != nil && !errors.Is(err, errRestore) {
		return context.Cause(ctx)
	}
	return err
}

// startCold starts everything that the machine needs, then the machine, and
// lets it boot.
func (s *Supervisor) startCold(ctx context.Context) error {
	if err := s.startNetwork(ctx); err != nil {
		return err
	}
	if err := s.startShares(ctx, len(s.spec.Shares)); err != nil {
		return err
	}
	if err := s.takeDevices(ctx); err != nil {
		return err
	}
	if err := s.startMachine(ctx); err != nil {
		return err
	}
	s.watchMachine(ctx)
	s.watchShares(ctx)
	s.to(instance.Booting, "")
	return s.boot(ctx, true)
}

func (s *Supervisor) startNetwork(ctx context.Context) (err error) {
	defer s.trace("network", time.Now())
	m := s.spec.Machine
	if len(m.NICs) == 0 {
		return errors.New("the machine has no network card")
	}
	s.network, err = s.parts.Network(ctx, s.spec, s.socket(filepath.Base(m.NICs[0].Socket)), s.inst.Path("network.jsonl"))
	return err
}

// startShares serves the first n shares.
func (s *Supervisor) startShares(ctx context.Context, n int) error {
	defer s.trace("share", time.Now())
	for i, sh := range s.spec.Shares[:n] {
		share, err := s.parts.Share(ctx, s.spec, sh, s.socket(filepath.Base(s.spec.Machine.Shares[i].Socket)), s.inst.Path("virtiofsd-"+sh.Tag+".log"))
		if err != nil {
			return fmt.Errorf("share %s: %w", sh.Source, err)
		}
		s.shares = append(s.shares, share)
		s.child("virtiofsd-"+sh.Tag, share.Process())
	}
	return nil
}

func (s *Supervisor) startMachine(ctx context.Context) (err error) {
	if s.machine, err = s.parts.Machine(ctx, s.spec.Machine, s.inst.Path("qemu.log"), s.trace); err != nil {
		return err
	}
	s.child("qemu", s.machine.Process())
	return nil
}

// watchMachine makes the machine's end the end of the life.
func (s *Supervisor) watchMachine(ctx context.Context) {
	ctx, s.unwatchMachine = context.WithCancel(ctx)
	go func(m Machine) {
		select {
		case <-m.Done():
			if ctx.Err() == nil {
				s.cancel(machineEnded{m.Err()})
			}
		case <-ctx.Done():
		}
	}(s.machine)
}

// machineEnded is the cause of a life that ended with its machine.
type machineEnded struct{ err error }

func (e machineEnded) Error() string {
	if e.err == nil {
		return "the guest powered itself off"
	}
	return e.err.Error()
}

// watchShares reports shares that end while the life goes on.
func (s *Supervisor) watchShares(ctx context.Context) {
	lost := make(chan lostShare, len(s.shares))
	s.lost = lost
	ctx, s.unwatchShares = context.WithCancel(ctx)
	machine := s.machine
	for i, sh := range s.shares {
		target := s.spec.Shares[i].Target
		go func() {
			select {
			case <-ctx.Done():
			case <-sh.Done():
				// A share also ends when QEMU does; that is not its own death.
				select {
				case <-ctx.Done():
				case <-machine.Done():
				case <-time.After(wait(sh.Err())):
					lost <- lostShare{target, fmt.Sprintf("the share at %s is lost: %v", target, sh.Err())}
				}
			}
		}()
	}
}

// wait is how long a machine may take to be seen to end after its shares. One
// that has let go of a share by itself is ending, which takes a busy host a while.
func wait(why error) time.Duration {
	if errors.Is(why, ErrDisconnected) {
		return disconnectTimeout
	}
	return dying
}

// lostShare is a share that ended before its machine.
type lostShare struct{ target, reason string }

func (l lostShare) Error() string { return l.reason }

// end takes everything down, whatever is there of it, and records why.
func (s *Supervisor) end(cause error) error {
	var stop stopRequest
	var ended machineEnded
	asked := errors.As(cause, &stop)
	if errors.Is(cause, errSaved) {
		asked, stop.reason = true, errSaved.Error() // and it is paused: there is no guest to ask
	}
	if asked {
		s.to(instance.Stopping, stop.reason)
		s.powerdown(stop.grace) // none at all without a grace time
	}
	suspended := errors.Is(cause, errSuspended)
	last := console.Tail(s.spec.Machine.Console, consoleLines)
	s.takeDown()
	s.mu.Lock()
	s.status.Children = nil
	if !asked && !suspended && !(errors.As(cause, &ended) && ended.err == nil) {
		s.status.Console = last
	}
	s.mu.Unlock()
	switch {
	case suspended:
		s.to(instance.Suspended, cause.Error())
		return nil
	case asked:
		s.to(instance.Stopped, stop.reason)
		return nil
	case errors.As(cause, &ended) && ended.err == nil:
		s.to(instance.Stopped, ended.Error())
		return nil
	}
	s.fail(cause)
	return cause
}

// powerdown asks the guest to shut down and waits for the grace time.
func (s *Supervisor) powerdown(grace time.Duration) {
	if s.machine == nil || grace <= 0 || s.spec.Spare != "" { // a spare is paused
		return
	}
	s.mu.Lock()
	whole := s.guest != nil && len(s.status.Lost) == 0
	s.mu.Unlock()
	// Nothing runs yet that would hear it, or a guest that will hang when it
	// unmounts what is lost.
	if !whole {
		grace = min(grace, earlyGrace)
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := s.machine.Powerdown(ctx); err != nil {
		s.log.Warn("power down", "error", err)
		return
	}
	select {
	case <-s.machine.Done():
	case <-ctx.Done():
		s.log.Warn("the guest did not shut down in time; killing it", "grace", grace)
	}
}

// takeDown ends every piece, in the reverse order of start.
func (s *Supervisor) takeDown() {
	note := func(what string, err error) {
		if err != nil && !errors.Is(err, net.ErrClosed) {
			s.log.Warn("take down", "what", what, "error", err)
		}
	}
	s.setGuest(nil)
	if s.ssh != nil {
		note("ssh socket", s.ssh.Close())
	}
	if s.machine != nil {
		note("qemu", s.machine.Kill())
		select {
		case <-s.machine.Done():
		case <-time.After(reapTimeout):
			s.log.Error("qemu cannot be reaped")
		}
	}
	s.giveBackDevices()
	for _, sh := range s.shares {
		note("share", sh.Stop())
	}
	if s.network != nil {
		note("network", s.network.Close())
	}
}

// setGuest replaces the connection into the guest, closing the old one.
func (s *Supervisor) setGuest(g Guest) {
	s.mu.Lock()
	old := s.guest
	s.guest = g
	s.mu.Unlock()
	if old != nil {
		if err := old.Close(); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			s.log.Debug("close guest connection", "error", err)
		}
	}
}

// fail records a failure.
func (s *Supervisor) fail(err error) {
	s.log.Error("failed", "error", err)
	s.change(func(st *instance.Status) {
		st.TimedOut = errors.Is(err, vm.ErrTimeout)
		st.RestoreFailed = errors.Is(err, errRestore)
		st.RestoreCutShort = st.RestoreFailed && errors.Is(err, errRestoreSlow)
		st.PlugFailed = errors.Is(err, errPlug)
	})
	s.to(instance.Failed, strings.TrimSpace(err.Error()))
}
