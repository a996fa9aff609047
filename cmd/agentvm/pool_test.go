package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
)

// pool lists the machines that wait.
func (h *host) pool() (list []spareView) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(h.home, "pool", "ls", "--json").stdout), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}

// filled waits until the pool has been filled beside the command that needed a
// machine.
func (h *host) filled(n int) []spareView {
	h.t.Helper()
	for range 3000 {
		if list := h.pool(); len(list) == n {
			return list
		}
		time.Sleep(100 * time.Millisecond)
	}
	log, _ := os.ReadFile(filepath.Join(h.home, "state", "pool.log"))
	h.t.Fatalf("the pool has %d machines, want %d\n%s", len(h.pool()), n, log)
	return nil
}

func (h *host) poolSize(n string) {
	h.t.Helper()
	path := filepath.Join(h.home, "config", "config.yaml")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("pool: "+n+"\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// TestPool claims machines that wait, loses one, and ends the rest.
func TestPool(t *testing.T) {
	h := newHost(t)
	const config = "version: 1\nresources: {memory: 512MiB}\ngit: {name: Ada}\n"
	first := h.project("first", config)
	h.poolSize("1")
	h.must(first, "up")
	waiting := h.filled(1)[0]
	if waiting.Memory != 512<<20 || waiting.Resident < 32<<20 || waiting.Disk == 0 {
		t.Errorf("listed as %+v", waiting)
	}
	if out := h.must(h.home, "image", "ls", "--json").stdout; !strings.Contains(out, `"the pool"`) {
		t.Errorf("the pool uses no image: %s", out)
	}

	// Two at once: one gets the machine that waits, the other a clone.
	dirs := []string{h.project("one", config), h.project("two", config)}
	var ups sync.WaitGroup
	for _, dir := range dirs {
		ups.Go(func() { h.must(dir, "up") })
	}
	ups.Wait()
	claimed, claims := "", 0
	ids := map[string]string{}
	for _, dir := range append(dirs, first) {
		name := filepath.Base(dir)
		self := h.is(dir, name)
		if other := ids[self.HostKey]; other != "" {
			t.Errorf("%s and %s have one host key", name, other)
		}
		ids[self.HostKey] = name
		id := h.spec(name).ID
		if self.MachineID != strings.ReplaceAll(id, "-", "") {
			t.Errorf("%s has machine-id %s, want that of %s", name, self.MachineID, id)
		}
		if strings.HasPrefix(id, waiting.ID) {
			claimed, claims = dir, claims+1
		}
	}
	if claims != 1 {
		t.Fatalf("%d machines were the one that waited", claims)
	}
	t.Run("claimed", func(t *testing.T) { h.claimedMachine(claimed) })

	h.filled(1)
	t.Run("killed", func(t *testing.T) {
		spares, err := h.store().Spares()
		if err != nil || len(spares) != 1 {
			t.Fatalf("%d spares: %v", len(spares), err)
		}
		status, err := spares[0].Status()
		if err != nil {
			t.Fatal(err)
		}
		if err := status.Supervisor.Kill(); err != nil {
			t.Fatal(err)
		}
		if list := h.pool(); len(list) != 0 {
			t.Errorf("a dead machine waits: %+v", list)
		}
		third := h.project("third", config)
		h.must(third, "up")
		h.is(third, "third")
		h.filled(1)
		if left, _ := filepath.Glob(filepath.Join(h.home, "state", "pool", "*")); len(left) != 1 {
			t.Errorf("the dead machine's files are left: %q", left)
		}
	})
	h.poolSize("0")
	if out := h.must(first, "pool", "fill").stderr; !strings.Contains(out, "to hold no machines") {
		t.Errorf("fill: %s", out)
	}
	if list := h.pool(); len(list) != 0 {
		t.Errorf("pool: 0, and there wait %+v", list)
	}
}

// claimedMachine uses a machine of the pool as any other.
func (h *host) claimedMachine(dir string) {
	h.t.Helper()
	name := filepath.Base(dir)
	if got := h.guest(dir, "echo of the guest >/workspace/out; git config user.name; date +%s >/dev/null; ls ~/.ssh"); got != "Ada\nauthorized_keys\n" {
		h.t.Errorf("in the guest: %q", got)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "out")); string(got) != "of the guest\n" {
		h.t.Errorf("out: %q, %v", got, err)
	}
	// It has rehearsed, and nothing of that is left.
	if got := h.guest(dir, "ls -d /run/rehearsal 2>/dev/null; grep -c virtiofs /proc/mounts"); got != "1\n" {
		h.t.Errorf("in the guest: %q", got)
	}
	if v := h.status(dir); !v.Restored || v.Processes["virtiofsd-workspace"] == 0 || v.Name != name {
		h.t.Errorf("status %+v", v)
	}
	// What tells a boot who the machine is was written into a file that QEMU had open.
	h.runIn(dir, "", "exec", "--", "sudo", "systemctl", "reboot")
	h.until(dir, instance.Booting)
	h.until(dir, instance.Ready)
	h.is(dir, name)
	h.must(dir, "suspend")
	h.must(dir, "resume")
	h.is(dir, name)
}
