package supervisor

import (
	"context"
	"slices"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
)

// lookInterval is how often a living machine is looked at.
const lookInterval = 2 * time.Second

// live waits for the end of the life, and mends what can be mended.
func (s *Supervisor) live(ctx context.Context) error {
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	clock := hostClock{began: time.Now()}
	for {
		s.mu.Lock()
		guest := s.guest
		s.mu.Unlock()
		select {
		case <-look.C:
			s.lookAtProtection()
			if clock.look() && guest != nil {
				go s.tellTime(ctx, guest)
			}
			if err := s.pauseDeserted(ctx); err != nil {
				return err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case lost := <-s.lost:
			s.log.Error("share lost", "target", lost.target, "reason", lost.reason)
			s.change(func(st *instance.Status) { st.Lost[lost.target] = lost.reason })
			s.to(instance.Degraded, lost.reason)
		case req := <-s.saves:
			if err := s.save(ctx, req); err != nil {
				return err
			}
		case <-guest.Done():
			if err := s.reconnect(ctx, guest.Err()); err != nil {
				return err
			}
		}
	}
}

// lookAtProtection tells of shared paths that have lost their protection since.
func (s *Supervisor) lookAtProtection() {
	known := s.Status().Warnings
	for _, sh := range s.shares {
		for _, w := range sh.Warnings() {
			if slices.Contains(known, w) {
				continue
			}
			s.log.Warn("protection lost", "warning", w)
			s.change(func(st *instance.Status) { st.Warnings = append(st.Warnings, w) })
			s.to(instance.Degraded, w)
		}
	}
}
