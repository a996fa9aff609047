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

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Step is what is about to be done to a device: it is written first.
type Step string

const (
	StepOverride Step = "override"       // write driver_override
	StepUnbind   Step = "unbind"         // take it from its driver
	StepProbe    Step = "probe"          // let vfio-pci have it
	StepBound    Step = "bound"          // nothing; it is bound
	StepGrant    Step = "grant"          // give its nodes in /dev to the user
	StepKept     Step = "kept"           // nothing; all of the bind are bound, and stay so
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

// Journal is what a function, or a mediated device, was like before it was taken,
// and how far that went.
type Journal struct {
	Version  int       `json:"version"`
	Boot     string    `json:"bootID"`
	Bind     string    `json:"bind"` // the same in all that were taken at once
	Owner    Owner     `json:"owner"`
	User     int       `json:"user"`    // who may use it: a user id
	Address  string    `json:"address"` // or the UUID of a mediated device
	Unit     string    `json:"unit"`    // the first address of what is taken and given back whole
	ID       string    `json:"id"`      // vendor:device; of a mediated device that of its card, if any
	Group    string    `json:"group"`
	Driver   string    `json:"driver"`   // original, "" for none
	Override string    `json:"override"` // original, "" when unset
	VFIO     string    `json:"vfio"`     // vfio-pci, or the variant that it is given to; of a mediated device its driver
	Prebound bool      `json:"prebound"` // on it already: nothing is done to it
	Grants   []Grant   `json:"grants,omitempty"`
	Step     Step      `json:"step"`
	Time     time.Time `json:"time"` // of the binding
}

// Grant is a node of /dev that was given to a user.
type Grant struct {
	Path string `json:"path"`
	Was  int    `json:"was"` // the owner before: a user id
}

const journalVersion = 2

// parseJournal reads a journal. What it names becomes part of paths that root
// writes to, so it must look like what this package writes.
func parseJournal(data []byte) (*Journal, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var j Journal
	if err := dec.Decode(&j); err != nil {
		return nil, err
	}
	if j.Version != journalVersion {
		return nil, fmt.Errorf("it is of version %d, this program knows %d", j.Version, journalVersion)
	}
	if err := j.named(); err != nil {
		return nil, err
	}
	for _, g := range j.Grants {
		if !nodePattern().MatchString(g.Path) {
			return nil, fmt.Errorf("%q is not a device of VFIO", g.Path)
		}
	}
	switch j.Step {
	case StepOverride, StepUnbind, StepProbe, StepBound, StepGrant, StepKept, StepRelease, StepReset, StepRebind, StepVerify:
		return &j, nil
	}
	return nil, fmt.Errorf("unknown step %q", j.Step)
}

// named sees that what a journal names is what can be taken.
func (j *Journal) named() error {
	switch {
	case j.mediated() && j.Unit != j.Address:
		return fmt.Errorf("%q is not the mediated device %s", j.Unit, j.Address)
	case j.mediated() && !j.Prebound:
		return fmt.Errorf("the mediated device %s has a driver of its own", j.Address)
	case !j.mediated() && !fullAddress(j.Address):
		return fmt.Errorf("%q is not an address", j.Address)
	case !j.mediated() && !fullAddress(j.Unit):
		return fmt.Errorf("%q is not an address", j.Unit)
	case !idPattern().MatchString(j.ID) && !(j.mediated() && j.ID == ""):
		return fmt.Errorf("%q is not an id", j.ID)
	case !plainName(j.Driver), !plainName(j.Override), !plainName(j.Group):
		return fmt.Errorf("driver %q, override %q or group %q is not a name", j.Driver, j.Override, j.Group)
	case !plainName(j.VFIO), !j.mediated() && !isVFIO(j.VFIO):
		return fmt.Errorf("%q is not a driver of VFIO", j.VFIO)
	}
	return nil
}

func fullAddress(s string) bool { return addressPattern().MatchString(s) && strings.Count(s, ":") == 2 }

func plainName(s string) bool { return !strings.ContainsAny(s, "/\x00\n") && s != "." && s != ".." }

// JournalDir is where the journals lie, whatever agentvm's own directories
// are: there is one set of devices. They hold no secret, and everybody may know
// who has which card.
const JournalDir = "/var/lib/agentvm/gpu"

const journalSuffix = ".json"

func (m *Manager) dir() string { return m.Host.at(JournalDir) }

func (m *Manager) journalPath(address string) string {
	return filepath.Join(m.dir(), address+journalSuffix)
}

// makeDir makes the directory of the journals. What they say, root does: it
// must be nobody else's.
func (m *Manager) makeDir() error {
	dir := m.dir()
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is not a directory of user %d", dir, os.Geteuid())
	}
	if err := os.Chmod(dir, 0o755); err != nil { // the umask may be any
		return err
	}
	// The names of what was just made must survive too, or the journals would not.
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
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
	// It would make the file in $TMPDIR, which can be anybody's to replace it in.
	if err := vm.WriteFile(m.journalPath(j.Address), append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the journal of %s: %w", j.Address, err)
	}
	if err := syncDir(m.dir()); err != nil {
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
	err := syncDir(m.dir())
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

// Journal reads the journal of one function, or of the mediated device of a
// UUID; nil when it has none.
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
	entries, err := os.ReadDir(m.dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list journals: %w", err)
	}
	var problems []error
	for _, e := range entries {
		address, ok := strings.CutSuffix(e.Name(), journalSuffix)
		if !ok || !addressPattern().MatchString(address) && !IsUUID(address) {
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
