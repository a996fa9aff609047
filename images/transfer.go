package images

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Which returns the ID of the image that the spec asks for, built or not.
func (c *Cache) Which(spec Spec) (string, error) {
	p, err := newPlan(spec, c.mirror, c.known)
	return p.id(), err
}

// Offsets say, for each of an image's files, from which byte on it is wanted.
type Offsets map[string]int64

var (
	idRE   = vm.Pattern(`^[a-z0-9][a-z0-9.+-]{0,99}$`)
	fileRE = vm.Pattern(`^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$`)
)

// maxFiles and maxFile bound an image that comes from elsewhere.
const (
	maxFiles = 16
	maxFile  = int64(1) << 42
)

// Reception is an image that comes from another host's cache. Its files grow
// in incoming/ID, which outlives a transfer that is cut off: the next goes on
// where that one ended.
type Reception struct {
	cache    *Cache
	manifest Manifest
	dir      string
	release  func() error
}

// Receive begins to take over an image. A nil Reception: it is here already.
func (c *Cache) Receive(ctx context.Context, m Manifest) (*Reception, error) {
	if err := m.checkForeign(); err != nil {
		return nil, fmt.Errorf("image from elsewhere: %w", err)
	}
	if _, err := c.load(m.ID); err == nil || !buildable(err) {
		return nil, err
	}
	lock, err := c.lock(ctx, m.ID, Discard)
	if err != nil {
		return nil, err
	}
	if _, err := c.load(m.ID); err == nil || !buildable(err) {
		return nil, errors.Join(err, lock.Close())
	} else if errors.Is(err, ErrCorrupt) {
		if err := c.discard(ctx, m.ID); err != nil {
			return nil, errors.Join(err, lock.Close())
		}
	}
	c.sweepIncoming(m.ID)
	r := &Reception{cache: c, manifest: m, dir: filepath.Join(c.dir, "incoming", m.ID), release: lock.Close}
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return r, nil
}

// keepIncoming is how long a transfer that was cut off may go on.
const keepIncoming = 7 * 24 * time.Hour

// sweepIncoming removes what nobody goes on with. The caller holds id's lock.
func (c *Cache) sweepIncoming(id string) {
	entries, _ := os.ReadDir(filepath.Join(c.dir, "incoming"))
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || e.Name() == id || time.Since(fi.ModTime()) < keepIncoming {
			continue
		}
		if lock, ok, err := c.tryLock(e.Name()); err == nil && ok {
			_ = os.RemoveAll(filepath.Join(c.dir, "incoming", e.Name()))
			_ = lock.Close()
		}
	}
}

func (m Manifest) checkForeign() error {
	if m.Format != formatVersion {
		return fmt.Errorf("format %d, not %d", m.Format, formatVersion)
	}
	if !idRE().MatchString(m.ID) || len(m.Files) == 0 || len(m.Files) > maxFiles {
		return fmt.Errorf("id %q with %d files", m.ID, len(m.Files))
	}
	if m.Arch != debianArch() {
		return fmt.Errorf("image %s is for %s", m.ID, m.Arch)
	}
	for _, f := range m.Files {
		if !fileRE().MatchString(f.Name) || f.Name == manifestName || f.Size < 0 || f.Size > maxFile {
			return fmt.Errorf("image %s: file %q of %d bytes", m.ID, f.Name, f.Size)
		}
	}
	return nil
}

