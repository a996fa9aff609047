package instance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

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
