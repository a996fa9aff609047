package instance

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

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

// A claim is the spec of an instance that a machine of the pool is about to
// become. It counts only once the machine has accepted it.
const claimFile = "claim.json"

// WriteClaim records what the instance is to be.
func (i *Instance) WriteClaim(s Spec) error {
	s.Format = Format
	return i.write(claimFile, s)
}

// Claim reads what the instance is to be.
func (i *Instance) Claim() (Spec, error) {
	var s Spec
	err := i.read(claimFile, &s, func() int { return s.Format })
	return s, err
}

// AcceptClaim makes the instance what it was to be.
func (i *Instance) AcceptClaim() error {
	if err := os.Rename(i.Path(claimFile), i.Path(specFile)); err != nil {
		return fmt.Errorf("accept the claim of %q: %w", i.Name, err)
	}
	return nil
}

// WithdrawClaim forgets a claim, unless it was accepted: it reports whether
// nobody can accept it any more.
func (i *Instance) WithdrawClaim() bool {
	if os.Remove(i.Path(claimFile)) == nil {
		return true
	}
	_, err := i.Spec()
	return errors.Is(err, fs.ErrNotExist) // it was never written
}

// claimedSuffix marks the directory of a spare whose machine is somebody's.
const claimedSuffix = ".claimed"

// BeginClaim takes the spare's directory out of the pool, so that nobody takes
// what is left of it for a machine that waits.
func (i *Instance) BeginClaim() (*Instance, error) {
	moved := i.At(i.Dir + claimedSuffix)
	if err := os.Rename(i.Dir, moved.Dir); err != nil {
		return nil, fmt.Errorf("take %q out of the pool: %w", i.Name, err)
	}
	return moved, nil
}

// EndClaim puts it back.
func (i *Instance) EndClaim() (*Instance, error) {
	back := i.At(strings.TrimSuffix(i.Dir, claimedSuffix))
	if err := os.Rename(i.Dir, back.Dir); err != nil {
		return nil, fmt.Errorf("put %q back into the pool: %w", i.Name, err)
	}
	return back, nil
}

// SweepClaimed removes what killed supervisors have left of spares that they
// were about to give away. Their sockets are the new instance's, where there is one.
func (s Store) SweepClaimed() (err error) {
	left, _ := filepath.Glob(filepath.Join(s.Dirs.Pool(), "*"+claimedSuffix))
	for _, dir := range left {
		i := s.Open(dir)
		release, lockErr := i.LockLive()
		if lockErr != nil {
			continue // it is at it
		}
		spec, specErr := i.Spec()
		if specErr == nil && !s.has(spec.ID) {
			err = errors.Join(err, os.RemoveAll(i.RunDir(spec.ID)))
		}
		err = errors.Join(err, os.RemoveAll(dir))
		release()
	}
	return err
}

// has reports whether an instance has the id.
func (s Store) has(id string) bool {
	list, err := s.List()
	return err != nil || slices.ContainsFunc(list, func(i *Instance) bool {
		spec, err := i.Spec()
		return err == nil && spec.ID == id
	})
}

// At is the instance in dir that is run from the same place.
func (i *Instance) At(dir string) *Instance {
	return &Instance{Name: filepath.Base(dir), Dir: dir, run: i.run}
}
