package lifecycle

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
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/template"
)

func oneCard(rom string) []vm.Slot {
	return []vm.Slot{{Functions: []vm.Function{
		{Address: "0000:01:00.0", Name: "H100", ROM: rom, Regions: []vm.Region{{Size: 128 << 30, Bits64: true, Prefetchable: true}}},
		{Address: "0000:01:00.1"},
	}}}
}

// TestDevices: what is chosen at a start stays as long as the machine runs.
func TestDevices(t *testing.T) {
	m := testManager(t)
	dir := t.TempDir()
	rom := filepath.Join(dir, "card.rom")
	if err := os.WriteFile(rom, []byte("rom"), 0o600); err != nil {
		t.Fatal(err)
	}
	var asked config.GPU
	m.ChooseDevices = func(_ context.Context, want config.GPU, memory int64, _ *vm.Owner) (Devices, error) {
		asked = want
		if memory != 4<<30 {
			t.Errorf("for a machine of %d bytes", memory)
		}
		return Devices{Slots: oneCard(want.Devices[0].ROM), IOMMUFD: true, Near: &vm.Node{ID: 1}}, nil
	}
	p := Project{Dir: dir, Config: parse(t, "version: 1\nresources: {memory: 4GiB}\ngpu:\n  devices: [{use: auto, rom: card.rom}]\n  hugepages: 2MiB\n")}
	inst, err := m.Store.Create("web")
	if err != nil {
		t.Fatal(err)
	}
	d, err := m.devices(t.Context(), p, inst, instance.Spec{}, nil)
	if err != nil || asked.Devices[0].ROM != rom {
		t.Fatalf("asked for %+v, %v", asked, err)
	}
	spec := instance.Spec{BootTimeout: time.Minute}
	roms, err := withDevices(&spec, p.Config.GPU, d, inst.Path)
	if err != nil {
		t.Fatal(err)
	}
	want := vm.Machine{Slots: oneCard(inst.Path("rom-0")), IOMMUFD: true, Near: &vm.Node{ID: 1}, HugePages: 2 << 20}
	if diff := cmp.Diff(want, spec.Machine); diff != "" {
		t.Error(diff)
	}
	if spec.BootTimeout != time.Minute+128*time.Second || spec.GPU == "" {
		t.Errorf("%v, %q", spec.BootTimeout, spec.GPU)
	}
	if err := copyROMs(inst, roms); err != nil {
		t.Error(err)
	}
	if data, err := os.ReadFile(inst.Path("rom-0")); string(data) != "rom" {
		t.Errorf("the copy is %q, %v", data, err)
	}

	// It runs: nothing is chosen anew, however the choice would be.
	live := running(t, m, "live", instance.Share{Source: "/w/p"})
	m.ChooseDevices = func(context.Context, config.GPU, int64, *vm.Owner) (Devices, error) {
		t.Error("chosen again")
		return Devices{}, nil
	}
	d, err = m.devices(t.Context(), p, live, spec, nil)
	if diff := cmp.Diff(spec.Machine.Slots, d.Slots); diff != "" || err != nil {
		t.Error(diff, err)
	}
	again := instance.Spec{BootTimeout: time.Minute}
	if roms, err = withDevices(&again, p.Config.GPU, d, inst.Path); err != nil || len(roms) > 0 {
		t.Errorf("copies %v, %v", roms, err)
	}
	if !sameMachine(spec, again) {
		t.Error("the same wish seems to be another")
	}
	p.Config.GPU.Devices[0].Use = "h100"
	if _, err = withDevices(&again, p.Config.GPU, d, inst.Path); err != nil || sameMachine(spec, again) {
		t.Error("another wish seems to be the same", err)
	}
}

