// Package template keeps machines that were booted once, saved, and are there
// for others to go on from. Each is made for one environment, which its key
// stands for.
//
// It promises that a template is found only when it is complete and was made
// for exactly that key; that two programs never make the same one at once; and
// that all of them together stay within a bound, the least recently used going
// first. A machine that has started does not need its template any more.
package template

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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/saved"
)

// Format is the version of a template's files. It is part of every key.
const Format = 2

// Files of a template's directory, beside those of package saved.
const (
	manifestFile = "template.json"
	DiskFile     = "root.qcow2" // the guest's disk, over the image's
)

// Manifest says what a template is.
type Manifest struct {
	Format  int       `json:"format"`
	Key     string    `json:"key"`
	Created time.Time `json:"created"`
	Image   string    `json:"image"` // id
	Name    string    `json:"name"`  // the image's, for people
	CPUs    int       `json:"cpus"`
	Memory  int64     `json:"memory"` // bytes of guest memory
	DiskCRC uint32    `json:"diskCrc32c"`
}

// Template is one that is complete.
type Template struct {
	ID string
	Manifest
	Dir  string
	Used time.Time // when a machine last started from it
}

// Store is a directory of templates.
type Store struct {
	Dir string
	Max int64 // bytes that all templates may take
}

// idText is a key's first digits and a number that tells one making from the next.
var idText = vm.Pattern(`^[0-9a-f]{12}-[0-9a-z]{1,13}$`)

const (
	keyDigits      = 12
	workshopPrefix = "template-"
)

// Find returns the template for a key, or fs.ErrNotExist.
func (s Store) Find(key string) (*Template, error) {
	list, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, t := range list {
		if t.Key == key {
			return t, nil
		}
	}
	return nil, fmt.Errorf("template %.*s: %w", keyDigits, key, fs.ErrNotExist)
}

// List returns the complete templates, the last used first.
func (s Store) List() ([]*Template, error) {
	entries, err := os.ReadDir(s.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var list []*Template
	for _, e := range entries {
		if t, err := s.open(e.Name()); err == nil {
			list = append(list, t)
		}
	}
	slices.SortFunc(list, func(a, b *Template) int {
		return cmp.Or(b.Used.Compare(a.Used), cmp.Compare(a.ID, b.ID))
	})
	return list, nil
}

func (s Store) open(id string) (*Template, error) {
	if !idText().MatchString(id) {
		return nil, fs.ErrNotExist
	}
	t := &Template{ID: id, Dir: filepath.Join(s.Dir, id)}
	path := filepath.Join(t.Dir, manifestFile)
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &t.Manifest); err != nil {
		return nil, err
	}
	if t.Format != Format || len(t.Key) < keyDigits || t.Key[:keyDigits] != id[:keyDigits] {
		return nil, fs.ErrNotExist
	}
	t.Used = info.ModTime()
	return t, nil
}

// Touch records that a machine starts from the template.
func (t *Template) Touch() error {
	now := time.Now()
	return os.Chtimes(filepath.Join(t.Dir, manifestFile), now, now)
}

// Disk is the room that the template takes, in bytes.
func (t *Template) Disk() (n int64) {
	entries, _ := os.ReadDir(t.Dir)
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				n += st.Blocks * 512
			}
		}
	}
	return n
}

// Get finds a template by its id or the beginning of one.
func (s Store) Get(id string) (*Template, error) {
	list, err := s.List()
	if err != nil {
		return nil, err
	}
	var found []*Template
	for _, t := range list {
		if id != "" && strings.HasPrefix(t.ID, id) {
			found = append(found, t)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("no template is called %q", id)), "agentvm template ls lists them")
	}
	return nil, vm.Classify(vm.ErrUsage, fmt.Errorf("%q could be any of %d templates", id, len(found)))
}

// Lock waits until nobody else makes the template for key. wait is called
// once if somebody does. The caller must release.
func (s Store) Lock(ctx context.Context, key string, wait func()) (release func(), err error) {
	path := s.lockFile(key)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("lock template: %w", err)
	}
	l := flock.New(path, flock.SetPermissions(0o600))
	ok, err := l.TryLock()
	if err == nil && !ok {
		wait()
		_, err = l.TryLockContext(ctx, 50*time.Millisecond)
	}
	if err != nil {
		return nil, fmt.Errorf("lock template: %w", err)
	}
	return func() { _ = l.Unlock() }, nil
}

