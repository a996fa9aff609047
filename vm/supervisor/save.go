package supervisor

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/line"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/tree"
)

// Waits of saving a machine that is in use.
const (
	releaseTimeout = time.Minute      // until the guest has let go of its shares
	unplugTimeout  = 30 * time.Second // until it has let go of a device
	writeTimeout   = 10 * time.Minute // memory and disk, whatever they are written to
	returnTimeout  = 2 * time.Minute  // until the guest is back after that
)

//go:embed release.py
var releaseProgram string

// errSuspended is the cause of a life that goes on at another time.
var errSuspended = errors.New("suspended")

// saveRequest asks the goroutine that owns the life to save the machine.
type saveRequest struct {
	ctx context.Context
	control.SnapshotRequest
	end   bool // it is left where the next start goes on from, with the disk as it is, and ended
	reply chan error
}

// Suspend implements control.Handler.
func (s *Supervisor) Suspend(ctx context.Context) error {
	err := s.askToSave(saveRequest{ctx: ctx, end: true, SnapshotRequest: control.SnapshotRequest{Memory: true}})
	if err == nil {
		<-s.ended
	}
	return err
}

// Snapshot implements control.Handler.
func (s *Supervisor) Snapshot(ctx context.Context, req control.SnapshotRequest) error {
	return s.askToSave(saveRequest{ctx: ctx, SnapshotRequest: req})
}

func (s *Supervisor) askToSave(req saveRequest) error {
	req.reply = make(chan error, 1)
	select {
	case s.saves <- req:
		return <-req.reply
	case <-s.ended:
		return errors.New("the machine has ended")
	case <-req.ctx.Done():
		return context.Cause(req.ctx)
	}
}

// save answers a request. What it returns ends the life.
func (s *Supervisor) save(ctx context.Context, req saveRequest) error {
	try := s.trySave
	if !req.Memory {
		try = s.tryCopy
	}
	refused, err := try(ctx, req)
	switch {
	case refused != nil:
		req.reply <- refused
	case err == nil && req.end:
		err = fmt.Errorf("%w on request", errSuspended)
		req.reply <- nil
	default:
		req.reply <- err
	}
	return err
}

// trySave saves the machine. refused says why it could not be, where the
// machine goes on as it was; err is a machine that does not.
func (s *Supervisor) trySave(life context.Context, req saveRequest) (refused, err error) {
	if s.spec.Machine.HasDevices() {
		return errDevices, nil
	}
	if st := s.Status(); !st.State.Usable() {
		return fmt.Errorf("the machine is %s", st.State), nil
	} else if len(st.Lost) > 0 {
		return errors.New("a share is lost, and the guest cannot let go of it; agentvm restart gives it back"), nil
	}
	s.mu.Lock()
	guest := s.guest
	s.mu.Unlock()
	// Who asked may change his mind for as long as nothing is final.
	ctx, cancel := context.WithCancelCause(life)
	defer cancel(nil)
	defer context.AfterFunc(req.ctx, func() { cancel(errors.New("interrupted")) })()
	// What the guest has begun to let go of cannot be told from here: that is seen through.
	if err := s.release(life, guest); errors.As(err, new(inUse)) {
		return err, nil
	} else if err != nil {
		s.remount(life, guest)
		return err, nil
	}
	l, err := s.listener(ctx)
	if err != nil {
		s.remount(life, guest)
		return err, nil
	}
	defer func() { l.Close() }() // not before the guest has its shares again: it would see that, and hang up
	// From here on the guest has nobody to talk to.
	warnings := s.Status().Warnings
	s.to(instance.Saving, "")
	if s.ssh != nil {
		s.ssh.Close()
	}
	s.setGuest(nil)
	// The guest cannot be told to keep what it was asked to let go of.
	unplugged, failed := s.unplug(life)
	if failed == nil && ctx.Err() != nil {
		failed = context.Cause(ctx)
	}
	ended := false
	if failed == nil {
		ended, failed = s.write(ctx, req)
	}
	if req.end && (failed == nil || ended && s.inst.Suspended()) { // else it was too late to be called off
		return nil, nil
	}
	if life.Err() == nil && ended {
		next, err := s.startAgain(life)
		if err != nil {
			return nil, s.leftSaved(life, errors.Join(failed, err))
		}
		l.Close()
		l = next
	}
	if life.Err() != nil {
		return nil, s.leftSaved(life, context.Cause(life))
	}
	own := s.inst.Path(instance.SavedDir)
	err = s.comeBack(life, l, unplugged, warnings, func() error {
		if failed == nil {
			failed = context.Cause(ctx)
		}
		if failed == nil {
			failed = saved.Move(req.Dir, own)
		}
		return saved.Discard(own)
	})
	if failed != nil && !req.end {
		_ = tree.Remove(req.Dir)
	}
	if err != nil {
		return nil, s.leftSaved(life, errors.Join(failed, err))
	}
	return failed, nil
}

