package main

import (
	"context"
	_ "embed"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/testenv"
)

//go:embed testdata/gpu-polkit.sh
var gpuPolkit string

// TestGPUPolkitRig: where there is no sudo, ordinary users take a card and a part
// of one through the real polkit, or are refused. It needs no virtual machine:
// namespaces keep the host's own files, message bus and processes out of it.
func TestGPUPolkitRig(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.Require(t, "unshare", "setpriv", "pkexec", "pkaction", "/usr/lib/polkit-1/polkitd", "dbus-daemon", "dbus-send")
	program, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute) // takes 3 s
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "sh", "-c", gpuPolkit, "sh", program)
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	var said []string
	for line := range strings.Lines(string(out)) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "rig "); ok {
			said = append(said, text)
		}
	}
	const free = "card of root, part of root, journals 0"
	want := []string{
		"not let by polkit: exit 3", "setup: exit 0", "own arguments: exit 1", "another command: exit 127",
		"bind: exit 0", "bound: card of nobody, part of nobody, journals 2", "another's: exit 5",
		"release the part: exit 0", "release: exit 0", "released: " + free, "another card: exit 5",
		"end: " + free, "log: 8 of nobody, 2 of daemon",
	}
	if diff := cmp.Diff(want, said); err != nil || diff != "" {
		t.Errorf("%v (-want +said)\n%s\nall that it said:\n%s", err, diff, out)
	}
	// It says what root has to do here, and that is not to write a line for sudo.
	if hint := "hint: let root run once what this prints: agentvm gpu helper-setup\n"; !strings.Contains(string(out), hint) {
		t.Errorf("no %q in\n%s", hint, out)
	}
}
