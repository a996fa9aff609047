package supervisor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/line"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/template"
)

// errRestore is any failure to go on from a saved state.
var errRestore = errors.New("restore")

var errRestoreSlow = errors.New("the restored guest does not answer in time")

// restoreTimeout bounds a restore.
func (s *Supervisor) restoreTimeout() time.Duration {
	return cmp.Or(s.spec.RestoreTimeout, s.spec.BootTimeout) // an older agentvm did not say
}

// restore brings everything up from a saved state. QEMU needs the network's
// socket to start, and the shares only before the guest runs, so memory, QEMU
// and the shares' servers come up at the same time.
func (s *Supervisor) restore(ctx context.Context) error {
	bounded, cancel := context.WithTimeoutCause(ctx, s.restoreTimeout(), errRestoreSlow)
	defer cancel()
	guest, warnings, err := s.goOn(bounded, ctx)
	if err != nil {
		return restoreError(bounded, ctx, err)
	}
	s.change(func(st *instance.Status) { st.Restored, st.Restoring = true, false })
	return s.ready(ctx, guest, warnings, true)
}

// restoreError prefers what ended the wait to err, its symptom.
func restoreError(bounded, life context.Context, err error) error {
	cause := context.Cause(bounded)
	switch {
	case cause == nil:
		return err
	case life.Err() != nil && !errors.As(cause, new(machineEnded)):
		return cause // somebody asked for the end: no failure, and no reason to boot instead
	}
	if errors.Is(cause, errRestoreSlow) {
		return failedRestore(cause)
	}
	// A machine that ends now is no shutdown: nobody has worked in it.
	return fmt.Errorf("%w: %v", errRestore, cause)
}

// goOn restores the machine and logs in. life is the context of the whole life.
func (s *Supervisor) goOn(ctx, life context.Context) (Guest, []string, error) {
	if err := s.startNetwork(ctx); err != nil {
		return nil, nil, err
	}
	var parts errgroup.Group
	parts.Go(func() error { return s.startShares(ctx, len(s.spec.Shares)) })
	parts.Go(func() error { return failedRestore(s.startMachine(ctx)) })
	parts.Go(func() error { return s.takeDevices(ctx) })
	if err := parts.Wait(); err != nil {
		return nil, nil, err
	}
	s.watchMachine(life)
	s.watchShares(life)
	s.to(instance.Booting, "restoring")
	guest, warnings, err := s.wakeRestored(ctx)
	if err != nil {
		err = s.orEnd(err)
	}
	return guest, warnings, failedRestore(err)
}

func failedRestore(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", errRestore, err)
}

// wakeRestored lets a machine that has just been restored run.
func (s *Supervisor) wakeRestored(ctx context.Context) (Guest, []string, error) {
	// The guest waits at its end of the line, and must not see it unplugged.
	l, err := s.parts.Line(ctx, s.spec.Machine)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	return s.wake(ctx, l, len(s.spec.Shares), s.useUp)
}

// useUp deletes what a suspended machine goes on from: its memory fits its disk
// only until it runs again.
func (s *Supervisor) useUp() error {
	if own := s.inst.Path(instance.SavedDir); s.spec.Machine.Saved == own {
		return saved.Discard(own)
	}
	return nil
}

// wake plugs the first n shares into the paused machine, lets it run, and makes
// it the machine that it is to be. last is what is to be done just before it runs.
func (s *Supervisor) wake(ctx context.Context, l Line, n int, last func() error) (Guest, []string, error) {
	call, err := s.call()
	if err != nil {
		return nil, nil, err
	}
	began := time.Now()
	for i, sh := range s.spec.Machine.Shares[:n] {
		if err := s.machine.Plug(ctx, i, sh); err != nil {
			return nil, nil, err
		}
	}
	if err := s.plugDevices(ctx); err != nil {
		return nil, nil, err
	}
	if err := last(); err != nil {
		return nil, nil, err
	}
	if err := s.machine.Resume(ctx); err != nil {
		return nil, nil, err
	}
	s.trace("resume", began)
	guest, warnings, err := s.become(ctx, l, call)
	if err != nil {
		return nil, nil, err
	}
	missed, err := s.meetDevices(ctx, l)
	return guest, append(warnings, missed...), err
}

