package main

import (
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
)

// day is a machine whose day's work is gone through, whoever runs it.
type day struct {
	h       *host
	dir     string // the workspace on the host
	data    string // the directory that is at /data
	service string // what model.internal leads to
}

// dayConfig is its configuration, but for its workspace and who runs it.
func dayConfig(data, service string) string {
	return fmt.Sprintf(`version: 1
name: day
resources: {memory: 1GiB}
workspace: {protect: [keep], hide: [secret.env]}
mounts: [{source: %q, target: /data, readonly: true}]
provision: {run: ["echo once >>provisioned"]}
network: {services: [{name: model.internal, port: 80, target: %q}]}
git: {name: "Ada O'Lovelace", email: ada@example.org}
env: {GREETING: "it's, me"}
`, data, service)
}

// newDay makes the project and what it shares.
func newDay(t *testing.T, h *host, more string) day {
	t.Helper()
	d := day{h: h, service: httpService(t), data: filepath.Join(h.home, "w", "data")}
	if err := os.MkdirAll(d.data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.data, "in"), []byte("of the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	d.dir = h.project(oddName, dayConfig(d.data, d.service)+more)
	d.write(t, "keep", "as it was\n")
	d.write(t, "secret.env", "TOKEN=1\n")
	if err := os.Mkdir(filepath.Join(d.dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d day) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(d.dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// dayCases are what every backend has to get right.
var dayCases = []struct {
	name string
	run  func(*testing.T, day)
}{
	{"files are the owner's", dayFiles},
	{"exec", dayExec},
	{"interrupt reaches the program", dayInterrupt},
	{"workspace", dayWorkspace},
	{"network", dayNetwork},
	{"cp", dayCopy},
	{"guest panics", dayPanic},
	{"suspend", daySuspend},
	{"snapshot", daySnapshot},
}

func dayFiles(t *testing.T, d day) {
	h := d.h
	for _, top := range []string{"state/instances/day", "run"} {
		err := filepath.WalkDir(filepath.Join(h.home, top), func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			fi, err := e.Info()
			if err == nil && fi.Mode()&0o077 != 0 {
				t.Errorf("%s is %s", path, fi.Mode())
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func dayExec(t *testing.T, d day) {
	h := d.h
	dir := d.dir
	for _, tt := range []struct {
		name   string
		args   []string
		stdin  string
		stdout string
		code   int
	}{
		{"exit code", []string{"--", "sh", "-c", "exit 42"}, "", "", 42},
		{"signal", []string{"--", "sh", "-c", "kill -TERM $$"}, "", "", 143},
		{"arguments", []string{"--", "printf", "%s|", "a b", "", "'", "\"", "$HOME", "\\", "*", "\n"}, "", "a b||'|\"|$HOME|\\|*|\n|", 0},
		{"stdin", []string{"--", "cat"}, "line\x00binary\xff", "line\x00binary\xff", 0},
		{"no stdin", []string{"--no-stdin", "--", "cat"}, "unread", "", 0},
		{"directory", []string{"--", "pwd"}, "", "/workspace\n", 0},
		{"other directory", []string{"-w", "/data", "--", "cat", "in"}, "", "of the host\n", 0},
		{"environment", []string{"-e", "A=it's $5", "--", "sh", "-c", "echo $A, $GREETING, $AGENTVM_TEST_SECRET."}, "", "it's $5, it's, me, .\n", 0},
		{"not found", []string{"--", "no-such-program"}, "", "", 127},
		{"user", []string{"--", "id", "-un"}, "", "agent\n", 0},
		{"git identity", []string{"--", "git", "config", "user.name"}, "", "Ada O'Lovelace\n", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := h.runIn(dir, tt.stdin, append([]string{"exec"}, tt.args...)...)
			if o.stdout != tt.stdout || o.code != tt.code {
				t.Errorf("%q, exit code %d\n%s", o.stdout, o.code, o.stderr)
			}
		})
	}
	if got := h.must(filepath.Join(dir, "sub"), "exec", "--", "pwd").stdout; got != "/workspace/sub\n" {
		t.Errorf("in a subdirectory: %q", got)
	}
	// The agent is a shell.
	if o := h.runIn(dir, "", "run", "--", "-c", `echo "$GREETING, $AGENTVM_TEST_SECRET."; pwd; exit 3`); o.stdout != "it's, me, .\n/workspace\n" || o.code != 3 {
		t.Errorf("run: %q, exit code %d\n%s", o.stdout, o.code, o.stderr)
	}
	if o := h.runIn(dir, "id -un; exit 7\n", "shell"); o.stdout != "agent\n" || o.code != 7 {
		t.Errorf("shell: %q, exit code %d\n%s", o.stdout, o.code, o.stderr)
	}
}

func dayInterrupt(t *testing.T, d day) {
	h := d.h
	dir := d.dir
	cmd := h.command(dir, "exec", "--", "sh", "-c", `trap 'echo caught; exit 9' INT; echo go; while :; do sleep 0.1; done`)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(out, buf); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Signal(syscall.SIGINT)
	rest, _ := io.ReadAll(out)
	_ = cmd.Wait()
	if string(rest) != "caught\n" || cmd.ProcessState.ExitCode() != 9 {
		t.Errorf("%q, exit code %d", rest, cmd.ProcessState.ExitCode())
	}
}

func dayWorkspace(t *testing.T, d day) {
	h := d.h
	dir := d.dir
	data := d.data
	h.guest(dir, "echo made >made && mkdir d && echo x >d/x && chmod 600 d/x")
	me, _ := user.Current()
	for _, name := range []string{"made", "d", "d/x", "provisioned"} {
		fi, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st := fi.Sys().(*syscall.Stat_t); strconv.Itoa(int(st.Uid)) != me.Uid || strconv.Itoa(int(st.Gid)) != me.Gid {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
	d.write(t, "made", "changed by the host\n")
	for range 200 { // at once, or as good as
		if h.guest(dir, "cat made") == "changed by the host\n" {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if got := h.guest(dir, "cat made"); got != "changed by the host\n" {
		t.Errorf("the guest still sees %q", got)
	}
	if got := h.guest(dir, "cat secret.env"); got != "" {
		t.Errorf("the guest sees the hidden file: %q", got)
	}
	for name, script := range map[string]string{
		"device node":        "sudo mknod dev c 1 3",
		"foreign owner":      "sudo chown 1234 made && test $(stat -c %u made) = 1234",
		"protected":          "sudo sh -c 'echo x >keep'",
		"protected, removed": "sudo rm -f keep",
		"protected, moved":   "sudo mv keep elsewhere",
		"remounted":          "sudo mount -o remount,rw /data; sudo sh -c 'echo x >/data/in'",
		"read-only":          "sudo touch /data/new",
	} {
		if o := h.runIn(dir, "", "exec", "--", "sh", "-c", script); o.code == 0 {
			t.Errorf("%s: guest root could", name)
		}
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "keep")); string(got) != "as it was\n" {
		t.Errorf("the protected file is %q", got)
	}
	if got, _ := os.ReadFile(filepath.Join(data, "in")); string(got) != "of the host\n" {
		t.Errorf("the read-only file is %q", got)
	}
	// What guest root makes is the owner's too, or is not made at all.
	h.runIn(dir, "", "exec", "--", "sudo", "touch", "by-root")
	if fi, err := os.Lstat(filepath.Join(dir, "by-root")); err == nil {
		if st := fi.Sys().(*syscall.Stat_t); strconv.Itoa(int(st.Uid)) != me.Uid {
			t.Errorf("guest root's file belongs to %d", st.Uid)
		}
	}
}

func dayNetwork(t *testing.T, d day) {
	h := d.h
	dir := d.dir
	service := d.service
	if got := h.guest(dir, "curl -sS -m 20 http://model.internal/"); got != "the service\n" {
		t.Errorf("the service says %q", got)
	}
	_, port, _ := net.SplitHostPort(service)
	for _, target := range []string{
		"http://example.org/", "http://1.1.1.1/", "https://1.1.1.1/", "http://169.254.169.254/",
		"http://127.0.0.1:" + port, "http://192.168.127.1:" + port, "http://192.168.127.254:" + port, "http://10.0.0.1/", "http://[2606:4700:4700::1111]/",
	} {
		if o := h.runIn(dir, "", "exec", "--", "curl", "-sS", "-m", "5", target); o.code == 0 {
			t.Errorf("%s was reached: %s", target, o.stdout)
		}
	}
	if log := h.must(dir, "logs", "-s", "network").stdout; !strings.Contains(log, `"verdict":"deny"`) || !strings.Contains(log, `"verdict":"allow"`) {
		t.Errorf("network log:\n%s", log)
	}
}

func dayCopy(t *testing.T, d day) {
	h := d.h
	dir := d.dir
	data := d.data
	h.must(dir, "cp", data, ":copied")
	if got := h.must(dir, "exec", "-w", "/home/agent", "--", "cat", "copied/in").stdout; got != "of the host\n" {
		t.Errorf("copied in: %q", got)
	}
	h.must(dir, "cp", "day:/etc/hostname", filepath.Join(h.home, "w", "out"))
	if got, _ := os.ReadFile(filepath.Join(h.home, "w", "out")); string(got) != "day\n" {
		t.Errorf("copied out: %q", got)
	}
}

// dayPanic lets the guest's kernel fail: it starts over by itself.
func dayPanic(t *testing.T, d day) {
	h, dir := d.h, d.dir
	const id = "cat /proc/sys/kernel/random/boot_id"
	boot := h.guest(dir, id+"; sync")
	panics := h.command(dir, "exec", "--", "sudo", "sh", "-c", "echo c >/proc/sysrq-trigger")
	if err := panics.Start(); err != nil {
		t.Fatal(err)
	}
	h.until(dir, instance.Booting)
	_ = panics.Wait()
	h.must(dir, "up")
	if h.guest(dir, id) == boot {
		t.Error("it is the same boot")
	}
	if p := h.status(dir).Panic; p == nil || !strings.Contains(p.Said, "sysrq triggered crash") {
		t.Errorf("why: %+v", p)
	}
	if got := h.guest(dir, "cat /data/in && echo x >after-panic"); got != "of the host\n" {
		t.Errorf("it sees %q", got)
	}
}

// daySuspend saves the machine with what runs in it, and goes on from there.
func daySuspend(t *testing.T, d day) {
	h, dir := d.h, d.dir
	end := h.busyShare(dir)
	h.fails(dir, exitFailure, "/workspace is in use by process", "suspend")
	end()
	h.guest(dir, "cd / && (setsid sleep 98765 >/dev/null 2>&1 </dev/null &) && echo in memory >/dev/shm/kept")
	before := h.is(dir, "day")
	h.must(dir, "suspend")
	if v := h.status(dir); v.State != instance.Suspended || len(v.Processes) > 0 {
		t.Errorf("status %+v", v)
	}
	h.nothingLeft()
	d.write(t, "meanwhile", "of the host\n")
	if c := h.resume(dir); !c.Restored {
		t.Error("it was not restored")
	}
	if got := h.guest(dir, "pgrep -c -f 'sleep 9876[5]'; cat /dev/shm/kept /workspace/meanwhile /data/in"); got != "1\nin memory\nof the host\nof the host\n" {
		t.Errorf("in the guest: %q", got)
	}
	if after := h.is(dir, "day"); after.BootID != before.BootID {
		t.Error("it has booted")
	}
	h.guest(dir, "cd / && pkill -f 'sleep 9876[5]'; echo of the guest >/workspace/out")
	if got, err := os.ReadFile(filepath.Join(dir, "out")); string(got) != "of the guest\n" {
		t.Errorf("out: %q, %v", got, err)
	}
	if o := h.runIn(dir, "", "exec", "--", "sudo", "touch", "/data/new"); o.code == 0 {
		t.Error("it could write to a read-only mount")
	}
}

// daySnapshot: a machine goes on when it has been saved, and again from there.
func daySnapshot(t *testing.T, d day) {
	h, dir := d.h, d.dir
	h.guest(dir, "cd / && (setsid sleep 98764 >/dev/null 2>&1 </dev/null &) && echo in memory >/dev/shm/kept && echo then >~/kept")
	before := h.is(dir, "day")
	h.must(dir, "snapshot", "create", "then")
	goesOn := func(want string) {
		t.Helper()
		if got := h.guest(dir, "pgrep -c -f 'sleep 9876[4]'; cat /dev/shm/kept ~/kept /data/in; echo of the guest >/workspace/out"); got != want {
			t.Errorf("in the guest: %q, want %q", got, want)
		}
		if after := h.is(dir, "day"); after.BootID != before.BootID {
			t.Error("it has booted")
		}
		if v := h.status(dir); v.State != instance.Ready || len(v.Warnings) > 0 {
			t.Errorf("status %+v", v)
		}
		if got := h.guest(dir, "curl -sS -m 60 http://model.internal/; curl -sS -m 5 http://1.1.1.1/ >/dev/null 2>&1 || echo no more"); got != "the service\nno more\n" {
			t.Errorf("it reaches %q", got)
		}
	}
	goesOn("1\nin memory\nthen\nof the host\n")
	h.guest(dir, "pkill -f 'sleep 9876[4]'; echo later | tee /dev/shm/kept ~/kept")
	if list := h.snapshots(dir); len(list) != 1 || !list[0].Memory {
		t.Errorf("snapshots: %+v", list)
	}
	h.must(dir, "snapshot", "restore", "then")
	goesOn("1\nin memory\nthen\nof the host\n")
	h.must(dir, "snapshot", "rm", "then")
	h.guest(dir, "cd / && pkill -f 'sleep 9876[4]'; rm ~/kept")
}
