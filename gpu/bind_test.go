package gpu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

// killed is what stands for SIGKILL: nothing after it runs.
type killed struct{}

var gone = Owner{Name: "a test", Process: vm.ProcID{PID: 1 << 30, Start: 1}}

// vmUser is the user that a machine runs as.
const vmUser = 1878982656

func ask(owner Owner, devices ...string) Request {
	return Request{Owner: owner, Devices: devices, User: vm.Owner{UID: vmUser, GID: vmUser}}
}

// survive runs do and reports whether it came to its end.
func survive(do func()) (ended bool) {
	defer func() {
		if r := recover(); r != nil && r != any(killed{}) {
			panic(r)
		}
	}()
	do()
	return true
}

// killAt makes m's process die at the n-th point.
func killAt(m *Manager, n int) {
	m.hook = func() {
		if n--; n < 0 {
			panic(killed{})
		}
	}
}

// TestKilledWhileKept kills a bind that is to outlive its process, and releases
// of it, at each step: what is left is all or nothing, of the bind and of each slot.
func TestKilledWhileKept(t *testing.T) {
	owner := gone
	owner.Keep = true
	units := []string{"0000:01:00.0", "0000:02:00.0", vgpu}
	// taken tells how many of a unit's functions are; it fails when some are.
	taken := func(f *fake, addresses ...string) bool {
		n := 0
		for _, a := range addresses {
			if f.driver(a) == vfioDriver || a == vgpu && f.owners["/dev/vfio/77"] == vmUser {
				n++
			}
		}
		if n > 0 && n < len(addresses) {
			t.Fatalf("%d of %q are taken\n%q", n, addresses, f.writes)
		}
		return n > 0
	}
	keptOnce, releasedOnce := false, false
	for n, ended := 0, false; !ended; n++ {
		for k, released := 0, false; !released; k++ {
			f, m := manager(t, cards()...)
			f.mediate(vgpu, "0000:00:1f.0", "77")
			before := f.state()
			killAt(m, n)
			ended = survive(func() {
				if _, err := m.Bind(t.Context(), ask(owner, units...)); err != nil {
					t.Fatal(err)
				}
			})
			recoverAll(t, m, k)
			if !taken(f, "0000:01:00.0", "0000:01:00.1", "0000:02:00.0", vgpu) {
				if diff := cmp.Diff(before, f.state()); diff != "" {
					t.Fatalf("bind killed at %d: %s", n, diff)
				}
				break
			}
			keptOnce = keptOnce || !ended
			killAt(m, k)
			released = survive(func() {
				if _, err := m.Release(t.Context(), units[0]); err != nil {
					t.Fatal(err)
				}
			})
			recoverAll(t, m, 0)
			releasedOnce = releasedOnce || !released && !taken(f, "0000:01:00.0", "0000:01:00.1")
			if !taken(f, units[1], vgpu) {
				t.Fatalf("bind killed at %d, release at %d: the others went along", n, k)
			}
			for i, unit := range [][]string{{"0000:01:00.0", "0000:01:00.1"}, {"0000:02:00.0"}, {vgpu}} {
				if taken(f, unit...) {
					if _, err := m.Release(t.Context(), units[i]); err != nil {
						t.Fatal(err)
					}
				}
			}
			if diff := cmp.Diff(before, f.state()); diff != "" {
				t.Fatalf("bind killed at %d, release at %d: %s", n, k, diff)
			}
			if left, err := m.Journals(); err != nil || len(left) > 0 {
				t.Fatalf("bind killed at %d, release at %d: %v, %v", n, k, left, err)
			}
		}
	}
	if !keptOnce || !releasedOnce {
		t.Error("no kill came between two functions:", keptOnce, releasedOnce)
	}
}

// recoverAll recovers until it comes to its end; it is killed at the n-th point first.
func recoverAll(t *testing.T, m *Manager, n int) {
	t.Helper()
	for ; ; n += 7 {
		killAt(m, n)
		if survive(func() {
			if _, err := m.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
		}) {
			m.hook = nil
			return
		}
	}
}

