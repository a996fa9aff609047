package main

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"errors"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/template"
)

// ownTemplates gives the host a store of templates for itself, empty, for
// tests that count, damage or interrupt them.
func (h *host) ownTemplates() {
	h.t.Helper()
	if err := os.Remove(h.templateDir()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { h.run("template", "prune", "--all") })
}

func (h *host) templateDir() string { return filepath.Join(h.home, "cache", "templates") }

func (h *host) templates() (list []templateView) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(h.home, "template", "ls", "--json").stdout), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}

func (h *host) machines() (list []view) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(h.home, "ls", "--json").stdout), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}

// came is what `up --json` says of a machine.
type came struct {
	Restored bool `json:"restored"`
	Status   view `json:"status"`
	notes    string
}

// up brings the project's machine up, without any warning.
func (h *host) up(dir string, flags ...string) (c came) {
	h.t.Helper()
	o := h.must(dir, append([]string{"up", "--json"}, flags...)...)
	if err := json.Unmarshal([]byte(o.stdout), &c); err != nil {
		h.t.Fatalf("up --json: %v in %s", err, o.stdout)
	}
	if c.Status.State != instance.Ready || len(c.Status.Warnings) > 0 {
		h.t.Errorf("it is %s: %v", c.Status.State, c.Status.Warnings)
	}
	c.notes = o.stderr
	return c
}

// when runs a command, and acts once it has said something.
func (h *host) when(dir, says string, act func(*os.Process), args ...string) outcome {
	h.t.Helper()
	cmd := h.command(dir, args...)
	pipe, err := cmd.StderrPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	defer time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() }).Stop()
	var stderr strings.Builder
	acted := false
	for lines := bufio.NewScanner(pipe); lines.Scan(); {
		stderr.WriteString(lines.Text() + "\n")
		if !acted && strings.Contains(lines.Text(), says) {
			acted = true
			act(cmd.Process)
		}
	}
	_ = cmd.Wait()
	if !acted {
		h.t.Fatalf("agentvm %q never says %q:\n%s", args, says, &stderr)
	}
	return outcome{"", stderr.String(), cmd.ProcessState.ExitCode(), time.Since(begun)}
}

