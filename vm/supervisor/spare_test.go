package supervisor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// spare is the spec of a machine of the pool.
func spare(t *testing.T) func(*instance.Spec) {
	return func(s *instance.Spec) {
		clone(t)(s)
		s.Spare, s.Shares, s.Machine.Shares = "key", nil, nil
		dir := filepath.Dir(s.Machine.Console)
		s.Machine.Disks = []vm.Disk{{Path: filepath.Join(dir, "root.qcow2")}, {Path: filepath.Join(dir, "seed.iso")}}
		files := map[string]int{"root.qcow2": 9, "seed.iso": 100}
		for _, name := range instance.SpareFiles {
			files[name] = 5
		}
		for file, size := range files {
			if err := os.WriteFile(filepath.Join(dir, file), bytes.Repeat([]byte("s"), size), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// claimant makes an instance that is to become the spare.
func claimant(t *testing.T, l *life, seed string) *instance.Instance {
	t.Helper()
	store := instance.Store{Dirs: instance.Dirs{State: t.TempDir(), Cache: t.TempDir(), Run: filepath.Dir(l.run)}}
	inst, err := store.Create("mine")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := l.inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	spec.Name, spec.Spare = "mine", ""
	spec.Shares = []instance.Share{{Tag: "workspace", Target: "/workspace"}}
	spec.Machine.Shares = []vm.Share{{Tag: "workspace", Socket: "workspace.sock"}}
	spec.Machine.Console = inst.Path("console.log")
	spec.Machine.Disks = []vm.Disk{{Path: inst.Path("root.qcow2")}, {Path: inst.Path("seed.iso")}}
	if err := errors.Join(inst.WriteClaim(spec),
		os.WriteFile(inst.Path("seed.iso"), []byte(seed), 0o600),
		os.WriteFile(inst.Path(instance.CallFile), []byte(`{"function":"become","data":"mine"}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	return inst
}

func TestSpare(t *testing.T) {
	w := newWorld()
	var programs []string
	w.line.run = func(_ context.Context, p string, each func(string)) error {
		programs = append(programs, p)
		if strings.HasPrefix(p, "become ") {
			each("login")
		}
		return nil
	}
	w.line.closed = sync.OnceFunc(func() { *w.machine.did = append(*w.machine.did, "hang up") })
	<-w.guests
	w.guests <- fakeGuest{mortal: newMortal(), run: func(script string, _ io.Writer) (int, error) {
		*w.machine.did = append(*w.machine.did, "run "+script)
		return 0, nil
	}}
	l := begin(t, w, spare(t))
	if s := l.until(instance.Spare); s.Restoring {
		t.Error("one that waits is being restored for ever")
	}
	// It has met a share and run a command before, so that its claimer's are not the first.
	rehearsed := []string{"resume", "plug 0 rehearsal", "run cd /run/rehearsal && exec env true", "unplug 0", "pause"}
	if !slices.Equal(*w.machine.did, rehearsed) {
		t.Errorf("the machine did %q, want %q", *w.machine.did, rehearsed)
	}
	w.rehearsalOver(l)
	old := l.inst
	l.inst = claimant(t, l, "seed of mine")
	spec, err := l.inst.Claim()
	if err != nil {
		t.Fatal(err)
	}
	spec.Guest.Run = []string{"setup"}
	if err := l.inst.WriteClaim(spec); err != nil {
		t.Fatal(err)
	}
	if err := l.client.Adopt(t.Context(), l.inst.Dir); err != nil {
		t.Fatal(err)
	}
	s := l.until(instance.Ready)
	if !s.Restored || s.Restoring || len(s.Children) != 2 || s.Children["qemu"].PID == 0 || s.Children["virtiofsd-workspace"].PID == 0 {
		t.Errorf("status %+v", s)
	}
	// What the guest has left for later is not left until provisioning is over.
	did := slices.DeleteFunc((*w.machine.did)[len(rehearsed):], func(what string) bool { return strings.HasPrefix(what, "run ") && !strings.Contains(what, "setup") })
	if len(did) != 4 || !slices.Equal(did[:3], []string{"resume", "plug 0 workspace", "hang up"}) || !strings.Contains(did[3], "setup") {
		t.Errorf("the machine did %q", did)
	}
	if want := []string{`become "test"`, rehearseMount, rehearseEnd, `become "mine"`}; !slices.Equal(programs, want) {
		t.Errorf("programs %q, want %q", programs, want)
	}
	if spec, err := l.inst.Spec(); err != nil || spec.Name != "mine" {
		t.Errorf("spec %+v: %v", spec, err)
	}
	for file, want := range map[string]string{"seed.iso": "seed of mine" + strings.Repeat("\x00", 88), "root.qcow2": "sssssssss", instance.HostKeyFile: "sssss", instance.ClientKeyFile: "sssss"} {
		if got, err := os.ReadFile(l.inst.Path(file)); err != nil || string(got) != want {
			t.Errorf("%s is %q: %v", file, got, err)
		}
	}
	if left, _ := filepath.Glob(old.Dir + "*"); len(left) != 0 {
		t.Errorf("the spare's directory is left: %q", left)
	}
	if err := l.client.Adopt(t.Context(), l.inst.Dir); err == nil {
		t.Error("claimed twice")
	}
	if err := l.client.Stop(context.Background(), time.Second, "enough"); err != nil {
		t.Fatal(err)
	}
	l.until(instance.Stopped)
}

// TestSpareRefuses: what is wrong with a claim leaves the machine to others.
func TestSpareRefuses(t *testing.T) {
	l := begin(t, newWorld(), spare(t))
	l.until(instance.Spare)
	large := claimant(t, l, strings.Repeat("x", 101))
	other := claimant(t, l, "seed")
	spec, err := other.Claim()
	if err != nil {
		t.Fatal(err)
	}
	spec.ID = "11234567-89ab-cdef-0123-456789abcdef"
	if err := other.WriteClaim(spec); err != nil {
		t.Fatal(err)
	}
	taken := claimant(t, l, "seed")
	release, err := taken.LockLive()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	for why, dir := range map[string]string{
		"takes 101 bytes": large.Dir, "is another machine": other.Dir, "already has a supervisor": taken.Dir, "claim.json": t.TempDir(),
	} {
		if err := l.client.Adopt(t.Context(), dir); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %q", err, why)
		}
	}
	l.until(instance.Spare)
	l.inst = claimant(t, l, "seed")
	if err := l.client.Adopt(t.Context(), l.inst.Dir); err != nil {
		t.Fatal(err)
	}
	l.until(instance.Ready)
}

// TestSpareEnds: a machine that waits is ended at once, since a paused guest
// cannot shut down, and its end is noticed.
func TestSpareEnds(t *testing.T) {
	t.Run("asked", func(t *testing.T) {
		w := newWorld()
		w.machine.deaf = true
		l := begin(t, w, spare(t))
		l.until(instance.Spare)
		begun := time.Now()
		if err := l.client.Stop(context.Background(), time.Minute, "drained"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		l.until(instance.Stopped)
	})
	t.Run("qemu", func(t *testing.T) {
		w := newWorld()
		l := begin(t, w, spare(t))
		l.until(instance.Spare)
		w.machine.die(errors.New("qemu was killed"))
		l.until(instance.Failed)
	})
	t.Run("connection", func(t *testing.T) {
		w := newWorld()
		<-w.guests
		guest := fakeGuest{mortal: newMortal()}
		w.guests <- guest
		l := begin(t, w, spare(t))
		l.until(instance.Spare)
		guest.die(errors.New("reset by peer"))
		l.until(instance.Failed)
	})
}

// TestClaimFails: what goes wrong after a claim is told in the instance, as the
// pool's fault, unless it is the share's.
func TestClaimFails(t *testing.T) {
	for name, c := range map[string]struct {
		alter   func(*world)
		restore bool
	}{
		"the guest fails":       {func(w *world) { w.line.run = failClaim(errors.New("no")) }, true},
		"a share is not served": {func(w *world) { w.shareErr = errors.New("no such directory") }, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			c.alter(w)
			l := begin(t, w, spare(t))
			l.until(instance.Spare)
			l.inst = claimant(t, l, "seed")
			if err := l.client.Adopt(t.Context(), l.inst.Dir); err != nil {
				t.Fatal(err)
			}
			if s := l.until(instance.Failed); s.RestoreFailed != c.restore {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// failClaim is a line whose second machine fails to become one.
func failClaim(err error) func(context.Context, string, func(string)) error {
	machines := 0
	return func(_ context.Context, p string, each func(string)) error {
		if !strings.HasPrefix(p, "become ") {
			return nil
		}
		if machines++; machines > 1 {
			return err
		}
		each("login")
		return nil
	}
}

// TestRehearsalFails: a machine that fails in its rehearsal ends, says why, and never waits.
func TestRehearsalFails(t *testing.T) {
	for why, alter := range map[string]func(*world){
		"no such program": func(w *world) { w.rehearsalErr = errors.New("no such program") },
		"not mounted": func(w *world) {
			w.line.run = func(_ context.Context, p string, each func(string)) error {
				each(map[bool]string{true: "login", false: "warning: not mounted"}[strings.HasPrefix(p, "become ")])
				return nil
			}
		},
		"exit code 2: cd: no": func(w *world) {
			<-w.guests
			w.guests <- fakeGuest{mortal: newMortal(), run: func(_ string, out io.Writer) (int, error) {
				_, err := io.WriteString(out, "cd: no")
				return 2, err
			}}
		},
		"busy": func(w *world) {
			w.line.run = func(_ context.Context, p string, each func(string)) error {
				if p == rehearseEnd {
					return errors.New("busy")
				}
				if strings.HasPrefix(p, "become ") {
					each("login")
				}
				return nil
			}
		},
		"the guest refused": func(w *world) { w.machine.keeps = true },
		"the share's server has ended: killed": func(w *world) {
			<-w.guests
			w.guests <- fakeGuest{mortal: newMortal(), run: func(string, io.Writer) (int, error) {
				w.rehearsal.die(errors.New("killed"))
				select {} // as a program in a dead share does
			}}
		},
	} {
		t.Run(why, func(t *testing.T) {
			w := newWorld()
			alter(w)
			l := begin(t, w, spare(t))
			if s := l.until(instance.Failed); !strings.Contains(s.Reason, "rehearse a claim: ") || !strings.Contains(s.Reason, why) {
				t.Errorf("failed of %q", s.Reason)
			}
			if w.rehearsalErr == nil {
				w.rehearsalOver(l)
			}
		})
	}
}

// rehearsalOver looks for what a rehearsal has left.
func (w *world) rehearsalOver(l *life) {
	l.t.Helper()
	if _, err := os.Stat(l.inst.Path("rehearsal")); !os.IsNotExist(err) {
		l.t.Errorf("the directory of the rehearsal is left: %v", err)
	}
	select {
	case <-w.rehearsal.Done():
	default:
		l.t.Error("the rehearsal's share is still served")
	}
}
