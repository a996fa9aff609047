package supervisor

import (
	"context"
	"fmt"
	"io"
	"time"
)

// Limits of what a guest's clock may be off.
const (
	clockJump    = 500 * time.Millisecond // of the host's, seen at the next look
	clockRefresh = time.Hour              // a clock left alone is off by less than a second then
	clockTimeout = 10 * time.Second
)

// hostClock notices when the host's time of day has left the guest's behind: a
// guest does not see its host sleep, nor an administrator set the date.
type hostClock struct {
	began time.Time
	ahead time.Duration // of the time of day, over the steady clock, when the guest was last told
	told  time.Duration // by the steady clock
}

// look is due with the host's two clocks as they are now.
func (c *hostClock) look() bool {
	now := time.Now()
	wall := now.Round(0).Sub(c.began.Round(0)) // Round strips the steady clock's reading
	return c.due(now.Sub(c.began), wall)
}

// due reports whether the guest should be told the time, after this much of
// the steady clock and of the time of day.
func (c *hostClock) due(steady, wall time.Duration) bool {
	ahead := wall - steady
	if (ahead-c.ahead).Abs() < clockJump && steady-c.told < clockRefresh {
		return false
	}
	c.ahead, c.told = ahead, steady
	return true
}

// tellTime sets the guest's clock to the host's.
func (s *Supervisor) tellTime(ctx context.Context, guest Guest) {
	ctx, cancel := context.WithTimeout(ctx, clockTimeout)
	defer cancel()
	now := time.Now()
	code, err := guest.Run(ctx, fmt.Sprintf("sudo -n date -u -s @%d.%09d", now.Unix(), now.Nanosecond()), io.Discard)
	if err != nil || code != 0 {
		s.log.Warn("set the guest's clock", "exit", code, "error", err)
		return
	}
	s.log.Info("set the guest's clock")
}
