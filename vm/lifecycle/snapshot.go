package lifecycle

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/tree"
)

// Snapshot is what a machine was at one time.
type Snapshot struct {
	Name      string        `json:"name"`
	Created   time.Time     `json:"created"`
	Memory    bool          `json:"memory"`    // it goes on from there; else it boots from the disk
	Workspace bool          `json:"workspace"` // what that was is part of it
	Bytes     int64         `json:"bytes"`     // that disk and memory take
	Spec      instance.Spec `json:"spec"`

	dir string
}

// snapshotFile is written last, and describes the directory that it lies in.
const snapshotFile = "snapshot.json"

// SnapshotOptions say what a snapshot has of a machine.
type SnapshotOptions struct {
	DiskOnly  bool // not the memory, also of a machine that runs
	Workspace bool // that too
}

// CreateSnapshot saves the machine: with its memory when it runs, its disk
// alone when it is stopped. A machine that did not go on after it was saved is an
// error, and keeps the snapshot, which is all that is left of what was in memory,
// unless who asked has called it off.
func (m *Manager) CreateSnapshot(ctx context.Context, inst *instance.Instance, name string, opt SnapshotOptions, wait func()) (_ Snapshot, err error) {
	switch err := vm.ValidName(name); {
	case err != nil:
		return Snapshot{}, vm.Classify(vm.ErrUsage, fmt.Errorf("name of a snapshot: %w", err))
	case strings.HasPrefix(name, undoSnapshot):
		return Snapshot{}, vm.Classify(vm.ErrUsage, fmt.Errorf("%q would look like what a restore keeps of the time before", name))
	}
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return Snapshot{}, err
	}
	defer release()
	m.tidyKilled(inst)
	if _, err := os.Lstat(snapshotDir(inst, name)); err == nil {
		return Snapshot{}, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q has a snapshot %q", inst.Name, name)), "choose another name, or agentvm snapshot rm "+name)
	}
	var lost error
	s, err := m.makeSnapshot(inst, name, func(s *Snapshot) error {
		err := m.saveTo(ctx, inst, s, opt, wait)
		if err != nil && ctx.Err() == nil && s.Memory && saved.Exists(s.dir) {
			lost, err = vm.WithHint(fmt.Errorf("%q did not go on after it was saved as %s: %w", inst.Name, name, err), "agentvm snapshot restore "+name+" goes on from there"), nil
		}
		return err
	})
	if err == nil {
		err = m.publish(inst, &s)
	}
	switch {
	case err == nil:
		return s, lost
	case lost != nil: // what is left is left
		return s, errors.Join(lost, fmt.Errorf("name the snapshot in %s: %w", s.dir, err))
	}
	return s, errors.Join(err, tree.Remove(s.dir))
}

// makeSnapshot has save fill a snapshot's directory, and describes what is in
// it. The snapshot has no name of its own until it is published.
func (m *Manager) makeSnapshot(inst *instance.Instance, name string, save func(*Snapshot) error) (Snapshot, error) {
	// The directory's name is none that a snapshot can have. An older one was left by a killed command.
	s := Snapshot{Name: name, Created: time.Now().UTC().Truncate(time.Second), dir: snapshotDir(inst, makingDir)}
	if err := errors.Join(tree.Remove(s.dir), os.MkdirAll(filepath.Dir(s.dir), 0o700)); err != nil {
		return s, fmt.Errorf("make snapshot: %w", err)
	}
	if err := save(&s); err != nil {
		return s, err
	}
	var err error
	if s.Bytes, err = sizeOf(s.dir); err != nil {
		return s, err
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return s, err
	}
	if err := vm.WriteFile(filepath.Join(s.dir, snapshotFile), data, 0o600); err != nil {
		return s, fmt.Errorf("make snapshot: %w", err)
	}
	return s, nil
}

// publish gives a snapshot its name.
func (m *Manager) publish(inst *instance.Instance, s *Snapshot) error {
	dir := snapshotDir(inst, s.Name)
	if err := os.Rename(s.dir, dir); err != nil {
		return fmt.Errorf("make snapshot: %w", err)
	}
	s.dir = dir
	return nil
}

