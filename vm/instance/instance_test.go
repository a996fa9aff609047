package instance

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
)

func testStore(t *testing.T) Store {
	t.Helper()
	home := t.TempDir()
	return Store{Dirs: Dirs{State: filepath.Join(home, "s"), Cache: filepath.Join(home, "c"), Run: filepath.Join(home, "r")}}
}

func create(t *testing.T, s Store, name string) *Instance {
	t.Helper()
	i, err := s.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.WriteSpec(Spec{Name: name, ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: "/w/" + name}); err != nil {
		t.Fatal(err)
	}
	return i
}

func TestFindDirs(t *testing.T) {
	long := "/" + strings.Repeat("x", 150)
	for _, tt := range []struct {
		name string
		env  map[string]string
		uid  int
		want Dirs
		err  error
	}{
		{"xdg", map[string]string{"HOME": "/home/a", "XDG_STATE_HOME": "/s"}, 1000,
			Dirs{State: "/s/agentvm", Cache: "/home/a/.cache/agentvm", Config: "/home/a/.config/agentvm", Run: "/tmp/agentvm-1000"}, nil},
		{"relative xdg is ignored", map[string]string{"HOME": "/home/a", "XDG_CACHE_HOME": "rel"}, 1000,
			Dirs{State: "/home/a/.local/state/agentvm", Cache: "/home/a/.cache/agentvm", Config: "/home/a/.config/agentvm", Run: "/tmp/agentvm-1000"}, nil},
		{"root", map[string]string{"HOME": "/root"}, 0,
			Dirs{State: "/var/lib/agentvm", Cache: "/var/cache/agentvm", Config: "/etc/agentvm", Run: "/run/agentvm"}, nil},
		{"one home", map[string]string{"AGENTVM_HOME": "/h"}, 1000, Dirs{State: "/h/state", Cache: "/h/cache", Config: "/h/config", Run: "/h/run"}, nil},
		{"long home", map[string]string{"AGENTVM_HOME": long}, 7,
			Dirs{State: long + "/state", Cache: long + "/cache", Config: long + "/config", Run: "/tmp/agentvm-7-"}, nil},
		{"relative home", map[string]string{"AGENTVM_HOME": "h"}, 1000, Dirs{}, vm.ErrUsage},
		{"nothing", nil, 1000, Dirs{}, vm.ErrHost},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := FindDirs(func(k string) string { return tt.env[k] }, tt.uid)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if strings.HasSuffix(tt.want.Run, "-7-") {
				got.Run = strings.TrimRight(got.Run, "0123456789abcdef")
			}
			if got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestStore(t *testing.T) {
	s := testStore(t)
	b, a := create(t, s, "b"), create(t, s, "a")
	if _, err := s.Create("a"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("name twice: %v", err)
	}
	if _, err := s.Create("../x"); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("bad name: %v", err)
	}
	list, err := s.List()
	if err != nil || len(list) != 2 || list[0].Name != "a" {
		t.Errorf("list %v, %v", list, err)
	}
	mine, err := s.ForWorkspace("/w/b")
	if err != nil || len(mine) != 1 || mine[0].Name != "b" {
		t.Errorf("for workspace %v, %v", mine, err)
	}
	if _, err := s.Get("bb"); !errors.Is(err, vm.ErrNotFound) || vm.Hint(err) != `did you mean "b"?` {
		t.Errorf("get: %v, hint %q", err, vm.Hint(err))
	}
	if err := a.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.Dir); err != nil {
		t.Error("the other instance is gone too")
	}
}

