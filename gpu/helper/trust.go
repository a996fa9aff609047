package helper

import (
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// trusted refuses a path that somebody else than owner could have put there:
// each directory from root on and the file itself must be theirs, and not for
// others to write. A link would lead elsewhere, and is refused.
func trusted(root, path string, owner int) error {
	dirs := []string{}
	for p := filepath.Clean("/" + path); ; p = filepath.Dir(p) {
		dirs = append(dirs, p)
		if p == "/" {
			break
		}
	}
	for _, p := range slices.Backward(dirs) {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, p), &st); err != nil {
			return fmt.Errorf("look at %s: %w", p, err)
		}
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			return vm.WithHint(fmt.Errorf("%s is a link", p), "put the file itself there")
		case int(st.Uid) != owner:
			return vm.WithHint(fmt.Errorf("%s belongs to user %d, and not to root", p, st.Uid), "sudo chown root:root "+p)
		case st.Mode&0o022 != 0:
			return vm.WithHint(fmt.Errorf("%s can be written by others than root", p), "sudo chmod go-w "+p)
		}
	}
	return nil
}