func TestDevicesRefused(t *testing.T) {
	m := testManager(t)
	inst, err := m.Store.Create("web")
	if err != nil {
		t.Fatal(err)
	}
	p := Project{Dir: t.TempDir(), Config: parse(t, "version: 1\ngpu: {devices: [{use: auto, rom: none.rom}]}\n")}
	if _, err := m.devices(t.Context(), p, inst, instance.Spec{}, nil); !errors.Is(err, vm.ErrUsage) || !strings.Contains(err.Error(), "gpu.devices[0].rom: ") {
		t.Errorf("a ROM that is not there: %v", err)
	}
	live := running(t, m, "live", instance.Share{Source: "/w/p"})
	if err := live.WriteSpec(instance.Spec{Name: "live", ID: "01234567-89ab-cdef-0123-456789abcdef", Hardware: "x", Machine: vm.Machine{Slots: oneCard("")}}); err != nil {
		t.Fatal(err)
	}
	_, forkErr := m.Fork(t.Context(), live, 1, false, &notes{}, nil)
	_, snapshotErr := m.CreateSnapshot(t.Context(), live, "s", SnapshotOptions{}, nil)
	for what, err := range map[string]error{"suspend": m.Suspend(t.Context(), live, nil), "fork": forkErr, "snapshot": snapshotErr} {
		if !errors.Is(err, vm.ErrUsage) || !strings.Contains(err.Error(), "H100 of the host, whose state cannot be saved") || !strings.Contains(vm.Hint(err), "--disk-only") {
			t.Errorf("%s: %v, %q", what, err, vm.Hint(err))
		}
	}
	// Its supervisor is asked for the disk alone; there is none here.
	if _, err := m.CreateSnapshot(t.Context(), live, "s", SnapshotOptions{DiskOnly: true}, nil); err == nil || errors.Is(err, vm.ErrUsage) {
		t.Errorf("a snapshot of the disk: %v", err)
	}
}

// TestNotSavedForAnotherQEMU: memory that this host's QEMU could not go on from is
// not saved to begin with.
func TestNotSavedForAnotherQEMU(t *testing.T) {
	m := testManager(t)
	m.Hardware = func(context.Context, vm.Machine) (string, error) { return "upgraded", nil }
	live := running(t, m, "live", instance.Share{Source: "/w/p"})
	if err := live.WriteSpec(instance.Spec{Name: "live", ID: "01234567-89ab-cdef-0123-456789abcdef", Hardware: "as it was", Machine: vm.Machine{Line: "line.sock"}}); err != nil {
		t.Fatal(err)
	}
	_, forkErr := m.Fork(t.Context(), live, 1, false, &notes{}, nil)
	_, snapshotErr := m.CreateSnapshot(t.Context(), live, "s", SnapshotOptions{}, nil)
	for what, err := range map[string]error{"suspend": m.Suspend(t.Context(), live, nil), "fork": forkErr, "snapshot": snapshotErr} {
		if !errors.Is(err, vm.ErrHost) || !strings.Contains(err.Error(), "could not go on from its memory") || !strings.Contains(vm.Hint(err), "agentvm restart live") {
			t.Errorf("%s: %v, %q", what, err, vm.Hint(err))
		}
	}
}

