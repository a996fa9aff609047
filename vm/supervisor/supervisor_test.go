package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

func TestReadyAndStop(t *testing.T) {
	w := newWorld()
	l := begin(t, w, nil)
	s := l.until(instance.Ready)
	if len(s.Phases) != 5 || s.Children["qemu"].PID == 0 || s.Children["virtiofsd-workspace"].PID == 0 {
		t.Errorf("status %+v", s)
	}
	if err := l.client.Stop(context.Background(), time.Second, "enough"); err != nil {
		t.Fatal(err)
	}
	if err := l.end(); err != nil {
		t.Error(err)
	}
	if s := l.until(instance.Stopped); s.Reason != "enough" || len(s.Children) != 0 {
		t.Errorf("status %+v", s)
	}
	for _, m := range []*mortal{w.share.mortal, w.machine.mortal} {
		select {
		case <-m.Done():
		default:
			t.Error("a piece is left running")
		}
	}
}

func TestDeafGuestIsKilled(t *testing.T) {
	w := newWorld()
	w.machine.deaf = true
	l := begin(t, w, nil)
	l.until(instance.Ready)
	if err := l.client.Stop(context.Background(), 100*time.Millisecond, "enough"); err != nil {
		t.Fatal(err)
	}
	l.until(instance.Stopped)
}

func TestCancelStops(t *testing.T) {
	l := begin(t, newWorld(), nil)
	l.until(instance.Ready)
	l.cancel()
	if err := l.end(); err != nil {
		t.Error(err)
	}
	l.until(instance.Stopped)
}

func TestStopWhileBooting(t *testing.T) {
	w := newWorld()
	<-w.guests
	l := begin(t, w, nil)
	l.until(instance.Booting)
	if err := l.client.Stop(context.Background(), 0, "changed my mind"); err != nil {
		t.Fatal(err)
	}
	if s := l.until(instance.Stopped); s.Reason != "changed my mind" {
		t.Errorf("reason %q", s.Reason)
	}
}

func TestFailuresHaveReasons(t *testing.T) {
	for _, tt := range []struct {
		name   string
		world  func(*world)
		alter  func(*instance.Spec)
		reason string
	}{
		{"share", func(w *world) { w.shareErr = errors.New("no virtiofsd") }, nil, "no virtiofsd"},
		{"qemu", func(w *world) { w.qemuErr = errors.New("exit status 1: bad option") }, nil, "bad option"},
		{"crash while booting", func(w *world) { <-w.guests; w.machine.die(errors.New("QEMU ended with signal: killed")) }, nil, "signal: killed"},
		{"share dies while booting", func(w *world) { <-w.guests; w.share.die(errors.New("signal: killed")) }, nil, "share at /workspace is lost"},
		{"never ready", func(w *world) { <-w.guests }, func(s *instance.Spec) { s.BootTimeout = 50 * time.Millisecond }, "did not become ready in time"},
		{"no card", func(*world) {}, func(s *instance.Spec) { s.Machine.NICs = nil }, "no network card"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			tt.world(w)
			l := begin(t, w, tt.alter)
			if err := l.end(); err == nil {
				t.Error("no error")
			}
			s := l.until(instance.Failed)
			if !strings.Contains(s.Reason, tt.reason) {
				t.Errorf("reason %q, want %q in it", s.Reason, tt.reason)
			}
			if len(s.Console) != 2 || strings.Contains(s.Console[1], "\x1b") {
				t.Errorf("console %q", s.Console)
			}
		})
	}
}

func TestGuestPowersItselfOff(t *testing.T) {
	w := newWorld()
	l := begin(t, w, nil)
	l.until(instance.Ready)
	w.machine.die(nil)
	if err := l.end(); err != nil {
		t.Error(err)
	}
	if s := l.until(instance.Stopped); !strings.Contains(s.Reason, "powered itself off") {
		t.Errorf("reason %q", s.Reason)
	}
}

