package instance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/gofrs/flock"

	"github.com/agentvm/agentvm/vm"
)

// Status reads how the instance is. When the file claims a life that nobody
// leads any more, because the supervisor was killed or the host restarted, it
// ends what was left over, removes the sockets, and records what happened.
func (i *Instance) Status() (Status, error) {
	var s Status
	err := i.read(statusFile, &s, func() int { return s.Format })
	if errors.Is(err, fs.ErrNotExist) {
		return Status{State: Stopped, Reason: "never started"}, nil
	}
	if err != nil || !s.State.Live() {
		return s, err
	}
	l := flock.New(i.Path(liveLock), flock.SetPermissions(0o600))
	ok, err := l.TryLock()
	if err != nil {
		return s, fmt.Errorf("check the supervisor of %q: %w", i.Name, err)
	}
	if !ok {
		return s, nil // somebody lives
	}
	defer l.Unlock()
	// It may have ended in good order between the read and the lock.
	if err := i.read(statusFile, &s, func() int { return s.Format }); err != nil || !s.State.Live() {
		return s, err
	}
	return i.bury(s)
}

// bury corrects the status of an instance whose supervisor is gone. The
// caller holds the live lock.
func (i *Instance) bury(s Status) (Status, error) {
	reason := fmt.Sprintf("the supervisor (process %d) was killed while %s", s.Supervisor.PID, s.State)
	if boot := HostBoot(); s.HostBoot != boot {
		reason = fmt.Sprintf("the host went down while %s", s.State)
	} else {
		for name, p := range s.Children {
			if err := p.Kill(); err != nil {
				return s, fmt.Errorf("clean up %s of %q: %w", name, i.Name, err)
			}
		}
		// Whoever waits for the machine can boot it instead. One that is stopping
		// was not to start any more.
		if s.Restoring && s.State != Stopping {
			s.RestoreFailed, s.RestoreCutShort = true, true
		}
	}
	if spec, err := i.Spec(); err == nil {
		if err := os.RemoveAll(i.RunDir(spec.ID)); err != nil {
			return s, fmt.Errorf("clean up sockets of %q: %w", i.Name, err)
		}
	}
	s.Children, s.Supervisor = nil, vm.ProcID{}
	if err := s.To(Failed, reason); err != nil {
		return s, err
	}
	err := i.WriteStatus(s)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		// Nobody could delete the machine to make room, were that an error. The
		// supervisor may not have been able to write its own end down either.
		s.Reason += fmt.Sprintf(", or ended on a full disk (%v)", err)
		err = nil
	}
	return s, err
}

// HostBoot identifies this boot of the host (random(4)).
func HostBoot() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}
