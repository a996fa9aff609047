package supervisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// fakeDevices are given back to a host that may refuse them for a while.
type fakeDevices struct {
	mu       sync.Mutex
	machine  *mortal // that must have ended before
	refusals int
	releases int
	early    bool
}

func (d *fakeDevices) Release(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.machine.Done():
	default:
		d.early = true
	}
	if d.refusals > 0 {
		d.refusals--
		return errors.New("in use by qemu (process 7)")
	}
	d.releases++
	return nil
}

func withCard(s *instance.Spec) {
	s.Machine.Slots = []vm.Slot{{Functions: []vm.Function{{Address: "0000:01:00.0", ID: "10de:2330", Name: "H100"}}}}
}

// TestDevicesComeBack: however a life ends, its devices go back, once, and after
// the machine that had them.
func TestDevicesComeBack(t *testing.T) {
	for _, tt := range []struct {
		name  string
		world func(*world)
		alter func(*instance.Spec)
		ends  func(*life, *world)
	}{
		{"stopped", func(*world) {}, nil, func(l *life, _ *world) {
			l.until(instance.Ready)
			if err := l.client.Stop(context.Background(), time.Second, "enough"); err != nil {
				t.Error(err)
			}
		}},
		{"stopped while booting", func(w *world) { <-w.guests }, nil, func(l *life, _ *world) {
			l.until(instance.Booting)
			if err := l.client.Stop(context.Background(), 0, "enough"); err != nil {
				t.Error(err)
			}
		}},
		{"QEMU does not start", func(w *world) { w.qemuErr = errors.New("exit status 1"); w.machine.die(nil) }, nil, func(*life, *world) {}},
		{"QEMU crashes", func(*world) {}, nil, func(l *life, w *world) {
			l.until(instance.Ready)
			w.machine.die(errors.New("signal: killed"))
		}},
		{"the boot fails", func(w *world) { <-w.guests }, func(s *instance.Spec) { s.BootTimeout = 50 * time.Millisecond }, func(*life, *world) {}},
		{"in use for a moment", func(w *world) { w.devices.refusals = 1 }, nil, func(l *life, _ *world) {
			l.until(instance.Ready)
			l.cancel()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			w.devices = &fakeDevices{machine: w.machine.mortal}
			tt.world(w)
			l := begin(t, w, func(s *instance.Spec) {
				withCard(s)
				if tt.alter != nil {
					tt.alter(s)
				}
			})
			tt.ends(l, w)
			_ = l.end()
			if w.devices.releases != 1 || w.devices.early {
				t.Errorf("given back %d times, early: %v", w.devices.releases, w.devices.early)
			}
		})
	}
}

// TestNoDevicesNoMachine: a device that cannot be had keeps the machine from
// starting, and the reason says which.
func TestNoDevicesNoMachine(t *testing.T) {
	w := newWorld()
	w.devicesErr = errors.New("0000:01:00.0 cannot be taken: it is in use")
	l := begin(t, w, withCard)
	if err := l.end(); err == nil {
		t.Error("it lived")
	}
	if s := l.until(instance.Failed); !strings.Contains(s.Reason, "0000:01:00.0 cannot be taken") || s.Children["qemu"].PID != 0 {
		t.Errorf("%+v", s)
	}
}

// TestDevicesAreNotSaved: no state of a device can be written down.
func TestDevicesAreNotSaved(t *testing.T) {
	w := newWorld()
	w.devices = &fakeDevices{machine: w.machine.mortal}
	l := begin(t, w, withCard)
	l.until(instance.Ready)
	if err := l.client.Suspend(context.Background()); err == nil || !strings.Contains(err.Error(), "cannot be saved") {
		t.Errorf("suspend: %v", err)
	}
	if err := l.client.Snapshot(context.Background(), control.SnapshotRequest{Dir: t.TempDir(), Memory: true}); err == nil || !strings.Contains(err.Error(), "cannot be saved") {
		t.Errorf("snapshot: %v", err)
	}
	if len(*w.machine.did) > 0 {
		t.Errorf("the machine was asked to %v", *w.machine.did)
	}
	l.until(instance.Ready)
}