// Offsets say what is lacking.
func (r *Reception) Offsets() (Offsets, error) {
	o := Offsets{}
	for _, f := range r.manifest.Files {
		fi, err := os.Lstat(filepath.Join(r.dir, f.Name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			o[f.Name] = 0
		case err != nil:
			return nil, err
		default: // what was written last may be half of a stretch
			o[f.Name] = min(fi.Size(), f.Size) / sparseBlock * sparseBlock
		}
	}
	return o, nil
}

// Take reads what [Image.Send] writes from those offsets on.
func (r *Reception) Take(ctx context.Context, from Offsets, in io.Reader) error {
	if err := requireSpace(r.cache.dir, baseSpace); err != nil {
		return fmt.Errorf("receive image %s: %w", r.manifest.ID, err)
	}
	buffered := bufio.NewReaderSize(in, sparseBlock)
	for _, f := range r.manifest.Files {
		if err := r.file(ctx, f, from[f.Name], buffered); err != nil {
			return fmt.Errorf("receive %s of image %s: %w", f.Name, r.manifest.ID, diskFull("", err))
		}
	}
	return nil
}

func (r *Reception) file(ctx context.Context, f File, at int64, in io.Reader) (err error) {
	out, err := os.OpenFile(filepath.Join(r.dir, f.Name), os.O_CREATE|os.O_WRONLY|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := out.Truncate(at); err != nil {
		return err
	}
	buf := make([]byte, sparseBlock)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var head [12]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return err
		}
		offset, n := int64(binary.BigEndian.Uint64(head[:])), int64(binary.BigEndian.Uint32(head[8:]))
		if n == 0 {
			return out.Truncate(f.Size)
		}
		if n > sparseBlock || offset < at || offset+n > f.Size {
			return fmt.Errorf("a stretch of %d bytes at %d", n, offset)
		}
		if _, err := io.ReadFull(in, buf[:n]); err != nil {
			return err
		}
		if _, err := out.WriteAt(buf[:n], offset); err != nil {
			return err
		}
		at = offset + n
	}
}

// Finish compares every file with the manifest and makes the image one of the
// cache's. What differs is removed, so that the next transfer sends it again.
func (r *Reception) Finish(ctx context.Context) error {
	for _, f := range r.manifest.Files {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(r.dir, f.Name)
		digest, err := Digest(path)
		if err == nil && digest != f.Digest {
			err = errors.Join(fmt.Errorf("%s: %w: digest %s, manifest says %s", path, ErrCorrupt, digest, f.Digest), os.Remove(path))
		}
		if err != nil {
			return fmt.Errorf("receive image %s: %w", r.manifest.ID, err)
		}
	}
	if err := writeManifest(r.dir, r.manifest); err != nil {
		return err
	}
	return publish(r.dir, r.cache.imageDir(r.manifest.ID))
}

// Close lets others at the image.
func (r *Reception) Close() error { return r.release() }

// Size is how many bytes [Image.Send] sends at most, from those offsets on:
// what the files take on the disk.
func (i *Image) Size(from Offsets) (sum int64, err error) {
	for _, f := range i.Manifest.Files {
		n, err := allocated(filepath.Join(i.Dir, f.Name))
		if err != nil {
			return 0, err
		}
		sum += max(0, min(n, f.Size-from[f.Name]))
	}
	return sum, nil
}

// Send writes the files' data from those offsets on, each as stretches with
// their place and length before them, and an empty one; holes are left out.
// done is told how many bytes went.
func (i *Image) Send(ctx context.Context, from Offsets, w io.Writer, done func(n int64)) error {
	out := bufio.NewWriterSize(w, sparseBlock+12)
	for _, f := range i.Manifest.Files {
		if err := sendFile(ctx, filepath.Join(i.Dir, f.Name), from[f.Name], f.Size, out, done); err != nil {
			return fmt.Errorf("send %s of image %s: %w", f.Name, i.ID, err)
		}
	}
	return out.Flush()
}

func sendFile(ctx context.Context, path string, at, size int64, out io.Writer, done func(n int64)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, sparseBlock)
	for at < size {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, err := nextData(f, at)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		at = max(at, next)
		n := min(sparseBlock, size-at)
		if _, err := f.ReadAt(buf[:n], at); err != nil {
			return err
		}
		if !allZero(buf[:n]) {
			if err := writeStretch(out, at, buf[:n]); err != nil {
				return err
			}
			done(n)
		}
		at += n
	}
	return writeStretch(out, 0, nil)
}

func writeStretch(w io.Writer, offset int64, data []byte) error {
	var head [12]byte
	binary.BigEndian.PutUint64(head[:], uint64(offset))
	binary.BigEndian.PutUint32(head[8:], uint32(len(data)))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
