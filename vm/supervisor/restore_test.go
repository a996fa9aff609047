package supervisor

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/template"
)

// clone is the spec of a machine that goes on from a template.
func clone(t *testing.T) func(*instance.Spec) {
	return func(s *instance.Spec) {
		s.Machine.Saved = "/template"
		path := strings.Replace(s.Machine.Console, "console.log", instance.CallFile, 1)
		if err := os.WriteFile(path, []byte(`{"function":"become","data":"test"}`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRestore(t *testing.T) {
	w := newWorld()
	var script string
	w.line.run = func(_ context.Context, s string, each func(string)) error {
		script = s
		if !slices.Equal(*w.machine.did, []string{"plug 0 workspace", "resume"}) {
			t.Errorf("before the guest runs: %q", *w.machine.did)
		}
		each("login")
		return nil
	}
	l := begin(t, w, clone(t))
	s := l.until(instance.Ready)
	if !s.Restored || s.RestoreFailed || s.Restoring {
		t.Errorf("status %+v", s)
	}
	if script != `become "test"` {
		t.Errorf("script %q", script)
	}
	var names []string
	for _, p := range s.Phases {
		names = append(names, p.Name)
	}
	for _, want := range []string{"network", "share", "qemu", "resume", "login", "clone", "ssh"} {
		if !slices.Contains(names, want) {
			t.Errorf("no phase %s in %v", want, names)
		}
	}
}

// TestRestoreWarns: a share that the guest cannot mount is lost comfort, as in a
// boot, and no fault of the template's.
func TestRestoreWarns(t *testing.T) {
	w := newWorld()
	w.line.run = func(_ context.Context, _ string, each func(string)) error {
		each("login")
		each("warning: not mounted: /etc/passwd/x: Not a directory")
		return nil
	}
	l := begin(t, w, clone(t))
	if s := l.until(instance.Degraded); !s.Restored || s.RestoreFailed || s.Reason != "not mounted: /etc/passwd/x: Not a directory" {
		t.Errorf("status %+v", s)
	}
}

// TestRestoreFails: whoever asked can tell that booting may still succeed, and
// nothing is left of the attempt.
func TestRestoreFails(t *testing.T) {
	for name, tt := range map[string]struct {
		harm    func(*world)
		reason  string
		restore bool
	}{
		"the state does not load":  {func(w *world) { w.qemuErr = errors.New("damaged") }, "damaged", true},
		"the guest's script fails": {func(w *world) { w.line.run = failing }, "no such command", true},
		"the machine dies": {func(w *world) {
			w.line.run = func(ctx context.Context, _ string, _ func(string)) error {
				w.machine.die(errors.New("abort"))
				return stuck(ctx, "", nil)
			}
		}, "abort", true},
		"a share does not start": {func(w *world) { w.shareErr = errors.New("no virtiofsd") }, "no virtiofsd", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			tt.harm(w)
			l := begin(t, w, clone(t))
			s := l.until(instance.Failed)
			if !strings.Contains(s.Reason, tt.reason) || strings.Contains(s.Reason, "log in") || s.RestoreFailed != tt.restore || s.RestoreCutShort || s.Restoring {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestStopWhileRestoring: an end that was asked for is no failure of the
// template's, whatever came of it on the way.
func TestStopWhileRestoring(t *testing.T) {
	w := newWorld()
	w.line.run = func(ctx context.Context, _ string, _ func(string)) error {
		<-ctx.Done()
		return errors.New("read: use of closed connection")
	}
	l := begin(t, w, clone(t))
	if s := l.until(instance.Booting); !s.Restoring {
		t.Error("nothing tells that it is being restored")
	}
	if err := l.client.Stop(context.Background(), 0, "changed my mind"); err != nil {
		t.Fatal(err)
	}
	if err := l.end(); err != nil {
		t.Error(err)
	}
	if s := l.until(instance.Stopped); s.Reason != "changed my mind" || s.RestoreFailed {
		t.Errorf("status %+v", s)
	}
}

func stuck(ctx context.Context, _ string, _ func(string)) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

func failing(context.Context, string, func(string)) error { return errors.New("no such command") }

func TestMakeTemplate(t *testing.T) {
	anonymous := func(s *instance.Spec) { s.Template, s.Shares, s.Machine.Shares = true, nil, nil }
	w := newWorld()
	var script string
	w.line.run = func(_ context.Context, s string, _ func(string)) error { script = s; return nil }
	l := begin(t, w, func(s *instance.Spec) { anonymous(s); s.Guest.User, s.Guest.Home = "agent", "/home/agent" })
	if err := l.end(); err != nil {
		t.Error(err)
	}
	s := l.until(instance.Stopped)
	if !s.Saved || !slices.Equal(*w.machine.did, []string{"save " + instance.SavedDir}) || script != template.Rest("agent", "/home/agent") {
		t.Errorf("status %+v, did %q, script %.60q", s, *w.machine.did, script)
	}

	for name, harm := range map[string]func(*world){
		"the guest fails":    func(w *world) { w.line.run = failing },
		"saving fails":       func(w *world) { w.machine.saveErr = errors.New("disk full") },
		"the guest is stuck": func(w *world) { w.line.run = stuck },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			harm(w)
			l := begin(t, w, func(s *instance.Spec) { anonymous(s); s.BootTimeout = 200 * time.Millisecond })
			if s := l.until(instance.Failed); s.Saved || s.Reason == "" {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestRestoredGuestHangs: a guest that says nothing is given up in time, and
// that may be the saved state's fault.
func TestRestoredGuestHangs(t *testing.T) {
	for name, harm := range map[string]func(*world){
		"on the line": func(w *world) {
			w.line.run = func(ctx context.Context, _ string, _ func(string)) error {
				<-ctx.Done()
				return context.Cause(ctx)
			}
		},
		"at the login": func(w *world) { <-w.guests },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			harm(w)
			l := begin(t, w, func(s *instance.Spec) { clone(t)(s); s.RestoreTimeout = 100 * time.Millisecond })
			if s := l.until(instance.Failed); !s.RestoreFailed || !s.RestoreCutShort || !strings.Contains(s.Reason, "does not answer in time") {
				t.Errorf("status %+v", s)
			}
		})
	}
}
