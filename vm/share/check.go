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
)

// enoughFiles lets a guest remember a large source tree: virtiofsd holds a
// descriptor for each inode.
const enoughFiles = 65536

// Check looks at all that Start needs of the host. Paths are as for Probe.
func Check(ctx context.Context, paths ...string) []vm.Finding {
	findings := []vm.Finding{checkVirtiofsd(ctx, paths)}
	return append(findings, checkHost("/", os.Geteuid() == 0)...)
}

func checkVirtiofsd(ctx context.Context, paths []string) vm.Finding {
	f := vm.Finding{Name: "virtiofsd", Status: vm.FindingOK}
	caps, err := Probe(ctx, paths...)
	if err != nil {
		f.Status, f.Detail, f.Fix = vm.FindingFail, err.Error(), installHint
		return f
	}
	f.Detail = fmt.Sprintf("%s, %s", caps.Path, caps.Version)
	return f
}

// checkHost reads kernel settings below root.
func checkHost(root string, privileged bool) []vm.Finding {
	ns := vm.Finding{Name: "user namespaces", Status: vm.FindingOK}
	for _, s := range []struct {
		name, bad, detail string
		unprivileged      bool // concerns only ordinary users
	}{
		{"user.max_user_namespaces", "0", "none are allowed", false},
		{"kernel.unprivileged_userns_clone", "0", "only root may make them", true},
		{"kernel.apparmor_restrict_unprivileged_userns", "1", "AppArmor takes their capabilities", true},
	} {
		if s.unprivileged && privileged {
			continue
		}
		if v, ok := sysctl(root, s.name); ok && v == s.bad {
			ns.Status, ns.Detail = vm.FindingFail, s.detail+" ("+s.name+"="+v+")"
			good := "1"
			switch s.bad {
			case "1":
				good = "0"
			case "0":
				if !s.unprivileged {
					good = "10000"
				}
			}
			ns.Fix = "sudo sysctl -w " + s.name + "=" + good
			break
		}
	}
	if _, err := os.Stat(filepath.Join(root, "proc/self/ns/user")); err != nil {
		ns.Status, ns.Detail = vm.FindingFail, "the kernel was built without them"
	}
	return []vm.Finding{ns, checkFileLimit(root, privileged)}
}

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
