package gpu

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

// vgpu is a mediated device.
const vgpu = "c2177883-f1bb-47f0-914d-32a22e3a8804"

func divided(t *testing.T) (*fake, *Manager) {
	f, m := manager(t, cards()...)
	f.mediate(vgpu, "0000:02:00.0", "77")
	return f, m
}

func TestMediatedInventory(t *testing.T) {
	f, m := divided(t)
	f.dir(mdevDevices, "not-a-uuid")
	f.put("/proc/77/comm", "qemu-system-x86\n")
	f.symlink("/dev/vfio/devices/vfio77", "/proc/77/fd/9")
	inv, err := m.Host.Inventory()
	if err != nil || len(inv.Mediated) != 1 {
		t.Fatal(inv, err)
	}
	want := &Mdev{UUID: vgpu, Type: "GRID T4-2Q", Group: "77", Driver: "nvidia-vgpu-vfio", Card: inv.Get("0000:02:00.0"), Nodes: []string{"/dev/vfio/77", "/dev/vfio/devices/vfio77"},
		Holders: []Holder{{77, "qemu-system-x86", "/dev/vfio/devices/vfio77", ""}}, Hidden: os.Geteuid() != 0}
	if diff := cmp.Diff(want, inv.Mediated[0]); diff != "" || want.Card == nil {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{vgpu}, want.Card.Mediated); diff != "" {
		t.Error(diff)
	}
}

// TestBindMediated gives a part of a card to a user and back, and nothing is
// written to any driver.
func TestBindMediated(t *testing.T) {
	f, m := divided(t)
	before := f.state()
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	taken, err := m.Bind(t.Context(), ask(Owner{Name: "web", Process: self}, vgpu, vgpu)) // named twice, taken once
	if err != nil || len(taken) != 1 || taken[0].ID != "10de:2330" || taken[0].VFIO != "nvidia-vgpu-vfio" || taken[0].Group != "77" {
		t.Fatalf("%+v, %v", taken, err)
	}
	if f.owners["/dev/vfio/77"] != vmUser || f.owners["/dev/vfio/devices/vfio77"] != vmUser || len(f.writes) > 0 {
		t.Error(f.owners, f.writes)
	}
	if _, err := m.Bind(t.Context(), ask(gone, vgpu)); err == nil || !strings.Contains(err.Error(), "taken already, by web") || vm.Hint(err) != "agentvm stop web" {
		t.Error(err, vm.Hint(err))
	}
	if _, err := m.Bind(t.Context(), ask(gone, "0000:02:00.0")); err == nil || !strings.Contains(err.Error(), "mediated devices live on it") {
		t.Error("the card of a part:", err)
	}
	if o, err := m.Recover(t.Context()); err != nil || len(o) != 1 || o[0].Action != Left {
		t.Error("recover while its owner lives:", o, err)
	}
	m.User = vmUser + 1
	if _, err := m.Release(t.Context(), vgpu); err == nil || !strings.Contains(err.Error(), "not yours") {
		t.Error(err)
	}
	m.User = vmUser
	f.put("/proc/77/comm", "qemu-system-x86\n")
	f.symlink("/dev/vfio/77", "/proc/77/fd/9")
	if o, err := m.Release(t.Context(), vgpu); err == nil || !strings.Contains(err.Error(), "in use by qemu-system-x86 (process 77, /dev/vfio/77)") || len(o) != 1 || o[0].Action != Failed {
		t.Error("while it is open:", o, err)
	}
	f.must(os.Remove(f.at("/proc/77/fd/9")))
	if o, err := m.Release(t.Context(), vgpu); err != nil || len(o) != 1 || o[0].Action != Restored {
		t.Error(o, err)
	}
	if diff := cmp.Diff(before, f.state()); diff != "" {
		t.Error(diff)
	}
	if left, err := m.Journals(); err != nil || len(left) > 0 {
		t.Error(left, err)
	}
}

// TestMediatedIsRefused: nothing is given, and no journal is left.
func TestMediatedIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(*fake, *Manager)
		says  string
		class error
	}{
		"there is none": {func(f *fake, _ *Manager) { f.unmediate(vgpu, "77") }, "no mediated device", vm.ErrNotFound},
		"no driver": {func(f *fake, _ *Manager) {
			f.must(os.Remove(f.at("/sys/devices/pci0000:00/0000:02:00.0", vgpu, "driver")))
		}, "no driver has it", vm.ErrHost},
		"no group": {func(f *fake, _ *Manager) {
			f.must(os.Remove(f.at("/sys/devices/pci0000:00/0000:02:00.0", vgpu, "iommu_group")))
		}, "in no IOMMU group", vm.ErrHost},
		"somebody has it open": {func(f *fake, _ *Manager) { f.symlink("/dev/vfio/77", "/proc/78/fd/9") }, "in use by", vm.ErrHost},
		"not viable":           {func(_ *fake, m *Manager) { m.Host.Viable = func(string) error { return errors.New("no") } }, "cannot be used", vm.ErrHost},
		"a node is not given": {func(f *fake, m *Manager) {
			m.Host.Chown = func(path string, uid int) error {
				if path == "/dev/vfio/devices/vfio77" && uid == vmUser {
					return errors.New("no")
				}
				return f.chown(path, uid)
			}
		}, "give /dev/vfio/devices/vfio77 to user", vm.ErrHost},
	} {
		t.Run(name, func(t *testing.T) {
			f, m := divided(t)
			tt.spoil(f, m)
			before := f.state()
			if j, err := m.Bind(t.Context(), ask(gone, "0000:01:00.0", vgpu)); !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.says) || j != nil {
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

// TestMediatedChangedMeanwhile: what was removed or made anew is not touched,
// nor is who has its group's number now.
func TestMediatedChangedMeanwhile(t *testing.T) {
	const stranger = 4711
	for name, tt := range map[string]struct {
		change func(*fake)
		action Action
		owner  int // of /dev/vfio/77 afterwards; 0: as at first
	}{
		"nothing": {func(*fake) {}, Restored, 0},
		"removed": {func(f *fake) { f.unmediate(vgpu, "77") }, Dropped, 0},
		"removed, and another's has its number": {func(f *fake) {
			f.unmediate(vgpu, "77")
			f.put("/dev/vfio/77", "")
			f.owners["/dev/vfio/77"] = stranger
		}, Dropped, stranger},
		"made anew with another number": {func(f *fake) {
			f.unmediate(vgpu, "77")
			f.must(os.RemoveAll(f.at("/sys/devices/pci0000:00/0000:02:00.0", vgpu)))
			f.mediate(vgpu, "0000:02:00.0", "78")
			f.put("/dev/vfio/77", "")
			f.owners["/dev/vfio/77"] = stranger
		}, Dropped, stranger},
		"another boot": {func(f *fake) { f.put("/proc/sys/kernel/random/boot_id", "another\n") }, Dropped, vmUser}, // devtmpfs is new then
	} {
		t.Run(name, func(t *testing.T) {
			f, m := divided(t)
			if _, err := m.Bind(t.Context(), ask(gone, vgpu)); err != nil {
				t.Fatal(err)
			}
			tt.change(f)
			o, err := m.Recover(t.Context())
			if err != nil || len(o) != 1 || o[0].Action != tt.action || f.owners["/dev/vfio/77"] != tt.owner || len(f.writes) > 0 {
				t.Error(o, err, f.owners, f.writes)
			}
			if left, err := m.Journals(); err != nil || len(left) > 0 {
				t.Error(left, err)
			}
		})
	}
}