func cards() []fakeDevice {
	return []fakeDevice{
		{address: "0000:00:01.0", id: "8086:1901", class: "0x060400", driver: "pcieport", group: "1"},
		{address: "0000:01:00.0", id: "10de:20f1", class: "0x030200", driver: "nvidia", group: "1"},
		{address: "0000:01:00.1", id: "10de:1aef", class: "0x040300", driver: "snd_hda_intel", override: "snd_hda_intel", group: "1"},
		{address: "0000:02:00.0", id: "10de:2330", class: "0x030200", driver: "nvidia", group: "2"},
	}
}

func manager(t *testing.T, devices ...fakeDevice) (*fake, *Manager) {
	f := newFake(t, devices...)
	return f, &Manager{Host: f.host(), Wait: 20 * time.Millisecond}
}

func TestBindAndRelease(t *testing.T) {
	f, m := manager(t, cards()...)
	before := f.state()
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Bind(t.Context(), ask(Owner{Name: "me", Process: self, Keep: true}, "0000:01:00.0", "0000:02:00.0")); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"0000:00:01.0": "pcieport override=", "0000:01:00.0": "vfio-pci override=vfio-pci", "0000:01:00.1": "vfio-pci override=vfio-pci", "0000:02:00.0": "vfio-pci override=vfio-pci",
		"/dev/vfio/1": "uid 1878982656", "/dev/vfio/2": "uid 1878982656"}
	if diff := cmp.Diff(want, f.state()); diff != "" {
		t.Fatal(diff)
	}
	_, err = m.Bind(t.Context(), ask(gone, "0000:01:00.1"))
	if err == nil || !strings.Contains(err.Error(), "taken already, by me") || vm.Hint(err) != "agentvm gpu release 0000:01:00.0" {
		t.Error(err, vm.Hint(err))
	}
	outcomes, err := m.Recover(t.Context())
	if err != nil || len(outcomes) != 3 || outcomes[0].Action != Left {
		t.Error(outcomes, err)
	}
	if _, err := m.Release(t.Context(), "0000:01:00.1", "0000:02:00.0"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, f.state()); diff != "" {
		t.Error(diff)
	}
	if _, err := m.Release(t.Context(), "0000:01:00.0"); !errors.Is(err, vm.ErrNotFound) {
		t.Error(err)
	}
}

// TestKeptAfterItsProcess: what gpu bind has bound outlives it; what it had
// only begun to bind does not.
func TestKeptAfterItsProcess(t *testing.T) {
	f, m := manager(t, cards()...)
	kept := gone
	kept.Keep = true
	if _, err := m.Bind(t.Context(), ask(kept, "0000:02:00.0")); err != nil {
		t.Fatal(err)
	}
	if o, err := m.Recover(t.Context()); err != nil || len(o) != 1 || o[0].Action != Left {
		t.Fatal(o, err)
	}
	// The host boots: sysfs is as ever, and the journal of another boot.
	f.put("/proc/sys/kernel/random/boot_id", "another\n")
	writes := len(f.writes)
	if o, err := m.Recover(t.Context()); err != nil || len(o) != 1 || o[0].Action != Dropped || len(f.writes) != writes {
		t.Fatal(o, err, f.writes)
	}
}

