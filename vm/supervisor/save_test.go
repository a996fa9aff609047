package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/testenv"
)

// savable is a world whose machine can be saved.
func savable(t *testing.T) (*world, func(*instance.Spec)) {
	w := newWorld()
	w.anew = true
	w.guests <- fakeGuest{mortal: newMortal()} // for the login afterwards
	return w, func(s *instance.Spec) {
		disk := strings.Replace(s.Machine.Console, "console.log", "root.qcow2", 1)
		s.Machine.Disks = []vm.Disk{{Path: disk}}
		for path, content := range map[string]string{
			disk: "the disk",
			strings.Replace(s.Machine.Console, "console.log", instance.CallFile, 1): `{"function":"mount","data":[]}`,
		} {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestNotReleased: a guest whose answer is lost gets back what it may have let
// go of, and one that does not take it is degraded.
func TestNotReleased(t *testing.T) {
	for code, want := range map[int]instance.State{0: instance.Ready, 1: instance.Degraded} {
		w, spec := savable(t)
		w.guests = make(chan fakeGuest, 1)
		remounted := make(chan string, 1)
		w.guests <- fakeGuest{mortal: newMortal(), run: func(script string, out io.Writer) (int, error) {
			switch {
			case strings.Contains(script, "python3 -c"):
				return 1, nil
			case strings.Contains(script, "mount -t virtiofs"):
				remounted <- script
				return code, nil
			}
			return 0, nil
		}}
		l := begin(t, w, spec)
		l.until(instance.Ready)
		if err := l.client.Suspend(t.Context()); err == nil {
			t.Error("no error")
		}
		if s := l.until(want); !strings.Contains(<-remounted, "workspace /workspace\n") || len(s.Warnings) != code {
			t.Errorf("status %+v", s)
		}
	}
}

func TestSuspend(t *testing.T) {
	w, spec := savable(t)
	l := begin(t, w, spec)
	l.until(instance.Ready)
	if err := l.client.Suspend(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := l.end(); err != nil {
		t.Error(err)
	}
	if s := l.until(instance.Suspended); len(s.Children) != 0 || s.Console != nil {
		t.Errorf("status %+v", s)
	}
	if want := []string{"unplug 0", "save " + instance.SavedDir}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}

// TestSnapshot: the machine goes on, with its share, and the disk is copied
// before it does.
func TestSnapshot(t *testing.T) {
	w, spec := savable(t)
	dir := t.TempDir() + "/one"
	w.line.run = func(_ context.Context, script string, each func(string)) error {
		if disk, err := os.ReadFile(dir + "/root.qcow2"); string(disk) != "the disk" {
			t.Errorf("when it runs again its disk is %q, %v", disk, err)
		}
		if script != "mount []" {
			t.Errorf("program %q", script)
		}
		each("login")
		return nil
	}
	l := begin(t, w, spec)
	l.until(instance.Ready)
	if err := l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: dir, Memory: true}); err != nil {
		t.Fatal(err)
	}
	if s, err := l.client.Status(t.Context()); err != nil || s.State != instance.Ready {
		t.Errorf("status %+v, %v", s, err)
	}
	if want := []string{"unplug 0", "save saved", "plug 0 workspace", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}

// TestSnapshotEndsMachine: where a machine ends when it is saved, another goes on
// from there, and its end is the end of the life then.
func TestSnapshotEndsMachine(t *testing.T) {
	w, spec := savable(t)
	w.machine.mortally = true
	next := fakeMachine{mortal: newMortal(), did: w.machine.did}
	w.again = []fakeMachine{next}
	l := begin(t, w, spec)
	l.until(instance.Ready)
	if err := l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: t.TempDir() + "/one", Memory: true}); err != nil {
		t.Fatal(err)
	}
	if s, err := l.client.Status(t.Context()); err != nil || s.State != instance.Ready {
		t.Errorf("status %+v, %v", s, err)
	}
	if want := []string{"unplug 0", "save saved", "start from saved", "plug 0 workspace", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
	next.die(errors.New("crashed"))
	if s := l.until(instance.Failed); s.Reason != "crashed" {
		t.Errorf("status %+v", s)
	}
}

// TestSavedInVain: a machine that has ended goes on too when the save has failed.
func TestSavedInVain(t *testing.T) {
	w, spec := savable(t)
	w.machine.mortally, w.machine.saveErr = true, errors.New("no space left on device")
	w.again = []fakeMachine{{mortal: newMortal(), did: w.machine.did}}
	l := begin(t, w, spec)
	l.until(instance.Ready)
	if err := l.client.Suspend(t.Context()); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("error %v", err)
	}
	if s := l.until(instance.Ready); s.Reason != "" {
		t.Errorf("status %+v", s)
	}
	if want := []string{"unplug 0", "save saved", "start from saved", "plug 0 workspace", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}

// TestSavedAndStuck: a machine that cannot go on after it was saved, and has not
// run since, is suspended with all that it had in memory.
func TestSavedAndStuck(t *testing.T) {
	for reason, harm := range map[string]func(*world){
		"no more memory": func(w *world) { w.machine.mortally = true },
		"no such directory": func(w *world) {
			w.guests = make(chan fakeGuest, 1)
			w.guests <- fakeGuest{mortal: newMortal(), run: func(script string, _ io.Writer) (int, error) {
				if strings.Contains(script, "python3 -c") {
					w.shareErr = errors.New("no such directory")
				}
				return 0, nil
			}}
		},
	} {
		t.Run(reason, func(t *testing.T) {
			w, spec := savable(t)
			harm(w)
			l := begin(t, w, spec)
			l.until(instance.Ready)
			dir := t.TempDir() + "/one"
			if err := l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: dir, Memory: true}); err == nil || !strings.Contains(err.Error(), reason) {
				t.Errorf("error %v", err)
			}
			if s := l.until(instance.Suspended); !strings.Contains(s.Reason, reason) {
				t.Errorf("status %+v", s)
			}
			if err := l.end(); err != nil {
				t.Error(err)
			}
			if _, err := saved.CheckImage(l.inst.Path(instance.SavedDir)); err != nil || saved.Exists(dir) {
				t.Errorf("saved: %v", err)
			}
		})
	}
}

