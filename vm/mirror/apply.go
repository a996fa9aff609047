package mirror

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"
	"time"
)

// Failure is a path that could not be changed, and why.
type Failure struct {
	Path    string `json:"path"`
	Why     string `json:"why"`
	Changed bool   `json:"changed,omitempty"` // it is not what the decision was made on, and another one will do
}

// Apply makes the changes, which are sorted by path, in the directory. The
// content of the files among what is new comes from r, as [Send] writes it. A
// path that is no longer what its change starts from is left alone and among
// the failures. What was begun has its permissions also after an error.
func Apply(ctx context.Context, root *os.Root, changes []Change, r io.Reader) ([]Failure, error) {
	a := applier{ctx: ctx, root: root, in: bufio.NewReaderSize(r, chunkSize)}
	if fi, err := root.Stat("."); err == nil && os.Geteuid() == 0 {
		a.owner, _ = fi.Sys().(*syscall.Stat_t)
	}
	err := a.all(changes)
	for _, c := range slices.Backward(a.dirs) { // a directory that cannot be written to, once all is in it
		a.try(c.Path, func() error { return a.chmod(c) })
	}
	return a.failed, err
}

// all makes the changes, but for the permissions of directories.
func (a *applier) all(changes []Change) error {
	for i := len(changes) - 1; i >= 0; i-- { // what lies in a directory goes before it
		c := changes[i]
		if c.Old != nil && (c.New == nil || c.New.Kind != c.Old.Kind) {
			a.try(c.Path, func() error { return a.remove(c) })
		}
	}
	for _, c := range changes {
		if c.New == nil {
			continue
		}
		if c.New.Kind == File { // its content has to be read in any case
			if err := a.file(c); err != nil {
				return err
			}
			continue
		}
		a.try(c.Path, func() error { return a.make(c) })
	}
	return a.ctx.Err()
}

// unfinished are the permissions of a directory while things are put into it.
const unfinished fs.FileMode = 0o700

type applier struct {
	ctx    context.Context
	root   *os.Root
	in     *bufio.Reader
	owner  *syscall.Stat_t // of what root makes; nil: whoever makes it
	dirs   []Change        // that need their permissions
	failed []Failure
	names  map[string]bool // of the failures
}

func (a *applier) try(p string, do func() error) {
	if a.names[p] {
		return
	}
	if err := do(); err != nil {
		if a.names == nil {
			a.names = map[string]bool{}
		}
		a.names[p] = true
		a.failed = append(a.failed, Failure{Path: p, Why: err.Error(), Changed: errors.Is(err, errChanged)})
	}
}

// at opens the directory that a path lies in, and fails unless old is what has
// the path's name there.
func (a *applier) at(p string, old *Entry) (dir *os.Root, base string, err error) {
	dir, base, err = parent(a.root, p)
	if err != nil {
		return nil, "", err
	}
	if err := expect(a.ctx, dir, base, old); err != nil {
		return nil, "", errors.Join(err, dir.Close())
	}
	return dir, base, nil
}

func expect(ctx context.Context, dir *os.Root, base string, old *Entry) error {
	now, err := look(ctx, dir, base, nil, time.Now())
	if err == nil && !same(now, old) {
		err = errChanged
	}
	return err
}

func (a *applier) remove(c Change) error {
	if c.Old.Kind == Other {
		return a.removeOther(c)
	}
	dir, base, err := a.at(c.Path, c.Old)
	if err != nil {
		return err
	}
	defer dir.Close()
	return inside(dir, func() error { return dir.Remove(base) })
}

