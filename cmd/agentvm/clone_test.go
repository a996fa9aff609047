package main

import (
	_ "embed"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

//go:embed testdata/self.py
var selfProgram string

// self is who a guest is, and what is random in it.
type self struct {
	Random         map[string]string
	Clock          float64
	TCP            [][2]uint32 // for each of some connections, what the secret adds, measured twice
	Hostname       string
	HostnameFile   string
	MachineID      string
	BootID         string
	HostKey        string
	ServedKey      string
	AuthorizedKeys []string
}

func (h *host) self(dir string) (s self) {
	h.t.Helper()
	before := time.Now()
	o := h.runIn(dir, selfProgram, "exec", "-w", "/", "--", "sudo", "python3", "-")
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil {
		h.t.Fatalf("%v in %q\n%s", err, o.stdout, o.stderr)
	}
	// The guest looked at its clock somewhere in between.
	clock := time.Unix(0, int64(s.Clock*1e9))
	const slack = 2 * time.Second
	if clock.Before(before.Add(-slack)) || clock.After(before.Add(o.took+slack)) {
		h.t.Errorf("its clock says %s, and the host's said %s and %s later", clock, before, o.took)
	}
	return s
}

// is checks that a guest is the machine that its instance says it is.
func (h *host) is(dir, name string) self {
	h.t.Helper()
	s, inst := h.self(dir), h.instance(name)
	client, host := h.publicKey(inst, lifecycle.ClientKeyFile), h.publicKey(inst, lifecycle.HostKeyFile)
	withoutComment := func(key string) string {
		return strings.Join(strings.Fields(key)[:min(2, len(strings.Fields(key)))], " ")
	}
	for i, key := range s.AuthorizedKeys {
		s.AuthorizedKeys[i] = withoutComment(key)
	}
	for what, got := range map[string][2]string{
		"hostname":                {s.Hostname, name},
		"/etc/hostname":           {s.HostnameFile, name},
		"machine-id":              {s.MachineID, strings.ReplaceAll(h.spec(name).ID, "-", "")},
		"host key":                {withoutComment(s.HostKey), host},
		"host key that is served": {withoutComment(s.ServedKey), host},
		"authorized keys":         {strings.Join(s.AuthorizedKeys, "\n"), client},
	} {
		if got[0] != got[1] {
			h.t.Errorf("%s: its %s is %q, want %q", name, what, got[0], got[1])
		}
	}
	return s
}

func (h *host) publicKey(inst *instance.Instance, file string) string {
	h.t.Helper()
	key, err := readKey(inst, file)
	if err != nil {
		h.t.Fatal(err)
	}
	return strings.TrimSpace(string(gossh.MarshalAuthorizedKey(key.PublicKey())))
}

// near tells whether two offsets of sequence numbers are less than a second apart.
func near(a, b uint32) bool {
	const second = int32(time.Second / 64)
	d := int32(a - b)
	return d > -second && d < second && d != math.MinInt32
}

// TestTemplate starts two projects from one template and looks for what they
// have in common.
func TestTemplate(t *testing.T) {
	h := newHost(t)
	h.ownTemplates()
	data := filepath.Join(h.home, "w", "data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "in"), []byte("of the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	const resources = "resources: {memory: 512MiB}\n"
	dirs := map[string]string{
		"ada": h.project("ada", "version: 1\nname: ada\n"+resources+"git: {name: Ada, email: ada@example.org}\n"),
		"bob": h.project("bob", "version: 1\nname: bob\n"+resources+"git: {name: Bob, email: bob@example.org}\n"+
			"mounts: [{source: ../data, target: /data, readonly: true}]\n"),
	}
	h.must(dirs["ada"], "image", "build")

	// Both at once: one makes the template, the other waits for it.
	var mu sync.Mutex
	var wait sync.WaitGroup
	results := map[string]outcome{}
	for name, dir := range dirs {
		wait.Go(func() {
			o := h.runIn(dir, "", "up", "--trace")
			if o.code == 0 {
				o.code = h.runIn(dir, "", "exec", "--", "logger", "--tag=early", "at once").code
			}
			mu.Lock()
			defer mu.Unlock()
			results[name] = o
		})
	}
	wait.Wait()
	made, waited := 0, 0
	for name, o := range results {
		if o.code != 0 || !strings.Contains(o.stderr, "is restored after") {
			t.Fatalf("%s: exit code %d\n%s", name, o.code, o.stderr)
		}
		for _, phase := range []string{"memory", "login"} {
			if !strings.Contains(o.stdout, " ms  "+phaseName(phase)+"\n") {
				t.Errorf("--trace has no %q:\n%s", phaseName(phase), o.stdout)
			}
		}
		made += strings.Count(o.stderr, "making a template")
		waited += strings.Count(o.stderr, "waiting for it")
	}
	if made != 1 || waited != 1 {
		t.Errorf("%d made it and %d waited:\n%s\n%s", made, waited, results["ada"].stderr, results["bob"].stderr)
	}
	if list := h.templates(); len(list) != 1 || list[0].Memory != 512<<20 {
		t.Fatalf("templates: %+v", list)
	}

	t.Run("each is itself", func(t *testing.T) { eachItself(t, h, dirs) })
	t.Run("nothing is left of the template", func(t *testing.T) {
		for script, want := range map[string]string{
			"cd && stat -c '%U:%G %a' . .ssh .ssh/authorized_keys": "agent:agent 700\nagent:agent 700\nagent:agent 600\n",
			"sudo find ~ ! -user agent":                            "",
			"sudo find /var/lib/cloud/instance /var/lib/cloud/instances /var/lib/cloud/data -mindepth 1 2>/dev/null || :": "",
			"grep iso9660 /proc/mounts || :": "",
			"for i in $(seq 300); do pgrep -af '[a]gentvm-listen' >/tmp/l || break; sleep 0.1; done; cat /tmp/l": "", // it is about to end
			"systemctl is-system-running": "running\n",
			"sudo grep -rlsI -e '[P]RIVATE KEY' /etc /home /root /run /tmp /var || :": "/etc/ssh/ssh_host_ed25519_key\n",
			// The template's is deleted, and what was logged before it began is in the new one.
			"timeout 60 sh -c 'until sudo journalctl --boot --quiet --output=cat --identifier=early | grep .; do sleep 0.1; done';" +
				"sudo journalctl --boot --output=cat --dmesg | grep -o -e 'Linux version' -e 'virtual machine fork'": "at once\nvirtual machine fork\n",
			"timeout 60 udevadm settle; echo $?": "0\n", // its queue is held at first
			"git config core.checkStat":          "minimal\n",
			"git config user.email":              "ada@example.org\n",
		} {
			if got := h.guest(dirs["ada"], script); got != want {
				t.Errorf("%s: %q, want %q", script, got, want)
			}
		}
	})
	h.must(dirs["ada"], "down")

	// What has been given to a clone is there after its own boots too.
	bob := dirs["bob"]
	shares := func(t *testing.T) {
		t.Helper()
		h.guest(bob, "echo of the guest >/workspace/made && rm /workspace/made")
		if got := h.guest(bob, "cat /data/in; git config user.email"); got != "of the host\nbob@example.org\n" {
			t.Errorf("it sees %q", got)
		}
		if o := h.runIn(bob, "", "exec", "--", "sudo", "touch", "/data/new"); o.code == 0 {
			t.Error("it could write to a read-only mount")
		}
		if got := h.guest(bob, "findmnt --noheadings --output=OPTIONS /data"); !strings.HasPrefix(got, "ro,") {
			t.Errorf("/data is mounted %s", got)
		}
	}
	t.Run("shares", shares)
	first := h.is(bob, "bob")
	boots := []string{first.BootID}
	again := func(t *testing.T) {
		t.Helper()
		s := h.is(bob, "bob")
		if slices.Contains(boots, s.BootID) {
			t.Errorf("boot %s is an old one", s.BootID)
		}
		boots = append(boots, s.BootID)
		shares(t)
		for script, want := range map[string]string{
			"cat ~/kept":                     "of the clone\n",
			"systemctl --failed --no-legend": "",
			`python3 -c 'import json; print(json.load(open("/run/cloud-init/result.json"))["v1"]["errors"])'`: "[]\n",
		} {
			if got := h.guest(bob, script); got != want {
				t.Errorf("%s: %q, want %q", script, got, want)
			}
		}
	}
	t.Run("restarted from inside", func(t *testing.T) {
		h.guest(bob, "echo of the clone >~/kept; sync")
		h.runIn(bob, "", "exec", "--", "sudo", "reboot")
		h.until(bob, instance.Booting)
		h.must(bob, "up")
		again(t)
	})
	t.Run("stopped and started", func(t *testing.T) {
		h.must(bob, "stop")
		if c := h.up(bob); c.Restored {
			t.Error("a disk that was used goes on from a template")
		}
		again(t)
	})
}

// eachItself compares two clones and the host.
func eachItself(t *testing.T, h *host, dirs map[string]string) {
	ada, bob := h.is(dirs["ada"], "ada"), h.is(dirs["bob"], "bob")
	for what, pair := range map[string][2]string{
		"boot id":         {ada.BootID, bob.BootID},
		"machine id":      {ada.MachineID, bob.MachineID},
		"host key":        {ada.HostKey, bob.HostKey},
		"authorized keys": {strings.Join(ada.AuthorizedKeys, "\n"), strings.Join(bob.AuthorizedKeys, "\n")},
	} {
		if pair[0] == pair[1] {
			t.Errorf("both have the %s %q", what, pair[0])
		}
	}
	for path, of := range map[string][2]string{
		"/proc/sys/kernel/random/boot_id": {ada.BootID, bob.BootID},
		"/etc/machine-id":                 {ada.MachineID, bob.MachineID},
		"/etc/hostname":                   {ada.Hostname, bob.Hostname},
	} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // not every host has them all
		}
		if mine := strings.TrimSpace(string(text)); mine == of[0] || mine == of[1] {
			t.Errorf("%s is the host's: %s", path, mine)
		}
	}
	for what, text := range ada.Random {
		if len(text) < 32 || text == bob.Random[what] {
			t.Errorf("%s gives %q and %q", what, text, bob.Random[what])
		}
	}
	// Two measurements in a guest agree, or they mean nothing; two guests may
	// come near each other by chance once in 130 connections.
	related := 0
	for i, a := range ada.TCP {
		b := bob.TCP[i]
		if !near(a[0], a[1]) || !near(b[0], b[1]) {
			t.Errorf("sequence numbers of one guest and one connection differ: %v, %v", a, b)
		}
		if near(a[0], b[0]) {
			related++
		}
	}
	if len(ada.TCP) < 4 || related == len(ada.TCP) {
		t.Errorf("both have the kernel's secret of TCP sequence numbers: %v, %v", ada.TCP, bob.TCP)
	}
}
