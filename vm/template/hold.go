package template

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"

	"github.com/agentvm/agentvm/vm"
)

// Files of a template's directory that come and go in its life.
const (
	useLock   = "use.lock" // shared by those who start from it, exclusive to who removes it
	doubtFile = "doubted"  // there while the last start from it was cut short
)

// ErrInUse is a template that a machine is starting from.
var ErrInUse = errors.New("a machine is starting from it")

// Hold finds the template for a key, as Find does, and keeps everybody from
// removing it. The caller must Release it.
func (s Store) Hold(key string) (*Template, error) {
	for {
		t, err := s.Find(key)
		if err != nil {
			return nil, err
		}
		held, err := t.hold()
		if err != nil || held {
			return t, err
		}
	}
}

// hold returns false for a template that has gone since it was found. What is
// being removed at this moment does not exist either.
func (t *Template) hold() (bool, error) {
	l := newUseLock(t.Dir)
	ok, err := l.TryRLock()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err == nil && !ok:
		err = fs.ErrNotExist
	}
	if err != nil {
		return false, fmt.Errorf("hold template %s: %w", t.ID, err)
	}
	// The lock may be of a directory that was renamed away after it was opened.
	mine, err := l.Stat()
	now, nowErr := os.Stat(l.Path())
	if err != nil || nowErr != nil || !os.SameFile(mine, now) {
		return false, l.Unlock()
	}
	t.held, t.doubted = l, t.isDoubted()
	return true, nil
}

// Release lets others remove the template. A second one does nothing.
func (t *Template) Release() {
	if t == nil || t.held == nil {
		return
	}
	_ = t.held.Unlock() // closing the file, as our end does, unlocks it too
	t.held = nil
}

// newUseLock is the lock in a template's directory; one that was made by an
// older agentvm gets the file when it is first wanted. It goes along when the
// directory is renamed.
func newUseLock(dir string) *flock.Flock {
	return flock.New(filepath.Join(dir, useLock), flock.SetPermissions(0o600))
}

// Remove deletes a template, unless somebody else holds it: the error wraps
// ErrInUse then. Machines that have started from it do not mind.
func (s Store) Remove(t *Template) error {
	t.Release()
	l := newUseLock(t.Dir)
	ok, err := l.TryLock()
	if err != nil {
		return fmt.Errorf("remove template %s: %w", t.ID, err)
	}
	if !ok {
		return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("template %s is in use: %w", t.ID, ErrInUse)), "try again when that machine is ready")
	}
	defer l.Unlock()
	// What is not called a template any more is never found half deleted.
	gone := filepath.Join(s.Dir, "removed-"+t.ID)
	if err := os.Rename(t.Dir, gone); err != nil {
		return fmt.Errorf("remove template %s: %w", t.ID, err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove template %s: %w", t.ID, err)
	}
	return nil
}

// Doubt records that a start from the template was cut short, which may be its
// fault or the host's. It reports whether the last one before it was too. The
// caller has held it since before the start: of those that a busy host cuts
// short at the same time none is a second one.
func (t *Template) Doubt() (again bool, err error) {
	again = t.doubted && t.isDoubted()
	if err := os.WriteFile(filepath.Join(t.Dir, doubtFile), nil, 0o600); err != nil {
		return again, fmt.Errorf("doubt template %s: %w", t.ID, err)
	}
	return again, nil
}

// Trust records that a machine has started from the template.
func (t *Template) Trust() error {
	if err := os.Remove(filepath.Join(t.Dir, doubtFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("trust template %s: %w", t.ID, err)
	}
	return nil
}

func (t *Template) isDoubted() bool {
	_, err := os.Lstat(filepath.Join(t.Dir, doubtFile))
	return err == nil
}