// call is what makes the guest what it is to be.
func (s *Supervisor) call() (c line.Call, err error) {
	data, err := os.ReadFile(s.inst.Path(instance.CallFile))
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(data, &c)
}

// become makes the guest the machine that it is to be. The login, which takes
// the longest, begins as soon as the guest says so; its sshd may get its key then.
func (s *Supervisor) become(ctx context.Context, l Line, call line.Call) (Guest, []string, error) {
	began := time.Now()
	login := make(chan struct{})
	var parts errgroup.Group
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var guest Guest
	parts.Go(func() (err error) {
		select {
		case <-login:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		began := time.Now()
		if guest, err = s.parts.Guest(ctx, s.inst, s.spec, s.network.Dial); err != nil {
			return fmt.Errorf("log in to the guest: %w", err)
		}
		s.setGuest(guest)
		s.trace("ssh", began)
		return nil
	})
	warnings, err := s.tell(ctx, l, call, sync.OnceFunc(func() { s.trace("login", began); close(login) }))
	if err != nil {
		cancel()
		_ = parts.Wait() // it ends because of err, which says more
		return nil, nil, err
	}
	return guest, warnings, parts.Wait()
}

// tell makes the guest what it is to be, and returns what it could not have.
// login is called when somebody can begin to log in.
func (s *Supervisor) tell(ctx context.Context, l Line, call line.Call, login func()) (warnings []string, err error) {
	defer s.trace("clone", time.Now())
	err = l.Call(ctx, call, func(text string) {
		if text == "login" {
			login()
			return
		}
		s.log.Info("clone", "guest", text)
		if w, ok := strings.CutPrefix(text, "warning: "); ok && len(warnings) < maxWarnings {
			warnings = append(warnings, w)
		}
	})
	return warnings, err
}

// dying is how long a machine may take to be seen to end after its sockets.
const dying = 300 * time.Millisecond

// orEnd prefers the machine's end, should it have ended, to err, which came of
// talking to it.
func (s *Supervisor) orEnd(err error) error {
	select {
	case <-s.machine.Done():
		return errors.New(machineEnded{s.machine.Err()}.Error())
	case <-time.After(dying):
		return err
	}
}

// errSaved is the cause of a life that ended as a template.
var errSaved = errors.New("saved")

// makeTemplate boots the machine, brings it to rest and saves it.
func (s *Supervisor) makeTemplate(ctx context.Context) error {
	bounded, cancel := context.WithTimeoutCause(ctx, s.spec.BootTimeout, errNotReady)
	defer cancel()
	if err := s.startNetwork(bounded); err != nil {
		return err
	}
	if err := s.startMachine(bounded); err != nil {
		return err
	}
	s.watchMachine(ctx)
	s.to(instance.Booting, "")
	l, err := s.parts.Line(bounded, s.spec.Machine)
	if err != nil {
		return err
	}
	defer l.Close()
	began := time.Now()
	if err := l.Ready(bounded); err != nil {
		return s.bootError(bounded, "wait for the guest", s.orEnd(err))
	}
	s.trace("boot", began)
	began = time.Now()
	if err := l.Run(bounded, template.Rest(s.spec.Guest.User, s.spec.Guest.Home), func(text string) { s.log.Info("template", "guest", strings.TrimSpace(text)) }); err != nil {
		return s.bootError(bounded, "bring the guest to rest", s.orEnd(err))
	}
	s.trace("rest", began)
	began = time.Now()
	dir := s.inst.Path(instance.SavedDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if _, err := s.machine.Save(bounded, dir); err != nil {
		return err
	}
	s.trace("save", began)
	s.change(func(st *instance.Status) { st.Saved = true })
	return errSaved
}
