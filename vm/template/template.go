// Package template keeps machines that were booted once, saved, and are there
// for others to go on from. Each is made for one environment, which its key
// stands for.
//
// It promises that a template is found only when it is complete and was made
// for exactly that key; that two programs never make the same one at once; that
// one is not removed while somebody holds it; and that all of them together stay
// within a bound, the least recently used going first. A machine that has
// started does not need its template any more.
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

// Template is one that is complete, or that has a fault.
type Template struct {
	ID string
	Manifest
	Dir   string
	Used  time.Time // when a machine last started from it; a damaged one: never
	Fault Fault

	held    *flock.Flock // its use lock
	doubted bool         // since before it was held
}

// Fault is why nothing of this version can start from a template, or empty.
type Fault string

// The faults.
const (
	Damaged Fault = "damaged"
	Foreign Fault = "of another version"
)

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
	return s.list(func(t *Template) bool { return t.Fault == "" })
}

// Faulty returns the others: they are of no use, and take room all the same.
func (s Store) Faulty() ([]*Template, error) {
	return s.list(func(t *Template) bool { return t.Fault != "" })
}

func (s Store) list(want func(*Template) bool) ([]*Template, error) {
	entries, err := os.ReadDir(s.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	var list []*Template
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if t, err := s.open(e.Name()); err == nil && want(t) {
			list = append(list, t)
		}
	}
	slices.SortFunc(list, func(a, b *Template) int {
		return cmp.Or(b.Used.Compare(a.Used), cmp.Compare(a.ID, b.ID))
	})
	return list, nil
}

// open fails where there is no template, or it cannot be read at this moment.
// One that appeared by a rename has its manifest: without it, it is damaged.
func (s Store) open(id string) (*Template, error) {
	if !idText().MatchString(id) {
		return nil, fs.ErrNotExist
	}
	t := &Template{ID: id, Dir: filepath.Join(s.Dir, id)}
	path := filepath.Join(t.Dir, manifestFile)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		t.Fault = Damaged
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if t.Fault = t.Manifest.parse(id, data); t.Fault != Damaged {
		t.Used = info.ModTime()
	}
	return t, nil
}

// parse reads the manifest of the template that is called id.
func (m *Manifest) parse(id string, data []byte) Fault {
	var any struct { // what every version's has
		Format int `json:"format"`
	}
	switch err := json.Unmarshal(data, &any); {
	case err != nil || any.Format <= 0:
		return Damaged
	case any.Format != Format:
		m.Format = any.Format
		return Foreign
	}
	if err := json.Unmarshal(data, m); err != nil || len(m.Key) < keyDigits || m.Key[:keyDigits] != id[:keyDigits] {
		*m = Manifest{}
		return Damaged
	}
	return ""
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
// template for the manifest's key. The caller holds the key's lock, and from the
// first moment the template, which it must Release.
func (s Store) Publish(dir string, m Manifest) (_ *Template, err error) {
	m.Format = Format
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
	held := newUseLock(dir)
	if ok, err := held.TryRLock(); err != nil || !ok {
		return nil, fmt.Errorf("publish template: lock it: %w", cmp.Or(err, error(ErrInUse)))
	}
	defer func() {
		if err != nil {
			_ = held.Unlock()
		}
	}()
	// A template made anew is another one: whoever has begun to start from the
	// old one must not be given a part of the new.
	id := fmt.Sprintf("%s-%s", m.Key[:keyDigits], strconv.FormatInt(time.Now().UnixNano(), 36))
	if err := os.Rename(dir, filepath.Join(s.Dir, id)); err != nil {
		return nil, fmt.Errorf("publish template: %w", err)
	}
	t, err := s.open(id)
	if err != nil {
		return nil, fmt.Errorf("publish template: %w", err)
	}
	t.held = held
	return t, nil
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

// Prune deletes damaged templates, those beyond the store's bound, the least
// recently used first, and what killed programs have left half removed; never
// keep, nor one that somebody holds. Another version's count and go like our own:
// it may be in use beside this one. Prune returns what it deleted.
func (s Store) Prune(keep *Template) (removed []*Template, err error) {
	left, _ := filepath.Glob(filepath.Join(s.Dir, "removed-*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	list, listErr := s.list(func(*Template) bool { return true })
	err = errors.Join(err, listErr)
	var total int64
	for _, t := range list {
		total += t.Disk()
	}
	for _, t := range slices.Backward(list) {
		if keep != nil && t.ID == keep.ID || t.Fault != Damaged && total <= s.Max {
			continue
		}
		size := t.Disk()
		switch rmErr := s.Remove(t); {
		case rmErr == nil:
			total -= size
			removed = append(removed, t)
		case errors.Is(rmErr, fs.ErrNotExist): // another command was quicker
			total -= size
		case !errors.Is(rmErr, ErrInUse):
			err = errors.Join(err, rmErr)
		}
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