// leftSaved is the end of a machine that did not go on after it was saved. One that
// has not run since is suspended, unless somebody has asked for its end.
func (s *Supervisor) leftSaved(life context.Context, err error) error {
	if cause := context.Cause(life); cause != nil && !errors.As(cause, new(machineEnded)) {
		return errors.Join(cause, saved.Discard(s.inst.Path(instance.SavedDir)))
	}
	if s.inst.Suspended() {
		return fmt.Errorf("%w, since it could not go on after it was saved: %w", errSuspended, err)
	}
	return fmt.Errorf("the guest did not come back after it was saved: %w", err)
}

// release has the guest let go of its shares, or fails with who holds them.
func (s *Supervisor) release(ctx context.Context, guest Guest) error {
	ctx, cancel := context.WithTimeoutCause(ctx, releaseTimeout, errors.New("the guest did not let go of its shares in time"))
	defer cancel()
	shares := [][3]any{}
	for _, sh := range s.spec.Shares {
		shares = append(shares, [3]any{sh.Tag, sh.Target, sh.ReadOnly})
	}
	program, err := telling(map[string]any{"shares": shares, "listener": line.Listener}, releaseProgram)
	if err != nil {
		return err
	}
	var out head
	code, err := guest.Run(ctx, "cd / && exec sudo -n python3 -c "+vm.ShellQuote(program), &out)
	switch {
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("ask the guest to let go of its shares: %w", err)
	case code == 3:
		return inUse{plain(strings.TrimSpace(out.String()))}
	case code != 0:
		return fmt.Errorf("the guest could not let go of its shares (exit code %d): %s", code, plain(lastLine(out.String())))
	}
	return nil
}

// telling puts what a Python program is told before it, as told: a string literal
// of JSON, which has no quote of the shell's in it.
func telling(told any, program string) (string, error) {
	text, err := json.Marshal(told)
	if err != nil {
		return "", err
	}
	return "import json\ntold = json.loads(" + strconv.QuoteToASCII(string(text)) + ")\n" + program, nil
}

// inUse is a share that the guest cannot let go of. It has them all still.
type inUse struct{ who string }

func (e inUse) Error() string { return e.who }

// remount takes a release back, as far as it got.
func (s *Supervisor) remount(ctx context.Context, guest Guest) {
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	var script strings.Builder
	script.WriteString("set -e\nsudo -n systemctl stop agentvm-line 2>/dev/null || :\n")
	for _, sh := range s.spec.Shares {
		mode := "rw"
		if sh.ReadOnly {
			mode = "ro"
		}
		target := vm.ShellQuote(sh.Target)
		fmt.Fprintf(&script, "mountpoint -q %s || sudo -n mount -t virtiofs -o %s %s %s\n", target, mode, sh.Tag, target)
	}
	var out head
	if code, err := guest.Run(ctx, script.String(), &out); err != nil || code != 0 {
		warning := plain(fmt.Sprintf("a share is not mounted any more, since the machine could not be saved: %s (%v)", lastLine(out.String()), err))
		s.change(func(st *instance.Status) { st.Warnings = append(st.Warnings, warning) })
		s.to(instance.Degraded, warning)
	}
}

// listener opens the line to the listener that release has started.
func (s *Supervisor) listener(ctx context.Context) (Line, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, releaseTimeout, errors.New("the guest's listener does not start"))
	defer cancel()
	l, err := s.parts.Line(ctx, s.spec.Machine)
	if err != nil {
		return nil, err
	}
	if err := l.Ready(ctx); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// unplug takes the shares out of the machine, as many as it says.
func (s *Supervisor) unplug(ctx context.Context) (n int, err error) {
	s.unwatchShares()
	defer s.trace("unplug", time.Now())
	ctx, cancel := context.WithTimeoutCause(ctx, unplugTimeout, errors.New("the guest keeps a share"))
	defer cancel()
	for n = range s.shares {
		if err := s.machine.Unplug(ctx, n); err != nil {
			return n, err
		}
	}
	return len(s.shares), nil
}

// write pauses the machine and writes it down, its memory where a start would go
// on from: it is nowhere else, should this process or the machine end meanwhile.
// ended says that this was the machine's end.
func (s *Supervisor) write(ctx context.Context, req saveRequest) (ended bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, writeTimeout, errors.New("saving takes too long"))
	defer cancel()
	defer s.trace("save", time.Now())
	own := s.inst.Path(instance.SavedDir)
	if err := os.MkdirAll(own, 0o700); err != nil {
		return false, fmt.Errorf("save the machine: %w", err)
	}
	if ended, err = s.machine.Save(ctx, own); err != nil || req.end {
		return ended, err
	}
	if err := os.MkdirAll(req.Dir, 0o700); err != nil {
		return ended, fmt.Errorf("save the machine: %w", err)
	}
	return ended, s.copyFiles(ctx, req.SnapshotRequest)
}