// saveTo saves the machine as it is, running or not.
func (m *Manager) saveTo(ctx context.Context, inst *instance.Instance, s *Snapshot, opt SnapshotOptions, wait func()) (err error) {
	status, err := inst.Status()
	if err != nil {
		return err
	}
	if s.Spec, err = inst.Spec(); err != nil {
		return err
	}
	if opt.Workspace {
		release, err := m.copying(ctx, inst, s.Spec, wait)
		if err != nil {
			return err
		}
		defer release()
	}
	switch {
	case status.State.Live():
		if _, _, err := m.saveable(ctx, inst, !opt.DiskOnly); err != nil {
			return err
		}
		s.Memory, s.Workspace = !opt.DiskOnly, opt.Workspace
		req := control.SnapshotRequest{Dir: s.dir, Memory: s.Memory, Workspace: opt.Workspace, Like: m.lastWorkspace(inst)}
		if err := m.client(inst, s.Spec).Snapshot(ctx, req); err != nil && saved.Exists(s.dir) {
			return err // of what came after
		} else if err != nil {
			return m.notSaved(inst, "saved", err)
		}
		return nil
	case inst.Suspended():
		return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q is suspended", inst.Name)), "agentvm resume "+inst.Name+" comes first")
	}
	return m.copyStopped(ctx, inst, s, opt.Workspace)
}

// copyStopped saves the files of a machine that does not run.
func (m *Manager) copyStopped(ctx context.Context, inst *instance.Instance, s *Snapshot, workspace bool) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("make snapshot: %w", err)
	}
	for _, name := range diskFiles(inst) {
		if err := saved.Copy(filepath.Join(s.dir, name), inst.Path(name)); err != nil {
			return err
		}
	}
	if s.Workspace = workspace; !workspace {
		return nil
	}
	return tree.Keep(ctx, s.workspace(), s.Spec.Workspace, m.lastWorkspace(inst))
}

// ownWorkspace makes sure that the workspace is the machine's to copy and to
// put back.
func (m *Manager) ownWorkspace(inst *instance.Instance, spec instance.Spec) error {
	if spec.View {
		return vm.Classify(vm.ErrUsage, fmt.Errorf("%q only looks at %s, which is another machine's", inst.Name, spec.Workspace))
	}
	for _, dir := range []string{m.Store.Dirs.State, m.Store.Dirs.Cache} {
		if within(dir, spec.Workspace) {
			return vm.Classify(vm.ErrUsage, fmt.Errorf("%s holds agentvm's own files (%s), and cannot be copied whole", spec.Workspace, dir))
		}
	}
	return m.aloneWith(inst, spec.Workspace)
}

