package mirror

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// arriving is a file on its way to its place: the directory and the name, and
// the file that takes its content meanwhile.
type arriving struct {
	dir     *os.Root
	base    string
	temp    string // in the directory; "": it has no name
	content *os.File
}

// file reads a file's content and puts it in its place. The error is one of
// the reader's; what is wrong with the place is a failure.
func (a *applier) file(c Change) error {
	var to *arriving
	a.try(c.Path, func() (err error) {
		to, err = a.expectFile(c)
		return err
	})
	w, h := io.Discard, sha256.New()
	if to != nil {
		defer to.dir.Close()
		w = to.content
	}
	readErr, writeErr := receive(a.ctx, a.in, io.MultiWriter(h, w), c.New.Size)
	if to == nil {
		return readErr
	}
	a.try(c.Path, func() error {
		err := errors.Join(readErr, writeErr)
		if err == nil && hex.EncodeToString(h.Sum(nil)) != c.New.Hash {
			err = errChanged
		}
		if err == nil {
			err = expect(a.ctx, to.dir, to.base, before(c)) // the content may have taken its time
		}
		if c.InPlace {
			if err == nil {
				err = to.overwrite(c)
			}
			return errors.Join(err, to.content.Close())
		}
		if err == nil {
			err = dress(to.content, c.New)
		}
		if err = errors.Join(err, to.content.Close()); err != nil {
			return errors.Join(err, inside(to.dir, func() error { return to.dir.Remove(to.temp) }))
		}
		return inside(to.dir, func() error { return rename(to.dir, to.temp, to.base) })
	})
	return readErr
}

// expectFile makes the file that takes a change's content.
func (a *applier) expectFile(c Change) (*arriving, error) {
	dir, base, err := a.at(c.Path, before(c))
	if err != nil {
		return nil, err
	}
	to := &arriving{dir: dir, base: base}
	if c.InPlace {
		to.content, err = nameless(dir)
	} else {
		to.temp = tempPrefix + rand.Text()
		err = inside(dir, func() (err error) {
			to.content, err = dir.OpenFile(to.temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			return err
		})
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	if !c.InPlace {
		a.own(to.content.Chown)
	}
	return to, nil
}

// nameless makes a file that has no name, on the directory's file system where
// that can have some.
func nameless(dir *os.Root) (*os.File, error) {
	if f, err := dir.OpenFile(".", os.O_RDWR|unix.O_TMPFILE, 0o600); err == nil {
		return f, nil
	}
	f, err := os.CreateTemp("", tempPrefix)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// overwrite writes what has arrived into the file that is there, which stays
// the one that it is. It is not cut off when the caller has enough: half a file
// is worse.
func (to *arriving) overwrite(c Change) error {
	f, err := openToWrite(to.dir, to.base)
	if err != nil {
		return err
	}
	if _, err = to.content.Seek(0, io.SeekStart); err == nil {
		_, err = io.Copy(f, to.content)
	}
	if err == nil {
		err = f.Truncate(c.New.Size)
	}
	if err != nil {
		return errors.Join(err, f.Chmod(c.Old.Perm.Perm()), f.Close())
	}
	return errors.Join(dress(f, c.New), f.Close())
}

// openToWrite opens a regular file, its owner's even if it is read-only.
func openToWrite(dir *os.Root, base string) (*os.File, error) {
	fi, err := dir.Lstat(base)
	if err != nil {
		return nil, err
	}
	open := func(how int) (*os.File, error) {
		f, err := dir.OpenFile(base, how|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		if opened, err := f.Stat(); err != nil || !opened.Mode().IsRegular() || !os.SameFile(opened, fi) {
			return nil, errors.Join(errChanged, err, f.Close())
		}
		return f, nil
	}
	f, err := open(os.O_WRONLY)
	if !errors.Is(err, fs.ErrPermission) {
		return f, err
	}
	readable, err2 := open(os.O_RDONLY)
	if err2 != nil {
		return nil, err
	}
	defer readable.Close()
	if readable.Chmod(fi.Mode().Perm()|0o200) != nil {
		return nil, err
	}
	if f, err = open(os.O_WRONLY); err != nil {
		err = errors.Join(err, readable.Chmod(fi.Mode().Perm()))
	}
	return f, err
}

// dress gives an open file its permissions and its time. A name for it could
// be a link by now.
func dress(f *os.File, e *Entry) error {
	return errors.Join(f.Chmod(e.Perm.Perm()), os.Chtimes(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), time.Time{}, time.Unix(0, e.Time)))
}
