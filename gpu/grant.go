package gpu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// nodePattern is what VFIO makes in /dev: a group, or on newer kernels a device.
var nodePattern = vm.Pattern(`^/dev/vfio/([0-9]+|devices/vfio[0-9]+)$`)

// grant gives the nodes of what was taken to the user whose virtual machine
// opens them, and to nobody else. The journals say so first. /dev/vfio is
// root's, so that a path in it leads nowhere else.
func (m *Manager) grant(taken []*Journal, uid int) error {
	var seen []string
	for _, j := range taken {
		dir := pciDevices
		if j.mediated() {
			dir = mdevDevices
		}
		for _, path := range m.Host.vfioNodes(j.Group, filepath.Join(dir, j.Address)) {
			was, err := m.owner(path)
			if slices.Contains(seen, path) || errors.Is(err, fs.ErrNotExist) { // a kernel may have either kind alone
				continue
			} else if err != nil {
				return fmt.Errorf("give %s to user %d: %w", path, uid, err)
			}
			seen = append(seen, path)
			j.Grants = append(j.Grants, Grant{Path: path, Was: was})
		}
		if err := m.record(j, StepGrant); err != nil {
			return err
		}
		for _, g := range j.Grants {
			if err := m.chown(g.Path, uid); err != nil {
				return fmt.Errorf("give %s to user %d: %w", g.Path, uid, err)
			}
		}
	}
	return nil
}

// revoke gives the nodes back to whose they were. It closes none that is open.
func (m *Manager) revoke(j *Journal) error {
	for _, g := range j.Grants {
		if err := m.chown(g.Path, g.Was); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("take %s from user %d: %w", g.Path, j.User, err)
		}
	}
	return nil
}

func (m *Manager) owner(path string) (uid int, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(m.Host.at(filepath.FromSlash(path)), &st); err != nil {
		return 0, err
	}
	return int(st.Uid), nil
}

func (m *Manager) chown(path string, uid int) error {
	chown := m.Host.Chown
	if chown == nil {
		chown = func(path string, uid int) error { return os.Lchown(m.Host.at(path), uid, -1) }
	}
	err := chown(path, uid)
	m.point()
	return err
}
