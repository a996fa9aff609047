package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// Upload copies a file or a directory, with everything in it, to the guest.
// An existing directory gets the copy inside it, under its own name;
// otherwise remote is the copy's name. Modes (without setuid, setgid and
// sticky) and modification times come along; symbolic links stay links.
// Other kinds of files are skipped, which a [SkippedError] tells at the end.
func (c *Client) Upload(ctx context.Context, local, remote string, o CopyOptions) error {
	info, err := os.Stat(local)
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(local)
	if err != nil {
		return err
	}
	return c.transfer(ctx, o, func(t *transfer) error {
		dst, err := t.uploadTarget(filepath.Base(abs), remote)
		switch {
		case err != nil:
			return err
		case info.IsDir():
			return t.uploadTree(ctx, local, dst)
		case !info.Mode().IsRegular():
			return fmt.Errorf("copy %s: not a regular file", local)
		}
		f, err := os.Open(local)
		if err != nil {
			return err
		}
		defer f.Close()
		return t.uploadFile(f, local, dst)
	})
}

func (t *transfer) uploadTarget(base, remote string) (string, error) {
	dst := guestPath(remote)
	info, err := t.sftp.Stat(dst)
	switch {
	case err == nil && info.IsDir():
		return path.Join(dst, base), nil
	case err == nil && strings.HasSuffix(remote, "/"):
		return "", fmt.Errorf("copy to %s in the guest: not a directory", remote)
	case err == nil:
		return dst, nil
	case errors.Is(err, fs.ErrNotExist) && !strings.HasSuffix(remote, "/"):
		return dst, nil
	}
	return "", remoteError("copy to", remote, err)
}

// uploadTree reads below an os.Root: what is in the tree may be the guest's
// doing, and a link in it must not make the host read elsewhere.
func (t *transfer) uploadTree(ctx context.Context, local, dst string) error {
	root, err := os.OpenRoot(local)
	if err != nil {
		return err
	}
	defer root.Close()

	var dirs []string // parents before children
	files, ctx := errgroup.WithContext(ctx)
	files.SetLimit(copyWorkers)
	walkErr := fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			t.skip(filepath.Join(local, name), err.Error())
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		to := path.Join(dst, name)
		switch {
		case d.IsDir():
			dirs = append(dirs, name)
			return t.makeRemoteDir(to)
		case d.Type() == fs.ModeSymlink:
			return t.uploadLink(root, name, to)
		case !d.Type().IsRegular():
			t.skip(filepath.Join(local, name), "not a regular file")
			return nil
		}
		files.Go(func() error {
			f, err := root.Open(name)
			if err != nil {
				t.skip(filepath.Join(local, name), err.Error())
				return nil
			}
			defer f.Close()
			return t.uploadFile(f, filepath.Join(local, name), to)
		})
		return nil
	})
	if err := errors.Join(files.Wait(), walkErr); err != nil {
		return err
	}
	// Last, as writing into a directory changes its time and may need a mode
	// that it is not to keep.
	for i := len(dirs) - 1; i >= 0; i-- {
		info, err := root.Stat(dirs[i])
		if err != nil {
			return err
		}
		if err := t.setRemote(path.Join(dst, dirs[i]), info.Mode(), info.ModTime()); err != nil {
			return err
		}
	}
	return nil
}

func (t *transfer) makeRemoteDir(name string) error {
	err := t.sftp.Mkdir(name)
	if err == nil {
		return nil
	}
	if info, statErr := t.sftp.Stat(name); statErr == nil && info.IsDir() {
		return nil
	}
	return remoteError("make directory", name, err)
}

func (t *transfer) uploadLink(root *os.Root, name, to string) error {
	target, err := root.Readlink(name)
	if err != nil {
		return err
	}
	if info, err := t.sftp.Lstat(to); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		if err := t.sftp.Remove(to); err != nil {
			return remoteError("replace", to, err)
		}
	}
	if err := t.sftp.Symlink(target, to); err != nil {
		return remoteError("link", to, err)
	}
	return nil
}

func (t *transfer) uploadFile(f *os.File, local, to string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		t.skip(local, "not a regular file")
		return nil
	}
	r := &countingReader{Reader: f, size: info.Size(), count: func(n int) { t.moved(local, n) }}
	if err := t.writeRemote(to, r, info.Mode()); err != nil {
		return err
	}
	if err := t.sftp.Chtimes(to, info.ModTime(), info.ModTime()); err != nil {
		return remoteError("set the time of", to, err)
	}
	t.finished(local)
	return nil
}

// writeRemote leaves no half-written file behind: pieces are written in any
// order, so that one could have holes.
func (t *transfer) writeRemote(to string, r io.Reader, mode fs.FileMode) (err error) {
	f, err := t.sftp.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return remoteError("write", to, err)
	}
	defer func() {
		if closeErr := f.Close(); err == nil && closeErr != nil {
			err = remoteError("write", to, closeErr)
		}
		if err != nil {
			t.sftp.Remove(to)
		}
	}()
	if err := f.Chmod(mode.Perm()); err != nil {
		return remoteError("set the mode of", to, err)
	}
	if _, err := f.ReadFrom(r); err != nil {
		return remoteError("write", to, err)
	}
	return nil
}

func (t *transfer) setRemote(name string, mode fs.FileMode, mtime time.Time) error {
	if err := t.sftp.Chmod(name, mode.Perm()); err != nil {
		return remoteError("set the mode of", name, err)
	}
	if err := t.sftp.Chtimes(name, mtime, mtime); err != nil {
		return remoteError("set the time of", name, err)
	}
	return nil
}

// countingReader tells the SFTP client the size, by which it decides to write
// pieces concurrently.
type countingReader struct {
	io.Reader
	size  int64
	count func(int)
}

func (r *countingReader) Size() int64 { return r.size }

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.count(n)
	}
	return n, err
}
