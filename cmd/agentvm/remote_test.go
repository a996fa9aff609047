package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestRemote takes a machine on another host through its day: this very host,
// by an SSH server of the test's own, with a home of its own.
func TestRemote(t *testing.T) {
	testenv.RequireRoot(t)
	lv := testenv.StartLibvirtd(t)
	there := newHost(t)
	if err := os.RemoveAll(filepath.Join(there.home, "cache")); err != nil { // it has no image
		t.Fatal(err)
	}
	sshd := testenv.StartSSHD(t, "HOME="+there.home, "AGENTVM_HOME="+there.home, "PATH="+os.Getenv("PATH"))
	h := newHost(t)
	t.Setenv("PATH", sshd.Bin+":"+os.Getenv("PATH"))
	uri := strings.Replace(lv.URI(), "qemu:///", "qemu+ssh://elsewhere/", 1)
	dir := h.project("far", "version: 1\nname: far\nresources: {memory: 1GiB}\nagent: {env: [PASSED]}\nbackend: libvirt\nuri: "+uri+"\n")
	d := day{h: h, dir: dir}
	d.write(t, "here", "from here\n")

	t.Run("up", func(t *testing.T) {
		o := h.must(dir, "up")
		t.Logf("%s\n%s", o.took, o.stderr)
		if v := h.status(dir); v.State != instance.Ready || v.Host != "elsewhere" || v.Workspace != dir {
			t.Fatalf("%+v", v)
		}
	})
	t.Run("workspace", func(t *testing.T) {
		if got := h.guest(dir, "cat here; echo changed >here; mkdir d; ln -s /etc/passwd d/link; echo x >d/x; chmod 750 d/x"); got != "from here\n" {
			t.Errorf("the guest sees %q", got)
		}
		out, err := exec.Command("sh", "-c", "cd \"$0\" && cat here d/x && readlink d/link && stat -c %a d/x", dir).CombinedOutput()
		if string(out) != "changed\nx\n/etc/passwd\n750\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("down", func(t *testing.T) {
		h.must(dir, "down")
		time.Sleep(0)
	})
}