// copying is ownWorkspace for as long as until release: no machine is started
// meanwhile.
func (m *Manager) copying(ctx context.Context, inst *instance.Instance, spec instance.Spec, wait func()) (release func(), err error) {
	if release, err = m.Store.LockWorkspaces(ctx, true, wait); err != nil {
		return nil, err
	}
	if err := m.ownWorkspace(inst, spec); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// workspace is the copy of the workspace that is part of the snapshot.
func (s Snapshot) workspace() string { return filepath.Join(s.dir, instance.WorkspaceDir) }

// lastWorkspace is the newest copy of the workspace among the snapshots, or "".
func (m *Manager) lastWorkspace(inst *instance.Instance) string {
	list, _ := m.Snapshots(inst) // without one the new copy takes more room
	for _, s := range slices.Backward(list) {
		if s.Workspace {
			return s.workspace()
		}
	}
	return ""
}

// CopyDisk gives another machine the snapshot's disk.
func (s Snapshot) CopyDisk(dst string) error {
	return saved.Copy(dst, filepath.Join(s.dir, OverlayFile))
}

// writtenFiles are the files that a machine writes to. Not each has all.
var writtenFiles = []string{VarsFile, OverlayFile}

// diskFiles are those that the machine has.
func diskFiles(inst *instance.Instance) (names []string) {
	for _, name := range writtenFiles {
		if _, err := os.Stat(inst.Path(name)); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// Snapshots lists the machine's snapshots, the oldest first.
func (m *Manager) Snapshots(inst *instance.Instance) ([]Snapshot, error) {
	entries, err := os.ReadDir(inst.Path(instance.SnapshotsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	list := []Snapshot{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		s, err := m.Snapshot(inst, e.Name())
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b Snapshot) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name, b.Name))
	})
	return list, nil
}

// Snapshot finds one of the machine's snapshots.
func (m *Manager) Snapshot(inst *instance.Instance, name string) (Snapshot, error) {
	s := Snapshot{dir: snapshotDir(inst, name)}
	if err := vm.ValidName(name); err != nil {
		return s, vm.Classify(vm.ErrUsage, fmt.Errorf("name of a snapshot: %w", err))
	}
	data, err := os.ReadFile(filepath.Join(s.dir, snapshotFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%q has no snapshot %q", inst.Name, name)), "agentvm snapshot ls "+inst.Name+" lists them")
	}
	if err != nil {
		return s, fmt.Errorf("read snapshot: %w", err)
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, vm.WithHint(fmt.Errorf("snapshot %q is damaged: %w", name, err), "agentvm snapshot rm "+name+" deletes it")
	}
	s.Name = name // what a restore keeps is renamed
	return s, nil
}

// undoSnapshot has what workspace and disk were before they were put back.
// Earlier ones get this name with more after it, and go once a restore has
// succeeded.
const undoSnapshot = "before-restore"

// RestoreSnapshot makes the machine what it was: what it is now, and what it
// has not written to the workspace, is lost. With the snapshot's memory it goes
// on; otherwise it is left stopped, with the snapshot's disk. With workspace
// that is put back too; what was in it is kept as another snapshot.
func (m *Manager) RestoreSnapshot(ctx context.Context, inst *instance.Instance, name string, workspace bool, report Report, wait func()) (Result, error) {
	// Before anything is ended for it.
	if s, err := m.Snapshot(inst, name); err != nil {
		return Result{}, err
	} else if workspace {
		if err := m.canPutBack(inst, s); err != nil {
			return Result{}, err
		}
	}
	var stopErr error
	release, err := inst.Lock(ctx, func() { // who starts or saves the machine ends with it
		_, stopErr = m.stop(ctx, inst, 0)
		wait()
	})
	if err != nil {
		return Result{}, errors.Join(err, stopErr)
	}
	defer release()
	s, err := m.Snapshot(inst, name)
	if err != nil {
		return Result{}, err
	}
	defer dropFresh(inst)
	files, err := copyBack(inst, s) // before the end of a machine: there may be no room
	if err != nil {
		return Result{}, err
	}
	if _, err := m.stop(ctx, inst, 0); err != nil {
		return Result{}, err
	}
	if workspace {
		if err := m.putBackWorkspace(ctx, inst, &s, report, wait); err != nil {
			return Result{}, err
		}
	}
	res, err := m.restoreTo(ctx, inst, s, files, report)
	if err == nil && workspace {
		err = m.removeOldUndos(inst)
	}
	return res, err
}

// restoreTo makes the machine what it was, but for the workspace. copyBack has
// been there.
func (m *Manager) restoreTo(ctx context.Context, inst *instance.Instance, s Snapshot, files []string, report Report) (Result, error) {
	if err := m.putBack(inst, s.Name, files); err != nil {
		return Result{}, err
	}
	if err := inst.WriteSpec(s.Spec); err != nil {
		return Result{}, err
	}
	if !s.Memory {
		if err := handOver(inst, s.Spec); err != nil {
			return Result{}, err
		}
		status, err := inst.Status()
		return Result{Instance: inst, Spec: s.Spec, Status: status}, err
	}
	res, err := m.goOn(ctx, inst, s.Spec, s.dir, report)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("the machine has the disk of snapshot %q, and could not go on from its memory: %w", s.Name, err)
	}
	return res, err
}

// canPutBack says why the workspace of s cannot be put back.
func (m *Manager) canPutBack(inst *instance.Instance, s Snapshot) error {
	if !s.Workspace {
		return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("snapshot %q does not have the workspace", s.Name)), "agentvm snapshot create --workspace makes one that has")
	}
	return errors.Join(m.ownWorkspace(inst, s.Spec), tree.CanPutBack())
}

