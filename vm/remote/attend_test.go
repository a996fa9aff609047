package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// attended is a supervisor that tells who comes and goes.
type attended struct {
	control.Handler
	seen chan string
}

func (a attended) Attend(context.Context, string) error { a.seen <- "came"; return nil }
func (a attended) Leave(_ string, lost bool) {
	a.seen <- map[bool]string{true: "lost", false: "left"}[lost]
}

func (a attended) expect(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-a.seen:
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	case <-time.After(time.Minute):
		t.Fatal("not " + want)
	}
}

// machineThere is a machine of a copy, on the other host.
func (f fake) machineThere(w Copy) attended {
	f.t.Helper()
	home := filepath.Join(f.dir, "home")
	dirs, err := instance.FindDirs(func(string) string { return home }, os.Getuid())
	if err != nil {
		f.t.Fatal(err)
	}
	inst, err := instance.Store{Dirs: dirs}.Create("m")
	id := "01234567-89ab-cdef-0123-456789abcdef"
	if err == nil {
		err = inst.WriteSpec(instance.Spec{Name: "m", ID: id, Workspace: filepath.Join(dirs.State, "remote", w.ID, w.Name)})
	}
	if err == nil {
		err = os.MkdirAll(inst.RunDir(id), 0o700)
	}
	var l net.Listener
	if err == nil {
		l, err = net.Listen("unix", filepath.Join(inst.RunDir(id), control.Socket))
	}
	if err != nil {
		f.t.Fatal(err)
	}
	a := attended{seen: make(chan string, 16)}
	served := make(chan error, 1)
	go func() { served <- control.Serve(l, a) }()
	f.t.Cleanup(func() {
		l.Close()
		if err := <-served; err != nil {
			f.t.Error(err)
		}
	})
	return a
}

// TestAttend: the machine there learns whether a command has ended or was lost.
func TestAttend(t *testing.T) {
	f := newFake(t)
	c := f.mustDial()
	w := Copy{ID: "0123456789abcdef", Name: "w"}
	if _, err := Do[scanned](t.Context(), c, look{Copy: w}, opScan); err != nil {
		t.Fatal(err)
	}
	leave, err := c.Attend(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	a := f.machineThere(w) // made by the command
	a.expect(t, "came")
	leave(false)
	a.expect(t, "left")
	a.expect(t, "lost") // the end of its request, which says nothing more
	if leave, err = c.Attend(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	a.expect(t, "came")
	leave(true)
	a.expect(t, "lost")

	// One that is cut off while its command goes on comes back.
	f.program("bin/ssh", strings.Replace(fmt.Sprintf(fakeSSH, f.dir), "exec env", `case $last in *attend*)
	if mkdir cut; then (for i in $(seq 600); do [ ! -e cut/now ] || break; sleep 0.1; done; kill -9 $$) & fi
esac
exec env`, 1))
	t.Chdir(f.dir)
	if leave, err = c.Attend(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	a.expect(t, "came")
	f.program("cut/now", "")
	a.expect(t, "lost")
	a.expect(t, "came")
	leave(false)
	a.expect(t, "left")
}

// TestSilence: a connection that gives no sign of life is lost, and one that
// does is not.
func TestSilence(t *testing.T) {
	dirs := instance.Dirs{State: t.TempDir(), Run: t.TempDir()}
	synctest.Test(t, func(t *testing.T) {
		in, beats := io.Pipe()
		defer beats.Close()
		replies, out := io.Pipe()
		ended := make(chan error, 1)
		go func() { ended <- Side{Dirs: dirs}.attend(t.Context(), in, out) }()
		var reply Reply[struct{}]
		if err := errors.Join(WriteFrame(beats, Copy{ID: "0123456789abcdef", Name: "w"}), ReadFrame(replies, &reply), reply.Problem.Err()); err != nil {
			t.Fatal(err)
		}
		for range 30 {
			time.Sleep(beatInterval)
			if err := WriteFrame(beats, beat{}); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case err := <-ended:
			t.Fatalf("it has ended: %v", err)
		default:
		}
		last := time.Now()
		if err := <-ended; !errors.Is(err, errCut) || time.Since(last) != beatSilence {
			t.Errorf("%v after %s", err, time.Since(last))
		}
	})
}