// startAgain has a machine that ended when it was saved go on, paused and without
// its shares, and opens the line to its listener.
func (s *Supervisor) startAgain(ctx context.Context) (Line, error) {
	defer s.trace("return", time.Now())
	s.unwatchMachine()
	if err := s.machine.Kill(); err != nil { // nothing but what is left of it
		s.log.Warn("clear away the saved machine", "error", err)
	}
	m := s.spec.Machine
	m.Saved = s.inst.Path(instance.SavedDir)
	next, err := s.parts.Machine(ctx, m, s.inst.Path("qemu.log"), s.trace)
	if err != nil {
		return nil, err
	}
	s.machine = next
	s.child("qemu", next.Process())
	s.watchMachine(ctx)
	return s.parts.Line(ctx, s.spec.Machine)
}

// copyFiles copies what the machine, which is paused, writes to: QEMU has
// written all that it had of the disk, and no guest moves anything under the
// copy of the workspace.
func (s *Supervisor) copyFiles(ctx context.Context, req control.SnapshotRequest) error {
	for _, d := range s.diskFiles() {
		if err := saved.Copy(filepath.Join(req.Dir, filepath.Base(d)), d); err != nil {
			return err
		}
	}
	if !req.Workspace {
		return nil
	}
	return tree.Keep(ctx, filepath.Join(req.Dir, instance.WorkspaceDir), s.spec.Workspace, req.Like)
}

// tryCopy copies the machine's files while it is paused, with its shares in
// place. For the guest's disk it is as if the power had failed, but for what
// the guest could be asked to write down.
func (s *Supervisor) tryCopy(life context.Context, req saveRequest) (refused, err error) {
	before := s.Status()
	if !before.State.Usable() {
		return fmt.Errorf("the machine is %s", before.State), nil
	}
	ctx, cancel := context.WithTimeoutCause(life, writeTimeout, errors.New("saving takes too long"))
	defer cancel()
	ctx, callOff := context.WithCancelCause(ctx)
	defer callOff(nil)
	defer context.AfterFunc(req.ctx, func() { callOff(errors.New("interrupted")) })()
	switch code, err := s.guest.Run(ctx, "sync", &head{}); {
	case err != nil:
		return fmt.Errorf("the guest could not write down what it has of the disk: %w", err), nil
	case code != 0:
		return fmt.Errorf("the guest could not write down what it has of the disk: exit code %d", code), nil
	}
	s.to(instance.Saving, "")
	began := time.Now()
	s.guest.Watch(false) // it answers nothing now
	// Whether it pauses is not left open: it could not be told to go on.
	if refused = s.machine.Pause(life); refused == nil {
		if refused = os.MkdirAll(req.Dir, 0o700); refused == nil {
			refused = s.copyFiles(ctx, req.SnapshotRequest)
		}
	}
	if refused != nil {
		_ = tree.Remove(req.Dir)
	}
	if err := s.machine.Resume(life); err != nil {
		return nil, fmt.Errorf("let the machine go on: %w", err)
	}
	s.guest.Watch(true)
	s.trace("save", began)
	s.to(before.State, before.Reason)
	go s.tellTime(life, s.guest) // which stood still
	return refused, nil
}

// diskFiles are the files of the machine that it writes to.
func (s *Supervisor) diskFiles() []string {
	files := []string{s.spec.Machine.Disks[0].Path}
	if vars := s.spec.Machine.Boot.VarsFile; vars != "" {
		files = append(files, vars)
	}
	return files
}

// comeBack gives the guest the shares that were unplugged, and logs in again.
// last is done just before it runs.
func (s *Supervisor) comeBack(life context.Context, l Line, unplugged int, warnings []string, last func() error) error {
	ctx, cancel := context.WithTimeoutCause(life, returnTimeout, errNotReady)
	defer cancel()
	kept := s.shares[unplugged:]
	for _, sh := range s.shares[:unplugged] {
		_ = sh.Stop() // most have ended with QEMU's end of their sockets
	}
	s.shares = nil
	if err := s.startShares(ctx, unplugged); err != nil {
		s.shares = append(s.shares, kept...) // so that they are taken down
		return err
	}
	s.shares = append(s.shares, kept...)
	guest, more, err := s.wake(ctx, l, unplugged, last)
	if err != nil {
		return s.orEnd(err)
	}
	s.watchShares(life)
	for _, w := range more {
		if !slices.Contains(warnings, w) {
			warnings = append(warnings, w)
		}
	}
	return s.ready(life, guest, warnings, false)
}

var _ control.Handler = (*Supervisor)(nil)
