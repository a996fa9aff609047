package libvirt

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
)

func TestConfined(t *testing.T) {
	const good = "Name:\tqemu\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\nSeccomp:\t2\n"
	owner := &vm.Owner{UID: 1000, GID: 1000}
	for name, tt := range map[string]struct {
		status string
		owner  *vm.Owner
		says   string // empty: fine
	}{
		"the owner's":        {good, owner, ""},
		"a session's":        {good, nil, ""},
		"root's":             {strings.ReplaceAll(good, "1000", "0"), nil, "as user 0"},
		"saved root":         {strings.Replace(good, "1000\n", "0\n", 1), owner, "as user 0"},
		"somebody else's":    {strings.ReplaceAll(good, "1000", "64055"), owner, "as user 64055"},
		"with capabilities":  {strings.Replace(good, "CapEff:\t0", "CapEff:\t8", 1), owner, "with capabilities"},
		"without a filter":   {strings.Replace(good, "Seccomp:\t2", "Seccomp:\t0", 1), owner, "without a seccomp filter"},
		"with a strange one": {strings.Replace(good, "Seccomp:\t2", "Seccomp:\t1", 1), owner, "without a seccomp filter"},
		"nothing said":       {"Name:\tqemu\n", owner, "no users"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.MkdirAll(filepath.Join(root, "proc", "7"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, "proc", "7", "status"), []byte(tt.status), 0o644); err != nil {
				t.Fatal(err)
			}
			err := checkConfined(root, vm.ProcID{PID: 7}, tt.owner)
			if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("%v, want %q", err, tt.says)
			}
		})
	}
}