// pid waits for a process of this host with all these words in its arguments.
func (h *host) pid(words ...string) int {
	h.t.Helper()
	for range 1000 {
		for _, p := range h.processes() {
			number, args, _ := strings.Cut(p, ": ")
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(args, w) }) {
				pid, _ := strconv.Atoi(number)
				return pid
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.t.Fatalf("no process has %q", words)
	return 0
}

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
			o := h.runIn(dir, "", "up")
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
			"grep iso9660 /proc/mounts || :":                                          "",
			"pgrep -af '[a]gentvm-listen' || :":                                       "",
			"systemctl is-system-running":                                             "running\n",
			"sudo grep -rlsI -e '[P]RIVATE KEY' /etc /home /root /run /tmp /var || :": "/etc/ssh/ssh_host_ed25519_key\n",
			"sudo journalctl --boot --quiet --lines=1 --output=cat 2>&1 | wc -l":      "1\n",
			"git config core.checkStat":                                               "minimal\n",
			"git config user.email":                                                   "ada@example.org\n",
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

// TestTemplateDamaged starts from templates that are good no more: each time
// the machine boots, says why, and the template is gone.
func TestTemplateDamaged(t *testing.T) {
	h := newHost(t)
	h.ownTemplates()
	const config = "version: 1\nresources: {memory: 512MiB}\n"
	dir := h.project("p", config)
	h.must(dir, "template", "build")
	id := h.templates()[0].ID
	at := filepath.Join(h.templateDir(), id)
	whole := filepath.Join(h.home, "whole")
	copyDir := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	copyDir(at, whole)
	edit := func(name string, change func([]byte) []byte) {
		t.Helper()
		path := filepath.Join(at, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, change(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name, says string
		damage     func(t *testing.T)
	}{
		{"a byte of memory", "memory has changed", func(*testing.T) {
			edit("memory", func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}},
		{"state cut short", "state has changed", func(*testing.T) {
			edit("state", func(b []byte) []byte { return b[:len(b)-100] })
		}},
		{"no disk", template.DiskFile, func(t *testing.T) {
			if err := os.Remove(filepath.Join(at, template.DiskFile)); err != nil {
				t.Fatal(err)
			}
		}},
		{"QEMU is killed", "signal: killed", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := os.Stat(at); err != nil {
				copyDir(whole, at)
			}
			var o outcome
			if tt.damage != nil {
				tt.damage(t)
				o = h.must(dir, "up")
			} else { // the template is good, and the machine that goes on from it dies
				o = h.when(dir, "running again", func(*os.Process) {
					_ = syscall.Kill(h.pid(qemuBinary, "instances"), syscall.SIGKILL)
				}, "up")
			}
			if o.code != 0 || !strings.Contains(o.stderr, "it boots instead") || !strings.Contains(o.stderr, tt.says) || !strings.Contains(o.stderr, "is ready after") {
				t.Errorf("exit code %d, want %q in\n%s", o.code, tt.says, o.stderr)
			}
			if v := h.status(dir); v.State != instance.Ready || len(v.Warnings) > 0 {
				t.Errorf("it is %s: %v", v.State, v.Warnings)
			}
			h.guest(dir, "echo x >/workspace/made")
			if list := h.templates(); len(list) > 0 {
				t.Errorf("the template is still there: %+v", list)
			}
			h.must(dir, "down")
		})
	}
	t.Run("the next makes another", func(t *testing.T) {
		next := h.project("next", config)
		o := h.when(next, "making a template", func(p *os.Process) { _ = p.Signal(syscall.SIGINT) }, "up")
		if o.code != exitInterrupt {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		h.nothingLeft()
	})
}

// TestTemplateKilled ends what makes a template, and what starts from one, in
// the middle. Nothing half made is ever found.
func TestTemplateKilled(t *testing.T) {
	h := newHost(t)
	h.ownTemplates()
	dir := h.project("p", "version: 1\nname: victim\nresources: {memory: 512MiB}\n")
	h.must(dir, "image", "build")
	signal := func(s syscall.Signal) func(*os.Process) { return func(p *os.Process) { _ = p.Signal(s) } }
	// inMiddle waits for the template's guest to boot.
	inMiddle := func(act func(*os.Process)) func(*os.Process) {
		return func(p *os.Process) {
			h.pid(qemuBinary, "making")
			time.Sleep(time.Second)
			act(p)
		}
	}
	clean := func(t *testing.T) {
		t.Helper()
		h.nothingLeft()
		if list := h.templates(); len(list) > 0 {
			t.Errorf("half a template is found: %+v", list)
		}
		if left, _ := filepath.Glob(filepath.Join(h.templateDir(), "making", "*")); len(left) > 0 {
			t.Errorf("left half made: %v", left)
		}
	}
	const making = "making a template"

	t.Run("interrupted", func(t *testing.T) {
		o := h.when(dir, making, inMiddle(signal(syscall.SIGINT)), "up")
		if o.code != exitInterrupt || o.took > 20*time.Second {
			t.Errorf("exit code %d after %s\n%s", o.code, o.took, o.stderr)
		}
		clean(t)
		if list := h.machines(); len(list) > 0 {
			t.Errorf("left: %+v", list)
		}
	})

	t.Run("up is killed", func(t *testing.T) {
		h.when(dir, making, inMiddle(signal(syscall.SIGKILL)), "up")
		if list := h.templates(); len(list) > 0 {
			t.Errorf("half a template is found: %+v", list)
		}
		h.must(dir, "template", "prune")
		clean(t)
	})

	t.Run("supervisor is killed", func(t *testing.T) {
		o := h.when(dir, making, inMiddle(func(*os.Process) {
			_ = syscall.Kill(h.pid("supervise", "making"), syscall.SIGKILL)
		}), "template", "build")
		if o.code != exitFailure || !strings.Contains(o.stderr, "was killed while") {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		clean(t)
	})

	t.Run("QEMU is killed", func(t *testing.T) {
		o := h.when(dir, making, inMiddle(func(*os.Process) {
			_ = syscall.Kill(h.pid(qemuBinary, "making"), syscall.SIGKILL)
		}), "up")
		if o.code != 0 || !strings.Contains(o.stderr, "there is no template for it") || !strings.Contains(o.stderr, "signal: killed") {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		if v := h.status(dir); v.State != instance.Ready {
			t.Errorf("it is %s: %s", v.State, v.Reason)
		}
		h.must(dir, "down")
		clean(t)
	})

	t.Run("cold", func(t *testing.T) {
		o := h.when(dir, "QEMU (", signal(syscall.SIGINT), "up", "--cold")
		if o.code != exitInterrupt || strings.Contains(o.stderr, making) {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		clean(t)
	})

	if c := h.up(dir); !c.Restored {
		t.Errorf("after all that it boots:\n%s", c.notes)
	}
	h.must(dir, "down")
	before := h.templates()
	if len(before) != 1 {
		t.Fatalf("templates: %+v", before)
	}
	for _, says := range []string{"memory loaded", "running again"} {
		t.Run("interrupted after "+says, func(t *testing.T) {
			o := h.when(dir, says, signal(syscall.SIGINT), "up")
			if o.code != exitInterrupt || o.took > 20*time.Second {
				t.Errorf("exit code %d after %s\n%s", o.code, o.took, o.stderr)
			}
			h.nothingLeft()
			if list := h.machines(); len(list) > 0 {
				t.Errorf("left: %+v", list)
			}
			if list := h.templates(); len(list) != 1 || list[0].ID != before[0].ID {
				t.Errorf("templates: %+v", list)
			}
		})
	}
	used := h.templates()[0].Used
	if c := h.up(dir, "--cold"); c.Restored || !h.templates()[0].Used.Equal(used) {
		t.Error("--cold has used the template")
	}
}