// TestFailureRollsBack fails each driver and the kernel's verdict, the last
// device of several, and finds all as before.
func TestFailureRollsBack(t *testing.T) {
	for name, spoil := range map[string]func(*fake, *Manager, context.CancelFunc){
		"vfio-pci refuses": func(f *fake, _ *Manager, _ context.CancelFunc) { f.refuses[vfioDriver] = true },
		"not viable": func(_ *fake, m *Manager, _ context.CancelFunc) {
			m.Host.Viable = func(string) error { return errors.New("no") }
		},
		"a write fails": func(f *fake, m *Manager, _ context.CancelFunc) {
			m.Host.Write = func(ctx context.Context, path, data string) error {
				if strings.HasSuffix(path, "nvidia/unbind") && data == "0000:02:00.0" {
					return errors.New("no")
				}
				return f.write(ctx, path, data)
			}
		},
		"interrupted": func(f *fake, m *Manager, cancel context.CancelFunc) {
			m.hook = func() {
				if f.driver("0000:01:00.0") == "" {
					cancel()
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f, m := manager(t, cards()...)
			before := f.state()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			spoil(f, m, cancel)
			if j, err := m.Bind(ctx, ask(gone, "0000:01:00.0", "0000:02:00.0")); err == nil || len(j) > 0 || !errors.Is(err, vm.ErrHost) {
				t.Error(j, err)
			}
			if diff := cmp.Diff(before, f.state()); diff != "" {
				t.Error(diff)
			}
			if left, err := m.Journals(); err != nil || len(left) > 0 {
				t.Error(left, err)
			}
		})
	}
}

// TestDriverTakesItLater: somebody else resets the device when it is given back,
// and its driver takes it once that is over.
func TestDriverTakesItLater(t *testing.T) {
	f, m := manager(t, cards()...)
	m.Wait = 10 * time.Second
	before := f.state()
	if _, err := m.Bind(t.Context(), ask(gone, "0000:02:00.0")); err != nil {
		t.Fatal(err)
	}
	f.refuses["nvidia"] = true
	tries := 0
	m.Host.Write = func(ctx context.Context, path, data string) error {
		if strings.HasSuffix(path, "nvidia/bind") {
			tries++
			f.refuses["nvidia"] = tries < 3
		}
		return f.write(ctx, path, data)
	}
	if o, err := m.Recover(t.Context()); err != nil || len(o) != 1 || o[0].Action != Restored || tries != 3 {
		t.Error(o, err, tries)
	}
	if diff := cmp.Diff(before, f.state()); diff != "" {
		t.Error(diff)
	}
}

// TestBlockedUnbind: the write happens after we gave up. The journal stays
// until it has, and the device comes back after it.
func TestBlockedUnbind(t *testing.T) {
	f, m := manager(t, cards()...)
	before := f.state()
	f.blocks["0000:02:00.0"] = true
	_, err := m.Bind(t.Context(), ask(gone, "0000:01:00.0", "0000:02:00.0"))
	if !errors.Is(err, ErrBlocked) || !strings.Contains(vm.Hint(err), "agentvm gpu recover") {
		t.Fatal(err, vm.Hint(err))
	}
	if f.driver("0000:01:00.0") != "nvidia" {
		t.Error("the other card was not given back")
	}
	if _, err := m.Recover(t.Context()); !errors.Is(err, ErrBlocked) {
		t.Error("recover while it blocks:", err)
	}
	f.letGo("0000:02:00.0")
	if o, err := m.Recover(t.Context()); err != nil || len(o) != 1 || o[0].Action != Restored {
		t.Error(o, err)
	}
	if diff := cmp.Diff(before, f.state()); diff != "" {
		t.Error(diff)
	}
}

// TestGivingBackIsRefused keeps the journal, and says why.
func TestGivingBackIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(*fake)
		says  string
	}{
		"the driver is gone": {func(f *fake) { f.refuses["nvidia"] = true }, `give back 0000:02:00.0: `},
		"the card is dead":   {func(f *fake) { f.put(pciDevices+"/0000:02:00.0/config", strings.Repeat("\xff", 64)) }, "does not answer"},
		"a machine has it": {func(f *fake) {
			f.put("/proc/77/comm", "qemu-system-x86\n")
			f.symlink("/dev/vfio/2", "/proc/77/fd/9")
		}, "in use by qemu-system-x86 (process 77, /dev/vfio/2)"},
	} {
		t.Run(name, func(t *testing.T) {
			f, m := manager(t, cards()...)
			if _, err := m.Bind(t.Context(), ask(gone, "0000:02:00.0")); err != nil {
				t.Fatal(err)
			}
			tt.spoil(f)
			o, err := m.Release(t.Context(), "0000:02:00.0")
			if err == nil || !strings.Contains(err.Error(), tt.says) || !errors.Is(err, vm.ErrHost) || len(o) != 1 || o[0].Action != Failed {
				t.Error(o, err)
			}
			if left, err := m.Journals(); err != nil || len(left) != 1 {
				t.Error(left, err)
			}
		})
	}
}

