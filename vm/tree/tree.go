// Package tree copies directories as they are: owners, modes, times, links and
// extended attributes included. Links are copied, never followed.
//
// Nobody may change a directory while it is copied who could not read all that
// the caller can: a directory that turns into a link under the copy would be
// followed. Whoever calls sees to it that the guest does not run.
package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

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

// sync compares content, because times and sizes are the guest's to choose.
var sync = []string{"-aHAX", "--numeric-ids", "--checksum"}

func copyWith(ctx context.Context, dst, src, program string, args ...string) error {
	err := run(ctx, program, args...)
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("copy %s to %s: %w", src, dst, err), os.RemoveAll(dst))
}

func run(ctx context.Context, program string, args ...string) error {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	text := strings.Split(strings.TrimSpace(string(out)), "\n")
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, exec.ErrNotFound):
		return vm.WithHint(vm.Classify(vm.ErrHost, err), "sudo apt-get install "+program)
	case text[0] != "":
		return errors.New(strings.Join(text[max(0, len(text)-3):], "\n"))
	}
	return err
}
