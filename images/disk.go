package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Local returns the disk image file at path as an image that boots by its own
// boot loader. Its format is looked at once, here; a qcow2 file that refers to
// other files is refused, because whoever wrote it chose which.
func Local(ctx context.Context, path string) (*Image, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(abs)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("image file %s: %w", abs, vm.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("image file: %w", err)
	case !info.Mode().IsRegular():
		return nil, invalid("image file %s is not a regular file", abs)
	case info.Size() == 0:
		return nil, invalid("image file %s is empty", abs)
	}
	disk, err := inspectDisk(ctx, abs)
	if err != nil {
		return nil, err
	}
	if disk.Format != "raw" && disk.Format != "qcow2" {
		return nil, vm.WithHint(invalid("image file %s has format %s, which is neither raw nor qcow2", abs, disk.Format),
			"convert it: qemu-img convert -O qcow2 "+filepath.Base(abs)+" converted.qcow2")
	}
	if disk.Backing != "" || disk.FormatSpecific.Data.DataFile != "" {
		return nil, vm.WithHint(
			vm.Classify(vm.ErrPolicy, fmt.Errorf("image file %s refers to another file (%s%s)", abs, disk.Backing, disk.FormatSpecific.Data.DataFile)),
			"make it self-contained: qemu-img convert -O qcow2 "+filepath.Base(abs)+" standalone.qcow2")
	}
	return &Image{
		ID:       abs,
		disk:     abs,
		format:   disk.Format,
		Manifest: Manifest{Name: abs, RootSize: disk.Size},
	}, nil
}

// IsPath reports whether an image's name means a file: it has a slash in it,
// or ends like a disk image.
func IsPath(name string) bool {
	if strings.ContainsRune(name, '/') {
		return true
	}
	switch filepath.Ext(name) {
	case ".qcow2", ".img", ".raw":
		return true
	}
	return false
}

type diskInfo struct {
	Format         string `json:"format"`
	Size           int64  `json:"virtual-size"`
	Backing        string `json:"backing-filename"`
	FormatSpecific struct {
		Data struct {
			DataFile string `json:"data-file"`
		} `json:"data"`
	} `json:"format-specific"`
}

func inspectDisk(ctx context.Context, path string) (diskInfo, error) {
	var info diskInfo
	// The file: prefix keeps a name with a colon in it from being a protocol.
	out, err := qemuImg(ctx, "info", "--output=json", "file:"+path)
	if err != nil {
		return info, fmt.Errorf("inspect disk %s: %w", path, err)
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return info, fmt.Errorf("inspect disk %s: read qemu-img's answer: %w", path, err)
	}
	return info, nil
}

// CreateOverlay makes the qcow2 file path, which takes every write and whose
// backing file is the image's root disk. The disk that the guest sees has size
// bytes; 0 means the image's own size, and less than that is an error: an
// overlay cannot shrink a file system. The guest grows its file system by
// itself. An existing file at path is an error.
func CreateOverlay(ctx context.Context, path string, img *Image, size int64) error {
	if size == 0 {
		size = img.Manifest.RootSize
	}
	if size < img.Manifest.RootSize {
		return vm.WithHint(
			invalid("a disk of %d bytes is smaller than image %s, which has %d", size, img.ID, img.Manifest.RootSize),
			fmt.Sprintf("ask for a disk of at least %dGiB", (img.Manifest.RootSize+1<<30-1)>>30))
	}
	// The name is taken first: qemu-img would overwrite.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	f.Close()
	_, err = qemuImg(ctx, "create", "-q", "-f", "qcow2", "-F", img.format, "-b", img.disk,
		"file:"+path, fmt.Sprint(size))
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("create overlay %s on %s: %w", path, img.disk, err)
	}
	return nil
}

func qemuImg(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx) // "signal: killed" is only how it ended
	case errors.Is(err, exec.ErrNotFound):
		return nil, vm.WithHint(vm.Classify(vm.ErrHost, err), "sudo apt-get install qemu-utils")
	case errors.As(err, &exit) && len(exit.Stderr) > 0:
		text := strings.TrimSpace(string(exit.Stderr))
		return nil, diskFull(text, fmt.Errorf("qemu-img %s: %s", args[0], text))
	case err != nil:
		return nil, err
	}
	return out, nil
}

// allocated returns the bytes that a file takes on the disk, without its holes.
func allocated(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512, nil
	}
	return info.Size(), nil
}

// free returns the bytes that the caller may still write below dir.
func free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// requireSpace fails with [vm.ErrHost] when less than need bytes are free.
func requireSpace(dir string, need int64) error {
	have, err := free(dir)
	if err != nil || have >= need {
		return err
	}
	return vm.WithHint(
		vm.Classify(vm.ErrHost, fmt.Errorf("not enough disk space in %s: %d MiB free, the build needs %d MiB", dir, have>>20, need>>20)),
		"free some space, remove unused images (agentvm image ls, agentvm image rm), or set AGENTVM_HOME to a larger disk")
}

// diskFull marks err as the host's failure when the text that came with it
// says that a disk filled up.
func diskFull(text string, err error) error {
	if !strings.Contains(text, "No space left on device") && !errors.Is(err, syscall.ENOSPC) &&
		!strings.Contains(text, "You don't have enough free space") {
		return err
	}
	return vm.WithHint(vm.Classify(vm.ErrHost, err), "free some disk space and repeat the command")
}
