package mirror

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

// settled is how old a file's last change must be for its stamp to tell whether
// it changed again: a kernel's clock for that advances in steps.
const settled = 2 * time.Second

// tempPrefix begins the names of files that are being written. Nothing else may
// have such a name, and they are not looked at.
const tempPrefix = ".agentvm-sync-"

// Scan describes a directory. Content is read only where known, an earlier
// manifest of the same directory, does not tell what it is.
func Scan(ctx context.Context, root *os.Root, known Manifest) (Manifest, error) {
	s := scanner{ctx: ctx, root: root, known: known, now: time.Now(), found: Manifest{}}
	if err := s.dir("."); err != nil {
		return nil, err
	}
	return s.found, nil
}

type scanner struct {
	ctx   context.Context
	root  *os.Root
	known Manifest
	now   time.Time
	found Manifest
	paths int
}

func (s *scanner) dir(name string) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	names, err := s.names(name)
	if errors.Is(err, fs.ErrPermission) && name != "." {
		s.found[name].Kind, s.found[name].Perm = Other, 0 // nobody knows what is in it
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) && name != "." {
		return nil // deleted meanwhile
	}
	if err != nil {
		return fmt.Errorf("read directory %q: %w", name, err)
	}
	for _, base := range names {
		if err := s.path(path.Join(name, base)); err != nil {
			return err
		}
	}
	return nil
}

// names reads a directory's names, as many as there can be.
func (s *scanner) names(dir string) ([]string, error) {
	f, err := s.root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxEntries + 1)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	slices.Sort(names)
	return slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, tempPrefix) }), err
}

func (s *scanner) path(name string) error {
	e, err := look(s.root, name, s.known[name], s.now)
	if err != nil || e == nil {
		return err
	}
	if err := s.found.add(e, &s.paths); err != nil {
		return err
	}
	if e.Kind == Directory {
		return s.dir(name)
	}
	return nil
}

// look describes one path; nil: there is nothing.
func look(root *os.Root, name string, known *Entry, now time.Time) (*Entry, error) {
	fi, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at %q: %w", name, err)
	}
	e := &Entry{Path: strings.ToValidUTF8(name, "\ufffd"), Kind: Other}
	if !utf8.ValidString(name) || len(name) > maxPath {
		return e, nil
	}
	switch {
	case fi.IsDir():
		e.Kind, e.Perm = Directory, fi.Mode().Perm()
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := root.Readlink(name)
		if err != nil {
			return nil, nil // it was one
		}
		if utf8.ValidString(target) && target != "" {
			e.Kind, e.Target = Link, target
		}
	case fi.Mode().IsRegular():
		return file(root, e, fi, known, now)
	}
	return e, nil
}

// file describes a regular file.
func file(root *os.Root, e *Entry, fi fs.FileInfo, known *Entry, now time.Time) (*Entry, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, fmt.Errorf("look at %q: no times", e.Path)
	}
	e.Kind, e.Perm, e.Size, e.Time = File, fi.Mode().Perm(), fi.Size(), fi.ModTime().UnixNano()
	stamp := Stamp{Inode: st.Ino, Change: st.Ctim.Nano()}
	if now.Sub(time.Unix(0, stamp.Change)) > settled {
		e.Stamp = &stamp
	}
	if known != nil && known.Kind == File && known.Stamp != nil && *known.Stamp == stamp && known.Size == e.Size {
		e.Hash = known.Hash
		return e, nil
	}
	f, err := root.OpenFile(e.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, fs.ErrPermission):
		return &Entry{Path: e.Path, Kind: Other}, nil
	case err != nil:
		return nil, fmt.Errorf("read %q: %w", e.Path, err)
	}
	defer f.Close()
	if opened, err := f.Stat(); err != nil || !os.SameFile(opened, fi) {
		return &Entry{Path: e.Path, Kind: Other}, nil // it changes under our hands
	}
	h := sha256.New()
	if e.Size, err = io.Copy(h, f); err != nil {
		return nil, fmt.Errorf("read %q: %w", e.Path, err)
	}
	e.Hash = hex.EncodeToString(h.Sum(nil))
	return e, nil
}
