package lifecycle

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// stopped makes an instance with a disk and a workspace.
func stopped(t *testing.T, m *Manager) (inst *instance.Instance, ws string) {
	t.Helper()
	ws = filepath.Join(t.TempDir(), "w")
	inst, err := m.Store.Create("one")
	if err != nil {
		t.Fatal(err)
	}
	spec := instance.Spec{Name: "one", ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: ws}
	if err := errors.Join(inst.WriteSpec(spec), os.Mkdir(ws, 0o755)); err != nil {
		t.Fatal(err)
	}
	return inst, ws
}

// TestWorkspaceSnapshot: disk and workspace are put back together, and that can
// be undone, and done again.
func TestWorkspaceSnapshot(t *testing.T) {
	testenv.Require(t, "rsync")
	m := testManager(t)
	inst, ws := stopped(t, m)
	var r notes
	write := func(disk, file string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(inst.Path(OverlayFile), []byte(disk), 0o600), os.WriteFile(filepath.Join(ws, "file"), []byte(file), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	restore := func(name, disk, file string) {
		t.Helper()
		if _, err := m.RestoreSnapshot(t.Context(), inst, name, true, &r, func() {}); err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]string{inst.Path(OverlayFile): disk, filepath.Join(ws, "file"): file} {
			if got, err := os.ReadFile(path); string(got) != want {
				t.Errorf("after %s %s is %q, want %q: %v", name, path, got, want, err)
			}
		}
		if left, _ := filepath.Glob(inst.Path("snapshots/.*")); len(left) != 0 {
			t.Errorf("left: %q", left)
		}
	}
	write("disk 1", "file 1")
	if s, err := m.CreateSnapshot(t.Context(), inst, "first", SnapshotOptions{Workspace: true}, func() {}); err != nil || !s.Workspace || s.Memory || s.Bytes != 6 {
		t.Fatalf("%+v, %v", s, err)
	}
	if _, err := m.CreateSnapshot(t.Context(), inst, "plain", SnapshotOptions{}, func() {}); err != nil {
		t.Fatal(err)
	}
	write("disk 2", "file 2")
	restore("first", "disk 1", "file 1")
	restore(undoSnapshot, "disk 2", "file 2")
	restore(undoSnapshot, "disk 1", "file 1")
	if _, err := m.RestoreSnapshot(t.Context(), inst, "plain", true, &r, func() {}); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("a workspace that is not there: %v", err)
	}
	if _, err := m.CreateSnapshot(t.Context(), inst, undoSnapshot, SnapshotOptions{}, func() {}); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("under a name that is taken: %v", err)
	}
}

// TestWorkspaceNotPutBack: a restore that ends halfway loses nothing, not even
// what an earlier one had kept and this one was to put back.
func TestWorkspaceNotPutBack(t *testing.T) {
	testenv.Require(t, "rsync")
	m := testManager(t)
	inst, ws := stopped(t, m)
	file := filepath.Join(ws, "file")
	write := func(text string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(inst.Path(OverlayFile), []byte(text), 0o600), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	if _, err := m.CreateSnapshot(t.Context(), inst, "one", SnapshotOptions{Workspace: true}, func() {}); err != nil {
		t.Fatal(err)
	}
	write("precious")
	if _, err := m.RestoreSnapshot(t.Context(), inst, "one", true, &notes{}, func() {}); err != nil {
		t.Fatal(err)
	}
	// Interrupted when all is prepared for putting back.
	ctx, cancel := context.WithCancel(t.Context())
	r := interrupting{&notes{}, cancel}
	if _, err := m.RestoreSnapshot(ctx, inst, undoSnapshot, true, r, func() {}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	if exists(inst.Path(OverlayFile + ".new")) {
		t.Error("the copy of a disk is left")
	}
	list, err := m.Snapshots(inst)
	if err != nil {
		t.Fatal(err)
	}
	var kept string
	for _, s := range list {
		if text, _ := os.ReadFile(filepath.Join(s.workspace(), "file")); string(text) == "precious" {
			kept = s.Name
		}
	}
	if _, err := m.RestoreSnapshot(t.Context(), inst, kept, true, &notes{}, func() {}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); string(got) != "precious" {
		t.Errorf("put back: %q, %v", got, err)
	}
	if list, err := m.Snapshots(inst); err != nil || len(list) != 2 {
		t.Errorf("kept: %+v, %v", list, err)
	}
}

// interrupting is a Report that calls off what it hears of.
type interrupting struct {
	*notes
	cancel func()
}

func (r interrupting) Note(string, ...any) { r.cancel() }

// TestWorkspaceHeld: a machine that is started waits for a copy, and the other
// way round.
func TestWorkspaceHeld(t *testing.T) {
	m := testManager(t)
	release, err := m.Store.LockWorkspaces(t.Context(), true, func() {})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	waited := false
	if _, err := m.Store.LockWorkspaces(ctx, false, func() { waited = true; cancel() }); err == nil || !waited {
		t.Errorf("a machine is started while a workspace is copied: %v", err)
	}
	release()
	for range 2 { // machines do not wait for one another
		if release, err = m.Store.LockWorkspaces(t.Context(), false, func() { t.Error("it waits") }); err != nil {
			t.Fatal(err)
		}
		defer release()
	}
	ctx, cancel = context.WithCancel(t.Context())
	if _, err := m.Store.LockWorkspaces(ctx, true, cancel); err == nil {
		t.Error("a workspace is copied while a machine is started")
	}
}

// TestWorkspaceOfOthers: what another machine works in is not copied, and a
// fork that only looks does not put anything back.
func TestWorkspaceOfOthers(t *testing.T) {
	m := testManager(t)
	inst, ws := stopped(t, m)
	opt := SnapshotOptions{Workspace: true}
	running(t, m, "two", instance.Share{Source: ws})
	if _, err := m.CreateSnapshot(t.Context(), inst, "first", opt, func() {}); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("another machine works in it: %v", err)
	}
	spec, err := inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	spec.View = true
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
	if _, err := m.CreateSnapshot(t.Context(), inst, "first", opt, func() {}); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("of a view: %v", err)
	}
	if list, err := m.Store.ForWorkspace(ws); err != nil || len(list) != 1 || list[0].Name != "two" {
		t.Errorf("the directory means %v, %v", list, err)
	}
	if list, err := m.Snapshots(inst); err != nil || len(list) != 0 {
		t.Errorf("made: %v, %v", list, err)
	}
}
