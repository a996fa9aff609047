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

	"github.com/google/renameio/v2"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/saved"
)

// Snapshot is what a machine was at one time. Its workspace is no part of it.
type Snapshot struct {
	Name    string        `json:"name"`
	Created time.Time     `json:"created"`
	Memory  bool          `json:"memory"` // it goes on from there; else it boots from the disk
	Bytes   int64         `json:"bytes"`  // that it takes
	Spec    instance.Spec `json:"spec"`

	dir string
}

// snapshotFile is written last, and describes the directory that it lies in.
const snapshotFile = "snapshot.json"

// CreateSnapshot saves the machine: with its memory when it runs, its disk
// alone when it is stopped.
func (m *Manager) CreateSnapshot(ctx context.Context, inst *instance.Instance, name string, wait func()) (_ Snapshot, err error) {
	if err := vm.ValidName(name); err != nil {
		return Snapshot{}, vm.Classify(vm.ErrUsage, fmt.Errorf("name of a snapshot: %w", err))
	}
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return Snapshot{}, err
	}
	defer release()
	dir := snapshotDir(inst, name)
	if _, err := os.Lstat(dir); err == nil {
		return Snapshot{}, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q has a snapshot %q", inst.Name, name)), "choose another name, or agentvm snapshot rm "+name)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return Snapshot{}, fmt.Errorf("make snapshot: %w", err)
	}
	// Its name is none that a snapshot can have. An older one was left by a killed command.
	making := filepath.Join(filepath.Dir(dir), ".making")
	if err := os.RemoveAll(making); err != nil {
		return Snapshot{}, fmt.Errorf("make snapshot: %w", err)
	}
	defer os.RemoveAll(making)
	s := Snapshot{Name: name, Created: time.Now().UTC().Truncate(time.Second), dir: dir}
	if s.Spec, s.Memory, err = m.saveTo(ctx, inst, making); err != nil {
		return s, err
	}
	if s.Bytes, err = sizeOf(making); err != nil {
		return s, err
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return s, err
	}
	if err := renameio.WriteFile(filepath.Join(making, snapshotFile), data, 0o600); err != nil {
		return s, fmt.Errorf("make snapshot: %w", err)
	}
	if err := os.Rename(making, dir); err != nil {
		return s, fmt.Errorf("make snapshot: %w", err)
	}
	return s, nil
}

// saveTo saves the machine as it is, running or not, in dir.
func (m *Manager) saveTo(ctx context.Context, inst *instance.Instance, dir string) (instance.Spec, bool, error) {
	status, err := inst.Status()
	if err != nil {
		return instance.Spec{}, false, err
	}
	if status.State.Live() {
		spec, _, err := m.saveable(inst)
		if err != nil {
			return spec, false, err
		}
		if err := m.client(inst, spec).Snapshot(ctx, dir); err != nil {
			return spec, false, m.notSaved(inst, "saved", err)
		}
		return spec, true, nil
	}
	spec, err := inst.Spec()
	if err != nil {
		return spec, false, err
	}
	if inst.Suspended() {
		return spec, false, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q is suspended", inst.Name)), "agentvm resume "+inst.Name+" comes first")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return spec, false, fmt.Errorf("make snapshot: %w", err)
	}
	for _, name := range diskFiles(inst) {
		if err := saved.Copy(filepath.Join(dir, name), inst.Path(name)); err != nil {
			return spec, false, err
		}
	}
	return spec, false, nil
}

// CopyDisk gives another machine the snapshot's disk.
func (s Snapshot) CopyDisk(dst string) error {
	return saved.Copy(dst, filepath.Join(s.dir, OverlayFile))
}

// diskFiles are the files that the machine writes to, of those that it has.
func diskFiles(inst *instance.Instance) (names []string) {
	for _, name := range []string{OverlayFile, VarsFile} {
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
	return s, nil
}

// RestoreSnapshot makes the machine what it was: what it is now, and what it
// has not written to the workspace, is lost. With the snapshot's memory it goes
// on; otherwise it is left stopped, with the snapshot's disk.
func (m *Manager) RestoreSnapshot(ctx context.Context, inst *instance.Instance, name string, report Report, wait func()) (Result, error) {
	if _, err := m.Snapshot(inst, name); err != nil {
		return Result{}, err // before anything is ended for it
	}
	if _, err := m.stop(ctx, inst, 0); err != nil {
		return Result{}, err
	}
	release, err := inst.Lock(ctx, wait)
	if err != nil {
		return Result{}, err
	}
	defer release()
	s, err := m.Snapshot(inst, name)
	if err != nil {
		return Result{}, err
	}
	if _, err := m.stop(ctx, inst, 0); err != nil { // started meanwhile
		return Result{}, err
	}
	if err := m.putBack(inst, s); err != nil {
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
		err = fmt.Errorf("the machine has the disk of snapshot %q, and could not go on from its memory: %w", name, err)
	}
	return res, err
}

// putBack replaces the machine's disk by the snapshot's. Until all of that is
// there, the machine stays what it is.
func (m *Manager) putBack(inst *instance.Instance, s Snapshot) error {
	var names []string
	for _, name := range []string{VarsFile, OverlayFile} {
		src := filepath.Join(s.dir, name)
		if _, err := os.Stat(src); name == VarsFile && errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return fmt.Errorf("read snapshot %q: %w", s.Name, err)
		}
		fresh := inst.Path(name + ".new")
		_ = os.Remove(fresh) // of a killed command
		if err := saved.Copy(fresh, src); err != nil {
			return err
		}
		names = append(names, name)
	}
	// A memory that it was suspended with does not fit another disk.
	if err := m.discardSaved(inst); err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Rename(inst.Path(name+".new"), inst.Path(name)); err != nil {
			return fmt.Errorf("restore snapshot %q: %w", s.Name, err)
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
	if err := os.RemoveAll(dir); err != nil {
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
		info, infoErr := e.Info()
		if infoErr != nil {
			return 0, infoErr
		}
		total += info.Size()
	}
	return total, err
}
