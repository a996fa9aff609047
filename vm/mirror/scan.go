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
	s := scanner{ctx: ctx, known: known, now: time.Now(), found: Manifest{}}
	if err := s.dir(root, ".", 0); err != nil {
		return nil, err
	}
	return s.found, nil
}

// maxDepth is how many directories may lie in each other: each is held open.
const maxDepth = 200

type scanner struct {
	ctx   context.Context
	known Manifest
	now   time.Time
	found Manifest
	paths int
}

// dir describes what is in the directory that is open.
func (s *scanner) dir(dir *os.Root, name string, depth int) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	names, err := namesIn(dir)
	if errors.Is(err, fs.ErrPermission) && name != "." {
		s.blind(name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("read directory %q: %w", name, err)
	}
	if name != "." && (depth > maxDepth || slices.ContainsFunc(names, func(n string) bool { return len(name)+1+len(n) > maxPath })) {
		s.blind(name)
		return nil
	}
	for i, base := range names {
		err := s.path(dir, base, path.Join(name, base), depth)
		if errors.Is(err, fs.ErrPermission) && name != "." && i == 0 { // it can be listed, and no more
			s.blind(name)
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// blind notes that nobody knows what is in a directory.
func (s *scanner) blind(name string) { s.found[name].Kind, s.found[name].Perm = Other, 0 }

// namesIn reads a directory's names, as many as there can be.
func namesIn(dir *os.Root) ([]string, error) {
	f, err := dir.Open(".")
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

// path describes what has the name base in the directory that is open.
func (s *scanner) path(dir *os.Root, base, name string, depth int) error {
	e, err := look(s.ctx, dir, base, s.known[name], s.now)
	if err != nil {
		return fmt.Errorf("look at %q: %w", name, err)
	}
	if e == nil {
		return nil
	}
	e.Path = strings.ToValidUTF8(name, "\ufffd")
	if err := s.found.add(e, &s.paths); err != nil || e.Kind != Directory {
		return err
	}
	sub, err := enter(dir, base)
	switch {
	case errors.Is(err, fs.ErrNotExist): // deleted meanwhile
		return nil
	case errors.Is(err, fs.ErrPermission), errors.Is(err, errChanged):
		s.blind(name)
		return nil
	case err != nil:
		return fmt.Errorf("read directory %q: %w", name, err)
	}
	defer sub.Close()
	return s.dir(sub, name, depth+1)
}

// look describes what has a name in the directory that is open, but for its
// path; nil: there is nothing.
func look(ctx context.Context, dir *os.Root, name string, known *Entry, now time.Time) (*Entry, error) {
	e := &Entry{Path: name, Kind: Other}
	other, err := mounted(dir, name)
	var fi fs.FileInfo
	if err == nil && !other {
		fi, err = dir.Lstat(name)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case other, !utf8.ValidString(name):
		return e, nil
	}
	switch {
	case fi.IsDir():
		e.Kind, e.Perm = Directory, fi.Mode().Perm()
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := dir.Readlink(name)
		if err != nil {
			return nil, nil // it was one
		}
		if utf8.ValidString(target) && target != "" {
			e.Kind, e.Target = Link, target
		}
	case fi.Mode().IsRegular():
		if fi.Size() <= maxFile {
			return file(ctx, dir, e, fi, known, now)
		}
	}
	return e, nil
}

// file describes a regular file, as long as it is now.
func file(ctx context.Context, dir *os.Root, e *Entry, fi fs.FileInfo, known *Entry, now time.Time) (*Entry, error) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, errors.New("it has no times")
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
	f, err := dir.OpenFile(e.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, fs.ErrPermission):
		return &Entry{Path: e.Path, Kind: Other}, nil
	case err != nil:
		return nil, err
	}
	defer f.Close()
	if opened, err := f.Stat(); err != nil || !os.SameFile(opened, fi) {
		return &Entry{Path: e.Path, Kind: Other}, nil // it changes under our hands
	}
	h := sha256.New()
	if e.Size, err = io.Copy(h, io.LimitReader(interruptible{ctx, f}, e.Size)); err != nil {
		return nil, err
	}
	e.Hash = hex.EncodeToString(h.Sum(nil))
	return e, nil
}

// interruptible is a reader that ends with its context.
type interruptible struct {
	ctx context.Context
	io.Reader
}

func (r interruptible) Read(data []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(data)
}
