package gpu

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/agentvm/agentvm/vm"
)

// Step is what is about to be done to a device: it is written first.
type Step string

const (
	StepOverride Step = "override"       // write driver_override
	StepUnbind   Step = "unbind"         // take it from its driver
	StepProbe    Step = "probe"          // let vfio-pci have it
	StepBound    Step = "bound"          // nothing; it is bound
	StepRelease  Step = "release"        // take it from vfio-pci
	StepReset    Step = "reset-override" // write back driver_override
	StepRebind   Step = "rebind"         // give it to its own driver
	StepVerify   Step = "verify"         // see that it is as it was
)

// Owner is who has a device.
type Owner struct {
	Name    string    `json:"name"`    // for people
	Process vm.ProcID `json:"process"` // who takes, holds or returns it
	Keep    bool      `json:"keep"`    // once bound it stays so after the process has ended
}

// Journal is what a function was like before it was taken, and how far that went.
type Journal struct {
	Version  int       `json:"version"`
	Boot     string    `json:"bootID"`
	Owner    Owner     `json:"owner"`
	Address  string    `json:"address"`
	ID       string    `json:"id"` // vendor:device
	Group    string    `json:"group"`
	Driver   string    `json:"driver"`   // original, "" for none
	Override string    `json:"override"` // original, "" when unset
	Prebound bool      `json:"prebound"` // on vfio-pci already: nothing is done to it
	Step     Step      `json:"step"`
	Time     time.Time `json:"time"` // of the binding
}

const journalVersion = 1

// parseJournal reads a journal. What it names becomes part of paths that root
// writes to, so it must look like what this package writes.
func parseJournal(data []byte) (*Journal, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var j Journal
	if err := dec.Decode(&j); err != nil {
		return nil, err
	}
	switch {
	case j.Version != journalVersion:
		return nil, fmt.Errorf("it is of version %d, this program knows %d", j.Version, journalVersion)
	case !addressPattern.MatchString(j.Address) || strings.Count(j.Address, ":") != 2:
		return nil, fmt.Errorf("%q is not an address", j.Address)
	case !idPattern.MatchString(j.ID):
		return nil, fmt.Errorf("%q is not an id", j.ID)
	case !plainName(j.Driver), !plainName(j.Override), !plainName(j.Group):
		return nil, fmt.Errorf("driver %q, override %q or group %q is not a name", j.Driver, j.Override, j.Group)
	}
	switch j.Step {
	case StepOverride, StepUnbind, StepProbe, StepBound, StepRelease, StepReset, StepRebind, StepVerify:
		return &j, nil
	}
	return nil, fmt.Errorf("unknown step %q", j.Step)
}

func plainName(s string) bool { return !strings.ContainsAny(s, "/\x00\n") && s != "." && s != ".." }

const journalSuffix = ".json"

func (m *Manager) journalPath(address string) string {
	return filepath.Join(m.Dir, address+journalSuffix)
}

// record writes j with the step that is about to be done, and returns when it
// is on the disk.
func (m *Manager) record(j *Journal, step Step) error {
	j.Step = step
	data, err := json.Marshal(j)
	if err != nil {
		return fmt.Errorf("write the journal of %s: %w", j.Address, err)
	}
	// renameio syncs the file before it renames it; the name is ours to sync.
	if err := renameio.WriteFile(m.journalPath(j.Address), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the journal of %s: %w", j.Address, err)
	}
	if err := syncDir(m.Dir); err != nil {
		return fmt.Errorf("write the journal of %s: %w", j.Address, err)
	}
	m.point()
	return nil
}

// forget deletes a journal: there is nothing to give back any more.
func (m *Manager) forget(address string) error {
	if err := os.Remove(m.journalPath(address)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete the journal of %s: %w", address, err)
	}
	err := syncDir(m.Dir)
	m.point()
	return err
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Journal reads the journal of one function; nil when it has none.
func (m *Manager) Journal(address string) (*Journal, error) {
	data, err := os.ReadFile(m.journalPath(address))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read the journal of %s: %w", address, err)
	}
	j, err := parseJournal(data)
	if err == nil && j.Address != address {
		err = fmt.Errorf("it is that of %s", j.Address)
	}
	if err != nil {
		return nil, vm.WithHint(fmt.Errorf("read the journal %s: %w", m.journalPath(address), err), "look at the file; without it agentvm does not know how to give the device back")
	}
	return j, nil
}

// Journals reads all journals, by address. Unreadable ones are in the error.
func (m *Manager) Journals() (list []*Journal, err error) {
	entries, err := os.ReadDir(m.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list journals: %w", err)
	}
	var problems []error
	for _, e := range entries {
		address, ok := strings.CutSuffix(e.Name(), journalSuffix)
		if !ok || !addressPattern.MatchString(address) {
			continue
		}
		j, err := m.Journal(address)
		if err != nil {
			problems = append(problems, err)
		} else if j != nil {
			list = append(list, j)
		}
	}
	return list, errors.Join(problems...)
}
