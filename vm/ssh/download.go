package ssh

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
)

// Download copies a file or a directory, with everything in it, from the
// guest, by the rules of [Client.Upload]. The guest is not trusted: nothing
// is written outside of the destination, no link on the host is followed
// below it, a symbolic link that leads out of the copied tree is skipped, and
// files appear complete or not at all.
func (c *Client) Download(ctx context.Context, remote, local string, o CopyOptions) error {
	return c.transfer(ctx, o, func(t *transfer) error {
		src := guestPath(remote)
		info, err := t.sftp.Stat(src)
		if err != nil {
			return remoteError("copy", remote, err)
		}
		dir, name, err := t.downloadTarget(src, local)
		if err != nil {
			return err
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		switch {
		case info.IsDir():
			return t.downloadDir(ctx, src, info, root, name, "")
		case info.Mode().IsRegular():
			return t.downloadFile(src, info, root, name)
		}
		return fmt.Errorf("copy %s: not a regular file", remote)
	})
}

// downloadTarget splits the copy's own path into a directory and a name.
func (t *transfer) downloadTarget(src, local string) (dir, name string, err error) {
	info, err := os.Stat(local)
	switch {
	case err == nil && info.IsDir():
		if name = baseName(src); name == "" {
			// "." or "/": only the guest knows what that is called.
			if src, err = t.sftp.RealPath(src); err != nil {
				return "", "", err
			}
			name = baseName(src)
		}
		if !safeName(name) {
			return "", "", fmt.Errorf("copy %s to %s: give the copy a name", src, local)
		}
		return local, name, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", "", err
	case strings.HasSuffix(local, "/"):
		return "", "", fmt.Errorf("copy to %s: not a directory", local)
	}
	return filepath.Dir(local), filepath.Base(local), nil
}

// safeName accepts what a directory entry can be called. The guest could
// send anything.
func safeName(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00")
}

// downloadDir copies a directory as name into parent. rel is where it is in
// the copied tree.
func (t *transfer) downloadDir(ctx context.Context, src string, info fs.FileInfo, parent *os.Root, name, rel string) error {
	if strings.Count(rel, "/") >= maxDepth {
		return fmt.Errorf("copy %s: more than %d directories below each other", src, maxDepth)
	}
	dir, err := makeDir(parent, name)
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := t.sftp.ReadDirContext(ctx, src)
	if err != nil {
		return remoteError("list", src, err)
	}
	if err := t.downloadFiles(ctx, src, entries, dir, rel); err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() && safeName(e.Name()) {
			if err := t.downloadDir(ctx, path.Join(src, e.Name()), e, dir, e.Name(), path.Join(rel, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := dir.Chmod(".", info.Mode().Perm()); err != nil {
		return err
	}
	return dir.Chtimes(".", info.ModTime(), info.ModTime())
}

// downloadFiles copies what is not a directory.
func (t *transfer) downloadFiles(ctx context.Context, src string, entries []fs.FileInfo, dir *os.Root, rel string) error {
	files, ctx := errgroup.WithContext(ctx)
	files.SetLimit(copyWorkers)
	for _, e := range entries {
		from := path.Join(src, e.Name())
		switch {
		case ctx.Err() != nil:
			return files.Wait()
		case !safeName(e.Name()):
			t.skip(src+"/"+e.Name(), "not a file name")
		case e.IsDir():
		case e.Mode().Type() == fs.ModeSymlink:
			files.Go(func() error { return t.downloadLink(from, dir, e.Name(), rel) })
		case !e.Mode().IsRegular():
			t.skip(from, "not a regular file")
		default:
			files.Go(func() error { return t.downloadFile(from, e, dir, e.Name()) })
		}
	}
	return files.Wait()
}

// makeDir makes or opens the directory name, and not what a link of that
// name points to.
func makeDir(parent *os.Root, name string) (*os.Root, error) {
	if err := parent.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	want, err := parent.Lstat(name)
	if err != nil {
		return nil, err
	}
	dir, err := parent.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	got, err := dir.Stat(".")
	if err == nil && os.SameFile(want, got) {
		return dir, nil
	}
	dir.Close()
	return nil, fmt.Errorf("copy to %s: it is a symbolic link", filepath.Join(parent.Name(), name))
}

func (t *transfer) downloadFile(src string, info fs.FileInfo, dir *os.Root, name string) (err error) {
	from, err := t.sftp.Open(src)
	if err != nil {
		return remoteError("read", src, err)
	}
	defer from.Close()

	temp := ".agentvm-" + rand.Text()
	to, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		to.Close()
		if err != nil {
			dir.Remove(temp)
		}
	}()
	if _, err := from.WriteTo(&countingWriter{to, func(n int) { t.moved(src, n) }}); err != nil {
		return remoteError("read", src, err)
	}
	if err := to.Chmod(info.Mode().Perm()); err != nil {
		return err
	}
	if err := to.Close(); err != nil {
		return err
	}
	if err := dir.Chtimes(temp, info.ModTime(), info.ModTime()); err != nil {
		return err
	}
	if err := dir.Rename(temp, name); err != nil {
		return err
	}
	t.finished(src)
	return nil
}

// downloadLink makes a link that stays within the copied tree.
func (t *transfer) downloadLink(src string, dir *os.Root, name, rel string) error {
	target, err := t.sftp.ReadLink(src)
	if err != nil {
		return remoteError("read link", src, err)
	}
	if !staysInside(rel, target) {
		t.skip(src, fmt.Sprintf("a link out of the copied tree, to %q", target))
		return nil
	}
	temp := ".agentvm-" + rand.Text()
	if err := dir.Symlink(target, temp); err != nil {
		return err
	}
	if err := dir.Rename(temp, name); err != nil {
		dir.Remove(temp)
		return err
	}
	t.finished(src)
	return nil
}

// staysInside says whether a link in the tree's directory rel leads to inside
// the tree, whatever other such links there are. Hence ".." may only stand at
// the beginning, where it is taken from rel, which has no links in it: behind
// another link it would be taken from that link's target.
func staysInside(rel, target string) bool {
	if target == "" || path.IsAbs(target) || strings.ContainsRune(target, 0) {
		return false
	}
	depth := 0
	if rel != "" {
		depth = strings.Count(rel, "/") + 1
	}
	ups, down := 0, false
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "", ".":
		case "..":
			if down {
				return false
			}
			ups++
		default:
			down = true
		}
	}
	return ups <= depth
}

type countingWriter struct {
	w     io.Writer
	count func(int)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	w.count(n)
	return n, err
}
