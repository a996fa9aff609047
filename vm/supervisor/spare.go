package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// adoptRequest asks the goroutine that owns the life to make the spare machine
// the instance in a directory.
type adoptRequest struct {
	dir   string
	reply chan error
}

// Adopt implements control.Handler.
func (s *Supervisor) Adopt(ctx context.Context, dir string) error {
	req := adoptRequest{dir, make(chan error, 1)}
	if st := s.Status().State; st != instance.Spare {
		return fmt.Errorf("the machine is %s, and nobody else's to have", st)
	}
	select {
	case s.adoptions <- req:
		return <-req.reply
	case <-s.ended:
		return errors.New("the machine has ended")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// startSpare brings up a machine from its template as one that is its own but
// nobody's: it has keys and ids, somebody is logged in, and it has no name, no
// shares and no way out. It waits, paused, until it is claimed.
func (s *Supervisor) startSpare(life context.Context) error {
	l, err := s.makeSpare(life)
	if err != nil {
		return err
	}
	defer l.Close() // the guest listens for as long as it is open
	s.to(instance.Spare, "waits to be claimed")
	for {
		select {
		case <-life.Done():
			return context.Cause(life)
		case <-s.guest.Done():
			return fmt.Errorf("the connection to the waiting guest ended: %w", s.guest.Err())
		case req := <-s.adoptions:
			adopted, err := s.adopt(life, req.dir)
			if !adopted {
				req.reply <- err
				continue
			}
			req.reply <- nil // what follows is in the instance's status
			if err != nil {
				return failedRestore(err)
			}
			return s.becomeClaimed(life, l)
		}
	}
}

func (s *Supervisor) makeSpare(life context.Context) (Line, error) {
	ctx, cancel := context.WithTimeoutCause(life, s.restoreTimeout(), errRestoreSlow)
	defer cancel()
	if err := s.startNetwork(ctx); err != nil {
		return nil, err
	}
	if err := s.startMachine(ctx); err != nil {
		return nil, failedRestore(err)
	}
	s.watchMachine(life)
	s.to(instance.Booting, "restoring")
	l, err := s.parts.Line(ctx, s.spec.Machine)
	if err != nil {
		return nil, failedRestore(err)
	}
	if _, _, err = s.wake(ctx, l, 0); err == nil {
		err = s.machine.Pause(ctx)
	}
	if err != nil {
		l.Close()
		return nil, failedRestore(s.orEnd(err))
	}
	return l, nil
}

// adopt moves the machine into the directory of the instance that it is to be.
// Once the status lies there, whatever happens is the instance's: adopted.
func (s *Supervisor) adopt(life context.Context, dir string) (adopted bool, err error) {
	spare, was := s.inst, s.spec.Machine
	inst := spare.At(dir)
	spec, err := inst.Claim()
	if err != nil {
		return false, err
	}
	if spec.ID != s.spec.ID {
		return false, fmt.Errorf("the instance in %s is another machine", dir)
	}
	if err := rewriteSeed(seedDisk(was), seedDisk(spec.Machine)); err != nil {
		return false, err
	}
	release, err := inst.LockLive()
	if err != nil {
		return false, err
	}
	st := s.Status()
	st.Phases, st.Restored = nil, true
	if err := errors.Join(st.To(instance.Booting, "claimed"), inst.AcceptClaim(), inst.WriteStatus(st)); err != nil {
		release()
		return false, err
	}
	s.disown = release
	s.mu.Lock()
	s.inst, s.spec, s.status = inst, spec, st
	s.mu.Unlock()
	s.log.Info("claimed", "name", spec.Name, "directory", dir)
	moves := [][2]string{{was.Console, spec.Machine.Console}}
	for i, d := range was.Disks {
		moves = append(moves, [2]string{d.Path, spec.Machine.Disks[i].Path})
	}
	for _, name := range []string{"qemu.log", "supervisor.log"} {
		moves = append(moves, [2]string{spare.Path(name), inst.Path(name)})
	}
	for _, m := range moves {
		if err := os.Rename(m[0], m[1]); err != nil {
			return true, fmt.Errorf("move the machine's files: %w", err)
		}
	}
	s.boundConsole(life)
	if err := os.RemoveAll(spare.Dir); err != nil {
		s.log.Warn("remove what is left of the spare", "error", err)
	}
	return true, nil
}

// seedDisk is the file that tells the guest at its next boot who it is.
func seedDisk(m vm.Machine) string { return m.Disks[1].Path }

// rewriteSeed gives the seed that QEMU has open the content of another. QEMU
// has asked for the file's size once, so that cannot grow.
func rewriteSeed(open, want string) error {
	data, err := os.ReadFile(want)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(open, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if int64(len(data)) > info.Size() {
		return fmt.Errorf("the seed takes %d bytes, and the waiting machine has room for %d", len(data), info.Size())
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Close()
}

// becomeClaimed makes the machine that was claimed the one that it is to be.
func (s *Supervisor) becomeClaimed(life context.Context, l Line) error {
	ctx, cancel := context.WithTimeoutCause(life, s.restoreTimeout(), errRestoreSlow)
	defer cancel()
	warnings, err := s.claimed(ctx, life, l)
	if err != nil {
		return restoreError(ctx, life, s.orEnd(err))
	}
	s.guest.Watch()
	return s.ready(life, s.guest, warnings, true)
}

// claimed lets the guest run while its shares are being served, and gives it
// its name and the shares.
func (s *Supervisor) claimed(ctx, life context.Context, l Line) (warnings []string, err error) {
	call, err := s.call()
	if err != nil {
		return nil, err
	}
	if err := s.network.Apply(s.spec, s.inst.Path("network.jsonl")); err != nil {
		return nil, err
	}
	var parts errgroup.Group
	parts.Go(func() error { return s.startShares(ctx, len(s.spec.Shares)) })
	parts.Go(func() error { return failedRestore(s.machine.Resume(ctx)) })
	if err := parts.Wait(); err != nil {
		return nil, err
	}
	s.watchShares(life)
	began := time.Now()
	for i, sh := range s.spec.Machine.Shares {
		if err := s.machine.Plug(ctx, i, sh); err != nil {
			return nil, failedRestore(err)
		}
	}
	s.trace("resume", began)
	warnings, err = s.tell(ctx, l, call, func() {})
	return warnings, failedRestore(err)
}
