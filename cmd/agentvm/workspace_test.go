package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/instance"
)

// TestWorkspaceCopies: a snapshot of a machine in use with its workspace, put
// back; and forks that look at the workspace and cannot write to it.
func TestWorkspaceCopies(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	dir := h.project("p", "version: 1\nname: worker\nresources: {memory: 512MiB}\ngit: {name: Ada}\n")
	h.up(dir)
	h.guest(dir, "echo one >/workspace/file; echo one >~/kept; (cd / && setsid sleep 98765 >/dev/null 2>&1 </dev/null &)")

	end := h.busyShare(dir)
	h.must(dir, "snapshot", "create", "busy", "--disk-only", "--workspace")
	if v := h.status(dir); v.State != instance.Ready {
		t.Errorf("status %+v", v)
	}
	end()
	h.must(dir, "snapshot", "create", "whole", "--workspace")
	for _, s := range h.snapshots(dir) {
		if !s.WithWorkspace || s.Memory != (s.Name == "whole") {
			t.Errorf("listed as %+v", s)
		}
	}
	h.guest(dir, "echo two >/workspace/file; echo new >/workspace/new; echo two >~/kept; pkill -f 'sleep 9876[5]'")

	h.must(dir, "snapshot", "restore", "whole", "--workspace")
	if got := h.guest(dir, "pgrep -c -f 'sleep 9876[5]'; cat /workspace/file ~/kept; ls /workspace"); got != "1\none\none\nagentvm.yaml\nfile\n" {
		t.Errorf("restored: %q", got)
	}
	h.must(dir, "snapshot", "restore", "before-restore", "--workspace")
	if got, err := os.ReadFile(filepath.Join(dir, "new")); string(got) != "new\n" {
		t.Errorf("undone: %q, %v", got, err)
	}
	h.must(dir, "snapshot", "restore", "busy", "--workspace")
	h.must(dir, "start")
	if got := h.guest(dir, "cat /workspace/file ~/kept"); got != "one\none\n" {
		t.Errorf("booted from the disk: %q", got)
	}

	h.must(dir, "fork", "--readonly")
	const view = "worker-fork-1"
	for _, start := range []string{"forked", "restarted"} {
		if got := h.guest(dir, "echo "+start+" >/workspace/file"); got != "" {
			t.Error(got)
		}
		o := h.runIn(dir, "", "exec", "-n", view, "--", "sh", "-c", "cat /workspace/file; hostname; sudo sh -c 'echo x >/workspace/file; mount -o remount,rw /workspace; echo x >/workspace/file'")
		if o.stdout != start+"\n"+view+"\n" || o.code == 0 || !strings.Contains(o.stderr, "Read-only file system") {
			t.Errorf("%s: %+v", start, o)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "file")); string(got) != start+"\n" {
			t.Errorf("%s: the file is %q, %v", start, got, err)
		}
		if start == "forked" {
			h.must(dir, "restart", view)
		}
	}
	h.must(dir, "down", view)
	if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
		t.Error(err)
	}
}
