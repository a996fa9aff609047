package qmp

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/digitalocean/go-qemu/qmp"
)

// eventBacklog is how many unread events a subscription holds. A guest can
// cause events at will, so no amount would be enough for a reader that sleeps.
const eventBacklog = 256

// Subscription is a bounded stream of events. When its reader is slow the
// oldest events are lost; subscribe by name to what must not be crowded out
// by events that a guest can flood.
type Subscription struct {
	// C is closed when the subscription's context or the connection ends.
	C <-chan qmp.Event

	c     chan qmp.Event
	names []string
	lost  atomic.Uint64
}

// Lost counts the events that nobody read in time.
func (s *Subscription) Lost() uint64 { return s.lost.Load() }

// Subscribe delivers the named events, or all where none is named, until ctx
// ends.
func (c *Client) Subscribe(ctx context.Context, names ...string) (*Subscription, error) {
	ch := make(chan qmp.Event, eventBacklog)
	s := &Subscription{C: ch, c: ch, names: names}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.Err(); err != nil {
		return nil, fmt.Errorf("subscribe to events: %w", err)
	}
	c.subs[s] = struct{}{}
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.drop(s)
	})
	return s, nil
}

// Events implements qmp.Monitor: a subscription to every event.
func (c *Client) Events(ctx context.Context) (<-chan qmp.Event, error) {
	s, err := c.Subscribe(ctx)
	if err != nil {
		return nil, err
	}
	return s.C, nil
}

// publish hands an event to every subscription that wants it and never waits.
func (c *Client) publish(ev qmp.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		if len(s.names) == 0 || slices.Contains(s.names, ev.Event) {
			s.push(ev)
		}
	}
}

func (s *Subscription) push(ev qmp.Event) {
	for {
		select {
		case s.c <- ev:
			return
		default:
		}
		select {
		case <-s.c:
			s.lost.Add(1)
		default: // the reader was quicker
		}
	}
}

// drop ends a subscription; c.mu is held.
func (c *Client) drop(s *Subscription) {
	if _, ok := c.subs[s]; ok {
		delete(c.subs, s)
		close(s.c)
	}
}
