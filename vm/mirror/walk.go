package mirror

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// errChanged is a path that is not what was decided on any more.
var errChanged = errors.New("it has changed meanwhile")

// errMounted is a place where another file system begins: what is in it is not
// the workspace's.
var errMounted = fmt.Errorf("%w: something is mounted on it", errChanged)

// mounted reports whether something is mounted on a name in the directory. It
// asks nothing of what is mounted there, which may not answer.
func mounted(dir *os.Root, name string) (bool, error) {
	f, err := dir.OpenFile(name, unix.O_PATH, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	st, err := statx(f)
	if err != nil || st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, err
	}
	// Before Linux 5.8 only what is of another file system can be told.
	above, err := dir.OpenFile(".", unix.O_PATH, 0)
	if err != nil {
		return false, err
	}
	defer above.Close()
	at, err := statx(above)
	return at.Dev_major != st.Dev_major || at.Dev_minor != st.Dev_minor, err
}

func statx(f *os.File) (st unix.Statx_t, err error) {
	err = unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	return st, os.NewSyscallError("statx", err)
}

// enter opens a directory that lies in root itself. An os.Root follows links
// that stay below it; a guest could put one where a directory was, and have us
// go where it may not write or look itself. What is mounted is not entered.
func enter(root *os.Root, name string) (*os.Root, error) {
	fi, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, errChanged
	}
	if other, err := mounted(root, name); err != nil || other {
		return nil, cmp.Or(err, errMounted)
	}
	dir, err := root.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	if opened, err := dir.Stat("."); err != nil || !os.SameFile(opened, fi) {
		return nil, errors.Join(errChanged, err, dir.Close())
	}
	return dir, nil
}

// parent opens the directory that a path lies in, following no link, and
// returns the path's name in it.
func parent(root *os.Root, p string) (*os.Root, string, error) {
	dir, err := root.OpenRoot(".")
	if err != nil {
		return nil, "", err
	}
	above, base := path.Split(p)
	for name := range strings.SplitSeq(strings.TrimSuffix(above, "/"), "/") {
		if name == "" {
			continue
		}
		next, err := enter(dir, name)
		if err := errors.Join(err, dir.Close()); err != nil {
			return nil, "", err
		}
		dir = next
	}
	return dir, base, nil
}
