// Package instance keeps what is known of each virtual machine on disk: what
// it is (Spec), how it is (Status), and who works on it (locks).
//
// It promises that a file is either the old one or the new one, never half;
// that a status whose supervisor is gone is corrected by whoever reads it
// next, with what happened as the reason; and that files of a newer version
// are never touched.
package instance

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

	"github.com/gofrs/flock"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/tree"
)

// Store is the set of a user's instances.
type Store struct{ Dirs Dirs }

// Instance is one of them: a directory.
type Instance struct {
	Name string
	Dir  string
	run  string // parent of run directories
}

// Files of an instance directory.
const (
	specFile   = "instance.json"
	statusFile = "status.json"
	liveLock   = "live.lock" // held by the supervisor for as long as it lives
	opLock     = "op.lock"   // held by a command that changes the instance
)

// Path is a file of the instance directory.
func (i *Instance) Path(name string) string { return filepath.Join(i.Dir, name) }

// RunDir is the instance's directory of sockets.
func (i *Instance) RunDir(id string) string {
	return filepath.Join(i.run, strings.ReplaceAll(id, "-", "")[:8])
}

// Get finds an instance by name.
func (s Store) Get(name string) (*Instance, error) {
	if err := vm.ValidName(name); err != nil {
		return nil, vm.Classify(vm.ErrUsage, err)
	}
	i := s.at(name)
	if _, err := os.Stat(i.Dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			hint := "agentvm ls lists them; agentvm up makes one"
			if near := vm.Nearest(name, s.names()); near != "" {
				hint = fmt.Sprintf("did you mean %q?", near)
			}
			return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("no virtual machine is named %q", name)), hint)
		}
		return nil, fmt.Errorf("look up %q: %w", name, err)
	}
	return i, nil
}

// Open is the instance in dir, which may lie outside the store, as a template
// that is being made does.
func (s Store) Open(dir string) *Instance {
	return &Instance{Name: filepath.Base(dir), Dir: dir, run: s.Dirs.Run}
}

// Create makes the directory of a new instance. It fails with fs.ErrExist
// when the name is taken.
func (s Store) Create(name string) (*Instance, error) {
	if err := vm.ValidName(name); err != nil {
		return nil, vm.Classify(vm.ErrUsage, err)
	}
	if err := s.Dirs.Make(); err != nil {
		return nil, err
	}
	i := s.at(name)
	mode := os.FileMode(0o700)
	if os.Getuid() == 0 {
		mode = 0o711
	}
	if err := os.Mkdir(i.Dir, mode); err != nil {
		return nil, fmt.Errorf("create instance %q: %w", name, err)
	}
	// A strict umask must not keep out the user that root's machine runs as.
	if err := os.Chmod(i.Dir, mode); err != nil {
		return nil, fmt.Errorf("create instance %q: %w", name, err)
	}
	return i, nil
}