// TestDiskOfAMachineWithDevices: stopped, it is a machine like others.
func TestDiskOfAMachineWithDevices(t *testing.T) {
	m := testManager(t)
	inst, err := m.Store.Create("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.WriteSpec(instance.Spec{Name: "web", ID: "01234567-89ab-cdef-0123-456789abcdef", Machine: vm.Machine{Slots: oneCard("")}}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(inst.Path(OverlayFile), []byte("disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := inst.WriteStatus(instance.Status{State: instance.Stopped}); err != nil {
		t.Fatal(err)
	}
	if s, err := m.CreateSnapshot(t.Context(), inst, "s", SnapshotOptions{}, nil); err != nil || s.Memory {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestNoTemplateWithDevices: memory of a kind that a template's is not of.
func TestNoTemplateWithDevices(t *testing.T) {
	for want, change := range map[string]func(*vm.Machine){
		"not in huge pages":                    func(m *vm.Machine) { m.HugePages = 2 << 20 },
		"does not come from NUMA node 1":       func(m *vm.Machine) { m.Near = &vm.Node{ID: 1} },
		"there is no template for it: no QEMU": func(*vm.Machine) {},
	} {
		p := testPlan()
		p.newDisk, p.spec.Machine.Slots = true, oneCard("")
		p.image.Manifest.Cmdline = "quiet"
		change(&p.spec.Machine)
		n := &notes{}
		m := &Manager{Hardware: func(context.Context, vm.Machine) (string, error) { return "", errors.New("no QEMU") }}
		if from, err := m.templateFor(t.Context(), p, UpOptions{}, n); from != nil || err != nil || len(n.said) != 1 || !strings.Contains(n.said[0], "the machine boots") || !strings.Contains(n.said[0], want) {
			t.Errorf("%v, %v, %q, want %q", from, err, n.said, want)
		}
	}
}

// TestTemplateHasNoDevice, but room for it.
func TestTemplateHasNoDevice(t *testing.T) {
	p := testPlan()
	p.spec.Machine.Slots = oneCard("/rom")
	p.spec.Machine.Slots[0].Functions[0].Regions = []vm.Region{{Size: 1 << 30, Bits64: true, Prefetchable: true}}
	inst := instance.Store{Dirs: instance.Dirs{Run: "/run/agentvm"}}.Open("/cache/templates/making/template-0123456789ab")
	spec := nobodys(p, inst, "89abcdef-0123-4567-89ab-cdef01234567")
	if diff := cmp.Diff([]vm.Slot{{Room: 2 << 30}}, spec.Machine.Slots); diff != "" {
		t.Error(diff)
	}
	restored := p.spec
	restored.Machine.Saved = "/template"
	restored.Machine.Slots, _ = p.spec.Machine.SlotsForLater()
	if !sameMachine(restored, p.spec) {
		t.Error("a machine that was restored is taken for another")
	}
}

// TestLeftDevicesAreTakenBack by whoever comes next, who is told so.
func TestLeftDevicesAreTakenBack(t *testing.T) {
	m := testManager(t)
	calls := 0
	m.RecoverDevices = func(context.Context) ([]string, error) {
		calls++
		return []string{"0000:01:00.0 was left behind"}, errors.New("0000:02:00.0 is in use")
	}
	n := &notes{}
	m.tidyDevices(t.Context(), n)
	if len(n.said) != 2 || !strings.Contains(n.said[1], "is not back: 0000:02:00.0 is in use") {
		t.Errorf("%q", n.said)
	}
	inst, err := m.Store.Create("web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Stop(t.Context(), inst, 0, func() {}); err != nil {
		t.Error(err)
	}
	if calls < 2 {
		t.Error("stop takes nothing back")
	}
}

// TestGiveUp: a card that cannot be plugged in is no fault of the template's.
func TestGiveUp(t *testing.T) {
	m := testManager(t)
	m.Templates = template.Store{Dir: t.TempDir()}
	from := &template.Template{ID: "0123456789ab-1", Dir: filepath.Join(m.Templates.Dir, "0123456789ab-1")}
	if err := os.Mkdir(from.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	inst := m.Store.Open(filepath.Join(t.TempDir(), "web"))
	for _, plug := range []bool{true, false} {
		n := &notes{}
		if err := m.giveUp(inst, from, instance.Status{RestoreFailed: true, PlugFailed: plug}, "why", n); err != nil {
			t.Error(err)
		}
		_, err := os.Lstat(from.Dir)
		if there := err == nil; there != plug || len(n.said) != 1 || strings.Contains(n.said[0], "deleted") == plug || !strings.Contains(n.said[0], "why") {
			t.Errorf("plug failed %v: the template is there %v, %q", plug, there, n.said)
		}
	}
}
