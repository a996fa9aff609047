package instance

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"
	"github.com/google/uuid"

	"github.com/agentvm/agentvm/vm"
)

// spareDigits of its id name the directory of a spare machine, and tell it from
// whatever else lies there.
const spareDigits = 8

// Spares returns the directories of the pool's machines, in whatever state.
func (s Store) Spares() ([]*Instance, error) {
	entries, err := os.ReadDir(s.Dirs.Pool())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the pool: %w", err)
	}
	var list []*Instance
	for _, e := range entries {
		if _, err := hex.DecodeString(e.Name()); err == nil && len(e.Name()) == spareDigits && e.IsDir() {
			list = append(list, s.Open(filepath.Join(s.Dirs.Pool(), e.Name())))
		}
	}
	return list, nil
}

// CreateSpare makes the directory of a new machine of the pool, and its id.
func (s Store) CreateSpare() (*Instance, string, error) {
	if err := s.Dirs.Make(); err != nil {
		return nil, "", err
	}
	id := uuid.New()
	mode := os.FileMode(0o700)
	if os.Getuid() == 0 { // the user that QEMU runs as passes through
		mode = 0o711
	}
	dir := filepath.Join(s.Dirs.Pool(), hex.EncodeToString(id[:])[:spareDigits])
	for _, d := range []string{s.Dirs.Pool(), dir} {
		if err := os.MkdirAll(d, mode); err != nil {
			return nil, "", vm.Classify(vm.ErrHost, fmt.Errorf("create %s: %w", d, err))
		}
		if err := os.Chmod(d, mode); err != nil { // whatever the umask
			return nil, "", fmt.Errorf("create %s: %w", d, err)
		}
	}
	return s.Open(dir), id.String(), nil
}

// LockPool waits until nobody else adds machines to the pool or ends them.
// wait is called once if somebody does. The caller must release. Claiming a
// machine takes the machine's own lock instead.
func (s Store) LockPool(ctx context.Context, wait func()) (release func(), err error) {
	if err := s.Dirs.Make(); err != nil {
		return nil, err
	}
	release, err = lock(ctx, filepath.Join(s.Dirs.State, "pool.lock"), wait)
	if err != nil {
		return nil, fmt.Errorf("lock the pool: %w", err)
	}
	return release, nil
}

// TryLock is Lock for a caller that has others to choose from.
func (i *Instance) TryLock() (release func(), ok bool) {
	l := flock.New(i.Path(opLock), flock.SetPermissions(0o600))
	if ok, err := l.TryLock(); err != nil || !ok {
		return nil, false
	}
	return func() { _ = l.Unlock() }, true
}
