package supervisor

import (
	"context"
	"io"
	"log/slog"
	"regexp"
	"testing"
	"time"
)

func TestHostClock(t *testing.T) {
	c := hostClock{began: time.Now()}
	for i, tt := range []struct {
		steady, jump time.Duration
		due          bool
	}{
		{2 * time.Second, 0, false},
		{4 * time.Second, 8 * time.Hour, true}, // the host slept
		{6 * time.Second, 8 * time.Hour, false},
		{8 * time.Second, 8*time.Hour + 100*time.Millisecond, false},
		{10 * time.Second, -time.Hour, true}, // somebody set the date
		{time.Hour, -time.Hour, false},
		{time.Hour + 11*time.Second, -time.Hour, true}, // long ago
	} {
		if got := c.due(tt.steady, tt.steady+tt.jump); got != tt.due {
			t.Errorf("look %d: %v, want %v", i, got, tt.due)
		}
	}
	if c := (hostClock{began: time.Now()}); c.look() {
		t.Error("the host's clock has jumped within a microsecond")
	}
}

func TestTellTime(t *testing.T) {
	var script string
	s := &Supervisor{log: slog.New(slog.DiscardHandler)}
	s.tellTime(context.Background(), fakeGuest{mortal: newMortal(), run: func(text string, _ io.Writer) (int, error) {
		script = text
		return 0, nil
	}})
	if !regexp.MustCompile(`^sudo -n date -u -s @\d{10,}\.\d{9}$`).MatchString(script) {
		t.Errorf("the guest was told %q", script)
	}
}
