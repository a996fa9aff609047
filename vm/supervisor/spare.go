package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	s.change(func(st *instance.Status) { st.Restoring = false })
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
	if _, _, err = s.wake(ctx, l, 0, s.useUp); err == nil {
		err = s.rehearse(ctx, l)
	}
	if err == nil {
		err = s.machine.Pause(ctx)
	}
	if err != nil {
		l.Close()
		return nil, failedRestore(s.orEnd(err))
	}
	return l, nil
}

// adopt moves the machine into the directory of the instance that it is to be.
// Once the claim is accepted, whatever happens is the instance's: adopted.
func (s *Supervisor) adopt(life context.Context, dir string) (adopted bool, err error) {
	was := s.spec.Machine
	inst := s.inst.At(dir)
	spec, err := inst.Claim()
	if err != nil {
		return false, err
	}
	if spec.ID != s.spec.ID {
		return false, fmt.Errorf("the instance in %s is another machine", dir)
	}
	seed, err := seedFor(seedDisk(was), seedDisk(spec.Machine))
	if err != nil {
		return false, err
	}
	release, err := inst.LockLive()
	if err != nil {
		return false, err
	}
	spare, err := s.inst.BeginClaim()
	if err != nil {
		release()
		return false, err
	}
	if err := inst.AcceptClaim(); err != nil {
		release()
		back, backErr := spare.EndClaim()
		if backErr == nil {
			spare = back
		}
		s.setInstance(spare, s.spec)
		return false, errors.Join(err, backErr)
	}
	s.disown = release
	s.setInstance(inst, spec)
	s.log.Info("claimed", "name", spec.Name, "directory", dir)
	s.change(func(st *instance.Status) { st.Phases, st.Restored, st.Restoring = nil, true, true })
	s.to(instance.Booting, "claimed")
	if err := moveFiles(spare, was, inst, spec.Machine, seed); err != nil {
		return true, fmt.Errorf("move the machine's files: %w", err)
	}
	s.boundConsole(life)
	if err := os.RemoveAll(spare.Dir); err != nil {
		s.log.Warn("remove what is left of the spare", "error", err)
	}
	return true, nil
}

// setInstance makes the life that of another instance.
func (s *Supervisor) setInstance(inst *instance.Instance, spec instance.Spec) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inst, s.spec = inst, spec
}

// moveFiles moves what is the machine's from the spare's directory, where the
// machine described as was has it open, to the instance's.
func moveFiles(spare *instance.Instance, was vm.Machine, inst *instance.Instance, is vm.Machine, seed []byte) error {
	old := func(path string) string { return spare.Path(filepath.Base(path)) }
	if err := os.WriteFile(old(seedDisk(was)), seed, 0o600); err != nil { // in place: QEMU has it open
		return err
	}
	moves := map[string]string{old(was.Console): is.Console}
	for i, d := range was.Disks {
		moves[old(d.Path)] = is.Disks[i].Path
	}
	for _, name := range instance.SpareFiles {
		moves[spare.Path(name)] = inst.Path(name)
	}
	for from, to := range moves {
		if err := os.Rename(from, to); err != nil {
			return err
		}
	}
	return nil
}

// seedDisk is the file that tells the guest at its next boot who it is.
func seedDisk(m vm.Machine) string { return m.Disks[1].Path }

// seedFor is the content of the seed that is wanted, as long as the one that
// QEMU has open: QEMU has asked for the file's size once.
func seedFor(open, want string) ([]byte, error) {
	data, err := os.ReadFile(want)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(open)
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > info.Size() {
		return nil, fmt.Errorf("the seed takes %d bytes, and the waiting machine has room for %d", len(data), info.Size())
	}
	return append(data, make([]byte, info.Size()-int64(len(data)))...), nil
}

// becomeClaimed makes the machine that was claimed the one that it is to be.
func (s *Supervisor) becomeClaimed(life context.Context, l Line) error {
	ctx, cancel := context.WithTimeoutCause(life, s.restoreTimeout(), errRestoreSlow)
	defer cancel()
	warnings, err := s.claimed(ctx, life, l)
	if err != nil {
		if ended := s.orEnd(err); ended != err { // QEMU's end is told by its symptoms too
			err = failedRestore(ended)
		}
		return restoreError(ctx, life, err)
	}
	s.change(func(st *instance.Status) { st.Restoring = false })
	l.Close() // what the guest left for later must not wait for provisioning
	s.guest.Watch(true)
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