// removeOther removes what could not be copied, if it still cannot: somebody
// has decided that. A directory stays, since nobody knows what is in it.
func (a *applier) removeOther(c Change) error {
	dir, base, err := parent(a.root, c.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if fi, err := dir.Lstat(base); err == nil && fi.IsDir() {
		return errors.New("a directory is in the way, and nobody knows what is in it")
	}
	now, err := look(a.ctx, dir, base, nil, time.Now())
	if err == nil && !isKind(now, Other) {
		err = errChanged
	}
	if err != nil {
		return err
	}
	return inside(dir, func() error { return dir.Remove(base) })
}

// inside has something done in a directory, which may be one that its owner
// has made read-only.
func inside(dir *os.Root, do func() error) error {
	err := do()
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	fi, statErr := dir.Stat(".")
	if statErr != nil || fi.Mode().Perm()&0o700 == 0o700 || dir.Chmod(".", fi.Mode().Perm()|0o700) != nil {
		return err
	}
	return errors.Join(do(), dir.Chmod(".", fi.Mode().Perm()))
}

// before is what is there when new content comes: what is of another kind has
// been removed.
func before(c Change) *Entry {
	if c.Old != nil && c.Old.Kind == c.New.Kind {
		return c.Old
	}
	return nil
}

// make makes a directory or a link.
func (a *applier) make(c Change) error {
	dir, base, err := a.at(c.Path, before(c))
	if err != nil {
		return err
	}
	defer dir.Close()
	if c.New.Kind == Directory {
		if before(c) == nil {
			err = inside(dir, func() error { return dir.Mkdir(base, unfinished) })
			if err == nil {
				a.own(func(uid, gid int) error { return dir.Lchown(base, uid, gid) })
			}
		}
		if err == nil {
			a.dirs = append(a.dirs, c)
		}
		return err
	}
	temp := tempPrefix + rand.Text()
	return inside(dir, func() error {
		if err := dir.Symlink(c.New.Target, temp); err != nil {
			return err
		}
		a.own(func(uid, gid int) error { return dir.Lchown(temp, uid, gid) })
		return rename(dir, temp, base)
	})
}

// own gives what root has made to the owner of the workspace, like all that a
// machine makes in it. There are file systems that cannot, and are no worse for
// that.
func (a *applier) own(chown func(uid, gid int) error) {
	if a.owner != nil {
		_ = chown(int(a.owner.Uid), int(a.owner.Gid))
	}
}

// chmod gives a directory its permissions, once all is in it.
func (a *applier) chmod(c Change) error {
	dir, base, err := parent(a.root, c.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	sub, err := enter(dir, base)
	if err != nil {
		return err
	}
	return errors.Join(sub.Chmod(".", c.New.Perm), sub.Close())
}

func rename(dir *os.Root, temp, base string) error {
	err := dir.Rename(temp, base)
	if err != nil {
		err = errors.Join(err, dir.Remove(temp))
	}
	return err
}

// chunkSize is how much of a file is sent at once.
const chunkSize = 64 << 10

// Send writes the content of the files among what is new: for each, in the
// changes' order, chunks with their length before them, and a chunk of none.
// A file that is not what it was said to be ends early; its digest tells.
func Send(ctx context.Context, root *os.Root, changes []Change, w io.Writer) error {
	out := bufio.NewWriterSize(w, chunkSize+4)
	for _, c := range changes {
		if c.New == nil || c.New.Kind != File {
			continue
		}
		if err := sendFile(ctx, root, c.New, out); err != nil {
			return fmt.Errorf("send %q: %w", c.Path, err)
		}
		if err := writeChunk(out, nil); err != nil {
			return err
		}
	}
	return out.Flush()
}

func sendFile(ctx context.Context, root *os.Root, e *Entry, out io.Writer) error {
	dir, base, err := parent(root, e.Path)
	if err != nil {
		return nil
	}
	defer dir.Close()
	now, err := dir.Lstat(base)
	if err != nil || !now.Mode().IsRegular() {
		return nil
	}
	f, err := dir.OpenFile(base, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !os.SameFile(fi, now) {
		return nil
	}
	buf := make([]byte, chunkSize)
	in := io.LimitReader(f, e.Size)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := in.Read(buf)
		if n > 0 {
			if err := writeChunk(out, buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return nil // its end; a shorter one has another digest
		}
	}
}

func writeChunk(w io.Writer, data []byte) error {
	var head [4]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(data)))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// receive reads one file's chunks, at most size bytes of them.
func receive(ctx context.Context, r io.Reader, w io.Writer, size int64) (readErr, writeErr error) {
	buf := make([]byte, chunkSize)
	for {
		if err := ctx.Err(); err != nil {
			return err, writeErr
		}
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("read a file's content: %w", noEOF(err)), writeErr
		}
		n := binary.BigEndian.Uint32(head[:])
		if n == 0 {
			return nil, writeErr
		}
		if size -= int64(n); n > chunkSize || size < 0 {
			return fmt.Errorf("more than was announced"), writeErr
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return fmt.Errorf("read a file's content: %w", noEOF(err)), writeErr
		}
		if writeErr == nil {
			_, writeErr = w.Write(buf[:n])
		}
	}
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
