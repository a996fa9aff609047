package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

// Image is one image, ready to use. Its files are never written to.
type Image struct {
	ID       string
	Dir      string // empty for a local disk file
	Manifest Manifest

	disk, format string
}

// RootDisk returns the path of the root disk and DiskFormat its format, raw
// or qcow2.
func (i *Image) RootDisk() string   { return i.disk }
func (i *Image) DiskFormat() string { return i.format }

// Kernel returns the path of the kernel, or "" for a disk that brings its own
// boot loader and starts by firmware.
func (i *Image) Kernel() string { return i.file(kernelName) }

// Initrd returns the path of the initial ram disk, or "".
func (i *Image) Initrd() string { return i.file(initrdName) }

// IsLayer reports whether the image is built on another one.
func (i *Image) IsLayer() bool { return i.Manifest.Base != "" }

func (i *Image) file(name string) string {
	if i.Dir == "" {
		return ""
	}
	return filepath.Join(i.Dir, name)
}

// DiskUsage returns the bytes that the image's files take on the host's disk.
// A file that two images share counts for both.
func (i *Image) DiskUsage() (int64, error) {
	if i.Dir == "" {
		return allocated(i.disk)
	}
	var sum int64
	for _, f := range i.Manifest.Files {
		n, err := allocated(filepath.Join(i.Dir, f.Name))
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// Verify reads every file of the image and compares its digest with the
// manifest. The error wraps [ErrCorrupt] when one differs. A local disk file
// has no manifest and always passes.
func (i *Image) Verify(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(2)
	for _, f := range i.Manifest.Files {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			path := filepath.Join(i.Dir, f.Name)
			digest, err := Digest(path)
			if os.IsNotExist(err) {
				return fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
			if err != nil {
				return err
			}
			if digest != f.Digest {
				return fmt.Errorf("%s: %w: digest %s, manifest says %s", path, ErrCorrupt, digest, f.Digest)
			}
			return nil
		})
	}
	return group.Wait()
}
