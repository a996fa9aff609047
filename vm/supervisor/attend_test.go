package supervisor

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// lose has a machine's connection be lost.
func lose(t *testing.T, w *world) *life {
	t.Helper()
	l := begin(t, w, nil)
	l.until(instance.Ready)
	ctx, cut := context.WithCancel(t.Context())
	if _, err := l.client.Attend(ctx); err != nil {
		t.Fatal(err)
	}
	cut()
	return l
}

// deserted is a machine that has paused after that.
func deserted(t *testing.T, w *world) *life {
	t.Helper()
	l := lose(t, w)
	if s := l.until(instance.Paused); !strings.Contains(s.Reason, "was lost") {
		t.Errorf("reason %q", s.Reason)
	}
	return l
}

// TestPausesWhenDeserted: it goes on with the next command, and ends well.
func TestPausesWhenDeserted(t *testing.T) {
	t.Parallel() // each waits for the grace time
	w := newWorld()
	l := deserted(t, w)
	if err := l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: t.TempDir()}); err == nil {
		t.Error("it was saved meanwhile")
	}
	if err := l.client.Wake(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := l.client.Status(t.Context()); err != nil || s.State != instance.Ready || s.Reason != "" {
		t.Errorf("%+v, %v", s, err)
	}
	if want := []string{"pause", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}

// TestStopWhilePaused: a guest that stands still could not shut down.
func TestStopWhilePaused(t *testing.T) {
	t.Parallel() // each waits for the grace time
	w := newWorld()
	l := deserted(t, w)
	if err := l.client.Stop(t.Context(), time.Minute, "enough"); err != nil {
		t.Fatal(err)
	}
	l.until(instance.Stopped)
	if want := []string{"pause", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}

// TestCannotPause: a machine that does not is used on, and says so.
func TestCannotPause(t *testing.T) {
	t.Parallel() // each waits for the grace time
	w := newWorld()
	w.machine.pauseErr = errors.New("no")
	l := lose(t, w)
	for range 600 {
		if s, err := l.inst.Status(); err == nil && len(s.Warnings) > 0 && s.State == instance.Ready {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	s, err := l.inst.Status()
	t.Errorf("%+v, %v", s, err)
}

// TestAttendance says when nobody is there any more.
func TestAttendance(t *testing.T) {
	a := newAttendance()
	a.grace = 0
	for i, step := range []struct {
		do   func()
		want bool
	}{
		{func() {}, false},
		{func() { a.leave("nobody", true) }, false},
		{func() { a.come("a"); a.leave("a", false) }, false},
		{func() { a.leave("a", true) }, false}, // the end of a request that has left
		{func() { a.come("a"); a.come("b"); a.leave("a", true) }, false},
		{func() { a.leave("b", false) }, true}, // which does not bring a back
		{func() { a.come("c") }, false},
		{func() { a.leave("c", false) }, false},
		{func() { a.come("d"); a.leave("d", true) }, true},
		{func() { a.grace = time.Hour }, false},
	} {
		step.do()
		if got := a.deserted(func(time.Time) {}); got != step.want {
			t.Errorf("step %d: %v", i, got)
		}
	}
}