// putBackWorkspace makes the workspace what it was when s was made, and keeps
// what it is now, with the machine's disk, for another restore.
func (m *Manager) putBackWorkspace(ctx context.Context, inst *instance.Instance, s *Snapshot, report Report, wait func()) error {
	if err := m.canPutBack(inst, *s); err != nil {
		return err
	}
	release, err := m.copying(ctx, inst, s.Spec, wait)
	if err != nil {
		return err
	}
	defer release()
	if err := os.MkdirAll(s.Spec.Workspace, 0o755); err != nil { // it may be what was lost
		return fmt.Errorf("put the workspace back: %w", err)
	}
	undo, err := m.makeSnapshot(inst, undoSnapshot, func(u *Snapshot) (err error) {
		if u.Spec, err = inst.Spec(); err != nil {
			return err
		}
		return m.copyStopped(ctx, inst, u, true)
	})
	if err != nil {
		return errors.Join(err, tree.Remove(undo.dir))
	}
	// The earlier one may be what is to be put back, or all that is left of a
	// restore that failed.
	if earlier := snapshotDir(inst, undoSnapshot); exists(earlier) {
		moved := snapshotDir(inst, fmt.Sprintf("%s-%d", undoSnapshot, time.Now().UnixMilli()))
		if err := os.Rename(earlier, moved); err != nil {
			return errors.Join(fmt.Errorf("keep the workspace: %w", err), tree.Remove(undo.dir))
		}
		if s.dir == earlier {
			s.dir = moved
		}
	}
	if err := m.publish(inst, &undo); err != nil {
		return errors.Join(err, tree.Remove(undo.dir))
	}
	report.Note("what %s is now is kept as snapshot %s", s.Spec.Workspace, undoSnapshot)
	return tree.PutBack(ctx, s.Spec.Workspace, s.workspace())
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// removeOldUndos deletes what earlier restores have kept.
func (m *Manager) removeOldUndos(inst *instance.Instance) (err error) {
	old, _ := filepath.Glob(snapshotDir(inst, undoSnapshot+"-*"))
	for _, dir := range old {
		err = errors.Join(err, tree.Remove(dir))
	}
	return err
}

// fresh ends the name of a file that is to take the machine's own one's place.
const fresh = ".new"

// dropFresh deletes what was copied and has not become the machine's.
func dropFresh(inst *instance.Instance) {
	for _, name := range writtenFiles {
		_ = os.Remove(inst.Path(name + fresh))
	}
}

// copyBack copies the snapshot's disk beside the machine's, for putBack, which
// takes the names of the files.
func copyBack(inst *instance.Instance, s Snapshot) (names []string, err error) {
	dropFresh(inst) // of a killed command
	for _, name := range writtenFiles {
		src := filepath.Join(s.dir, name)
		if _, err := os.Stat(src); name == VarsFile && errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("read snapshot %q: %w", s.Name, err)
		}
		if err := saved.Copy(inst.Path(name+fresh), src); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// putBack replaces the machine's disk by what copyBack has copied.
func (m *Manager) putBack(inst *instance.Instance, name string, files []string) error {
	// A memory that it was suspended with does not fit another disk.
	if err := m.discardSaved(inst); err != nil {
		return err
	}
	for _, file := range files {
		if err := os.Rename(inst.Path(file+fresh), inst.Path(file)); err != nil {
			return fmt.Errorf("restore snapshot %q: %w", name, err)
		}
	}
	return nil
}

// RemoveSnapshot deletes one of the machine's snapshots.
func (m *Manager) RemoveSnapshot(ctx context.Context, inst *instance.Instance, name string, wait func()) error {
	if err := vm.ValidName(name); err != nil {
		return vm.Classify(vm.ErrUsage, fmt.Errorf("name of a snapshot: %w", err))
	}
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return err
	}
	defer release()
	dir := snapshotDir(inst, name)
	if _, err := os.Lstat(dir); err != nil {
		return vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%q has no snapshot %q", inst.Name, name)), "agentvm snapshot ls "+inst.Name+" lists them")
	}
	if err := tree.Remove(dir); err != nil {
		return fmt.Errorf("remove snapshot %q: %w", name, err)
	}
	return nil
}

func snapshotDir(inst *instance.Instance, name string) string {
	return filepath.Join(inst.Path(instance.SnapshotsDir), name)
}

// sizeOf is the room that the files of a directory take, in bytes.
func sizeOf(dir string) (total int64, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		info, infoErr := e.Info()
		if infoErr != nil {
			return 0, infoErr
		}
		total += info.Size()
	}
	return total, err
}
