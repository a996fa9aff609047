package supervisor

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
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
	s.Machine.Slots = []vm.Slot{{Functions: []vm.Function{{Address: "0000:01:00.0"}}}}
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