// Workshop is the directory in which the template for key is made. Whoever
// holds the key's lock may use it. The name is short: sockets are named after it.
func (s Store) Workshop(key string) string {
	return filepath.Join(s.Dir, "making", workshopPrefix+key[:keyDigits])
}

// Abandoned calls each with every workshop that nobody works in, while nobody
// can begin to.
func (s Store) Abandoned(each func(dir string) error) (err error) {
	dirs, _ := filepath.Glob(s.Workshop(strings.Repeat("?", keyDigits)))
	for _, dir := range dirs {
		key := strings.TrimPrefix(filepath.Base(dir), workshopPrefix)
		l := flock.New(s.lockFile(key), flock.SetPermissions(0o600))
		ok, lockErr := l.TryLock()
		err = errors.Join(err, lockErr)
		if ok {
			err = errors.Join(err, each(dir), l.Unlock())
		}
	}
	return err
}

func (s Store) lockFile(key string) string {
	return filepath.Join(s.Dir, "locks", key[:keyDigits]+".lock")
}

// Publish makes the content of dir, on the store's own file system, the
// template for the manifest's key. The caller holds the key's lock.
func (s Store) Publish(dir string, m Manifest) (*Template, error) {
	m.Format = Format
	var err error
	if m.DiskCRC, err = saved.Checksum(filepath.Join(dir, DiskFile)); err != nil {
		return nil, fmt.Errorf("publish template: %w", err)
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := vm.WriteFile(filepath.Join(dir, manifestFile), append(data, '\n'), 0o600); err != nil {
		return nil, fmt.Errorf("publish template: %w", err)
	}
	// A template made anew is another one: whoever has begun to start from the
	// old one must not be given a part of the new.
	id := fmt.Sprintf("%s-%s", m.Key[:keyDigits], strconv.FormatInt(time.Now().UnixNano(), 36))
	if err := os.Rename(dir, filepath.Join(s.Dir, id)); err != nil {
		return nil, fmt.Errorf("publish template: %w", err)
	}
	return s.open(id)
}

// CopyDisk gives a machine that goes on from the template a disk of its own. An
// error that wraps ErrDisk is the template's fault.
func (t *Template) CopyDisk(dst string) error {
	src := filepath.Join(t.Dir, DiskFile)
	switch crc, err := saved.Checksum(src); {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrDisk, err)
	case crc != t.DiskCRC:
		return fmt.Errorf("%w: %s has changed", ErrDisk, DiskFile)
	}
	return saved.Copy(dst, src)
}

// ErrDisk is a template without the disk that its memory remembers.
var ErrDisk = errors.New("the template's disk cannot be used")

// Remove deletes a template. Machines that have started from it do not mind.
func (s Store) Remove(t *Template) error {
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

// Prune deletes templates beyond the store's bound, the least recently used
// first and keep never, and what killed programs have left half removed. It
// returns what it deleted.
func (s Store) Prune(keep *Template) (removed []*Template, err error) {
	left, _ := filepath.Glob(filepath.Join(s.Dir, "removed-*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	list, listErr := s.List()
	err = errors.Join(err, listErr)
	var total int64
	for _, t := range list {
		total += t.Disk()
	}
	for _, t := range slices.Backward(list) {
		if total <= s.Max {
			break
		}
		if keep != nil && t.ID == keep.ID {
			continue
		}
		total -= t.Disk()
		if rmErr := s.Remove(t); rmErr != nil {
			err = errors.Join(err, rmErr)
			continue
		}
		removed = append(removed, t)
	}
	return removed, err
}

// Make creates the store's directory. As root it can be passed through by the
// unprivileged users that templates are made as.
func (s Store) Make() error {
	mode := os.FileMode(0o700)
	if os.Getuid() == 0 {
		mode = 0o711
	}
	for _, dir := range []string{s.Dir, filepath.Join(s.Dir, "making")} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return vm.Classify(vm.ErrHost, fmt.Errorf("create %s: %w", dir, err))
		}
		if err := os.Chmod(dir, mode); err != nil {
			return fmt.Errorf("create %s: %w", dir, err)
		}
	}
	return nil
}
