package supervisor

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// Status implements control.Handler.
func (s *Supervisor) Status() instance.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshot()
}

// snapshot copies the status; the caller holds mu.
func (s *Supervisor) snapshot() instance.Status {
	c := s.status
	c.Children = maps.Clone(c.Children)
	c.Lost = maps.Clone(c.Lost)
	c.Phases = slices.Clone(c.Phases)
	c.Warnings = slices.Clone(c.Warnings)
	return c
}

// Watch implements control.Handler. A slow watcher misses steps in between,
// never the last one.
func (s *Supervisor) Watch(ctx context.Context) <-chan instance.Status {
	in, out := make(chan instance.Status, 1), make(chan instance.Status)
	s.mu.Lock()
	in <- s.snapshot()
	select {
	case <-s.ended:
		close(in)
	default:
		s.watchers[in] = struct{}{}
	}
	s.mu.Unlock()
	go func() {
		defer close(out)
		for {
			select {
			case st, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- st:
				case <-ctx.Done():
					s.unwatch(in)
					return
				}
			case <-ctx.Done():
				s.unwatch(in)
				return
			}
		}
	}()
	return out
}

func (s *Supervisor) unwatch(c chan instance.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watchers, c)
}

func (s *Supervisor) closeWatchers() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.watchers {
		close(c)
		delete(s.watchers, c)
	}
}

// Stop implements control.Handler.
func (s *Supervisor) Stop(ctx context.Context, grace time.Duration, reason string) error {
	s.cancel(stopRequest{grace, reason})
	select {
	case <-s.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// to moves to another state, writes it down and tells the watchers.
func (s *Supervisor) to(state instance.State, reason string) {
	reason = plain(reason)
	s.change(func(st *instance.Status) {
		if err := st.To(state, reason); err != nil {
			s.log.Error("state", "error", err)
		}
	})
	s.log.Info("state", "state", state, "reason", reason)
}

// trace records a stretch of start-up that has just ended. Stretches may
// overlap. The next change writes it down: to wait for the disk here would make
// the stretches longer.
func (s *Supervisor) trace(name string, began time.Time) {
	p := instance.Phase{Name: name, Start: began, Took: time.Since(began)}
	s.mu.Lock()
	s.status.Phases = append(s.status.Phases, p)
	s.publish()
	s.mu.Unlock()
	s.log.Info("phase", "name", name, "took", p.Took)
}

// child records a process that must not outlive the machine.
func (s *Supervisor) child(name string, id vm.ProcID) {
	s.change(func(st *instance.Status) { st.Children[name] = id })
}

// change alters the status, writes it down and tells the watchers.
func (s *Supervisor) change(alter func(*instance.Status)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	alter(&s.status)
	if err := s.inst.WriteStatus(s.status); err != nil {
		// A full disk must not end a running machine; the sockets still tell.
		s.log.Error("write status", "error", err)
	}
	s.publish()
}

// publish tells the watchers; the caller holds mu.
func (s *Supervisor) publish() {
	st := s.snapshot()
	for c := range s.watchers {
		select {
		case <-c: // drop what was not read yet
		default:
		}
		c <- st
	}
}
