package userns

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/agentvm/agentvm/vm"
)

func TestCheck(t *testing.T) {
	const (
		most     = "proc/sys/user/max_user_namespaces"
		clone    = "proc/sys/kernel/unprivileged_userns_clone"
		appArmor = "proc/sys/kernel/apparmor_restrict_unprivileged_userns"
		support  = "proc/self/ns/user"
	)
	for _, tt := range []struct {
		name       string
		files      map[string]string
		privileged bool
		want       vm.Finding
	}{
		{"fine", map[string]string{support: "", most: "1000\n"}, false, vm.Finding{Status: vm.FindingOK, Detail: "allowed"}},
		{"none", map[string]string{support: "", most: "0\n"}, true,
			vm.Finding{Status: vm.FindingFail, Detail: "none are allowed (user.max_user_namespaces=0)", Fix: "sudo sysctl -w user.max_user_namespaces=10000"}},
		{"old Debian", map[string]string{support: "", clone: "0\n"}, false,
			vm.Finding{Status: vm.FindingFail, Detail: "only root may make them (kernel.unprivileged_userns_clone=0)", Fix: "sudo sysctl -w kernel.unprivileged_userns_clone=1"}},
		{"old Debian, root", map[string]string{support: "", clone: "0\n"}, true, vm.Finding{Status: vm.FindingOK, Detail: "allowed"}},
		{"Ubuntu", map[string]string{support: "", appArmor: "1\n"}, false,
			vm.Finding{Status: vm.FindingFail, Detail: "AppArmor takes their capabilities (kernel.apparmor_restrict_unprivileged_userns=1)",
				Fix: "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"}},
		{"not built in", nil, true, vm.Finding{Status: vm.FindingFail, Detail: "the kernel was built without them"}},
	} {
		root := t.TempDir()
		for name, text := range tt.files {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		tt.want.Name = "user namespaces"
		if got := Check(root, tt.privileged); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}