func TestGuestRestarts(t *testing.T) {
	w := newWorld()
	first := fakeGuest{mortal: newMortal()}
	<-w.guests
	w.guests <- first
	l := begin(t, w, nil)
	l.until(instance.Ready)
	first.die(errors.New("EOF"))
	if s := l.until(instance.Booting); !strings.Contains(s.Reason, "EOF") || s.Panic != nil {
		t.Errorf("status %+v", s)
	}
	second := fakeGuest{mortal: newMortal()}
	w.guests <- second
	l.until(instance.Ready)
	write(t, l.inst.Path("console.log"), "[   99.0] Kernel panic - not syncing: Fatal exception\n[    0.0] Linux\n")
	second.die(errors.New("EOF"))
	l.until(instance.Booting)
	w.guests <- fakeGuest{mortal: newMortal()}
	if s := l.until(instance.Ready); s.Panic == nil || s.Panic.Said != "Kernel panic - not syncing: Fatal exception" {
		t.Errorf("status %+v", s)
	}
	// The socket serves the new connection.
	c, err := net.Dial("unix", filepath.Join(l.run, control.SSHSocket))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// write appends to a file, as QEMU does to the console's log.
func write(t *testing.T, file, text string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

func TestLostShareDegrades(t *testing.T) {
	w := newWorld()
	l := begin(t, w, nil)
	l.until(instance.Ready)
	w.share.die(errors.New("signal: killed"))
	s := l.until(instance.Degraded)
	if !strings.Contains(s.LostShare("/workspace/src"), "signal: killed") || s.LostShare("/home") != "" {
		t.Errorf("status %+v", s)
	}
	// It must still be possible to stop.
	if err := l.client.Stop(context.Background(), time.Second, "enough"); err != nil {
		t.Fatal(err)
	}
	l.until(instance.Stopped)
}

// TestMachineLetsGoOfShares has a machine that takes a while to end after it
// has let go of its shares, as it does on a busy host.
func TestMachineLetsGoOfShares(t *testing.T) {
	w := newWorld()
	l := begin(t, w, nil)
	l.until(instance.Ready)
	w.share.die(fmt.Errorf("share \"workspace\": %w", ErrDisconnected))
	time.Sleep(2 * dying)
	w.machine.die(nil)
	if s := l.until(instance.Stopped); !strings.Contains(s.Reason, "powered itself off") || len(s.Lost) != 0 {
		t.Errorf("status %+v", s)
	}
}

func TestProvision(t *testing.T) {
	for _, tt := range []struct {
		name   string
		code   int
		state  instance.State
		reason string
	}{
		{"works", 0, instance.Ready, ""},
		{"fails", 3, instance.Degraded, "provision.run[0] failed: exit code 3: no such thing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			<-w.guests
			ran := 0
			w.guests <- fakeGuest{mortal: newMortal(), run: func(script string, out io.Writer) (int, error) {
				if strings.Contains(script, "setup") {
					ran++
					fmt.Fprintln(out, "some output\nno such thing")
					return tt.code, nil
				}
				return 0, nil
			}}
			l := begin(t, w, func(s *instance.Spec) { s.Guest.Run = []string{"setup"} })
			s := l.until(tt.state)
			if s.Reason != tt.reason || s.Provisioned != (tt.code == 0) || ran != 1 {
				t.Errorf("status %+v, ran %d times", s, ran)
			}
		})
	}
}

func TestSettleWarnings(t *testing.T) {
	w := newWorld()
	<-w.guests
	w.guests <- fakeGuest{mortal: newMortal(), run: func(script string, out io.Writer) (int, error) {
		fmt.Fprintln(out, "not mounted: /workspace")
		return 0, nil
	}}
	l := begin(t, w, nil)
	if s := l.until(instance.Degraded); s.Reason != "not mounted: /workspace" {
		t.Errorf("reason %q", s.Reason)
	}
}

func TestOneSupervisorOnly(t *testing.T) {
	w := newWorld()
	l := begin(t, w, nil)
	l.until(instance.Ready)
	if err := Run(context.Background(), l.inst, newWorld(), slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "already has a supervisor") {
		t.Errorf("got %v", err)
	}
	l.until(instance.Ready)
}

func TestWatchSeesTheEnd(t *testing.T) {
	l := begin(t, newWorld(), nil)
	l.until(instance.Ready)
	var states []instance.State
	done := make(chan error, 1)
	seen := make(chan struct{}, 16)
	go func() {
		done <- l.client.Watch(context.Background(), func(s instance.Status) bool {
			states = append(states, s.State)
			seen <- struct{}{}
			return true
		})
	}()
	<-seen
	if err := l.client.Stop(context.Background(), time.Second, "enough"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if last := states[len(states)-1]; last != instance.Stopped {
		t.Errorf("states %v", states)
	}
}

func TestMountsEscape(t *testing.T) {
	for in, want := range map[string]string{
		"/workspace": "/workspace",
		"/my data":   `'/my\\040data'`,
		"/a.b":       `'/a\.b'`,
		"/it's":      `'/it'\''s'`,
	} {
		if got := mountsEscape(in); got != want {
			t.Errorf("mountsEscape(%q) = %s, want %s", in, got, want)
		}
	}
}