func TestNewerAndDamagedFilesAreLeftAlone(t *testing.T) {
	for name, text := range map[string]string{
		"newer":     `{"format": 99, "name": 7}`,
		"damaged":   `{"format": 1, "name": `,
		"truncated": ``,
	} {
		t.Run(name, func(t *testing.T) {
			i := create(t, testStore(t), "a")
			for _, file := range []string{specFile, statusFile} {
				if err := os.WriteFile(i.Path(file), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, specErr := i.Spec()
			_, statusErr := i.Status()
			for _, err := range []error{specErr, statusErr} {
				if err == nil || !strings.Contains(vm.Hint(err), "agentvm down a") {
					t.Errorf("error %v, hint %q", err, vm.Hint(err))
				}
			}
			if got, _ := os.ReadFile(i.Path(specFile)); string(got) != text {
				t.Error("the file was changed")
			}
		})
	}
}

func TestStatusOfAKilledSupervisor(t *testing.T) {
	for _, tt := range []struct{ name, boot, reason string }{
		{"killed", HostBoot(), "was killed while ready"},
		{"host restarted", "another boot", "the host went down while ready"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := create(t, testStore(t), "a")
			child := exec.Command("sleep", "600")
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			defer child.Process.Kill()
			id, err := vm.ProcessID(child.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			spec, _ := i.Spec()
			run := i.RunDir(spec.ID)
			if err := os.MkdirAll(filepath.Join(run, "vm"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := i.WriteStatus(Status{State: Ready, HostBoot: tt.boot, Supervisor: vm.ProcID{PID: 1 << 30}, Children: map[string]vm.ProcID{"qemu": id}, Provisioned: true}); err != nil {
				t.Fatal(err)
			}
			s, err := i.Status()
			if err != nil {
				t.Fatal(err)
			}
			if s.State != Failed || !strings.Contains(s.Reason, tt.reason) || !s.Provisioned {
				t.Errorf("status %+v", s)
			}
			if _, err := os.Stat(run); !os.IsNotExist(err) {
				t.Error("sockets are left")
			}
			exited := make(chan struct{})
			go func() { child.Wait(); close(exited) }()
			select {
			case <-exited:
				if tt.name != "killed" {
					t.Error("a process of this boot was taken for one of another")
				}
			case <-time.After(300 * time.Millisecond):
				if tt.name == "killed" {
					t.Error("the child is left running")
				}
			}
			if again, err := i.Status(); err != nil || again.Reason != s.Reason {
				t.Errorf("read again: %+v, %v", again, err)
			}
		})
	}
}

// TestKilledWhileRestoring: whoever waits for a machine whose supervisor was
// killed in a restore learns that booting may still succeed.
func TestKilledWhileRestoring(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status Status
		failed bool
	}{
		{"before QEMU runs", Status{State: Starting, HostBoot: HostBoot(), Restoring: true}, true},
		{"as it wakes", Status{State: Booting, HostBoot: HostBoot(), Restoring: true}, true},
		{"claimed from the pool", Status{State: Booting, HostBoot: HostBoot(), Restoring: true, Restored: true}, true},
		{"stopped on request", Status{State: Stopping, HostBoot: HostBoot(), Restoring: true}, false},
		{"host restarted", Status{State: Booting, HostBoot: "another boot", Restoring: true}, false},
		{"a boot", Status{State: Booting, HostBoot: HostBoot()}, false},
		{"a restart from inside", Status{State: Booting, HostBoot: HostBoot(), Restored: true}, false},
		{"restored long ago", Status{State: Ready, HostBoot: HostBoot(), Restored: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := create(t, testStore(t), "a")
			if err := i.WriteStatus(tt.status); err != nil {
				t.Fatal(err)
			}
			if s, err := i.Status(); err != nil || s.State != Failed || s.RestoreFailed != tt.failed || s.RestoreCutShort != tt.failed || s.Restoring {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

func TestStatusOfALivingSupervisor(t *testing.T) {
	i := create(t, testStore(t), "a")
	release, err := i.LockLive()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := i.WriteStatus(Status{State: Ready, HostBoot: HostBoot()}); err != nil {
		t.Fatal(err)
	}
	if s, err := i.Status(); err != nil || s.State != Ready {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := i.LockLive(); err == nil {
		t.Error("locked twice")
	}
}

func TestLockWaits(t *testing.T) {
	i := create(t, testStore(t), "a")
	release, err := i.Lock(context.Background(), func() { t.Error("waited for nobody") })
	if err != nil {
		t.Fatal(err)
	}
	waited := false
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := i.Lock(ctx, func() { waited = true }); !errors.Is(err, context.DeadlineExceeded) || !waited {
		t.Errorf("error %v, waited %v", err, waited)
	}
	release()
	if release, err = i.Lock(context.Background(), func() {}); err != nil {
		t.Error(err)
	}
	release()
}

func TestStateMachine(t *testing.T) {
	for from, tos := range next {
		for _, to := range tos {
			s := Status{State: from}
			if err := s.To(to, "why"); err != nil || s.Reason != "why" {
				t.Errorf("%s to %s: %v", from, to, err)
			}
		}
		if from.Live() {
			s := Status{State: from}
			if err := s.To(Failed, ""); err != nil {
				t.Errorf("%s cannot fail", from)
			}
		}
	}
	s := Status{State: Stopped}
	if err := s.To(Ready, ""); err == nil {
		t.Error("stopped to ready")
	}
}

func TestReachable(t *testing.T) {
	root := t.TempDir()
	if err := os.Chmod(filepath.Dir(root), 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, "closed", "inner")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := reachable(dir); err != nil {
		t.Errorf("open, and refused: %v", err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := reachable(dir); !errors.Is(err, vm.ErrHost) || !strings.Contains(vm.Hint(err), "chmod o+x "+filepath.Dir(dir)) {
		t.Errorf("closed: %v, hint %q", err, vm.Hint(err))
	}
}

// TestClaim: a claim is accepted or withdrawn, never both, and what is left of
// a spare does not harm the instance that it has become.
func TestClaim(t *testing.T) {
	dirs := Dirs{State: t.TempDir(), Cache: t.TempDir(), Run: t.TempDir()}
	store := Store{Dirs: dirs}
	spare, id, err := store.CreateSpare()
	if err != nil {
		t.Fatal(err)
	}
	inst, err := store.Create("mine")
	if err != nil {
		t.Fatal(err)
	}
	spec := Spec{Name: "mine", ID: id}
	if !inst.WithdrawClaim() {
		t.Error("without a claim there is one that was accepted")
	}
	for range 2 {
		if err := inst.WriteClaim(spec); err != nil {
			t.Fatal(err)
		}
		if !inst.WithdrawClaim() || inst.AcceptClaim() == nil {
			t.Error("accepted after it was withdrawn")
		}
	}
	if err := errors.Join(inst.WriteClaim(spec), inst.AcceptClaim()); err != nil {
		t.Fatal(err)
	}
	if inst.WithdrawClaim() {
		t.Error("withdrawn after it was accepted")
	}
	// The supervisor is killed in the middle.
	if err := errors.Join(spare.WriteSpec(spec), spare.WriteStatus(Status{State: Spare}), os.MkdirAll(inst.RunDir(id), 0o700)); err != nil {
		t.Fatal(err)
	}
	moved, err := spare.BeginClaim()
	if err != nil {
		t.Fatal(err)
	}
	if list, err := store.Spares(); err != nil || len(list) != 0 {
		t.Errorf("in the pool: %v, %v", list, err)
	}
	release, err := moved.LockLive()
	if err != nil {
		t.Fatal(err)
	}
	if err := store.SweepClaimed(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(moved.Dir); err != nil {
		t.Errorf("removed from under its supervisor: %v", err)
	}
	release()
	if err := store.SweepClaimed(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(moved.Dir); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
	if _, err := os.Stat(inst.RunDir(id)); err != nil {
		t.Errorf("the instance's sockets are gone: %v", err)
	}
}
