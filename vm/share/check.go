package share

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/userns"
)

// enoughFiles lets a guest remember a large source tree: virtiofsd holds a
// descriptor for each inode.
const enoughFiles = 65536

// Check looks at all that Start needs of the host. Paths are as for Probe.
func Check(ctx context.Context, paths ...string) []vm.Finding {
	privileged := os.Geteuid() == 0
	return []vm.Finding{checkVirtiofsd(ctx, paths), userns.Check("/", privileged), checkFileLimit("/", privileged)}
}

func checkVirtiofsd(ctx context.Context, paths []string) vm.Finding {
	f := vm.Finding{Name: "virtiofsd", Status: vm.FindingOK}
	caps, err := Probe(ctx, "", paths...)
	if err != nil {
		f.Status, f.Detail, f.Fix = vm.FindingFail, err.Error(), installHint
		return f
	}
	f.Detail = fmt.Sprintf("%s, %s", caps.Path, caps.Version)
	return f
}

// checkFileLimit reads kernel settings below root.
func checkFileLimit(root string, privileged bool) vm.Finding {
	f := vm.Finding{Name: "open files", Status: vm.FindingOK}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		f.Status, f.Detail = vm.FindingWarn, err.Error()
		return f
	}
	most := limit.Max
	if v, ok := sysctl(root, "fs.nr_open"); ok && privileged {
		if n, err := strconv.ParseUint(v, 10, 64); err == nil {
			most = n
		}
	}
	f.Detail = fmt.Sprintf("at most %d", most)
	if most < enoughFiles {
		f.Status = vm.FindingWarn
		f.Detail += fmt.Sprintf("; a guest that walks more than that many files of the workspace gets errors, %d is safe", enoughFiles)
		f.Fix = fmt.Sprintf("echo '* hard nofile %d' | sudo tee /etc/security/limits.d/agentvm.conf, then log in again", 1<<20)
	}
	return f
}

func sysctl(root, name string) (string, bool) {
	b, err := os.ReadFile(filepath.Join(root, "proc/sys", strings.ReplaceAll(name, ".", "/")))
	if err != nil {
		return "", false
	}
	return strings.TrimSpace(string(b)), true
}

const hintDoctor = "agentvm doctor"

// explainStart classifies the failure to make the daemon's process.
func explainStart(err error) error {
	err = fmt.Errorf("start virtiofsd in namespaces of its own: %w", err)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS) {
		return vm.WithHint(vm.Classify(vm.ErrHost, err), hintDoctor)
	}
	return err
}

// explainStage does so for the stage, whose errors arrive as text and number.
func explainStage(rep report) error {
	err := errors.New(rep.Error)
	switch unix.Errno(rep.Errno) {
	case unix.EPERM, unix.EACCES:
		return vm.WithHint(vm.Classify(vm.ErrHost, err), hintDoctor)
	case unix.ENOSYS:
		return vm.WithHint(vm.Classify(vm.ErrHost, err), "mount_setattr needs Linux 5.12 or newer")
	}
	return err
}
