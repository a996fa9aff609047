package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

// cardHost is an app on a host with one card, and without an IOMMU.
func cardHost(t *testing.T) (a *app, stdout, stderr *bytes.Buffer) {
	t.Helper()
	root, home := t.TempDir(), t.TempDir()
	dir := filepath.Join(root, "sys/bus/pci/devices/0000:3b:00.0")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	kernel := filepath.Join(root, "proc/sys/kernel/random")
	if err := errors.Join(os.Mkdir(filepath.Join(root, "run"), 0o755), os.MkdirAll(kernel, 0o755), os.WriteFile(filepath.Join(kernel, "boot_id"), []byte("x\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"vendor": "0x10de", "device": "0x2330", "class": "0x030200", "resource": "0x0000084000000000 0x0000085fffffffff 0x000000000014220c\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	return &app{stdout: stdout, stderr: stderr, gpuRoot: root, getenv: func(name string) string {
		return map[string]string{"AGENTVM_HOME": home}[name]
	}}, stdout, stderr
}

func (a *app) run(args ...string) error {
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetOut(a.stdout)
	return root.Execute()
}

func TestGPULs(t *testing.T) {
	a, stdout, _ := cardHost(t)
	if err := a.run("gpu", "ls"); err != nil || !strings.Contains(stdout.String(), "0000:3b:00.0  10de:2330") || !strings.Contains(stdout.String(), "128GiB") {
		t.Error(err, stdout)
	}
	stdout.Reset()
	var views []gpuView
	if err := a.run("gpu", "ls", "--json"); err != nil || json.Unmarshal(stdout.Bytes(), &views) != nil || len(views) != 1 || views[0].Address != "0000:3b:00.0" {
		t.Error(err, stdout)
	}
	stdout.Reset()
	if err := a.run("__complete", "gpu", "check", ""); err != nil || !strings.HasPrefix(stdout.String(), "0000:3b:00.0\t10de:2330\n") {
		t.Error(err, stdout)
	}
}

// TestGPULsHidden: ls does not say that nobody uses a card where it cannot know.
func TestGPULsHidden(t *testing.T) {
	const uuid, note = "c2177883-f1bb-47f0-914d-32a22e3a8804", "agentvm: ?: only your own processes were looked at; sudo agentvm gpu ls looks at all\n"
	mine := []gpu.Holder{{PID: 7, Command: "train.py", Path: "/dev/nvidia0"}}
	for _, tt := range []struct {
		name         string
		card, part   bool // who has them open is not known
		holders      []gpu.Holder
		taken        *gpu.Journal
		usedBy, note string
	}{
		{"root", false, false, nil, nil, "- -", ""},
		{"not known", true, true, nil, nil, "? ?", note},
		{"of a part", false, true, nil, nil, "- ?", note},
		{"one's own", true, false, mine, nil, "train.py (7) -", ""},
		{"a machine's", true, false, nil, &gpu.Journal{Owner: gpu.Owner{Name: "web"}}, "web -", ""},
	} {
		stdout, stderr := new(bytes.Buffer), new(bytes.Buffer)
		a := &app{stdout: stdout, stderr: stderr}
		err := a.showGPUs([]gpuView{{&gpu.Device{Address: "0000:3b:00.0", Hidden: tt.card, Holders: tt.holders}, tt.taken}}, []mdevView{{Mdev: &gpu.Mdev{UUID: uuid, Type: "T4", Hidden: tt.part}}}, false)
		if err != nil {
			t.Fatal(err)
		}
		last := func(begins string) string { // the last column
			columns := strings.Split(strings.TrimSpace(lineOf(stdout.String(), begins)), "  ")
			return strings.TrimSpace(columns[len(columns)-1])
		}
		if got := last("0000:3b:00.0") + " " + last(uuid); got != tt.usedBy || stderr.String() != tt.note {
			t.Errorf("%s: %q, %q\n%s", tt.name, got, stderr, stdout)
		}
	}
}

// lineOf is the line of a text that begins so.
func lineOf(text, begins string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, begins) {
			return line
		}
	}
	return ""
}

// TestGPUMediated: a part of a card goes by its UUID, in any case.
func TestGPUMediated(t *testing.T) {
	const uuid = "c2177883-f1bb-47f0-914d-32a22e3a8804"
	a, stdout, _ := cardHost(t)
	card := filepath.Join(a.gpuRoot, "sys/bus/pci/devices/0000:3b:00.0")
	part, mdevs := filepath.Join(card, uuid), filepath.Join(a.gpuRoot, "sys/bus/mdev/devices")
	if err := errors.Join(os.MkdirAll(filepath.Join(part, "mdev_type"), 0o755), os.WriteFile(filepath.Join(part, "mdev_type/name"), []byte("GRID T4-2Q\n"), 0o600),
		os.MkdirAll(mdevs, 0o755), os.Symlink(part, filepath.Join(mdevs, uuid))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.run("gpu", "ls"), os.WriteFile(filepath.Join(card, "current_link_speed"), []byte("32.0 GT/s PCIe\n"), 0o600), os.WriteFile(filepath.Join(card, "current_link_width"), []byte("16\n"), 0o600),
		os.WriteFile(filepath.Join(card, "sriov_totalvfs"), []byte("20\n"), 0o600), os.WriteFile(filepath.Join(card, "numa_node"), []byte("1\n"), 0o600), os.WriteFile(filepath.Join(card, "reset_method"), []byte("flr bus\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if line := lineOf(stdout.String(), uuid); !slices.Equal(strings.Fields(line), []string{uuid, "10de:2330", "GRID", "T4-2Q", "-", "-", "-", "-"}) {
		t.Errorf("%q", line)
	}
	stdout.Reset()
	if err := a.run("gpu", "ls", "--wide"); err != nil {
		t.Fatal(err)
	}
	if line := lineOf(stdout.String(), "0000:3b:00.0"); !strings.Contains(strings.Join(strings.Fields(line), " "), "128GiB 030200 1 32.0 GT/s x16 flr,bus 0 of 20 -") {
		t.Errorf("%q", line)
	}
	stdout.Reset()
	err := a.run("gpu", "check", strings.ToUpper(uuid))
	if want := uuid + " GRID T4-2Q: cannot be taken, with " + uuid + "\n  problem  no driver has it\n"; !errors.Is(err, vm.ErrHost) || !strings.HasPrefix(stdout.String(), want) {
		t.Error(err, stdout)
	}
	if err := errors.Join(os.Symlink("x/nvidia-vgpu-vfio", filepath.Join(part, "driver")), os.Symlink("x/77", filepath.Join(part, "iommu_group"))); err != nil {
		t.Fatal(err)
	}
	stdout.Reset()
	var rows []map[string]any
	if err := a.run("gpu", "ls", "--json"); err != nil || json.Unmarshal(stdout.Bytes(), &rows) != nil || len(rows) != 2 {
		t.Fatal(err, stdout)
	}
	part77 := map[string]any{"uuid": uuid, "type": "GRID T4-2Q", "driver": "nvidia-vgpu-vfio", "group": "77", "card": "0000:3b:00.0", "nodes": []any{"/dev/vfio/77"}}
	if os.Geteuid() != 0 {
		part77["holdersHidden"] = true
	}
	if diff := cmp.Diff(part77, rows[1]); diff != "" || rows[0]["address"] != "0000:3b:00.0" {
		t.Error(diff, rows[0])
	}
	stdout.Reset()
	var views []gpuCheckView
	err = a.run("gpu", "check", "--json")
	if !errors.Is(err, vm.ErrHost) || json.Unmarshal(stdout.Bytes(), &views) != nil || len(views) != 2 || views[0].Free || !views[1].Free || views[1].Address != uuid || views[1].ID != "10de:2330" {
		t.Error(err, stdout)
	}
	if !slices.ContainsFunc(views[0].Findings, func(f gpu.Finding) bool { return f.Code == gpu.HasMediated }) {
		t.Error("the card:", stdout)
	}
	err = a.run("gpu", "release", uuid)
	if want := uuid + " was not taken by agentvm"; os.Geteuid() == 0 && (!errors.Is(err, vm.ErrNotFound) || !strings.Contains(err.Error(), want)) {
		t.Error(err)
	}
	if err := a.run("gpu", "check", "00000000"+uuid[8:]); !errors.Is(err, vm.ErrNotFound) {
		t.Error(err)
	}
}

// TestNoGPU: a host without a card is no failure.
func TestNoGPU(t *testing.T) {
	for _, command := range []string{"ls", "check"} {
		a, _, stderr := cardHost(t)
		a.gpuRoot = t.TempDir()
		if err := a.run("gpu", command); err != nil || !strings.Contains(stderr.String(), noGPU) {
			t.Error(command, err, stderr)
		}
	}
}

// bindJournal is that of a card that gpu bind has taken, at a step.
const bindJournal = `{"version":2,"bootID":"x","bind":"b","owner":{"name":"gpu bind","process":{"pid":1,"start":1},"keep":true},"user":0,"address":"0000:3b:00.0","unit":"0000:3b:00.0","id":"10de:2330","group":"1","driver":"nvidia","override":"","vfio":"vfio-pci","prebound":false,"step":%q,"time":"2026-01-02T03:04:05Z"}`

// TestGPUPassesOverTaken: check names who has a card, and a name means the other.
func TestGPUPassesOverTaken(t *testing.T) {
	const mine, free = "0000:3b:00.0", "0000:3c:00.0"
	a, stdout, stderr := cardHost(t)
	devices, dir := filepath.Join(a.gpuRoot, "sys/bus/pci/devices"), filepath.Join(a.gpuRoot, gpu.JournalDir)
	if err := errors.Join(os.CopyFS(filepath.Join(devices, free), os.DirFS(filepath.Join(devices, mine))), os.Symlink("x/vfio-pci", filepath.Join(devices, mine, "driver")),
		os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, mine+".json"), fmt.Appendf(nil, bindJournal, gpu.StepKept), 0o600)); err != nil {
		t.Fatal(err)
	}
	for wanted, want := range map[string]string{"10de:2330": free, "2330": free, "3b:00.0": mine} {
		stdout.Reset()
		var views []gpuCheckView
		if err := a.run("gpu", "check", wanted, "--json"); !errors.Is(err, vm.ErrHost) || json.Unmarshal(stdout.Bytes(), &views) != nil || len(views) != 1 || views[0].Address != want {
			t.Error(wanted, err, stdout)
			continue
		}
		var got []string
		for _, f := range views[0].Findings {
			if f.Code == gpu.Taken || f.Code == gpu.Prebound {
				got = append(got, f.Detail+"; "+f.Fix)
			}
		}
		if says := "it is taken already, by agentvm gpu bind; agentvm gpu release " + mine; want == mine && !slices.Equal(got, []string{says}) || want == free && got != nil {
			t.Errorf("%s: %q", wanted, got)
		}
	}
	m, inv, err := a.gpus()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := selectGPUs(inv, a.takenGPUs(m), []string{"2330"}); err != nil || !slices.Equal(got, []string{free}) {
		t.Error("bind:", got, err)
	}
	// A journal that cannot be read is told of, and hides none that can.
	if err := os.WriteFile(filepath.Join(dir, free+".json"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if taken := a.takenGPUs(m); len(taken) != 1 || !strings.Contains(stderr.String(), "read the journal") {
		t.Error(taken, stderr)
	}
}

func TestGPUCheckAndBindRefuse(t *testing.T) {
	a, stdout, _ := cardHost(t)
	err := a.run("gpu", "check", "3b:00.0")
	if !errors.Is(err, vm.ErrHost) || !strings.Contains(stdout.String(), "cannot be taken") || !strings.Contains(stdout.String(), "no IOMMU groups") {
		t.Error(err, stdout)
	}
	err = a.run("gpu", "bind", "3b:00.0")
	if !errors.Is(err, vm.ErrHost) || vm.Hint(err) == "" {
		t.Error(err, vm.Hint(err))
	}
	if os.Geteuid() != 0 && !strings.Contains(vm.Hint(err), "agentvm gpu helper-setup") {
		t.Error(vm.Hint(err))
	}
}

// TestGPUAutoSaysWhy: where no card is free check says of each what is in the way,
// as it does without auto, and bind refuses with that.
func TestGPUAutoSaysWhy(t *testing.T) {
	a, stdout, _ := cardHost(t)
	for _, more := range [][]string{nil, {"--json"}} {
		stdout.Reset()
		err := a.run(append([]string{"gpu", "check"}, more...)...)
		all := stdout.String()
		if exitCode(err) != exitHost || !strings.Contains(all, "no IOMMU groups") {
			t.Error(err, all)
		}
		stdout.Reset()
		err = a.run(append([]string{"gpu", "check", "AUTO"}, more...)...)
		if exitCode(err) != exitNotFound || err.Error() != "no card of this host is free" || stdout.String() != all {
			t.Errorf("%v: %v\n%s", more, err, stdout)
		}
	}
	err := a.run("gpu", "bind", "auto")
	if want := "no card of this host is free: 0000:3b:00.0 cannot be taken: the host has no IOMMU groups"; exitCode(err) != exitNotFound || !strings.HasPrefix(err.Error(), want) || !strings.Contains(vm.Hint(err), "iommu=on") {
		t.Error(err, vm.Hint(err))
	}
	a.gpuRoot = t.TempDir()
	stdout.Reset()
	if err := a.run("gpu", "check", "auto"); exitCode(err) != exitNotFound || err.Error() != "this host has no card" || stdout.Len() > 0 {
		t.Error(err, stdout)
	}
}

// TestDoctorTellsOfCardsLeftBehind: whatever home the one who took them had.
func TestDoctorTellsOfCardsLeftBehind(t *testing.T) {
	a, _, _ := cardHost(t)
	if f := gpuJournals(a.gpuHost()); len(f) > 0 {
		t.Error(f)
	}
	dir := filepath.Join(a.gpuRoot, gpu.JournalDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for step, want := range map[gpu.Step]vm.Finding{
		gpu.StepKept:  {Name: "cards", Status: vm.FindingOK, Detail: "1 PCI functions or mediated devices are taken from the host; agentvm gpu release gives them back"},
		gpu.StepBound: {Name: "cards", Status: vm.FindingWarn, Detail: "taken from the host by processes that have ended: 0000:3b:00.0", Fix: "sudo agentvm gpu recover"},
	} {
		if err := os.WriteFile(filepath.Join(dir, "0000:3b:00.0.json"), fmt.Appendf(nil, bindJournal, step), 0o600); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]vm.Finding{want}, gpuJournals(a.gpuHost())); diff != "" {
			t.Error(step, diff)
		}
	}
}

func TestGPUJSONIsDocumented(t *testing.T) {
	said := append(spans(section(t, readDoc(t, "docs/gpu.md"), "## JSON")), spans(section(t, readDoc(t, "docs/commands.md"), "## JSON"))...)
	for _, typ := range []reflect.Type{reflect.TypeFor[gpu.Device](), reflect.TypeFor[gpu.BAR](), reflect.TypeFor[gpu.Holder](), reflect.TypeFor[gpuCheckView](), reflect.TypeFor[gpu.Finding](),
		reflect.TypeFor[gpu.Journal](), reflect.TypeFor[gpu.Grant](), reflect.TypeFor[gpu.Outcome](), reflect.TypeFor[gpu.Mdev](), reflect.TypeFor[mdevView]()} {
		for f := range typ.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "-" || f.Anonymous || name == "bridge" { // which no card is
				continue
			}
			if !slices.Contains(said, name) {
				t.Errorf("no document mentions the field %s of %s", name, typ)
			}
		}
	}
}

func TestGPUFindingsAreDocumented(t *testing.T) {
	said := spans(section(t, readDoc(t, "docs/gpu.md"), "## What is in the way"))
	for _, code := range []string{gpu.NoIOMMU, gpu.NoVFIO, gpu.NoGroup, gpu.Companions, gpu.BootVGA, gpu.Framebuffer, gpu.Held, gpu.OtherOverride, gpu.HoldersHidden, gpu.MemlockLow,
		gpu.NoReset, gpu.Prebound, gpu.VirtualFn, gpu.HasVirtualFns, gpu.HasMediated, gpu.MIG, gpu.Mediated, gpu.VGPU, gpu.VariantDriver, gpu.Taken} {
		if !slices.Contains(said, code) {
			t.Errorf("docs/gpu.md does not mention %s", code)
		}
	}
}