// List returns every instance, by name.
func (s Store) List() ([]*Instance, error) {
	var list []*Instance
	for _, name := range s.names() {
		list = append(list, s.at(name))
	}
	slices.SortFunc(list, func(a, b *Instance) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

// ForWorkspace finds the instances that work in a host directory.
func (s Store) ForWorkspace(dir string) ([]*Instance, error) {
	all, err := s.List()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(i *Instance) bool {
		spec, err := i.Spec()
		return err != nil || spec.Workspace != dir || spec.View
	}), nil
}

func (s Store) at(name string) *Instance {
	return &Instance{Name: name, Dir: filepath.Join(s.Dirs.State, "instances", name), run: s.Dirs.Run}
}

func (s Store) names() []string {
	entries, _ := os.ReadDir(filepath.Join(s.Dirs.State, "instances"))
	var names []string
	for _, e := range entries {
		if e.IsDir() && vm.ValidName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names
}

// Spec reads what the instance is.
func (i *Instance) Spec() (Spec, error) {
	var s Spec
	err := i.read(specFile, &s, func() int { return s.Format })
	return s, err
}

// WriteSpec records what the instance is.
func (i *Instance) WriteSpec(s Spec) error {
	s.Format = Format
	return i.write(specFile, s)
}

// WriteStatus records how the instance is.
func (i *Instance) WriteStatus(s Status) error {
	s.Format = Format
	return i.write(statusFile, s)
}

// Unprovisioned records that the machine's disk is new, so that the project's
// commands run again. The instance must be stopped.
func (i *Instance) Unprovisioned() error {
	s, err := i.Status()
	if err != nil || !s.Provisioned {
		return err
	}
	s.Provisioned = false
	return i.WriteStatus(s)
}

// Lock waits until no other command changes the instance. wait is called once
// if there is one. The caller must release.
func (i *Instance) Lock(ctx context.Context, wait func()) (release func(), err error) {
	release, err = lock(ctx, i.Path(opLock), wait)
	if err != nil {
		return nil, fmt.Errorf("lock instance %q: %w", i.Name, err)
	}
	return release, nil
}

// LockWorkspaces keeps machines from being started while workspaces are copied
// or put back, by whoever is copying, and workspaces from being copied while
// machines are started. wait is called once if one has to wait for the other.
func (s Store) LockWorkspaces(ctx context.Context, copying bool, wait func()) (release func(), err error) {
	if err := s.Dirs.Make(); err != nil {
		return nil, err
	}
	l := flock.New(filepath.Join(s.Dirs.State, "workspaces.lock"), flock.SetPermissions(0o600))
	try, keepTrying := l.TryRLock, l.TryRLockContext
	if copying {
		try, keepTrying = l.TryLock, l.TryLockContext
	}
	if release, err = lockWith(ctx, l, try, keepTrying, wait); err != nil {
		return nil, fmt.Errorf("lock the workspaces: %w", err)
	}
	return release, nil
}

// lock waits for the lock file at path, and calls wait once if it has to.
func lock(ctx context.Context, path string, wait func()) (release func(), err error) {
	l := flock.New(path, flock.SetPermissions(0o600))
	return lockWith(ctx, l, l.TryLock, l.TryLockContext, wait)
}

func lockWith(ctx context.Context, l *flock.Flock, try func() (bool, error), keepTrying func(context.Context, time.Duration) (bool, error), wait func()) (release func(), err error) {
	ok, err := try()
	if err == nil && !ok {
		wait()
		_, err = keepTrying(ctx, 50*time.Millisecond)
	}
	return func() { _ = l.Unlock() }, err
}

// LockLive marks the instance as run by this process until it ends, however
// it ends. It fails at once when another process has it.
func (i *Instance) LockLive() (release func(), err error) {
	l := flock.New(i.Path(liveLock), flock.SetPermissions(0o600))
	ok, err := l.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock instance %q: %w", i.Name, err)
	}
	if !ok {
		return nil, fmt.Errorf("instance %q already has a supervisor", i.Name)
	}
	return func() { _ = l.Unlock() }, nil
}

// Remove deletes the instance's files. Its supervisor must be gone.
func (i *Instance) Remove() error {
	if spec, err := i.Spec(); err == nil {
		if err := os.RemoveAll(i.RunDir(spec.ID)); err != nil {
			return fmt.Errorf("remove sockets of %q: %w", i.Name, err)
		}
	}
	if err := tree.Remove(i.Dir); err != nil { // a snapshot's copy may have anything in it
		return fmt.Errorf("remove instance %q: %w", i.Name, err)
	}
	return nil
}

func (i *Instance) write(file string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if err := vm.WriteFile(i.Path(file), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write %s of %q: %w", file, i.Name, err)
	}
	return nil
}

func (i *Instance) read(file string, v any, format func() int) error {
	data, err := os.ReadFile(i.Path(file))
	if err != nil {
		return fmt.Errorf("read %s of %q: %w", file, i.Name, err)
	}
	err = json.Unmarshal(data, v)
	if format() > Format {
		return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("instance %q was written by a newer agentvm (format %d, this one knows %d)", i.Name, format(), Format)),
			"use the newer agentvm, or delete the instance: agentvm down "+i.Name+" (the workspace is kept)")
	}
	if err != nil {
		return vm.WithHint(fmt.Errorf("%s is damaged: %w", i.Path(file), err), "delete the instance: agentvm down "+i.Name+" (the workspace is kept)")
	}
	return nil
}

// Suspended reports whether the instance has a memory to go on from.
func (i *Instance) Suspended() bool { return saved.Exists(i.Path(SavedDir)) }