// TestStoppedWhileSaved: who stops a machine that is about to go on has it stopped,
// and not suspended.
func TestStoppedWhileSaved(t *testing.T) {
	w, spec := savable(t)
	w.machine.mortally = true
	starting := make(chan struct{})
	w.starting = func() { close(starting) }
	l := begin(t, w, spec)
	l.until(instance.Ready)
	dir := t.TempDir() + "/one"
	made := make(chan error, 1)
	go func() {
		made <- l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: dir, Memory: true})
	}()
	<-starting
	if err := l.client.Stop(t.Context(), 0, "stopped on request"); err != nil {
		t.Error(err)
	}
	if err := <-made; err == nil {
		t.Error("the snapshot was made")
	}
	if s := l.until(instance.Stopped); s.Reason != "stopped on request" {
		t.Errorf("status %+v", s)
	}
	if err := l.end(); err != nil || l.inst.Suspended() {
		t.Error("it could be resumed", err)
	}
}

// TestNotSaved: whatever keeps a machine from being saved, it is ready
// afterwards, and nothing is left that a start would go on from.
func TestNotSaved(t *testing.T) {
	for name, tt := range map[string]struct {
		harm   func(*world)
		reason string
		did    []string
	}{
		"a share is in use": {func(w *world) {
			w.guests = make(chan fakeGuest, 1)
			w.guests <- fakeGuest{mortal: newMortal(), run: func(script string, out io.Writer) (int, error) {
				if strings.Contains(script, "python3 -c") {
					fmt.Fprintln(out, "/workspace is in use by process 7 (vi)")
					return 3, nil
				}
				return 0, nil
			}}
		}, "in use by process 7 (vi)", nil},
		"the guest keeps a share": {func(w *world) { w.machine.keeps = true }, "the guest refused", []string{"resume"}},
		"the disk is full": {func(w *world) { w.machine.saveErr = errors.New("no space left on device") }, "no space left",
			[]string{"unplug 0", "save saved", "plug 0 workspace", "resume"}},
	} {
		t.Run(name, func(t *testing.T) {
			w, spec := savable(t)
			tt.harm(w)
			l := begin(t, w, spec)
			l.until(instance.Ready)
			if err := l.client.Suspend(t.Context()); err == nil || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("error %v", err)
			}
			if s := l.until(instance.Ready); s.Reason != "" {
				t.Errorf("status %+v", s)
			}
			if !slices.Equal(*w.machine.did, tt.did) {
				t.Errorf("did %q, want %q", *w.machine.did, tt.did)
			}
			if _, err := os.Stat(l.inst.Path(instance.SavedDir)); !os.IsNotExist(err) {
				t.Errorf("left: %v", err)
			}
		})
	}
}

// TestNotBack: a guest that does not take its shares back has failed.
func TestNotBack(t *testing.T) {
	w, spec := savable(t)
	w.line.run = failing
	l := begin(t, w, spec)
	l.until(instance.Ready)
	if err := l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: t.TempDir() + "/one", Memory: true}); err == nil {
		t.Error("no error")
	}
	if s := l.until(instance.Failed); !strings.Contains(s.Reason, "did not come back") {
		t.Errorf("status %+v", s)
	}
}

// TestCopiedWhilePaused: disk and workspace can be had of a machine whose shares
// are in use, which goes on, whatever comes of it.
func TestCopiedWhilePaused(t *testing.T) {
	testenv.Require(t, "rsync")
	ws := t.TempDir()
	if err := os.WriteFile(ws+"/file", []byte("of the project"), 0o600); err != nil {
		t.Fatal(err)
	}
	w, alter := savable(t)
	l := begin(t, w, func(s *instance.Spec) { alter(s); s.Workspace = ws })
	l.until(instance.Ready)
	dir := t.TempDir() + "/one"
	req := control.SnapshotRequest{Dir: dir, Workspace: true}
	if err := l.client.Snapshot(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{"root.qcow2": "the disk", "workspace/file": "of the project"} {
		if got, err := os.ReadFile(dir + "/" + file); string(got) != want {
			t.Errorf("%s: %q, %v", file, got, err)
		}
	}
	if err := l.client.Snapshot(t.Context(), req); err == nil || !strings.Contains(err.Error(), "file exists") {
		t.Errorf("over another: %v", err)
	}
	if s := l.until(instance.Ready); s.Reason != "" {
		t.Errorf("status %+v", s)
	}
	if want := []string{"pause", "resume", "pause", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}

// TestNotPaused: a machine that does not pause goes on.
func TestNotPaused(t *testing.T) {
	w, alter := savable(t)
	w.machine.pauseErr = errors.New("busy")
	l := begin(t, w, alter)
	l.until(instance.Ready)
	if err := l.client.Snapshot(t.Context(), control.SnapshotRequest{Dir: t.TempDir() + "/one"}); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("error %v", err)
	}
	l.until(instance.Ready)
	if want := []string{"pause", "resume"}; !slices.Equal(*w.machine.did, want) {
		t.Errorf("did %q, want %q", *w.machine.did, want)
	}
}
