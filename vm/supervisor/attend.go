package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
)

// lossGrace is how long a machine goes on after a lost connection: a network
// that comes back, or another command, should find it running.
const lossGrace = 10 * time.Second

// attendance is who of other hosts is connected, of those whose loss is to
// pause the machine.
type attendance struct {
	mu      sync.Mutex
	present map[string]bool
	lostAt  time.Time     // when a connection was lost and no other came since; zero: none was
	changed chan struct{} // holds one
	grace   time.Duration
}

func newAttendance() *attendance {
	return &attendance{present: map[string]bool{}, changed: make(chan struct{}, 1), grace: lossGrace}
}

// come notes a connection. Whoever comes makes good what was lost before.
func (a *attendance) come(id string) {
	a.alter(func() {
		a.present[id] = true
		a.lostAt = time.Time{}
	})
}

// leave notes the end of a connection.
func (a *attendance) leave(id string, lost bool) {
	a.alter(func() {
		if lost && a.present[id] {
			a.lostAt = time.Now()
		}
		delete(a.present, id)
	})
}

func (a *attendance) alter(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// forgive has a loss count no more.
func (a *attendance) forgive() { a.alter(func() { a.lostAt = time.Time{} }) }

// deserted calls do if a connection was lost, for longer than the grace time,
// and nobody is connected. Nobody comes or leaves meanwhile.
func (a *attendance) deserted(do func(since time.Time)) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.present) > 0 || a.lostAt.IsZero() || time.Since(a.lostAt) < a.grace {
		return false
	}
	do(a.lostAt)
	return true
}

// wanted reports whether somebody has come since the loss.
func (a *attendance) wanted() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lostAt.IsZero()
}

// Attend implements control.Handler.
func (s *Supervisor) Attend(ctx context.Context, id string) error {
	s.attendance.come(id)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for st := range s.Watch(ctx) {
		if st.State != instance.Paused {
			return nil
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.New("the machine has ended")
}

// Leave implements control.Handler.
func (s *Supervisor) Leave(id string, lost bool) { s.attendance.leave(id, lost) }

// pauseDeserted pauses the machine when those who were connected were lost,
// until somebody comes. What it returns ends the life.
func (s *Supervisor) pauseDeserted(life context.Context) error {
	before := s.Status()
	if !s.attendance.deserted(func(since time.Time) {
		// Whoever comes from here on waits for the machine to go on.
		s.to(instance.Paused, fmt.Sprintf("the connection from another host was lost at %s; the next command lets it go on", since.UTC().Format(time.RFC3339)))
	}) {
		return nil
	}
	s.guest.Watch(false) // it answers nothing now
	err := s.machine.Pause(life)
	if err == nil {
		err = s.awaitAttendance(life)
	} else {
		s.log.Error("pause", "error", err)
		s.attendance.forgive()
		warning := plain(fmt.Sprintf("a connection was lost, and the machine could not be paused: %v", err))
		s.change(func(st *instance.Status) { st.Warnings = append(st.Warnings, warning) })
		err = nil
	}
	// Also where it may not have paused, and where it is to end: a guest that
	// stands still cannot shut down.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(life), resumeTimeout)
	defer cancel()
	if resumeErr := s.machine.Resume(bounded); resumeErr != nil && err == nil {
		return fmt.Errorf("let the machine go on: %w", resumeErr)
	}
	s.guest.Watch(true)
	if err != nil {
		return err
	}
	s.to(before.State, before.Reason)
	go s.tellTime(life, s.guest) // which stood still
	return nil
}

// resumeTimeout bounds the wait for a paused machine to go on.
const resumeTimeout = 10 * time.Second

// awaitAttendance waits for somebody to come to a paused machine.
func (s *Supervisor) awaitAttendance(life context.Context) error {
	for !s.attendance.wanted() {
		select {
		case <-life.Done():
			return context.Cause(life)
		case req := <-s.saves:
			req.reply <- fmt.Errorf("the machine is %s", instance.Paused)
		case <-s.attendance.changed:
		}
	}
	return nil
}