// TestChangedMeanwhile leaves alone what others did after the binding.
func TestChangedMeanwhile(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*fake)
		action Action
		driver string
	}{
		"another device": {func(f *fake) { f.put(pciDevices+"/0000:02:00.0/device", "0x9999\n") }, Dropped, vfioDriver},
		"another driver": {func(f *fake) {
			f.must(os.Remove(f.at(pciDevices, "0000:02:00.0", "driver")))
			f.symlink("../../drivers/nouveau", pciDevices+"/0000:02:00.0/driver")
		}, Restored, "nouveau"},
		"given back by hand": {func(f *fake) {
			f.must(os.Remove(f.at(pciDevices, "0000:02:00.0", "driver")))
			f.put(pciDevices+"/0000:02:00.0/driver_override", "(null)\n")
		}, Restored, "nvidia"},
	} {
		t.Run(name, func(t *testing.T) {
			f, m := manager(t, cards()...)
			if _, err := m.Bind(t.Context(), ask(gone, "0000:02:00.0")); err != nil {
				t.Fatal(err)
			}
			tt.change(f)
			o, err := m.Recover(t.Context())
			if err != nil || len(o) != 1 || o[0].Action != tt.action || f.driver("0000:02:00.0") != tt.driver {
				t.Error(o, err, f.driver("0000:02:00.0"))
			}
		})
	}
}

// TestRefusalWritesNothing: one device of two may not be taken.
func TestRefusalWritesNothing(t *testing.T) {
	devices := cards()
	devices[3].files = map[string]string{"boot_vga": "1\n"}
	f, m := manager(t, devices...)
	_, err := m.Bind(t.Context(), ask(gone, "0000:01:00.0", "0000:02:00.0"))
	if !errors.Is(err, vm.ErrHost) || vm.Hint(err) == "" || len(f.writes) > 0 {
		t.Error(err, f.writes)
	}
	if left, err := m.Journals(); err != nil || len(left) > 0 {
		t.Error(left, err)
	}
	if _, err := m.Bind(t.Context(), Request{Owner: gone, Force: true, Devices: []string{"0000:02:00.0"}}); err != nil {
		t.Error("with force:", err)
	}
}

// FuzzJournal: what is read back is what was written, and nothing else names
// a path.
func FuzzJournal(f *testing.F) {
	f.Add([]byte(`{"version":2,"bootID":"x","bind":"b","owner":{"name":"a","process":{"pid":1,"start":2},"keep":false},"user":0,"address":"0000:01:00.0","unit":"0000:01:00.0","id":"10de:20f1","group":"1","driver":"nvidia","override":"","vfio":"vfio-pci","prebound":false,"grants":[{"path":"/dev/vfio/1","was":0}],"step":"unbind","time":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"version":2,"address":"0000:01:00.0","unit":"0000:01:00.0","id":"10de:20f1","driver":"../x","vfio":"vfio-pci","grants":[{"path":"/etc/passwd"}],"step":"unbind"}`))
	f.Add([]byte(`{"version":2,"bootID":"x","bind":"b","owner":{"name":"a","process":{"pid":1,"start":2},"keep":false},"user":0,"address":"` + vgpu + `","unit":"` + vgpu + `","id":"","group":"77","driver":"vfio_mdev","override":"","vfio":"vfio_mdev","prebound":true,"grants":[{"path":"/dev/vfio/devices/vfio3","was":0}],"step":"grant","time":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"version":2,"address":"` + vgpu + `","unit":"0000:01:00.0","driver":"x","vfio":"x","prebound":false,"step":"grant"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		j, err := parseJournal(data)
		if err != nil {
			return
		}
		if strings.ContainsAny(j.Driver+j.Override+j.VFIO+j.Group+j.Address, "/\n\x00") || j.Driver == ".." {
			t.Errorf("%+v", j)
		}
		if !IsUUID(j.Address) && !isVFIO(j.VFIO) || IsUUID(j.Address) && (j.Unit != j.Address || !j.Prebound) {
			t.Errorf("%+v", j)
		}
		for _, g := range j.Grants {
			if filepath.Clean(g.Path) != g.Path || !strings.HasPrefix(g.Path, "/dev/vfio/") {
				t.Errorf("%+v", j)
			}
		}
	})
}
