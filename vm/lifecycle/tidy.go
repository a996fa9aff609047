package lifecycle

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/tree"
)

// copiesFile lists, in the machine's directory, the copies of its workspace that
// have no name yet. They lie in a directory of the user's, where only what is
// in this list may be deleted.
const copiesFile = "copies.json"

// copyPrefix begins the names of such copies. The rest is random, so that nobody
// else can have anything there.
const copyPrefix = ".agentvm-fork-"

// makingDir is where a snapshot is made, under a name that none can have.
const makingDir = ".making"

// announceCopies gives each target a place to be copied to, hidden beside where
// it is to be, and notes these places before anything is there.
func announceCopies(inst *instance.Instance, targets []forkTarget) error {
	list, err := copies(inst) // what could not be deleted
	if err != nil {
		return err
	}
	for i, t := range targets {
		id := uuid.New()
		targets[i].copy = filepath.Join(filepath.Dir(t.dir), copyPrefix+hex.EncodeToString(id[:]))
		list = append(list, targets[i].copy)
	}
	return writeCopies(inst, list)
}

// dropCopies deletes the copies that have no name, and what notes them.
func dropCopies(inst *instance.Instance) error {
	list, err := copies(inst)
	if err != nil {
		return err
	}
	var left []string
	for _, dir := range list {
		if strings.HasPrefix(filepath.Base(dir), copyPrefix) {
			if rmErr := removeDir(dir); rmErr != nil {
				left, err = append(left, dir), errors.Join(err, rmErr)
			}
		}
	}
	if len(left) == 0 {
		if rmErr := os.Remove(inst.Path(copiesFile)); !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
		return err
	}
	return errors.Join(err, writeCopies(inst, left))
}

func copies(inst *instance.Instance) (list []string, err error) {
	data, err := os.ReadFile(inst.Path(copiesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &list)
	}
	if err != nil {
		return nil, fmt.Errorf("read what was copied for %q: %w", inst.Name, err)
	}
	return list, nil
}

func writeCopies(inst *instance.Instance, list []string) error {
	data, err := json.Marshal(list)
	if err != nil {
		return err
	}
	if err := vm.WriteFile(inst.Path(copiesFile), data, 0o600); err != nil {
		return fmt.Errorf("note what is copied for %q: %w", inst.Name, err)
	}
	return nil
}

// removeDir deletes a directory; anything else that is there is not ours.
func removeDir(dir string) error {
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	return tree.Remove(dir)
}

// tidyKilled deletes what killed commands have left half made for a machine
// whose lock the caller holds. What cannot be deleted now keeps no machine from
// being used; a later command tries again.
func (m *Manager) tidyKilled(inst *instance.Instance) {
	// A supervisor goes on with a snapshot for a moment when its command is killed.
	if status, err := inst.Status(); err != nil || status.State.Live() && !status.State.Usable() {
		return
	}
	_ = dropCopies(inst)
	dropFresh(inst)
	if dir := snapshotDir(inst, forkDir); !m.goingOnFrom(dir) {
		_ = removeDir(dir)
	}
	// One that is described is whole.
	if dir := snapshotDir(inst, makingDir); !exists(filepath.Join(dir, snapshotFile)) {
		_ = removeDir(dir)
	}
}

// goingOnFrom reports whether a machine is just being started from the memory in
// dir, or may be: who asked for it can have been killed.
func (m *Manager) goingOnFrom(dir string) bool {
	list, err := m.Store.List()
	if err != nil {
		return true
	}
	for _, inst := range list {
		spec, err := inst.Spec()
		if err != nil || spec.Machine.Saved != dir {
			continue
		}
		if status, err := inst.Status(); err != nil || status.State.Live() && !status.State.Usable() {
			return true
		}
	}
	return false
}
