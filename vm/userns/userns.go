// Package userns looks whether this host lets its users make user namespaces.
// Shares run virtiofsd in one and image builds unpack in one, so both ask here.
package userns

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Check reads the kernel's settings below root, "/" for the real host, for an
// ordinary or a privileged user. It changes nothing.
func Check(root string, privileged bool) vm.Finding {
	f := vm.Finding{Name: "user namespaces", Status: vm.FindingOK, Detail: "allowed"}
	for _, s := range []struct {
		name, bad, detail, good string
		unprivileged            bool // concerns only ordinary users
	}{
		{"user.max_user_namespaces", "0", "none are allowed", "10000", false},
		{"kernel.unprivileged_userns_clone", "0", "only root may make them", "1", true},
		{"kernel.apparmor_restrict_unprivileged_userns", "1", "AppArmor takes their capabilities", "0", true},
	} {
		if s.unprivileged && privileged {
			continue
		}
		value, err := os.ReadFile(filepath.Join(root, "proc/sys", strings.ReplaceAll(s.name, ".", "/")))
		if err == nil && strings.TrimSpace(string(value)) == s.bad {
			f.Status, f.Detail, f.Fix = vm.FindingFail, s.detail+" ("+s.name+"="+s.bad+")", "sudo sysctl -w "+s.name+"="+s.good
			break
		}
	}
	if _, err := os.Stat(filepath.Join(root, "proc/self/ns/user")); err != nil {
		f.Status, f.Detail, f.Fix = vm.FindingFail, "the kernel was built without them", ""
	}
	return f
}
