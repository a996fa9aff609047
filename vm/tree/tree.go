// Package tree copies directories as they are: owners, modes, times, links and
// extended attributes included. Links are copied, never followed.
//
// Nobody may change a directory while it is copied who could not read all that
// the caller can: a directory that turns into a link under the copy would be
// followed. Whoever calls sees to it that the guest does not run. The programs
// that copy end with the program that started them, however that ends.
package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Copy makes dst, which must not exist, a copy of src, without copying blocks
// where the file system can share them. What a failed copy leaves is removed.
func Copy(ctx context.Context, dst, src string) error {
	return copyWith(ctx, dst, src, "cp", "-a", "--reflink=auto", "--no-target-directory", "--", src, dst)
}

// Keep is Copy for a copy that is only kept, and has many like it. Where the file
// system cannot share blocks, files whose content and attributes are the same
// in like, an earlier copy, become links to those; empty: there is none.
func Keep(ctx context.Context, dst, src, like string) error {
	err := copyWith(ctx, dst, src, "cp", "-a", "--reflink=always", "--no-target-directory", "--", src, dst)
	if err == nil || ctx.Err() != nil {
		return err
	}
	args := sync
	if like != "" {
		args = append(args[:len(args):len(args)], "--link-dest="+like)
	}
	return copyWith(ctx, dst, src, "rsync", append(args, "--", src+"/", dst+"/")...)
}

// PutBack makes dst, which may have changed, the same as src.
func PutBack(ctx context.Context, dst, src string) error {
	if err := run(ctx, "rsync", append(sync[:len(sync):len(sync)], "--delete", "--", src+"/", dst+"/")...); err != nil {
		return fmt.Errorf("make %s what it was: %w", dst, err)
	}
	return nil
}

// CanPutBack says what PutBack lacks on this host.
func CanPutBack() error {
	_, err := exec.LookPath("rsync")
	return missing("rsync", err)
}

// Remove deletes a directory, also one with directories that a copy has made
// read-only for their owner.
func Remove(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// What can be written by somebody else may be swapped for a link meanwhile.
	root, err := os.OpenRoot(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer root.Close()
	_ = fs.WalkDir(root.FS(), filepath.Base(dir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = root.Chmod(path, 0o700) // before it is read; what fails shows below
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// Rename gives a copy its name, unless something has that name meanwhile.
func Rename(dst, src string) error {
	err := unix.Renameat2(unix.AT_FDCWD, src, unix.AT_FDCWD, dst, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not every file system can
		if _, err = os.Lstat(dst); err == nil {
			err = fs.ErrExist
		} else if errors.Is(err, fs.ErrNotExist) {
			err = os.Rename(src, dst)
		}
	}
	if err != nil {
		return fmt.Errorf("name the copy %s: %w", dst, err)
	}
	return nil
}

// sync compares content, because times and sizes are the guest's to choose.
var sync = []string{"-aHAX", "--numeric-ids", "--checksum"}

func copyWith(ctx context.Context, dst, src, program string, args ...string) error {
	err := run(ctx, program, args...)
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("copy %s to %s: %w", src, dst, err), Remove(dst))
}

// run runs a program on one OS thread, because Linux sends the parent-death
// signal when the thread that forked ends (prctl(2)).
func run(ctx context.Context, program string, args ...string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		out, err := cmd.CombinedOutput()
		done <- explain(ctx, program, out, err)
	}()
	return <-done
}

func explain(ctx context.Context, program string, out []byte, err error) error {
	text := strings.Split(strings.TrimSpace(string(out)), "\n")
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound):
		return missing(program, err)
	case text[0] != "":
		return errors.New(strings.Join(text[max(0, len(text)-3):], "\n"))
	}
	return err
}

func missing(program string, err error) error {
	return vm.WithHint(vm.Classify(vm.ErrHost, err), "sudo apt-get install "+program)
}
