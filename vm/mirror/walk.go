package mirror

import (
	"errors"
	"os"
	"path"
	"strings"
)

// errChanged is a path that is not what was decided on any more.
var errChanged = errors.New("it has changed meanwhile")

// enter opens a directory that lies in root itself. An os.Root follows links
// that stay below it; a guest could put one where a directory was, and have us
// go where it may not write or look itself.
func enter(root *os.Root, name string) (*os.Root, error) {
	fi, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, errChanged
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