// TestDevicesArePluggedIn: a machine that goes on from a template has them before
// its guest runs, and is waited for until the guest has met them.
func TestDevicesArePluggedIn(t *testing.T) {
	for name, tt := range map[string]struct {
		says   string
		state  instance.State
		reason string
	}{
		"met":                 {"", instance.Ready, ""},
		"missed":              {"missing 0", instance.Degraded, "the guest has no room for H100, which was plugged in, or does not see it; agentvm up --recreate --cold boots with it"},
		"lies of the guest's": {"missing 1", instance.Ready, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.devices = &fakeDevices{machine: w.machine.mortal}
			var scripts []string
			w.line.run = func(_ context.Context, script string, each func(string)) error {
				if scripts = append(scripts, script); len(scripts) == 1 {
					each("login")
				} else if tt.says != "" {
					each(tt.says)
					each(tt.says)
				}
				return nil
			}
			l := begin(t, w, func(s *instance.Spec) { clone(t)(s); withCard(s) })
			if s := l.until(tt.state); s.Reason != tt.reason || len(s.Warnings) > 1 || !s.Restored {
				t.Errorf("%+v", s)
			}
			if did := *w.machine.did; !slices.Equal(did, []string{"plug 0 workspace", "plug device 0 0000:01:00.0", "resume"}) {
				t.Errorf("it was asked to %q", did)
			}
			if len(scripts) != 2 || !strings.Contains(scripts[1], "10de:2330") {
				t.Errorf("the guest was asked %q", scripts)
			}
		})
	}
}

// TestDevicesThatCannotBePluggedIn: the machine may boot with them instead, but
// not without what somebody else has.
func TestDevicesThatCannotBePluggedIn(t *testing.T) {
	for name, tt := range map[string]struct {
		harm    func(*world)
		reason  string
		restore bool
	}{
		"plug":  {func(w *world) { w.machine.plugErr = errors.New("cannot allocate memory") }, "cannot allocate memory", true},
		"taken": {func(w *world) { w.devicesErr = errors.New("it is in use") }, "it is in use", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			w.devices = &fakeDevices{machine: w.machine.mortal}
			tt.harm(w)
			l := begin(t, w, func(s *instance.Spec) { clone(t)(s); withCard(s) })
			if s := l.until(instance.Failed); !strings.Contains(s.Reason, tt.reason) || s.RestoreFailed != tt.restore || s.PlugFailed != (w.machine.plugErr != nil) {
				t.Errorf("%+v", s)
			}
			if w.devicesErr == nil && (w.devices.releases != 1 || w.devices.early) {
				t.Errorf("given back %d times, early: %v", w.devices.releases, w.devices.early)
			}
		})
	}
}

// TestMeet runs the guest's program on devices of a made-up sysfs.
func TestMeet(t *testing.T) {
	testenv.Require(t, "python3")
	dir := t.TempDir()
	const none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
	const large = "0x0000004000000000 0x0000005fffffffff 0x000000000014220c\n"
	for name, resource := range map[string]string{"0000:05:00.0": none + large, "0000:06:00.0": none + none, "0000:06:00.1": none} {
		ids := map[string]string{"vendor": "0x10de\n", "device": "0x2330\n", "resource": resource}
		if strings.HasSuffix(name, ".1") {
			ids["device"] = "0x22a3\n"
		}
		for file, text := range ids {
			if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	card, sound := [2]any{"10de:2330", []int64{128 << 30}}, [2]any{"10de:22a3", []int64{}}
	for _, tt := range []struct {
		name string
		told [][2]any
		want string
	}{
		{"all", [][2]any{card, sound}, ""},
		{"the second has no room", [][2]any{card, card, sound}, "missing 1\n"},
		{"not there", [][2]any{{"1002:74a1", []int64{}}, card}, "missing 0\n"},
	} {
		program, err := telling(tt.told, strings.NewReplacer("/sys/bus/pci/devices", dir, "range(300)", "range(2)").Replace(meetProgram))
		if err != nil {
			t.Fatal(err)
		}
		const listener = "import glob, os, time\nsay = print\nrun = lambda script: None\nbegin_journal = lambda: say('journal')\n"
		out, err := exec.Command("python3", "-c", listener+program).CombinedOutput()
		if tt.want = "journal\n" + tt.want; err != nil || string(out) != tt.want {
			t.Errorf("%s: it says %q, want %q: %v", tt.name, out, tt.want, err)
		}
	}
}
