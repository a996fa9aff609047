package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// far is a host whose machines are on another one, which is this very host by
// an SSH server of the test's own, with a home of its own.
type far struct {
	*host
	there *host
	sshd  *testenv.SSHD
	dir   string // the workspace here
}

func newFar(t *testing.T, config string) far {
	t.Helper()
	lv := testenv.StartLibvirtd(t)
	there := newHost(t)
	if err := os.RemoveAll(filepath.Join(there.home, "cache")); err != nil { // it has no image
		t.Fatal(err)
	}
	sshd := testenv.StartSSHD(t, "HOME="+there.home, "AGENTVM_HOME="+there.home, "PATH="+os.Getenv("PATH"))
	h := newHost(t)
	t.Setenv("PATH", sshd.Bin+":"+os.Getenv("PATH"))
	t.Setenv("PASSED", "a 'secret'")
	uri := strings.Replace(lv.URI(), "qemu:///", "qemu+ssh://elsewhere/", 1)
	return far{host: h, there: there, sshd: sshd, dir: h.project(oddName, config+"backend: libvirt\nuri: "+uri+"\n")}
}

// at is a path of the workspace.
func (f far) at(name string) string { return filepath.Join(f.dir, name) }

// copy is a path of the copy of the workspace.
func (f far) copy(name string) string {
	f.t.Helper()
	dirs, _ := filepath.Glob(filepath.Join(f.there.home, "state/remote/*/*/agentvm.yaml"))
	if len(dirs) != 1 {
		f.t.Fatalf("copies: %q", dirs)
	}
	return filepath.Join(filepath.Dir(dirs[0]), name)
}

func (f far) write(path, text string) {
	f.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f far) content(path, want string) {
	f.t.Helper()
	if got, err := os.ReadFile(path); string(got) != want {
		f.t.Errorf("%s holds %q (%v), want %q", path, got, err, want)
	}
}

// TestRemote takes a machine on another host through its day. An ordinary user's
// is shorter: it leaves out what has nothing to do with whose machine it is.
func TestRemote(t *testing.T) {
	whole := os.Getuid() == 0
	service := httpService(t)
	// What a mount would bring is made in the guest.
	config := strings.Replace(dayConfig("", service), `mounts: [{source: "", target: /data, readonly: true}]`+"\n", "", 1)
	config = strings.Replace(config, "run: [", `run: ["sudo mkdir /data && echo of the host | sudo tee /data/in", `, 1)
	f := newFar(t, config+"agent: {env: [PASSED]}\n")
	dir := f.dir
	for name, text := range map[string]string{"keep": "as it was\n", "secret.env": "TOKEN=1\n", "here": "from here\n", "sub/x": "x\n"} {
		if err := os.MkdirAll(filepath.Dir(f.at(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		f.write(f.at(name), text)
	}
	f.fails(dir, exitNotFound, "has no virtual machine on elsewhere", "status")
	stranger := f.project("stranger", "version: 1\nbackend: libvirt\nuri: qemu+ssh://stranger/system\n")
	f.fails(stranger, exitConnection, "Host key verification failed", "up")
	if left, _ := filepath.Glob(filepath.Join(f.there.home, "*")); len(left) > 0 {
		t.Errorf("a host that is not known got %q", left)
	}

	t.Run("up", func(t *testing.T) {
		if o := f.must(dir, "up"); !strings.Contains(o.stderr, "send image") || !strings.Contains(o.stderr, "send workspace to elsewhere: 6 paths, ") || !strings.Contains(o.stderr, "as that host sees it") {
			t.Errorf("it does not say what it does:\n%s", o.stderr)
		}
		if v := f.status(dir); v.State != instance.Ready || len(v.Warnings) != 0 || v.Host != "elsewhere" || v.Workspace != dir || v.Copy != filepath.Dir(f.copy("x")) {
			t.Fatalf("%+v", v)
		}
		if o := f.must(dir, "up"); !strings.Contains(o.stderr, "already running") || strings.Contains(o.stderr, "send image") {
			t.Errorf("the second says\n%s", o.stderr)
		}
	})
	d := day{h: f.host, dir: dir, service: service}
	for _, c := range dayCases {
		if whole && slices.Contains([]string{"exec", "interrupt reaches the program", "network"}, c.name) {
			t.Run(c.name, func(t *testing.T) { c.run(t, d) })
		}
	}
	t.Run("run", func(t *testing.T) { f.runs(t) })
	t.Run("workspace", func(t *testing.T) { f.workspace(t) })
	if whole {
		t.Run("conflict", func(t *testing.T) { f.conflict(t) })
		t.Run("connection is lost", func(t *testing.T) { f.lost(t) })
	}
	t.Run("found from elsewhere", func(t *testing.T) {
		var list []view
		if err := json.Unmarshal([]byte(f.run("ls", "--json").stdout), &list); err != nil || len(list) != 1 || list[0].Name != "day" || list[0].Host != "elsewhere" || list[0].State != instance.Ready {
			t.Errorf("%v, %+v", err, list)
		}
		f.must(f.home, "status", "day")
		if o := f.must(f.home, "logs", "day"); !strings.Contains(o.stdout, "libvirt") {
			t.Errorf("its log:\n%s", o.stdout)
		}
	})
	t.Run("doctor", func(t *testing.T) {
		if o := f.runIn(dir, "", "doctor"); !strings.Contains(o.stdout, "ok    host elsewhere: ") || !strings.Contains(o.stdout, "ok    elsewhere: libvirt: ") {
			t.Errorf("%s%s", o.stdout, o.stderr)
		}
	})
	t.Run("from here", func(t *testing.T) { f.fromHere(t) })
	t.Run("suspend", func(t *testing.T) { f.suspends(t) })
	t.Run("snapshot", func(t *testing.T) { f.snapshots(t) })
	t.Run("what does not work", func(t *testing.T) {
		for _, args := range [][]string{{"fork", "1"}, {"template", "build"}, {"pool", "fill"}} {
			f.fails(dir, exitUsage, "does not work with a machine on another host", args...)
		}
	})
	t.Run("down", func(t *testing.T) { f.down(t) })
}

// suspends has that host's libvirt write the machine down, and go on from there
// with what is new in the workspace here. The web server that fromHere has left
// holds the workspace first.
func (f far) suspends(t *testing.T) {
	const id = "cat /proc/sys/kernel/random/boot_id"
	boot := f.guest(f.dir, id)
	f.guest(f.dir, "cd / && setsid sleep 98765 >/dev/null 2>&1 </dev/null & echo of the guest >saved")
	f.fails(f.dir, exitFailure, "/workspace is in use by process", "suspend")
	f.guest(f.dir, "sudo pkill -f http.serve[r]")
	f.must(f.dir, "suspend")
	if v := f.status(f.dir); v.State != instance.Suspended {
		t.Errorf("it is %s: %s", v.State, v.Reason)
	}
	f.content(f.at("saved"), "of the guest\n")
	f.write(f.at("meanwhile"), "from here\n")
	f.must(f.dir, "resume")
	if got := f.guest(f.dir, id+"; pgrep -c -f 'sleep 9876[5]'; cat saved meanwhile"); got != boot+"1\nof the guest\nfrom here\n" {
		t.Errorf("it went on as %q", got)
	}
}

// snapshots has that host's libvirt keep what the machine is, and go back to it.
// The workspace is no part of that, and in step before and after.
func (f far) snapshots(t *testing.T) {
	const id = "cat /proc/sys/kernel/random/boot_id"
	boot := f.guest(f.dir, id)
	f.guest(f.dir, "echo then | tee /dev/shm/kept ~/kept; echo of the guest >before")
	f.must(f.dir, "snapshot", "create", "then")
	goesOn := func() {
		t.Helper()
		if got := f.guest(f.dir, id+"; cat /dev/shm/kept ~/kept"); got != boot+"then\nthen\n" {
			t.Errorf("it goes on as %q", got)
		}
	}
	goesOn()
	f.guest(f.dir, "echo later | tee /dev/shm/kept ~/kept >after")
	f.must(f.dir, "snapshot", "restore", "then")
	goesOn()
	f.content(f.at("before"), "of the guest\n")
	f.content(f.at("after"), "later\n")
	f.must(f.dir, "snapshot", "rm", "then")
}

// runs gives the agent what is its user's.
func (f far) runs(t *testing.T) {
	if o := f.must(f.dir, "run", "--", "-c", `echo "$PASSED,$AGENTVM_TEST_SECRET."`); o.stdout != "a 'secret',.\n" {
		t.Errorf("%q\n%s", o.stdout, o.stderr)
	}
	if o := f.runIn(f.dir, "", "exec", "-e", "PASSED", "--", "sh", "-c", `echo "$PASSED"; exit 255`); o.code != 255 || o.stdout != "a 'secret'\n" || strings.Contains(o.stderr, "lost") {
		t.Errorf("%d, %q\n%s", o.code, o.stdout, o.stderr)
	}
	if os.Getuid() != 0 { // whose sshd may not hand over a terminal on every host
		return
	}
	out, _ := exec.Command("script", "-qec", "cd '"+strings.ReplaceAll(f.dir, "'", `'\''`)+"' && AGENTVM_HOME="+f.home+" "+f.program+" exec -- tty", "/dev/null").CombinedOutput()
	if !bytes.Contains(out, []byte("/dev/pts/")) {
		t.Errorf("on a terminal: %q", out)
	}
}

// conflict changes one file on both sides.
func (f far) conflict(t *testing.T) {
	f.write(f.at("both"), "first\n")
	f.must(f.dir, "sync")
	f.write(f.at("both"), "mine\n")
	f.write(f.copy("both"), "theirs\n")
	f.write(f.at("other"), "all the same\n")
	f.fails(f.dir, exitFailure, "changed here and there, and left as it is on both sides: both", "exec", "--", "true")
	f.content(f.at("both"), "mine\n")
	f.content(f.copy("both"), "theirs\n")
	f.content(f.copy("other"), "all the same\n")
	if o := f.runIn(f.dir, "cat both\n", "shell"); o.stdout != "theirs\n" || !strings.Contains(o.stderr, "changed here and there") {
		t.Errorf("a shell says %q\n%s", o.stdout, o.stderr)
	}
	f.must(f.dir, "sync", "--keep", "there")
	f.content(f.at("both"), "theirs\n")
}

// down leaves nothing but what the guest did last.
func (f far) down(t *testing.T) {
	f.guest(f.dir, "echo last >last; (sleep 1; echo later >later) >/dev/null 2>&1 &")
	time.Sleep(2 * time.Second)
	f.must(f.home, "stop", "day", "--timeout", "5s")
	odd := f.copy("odd\xff")
	f.write(odd, "only there\n")
	f.fails(f.dir, exitFailure, "the copy of the workspace stays on elsewhere, because this of it is not here: ", "down")
	f.content(odd, "only there\n")
	f.content(f.at("later"), "later\n")
	if err := os.Remove(odd); err != nil {
		t.Fatal(err)
	}
	f.fails(f.dir, exitNotFound, "the copy of the workspace on elsewhere is deleted", "down") // the machine was already
	f.fails(f.dir, exitNotFound, "no virtual machine", "status")
	left, _ := filepath.Glob(filepath.Join(f.there.home, "state", "remote", "*"))
	mine, _ := filepath.Glob(filepath.Join(f.home, "state", "elsewhere", "*"))
	if left = append(left, mine...); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	f.there.nothingLeft()
	f.nothingLeft()
}

// workspace changes files on both sides.
func (f far) workspace(t *testing.T) {
	if got := f.guest(f.dir, "cat here; echo changed >here; mkdir d; ln -s /etc/passwd d/link; echo x >d/x; chmod 750 d/x; rm -r sub; cat secret.env; mkfifo pipe"); got != "from here\n" {
		t.Errorf("the guest sees %q", got)
	}
	out, err := exec.Command("sh", "-c", "cd \"$0\" && cat here d/x && readlink d/link && stat -c %a d/x && ls", f.dir).CombinedOutput()
	if string(out) != "changed\nx\n/etc/passwd\n750\nagentvm.yaml\nd\nhere\nkeep\nprovisioned\nsecret.env\n" {
		t.Errorf("%q, %v", out, err)
	}
	if o := f.runIn(f.dir, "", "exec", "--", "sudo", "sh", "-c", "echo x >keep"); o.code == 0 {
		t.Error("the guest's root could write to what is protected")
	}
	f.write(f.at("keep"), "anew\n")
	f.write(f.at("secret.env"), "TOKEN=2\n")
	if o := f.runIn(f.dir, "", "exec", "--", "sh", "-c", "cat keep secret.env; sudo sh -c 'echo x >keep'"); o.code == 0 || o.stdout != "anew\n" {
		t.Errorf("after they have changed here, the guest's root has %q of what is protected and hidden, and its writing ends with %d", o.stdout, o.code)
	}
	f.content(f.copy("secret.env"), "TOKEN=2\n")
	f.content(f.at("keep"), "anew\n")
	// The guest puts a link where a directory of the host's user was.
	secret := filepath.Join(f.home, "w", "secret")
	if err := os.Mkdir(secret, 0o755); err != nil {
		t.Fatal(err)
	}
	f.guest(f.dir, fmt.Sprintf("rm -r d && ln -s %s d", secret))
	f.write(filepath.Join(f.dir, "after"), "")
	f.guest(f.dir, "rm d && mkdir d && echo x >d/x")
	f.content(filepath.Join(f.dir, "d", "x"), "x\n")
	if left, _ := os.ReadDir(secret); len(left) > 0 {
		t.Errorf("something was written through the link: %v", left)
	}
}

// fromHere reaches the guest with programs of this host.
func (f far) fromHere(t *testing.T) {
	in := filepath.Join(f.home, "in")
	f.write(in, "over there\n")
	f.must(f.dir, "cp", "-q", in, ":/tmp/in")
	if got := f.guest(f.dir, "cat /tmp/in"); got != "over there\n" {
		t.Errorf("the guest has %q", got)
	}
	f.must(f.home, "cp", "-q", "day:/tmp/in", in+".back")
	f.content(in+".back", "over there\n")
	f.fails(f.dir, exitNotFound, "/tmp/nothing in the guest", "cp", ":/tmp/nothing", in)

	config := filepath.Join(f.home, "ssh_config")
	f.write(config, f.must(f.dir, "ssh-config").stdout)
	ssh := exec.Command("ssh", "-F", config, "day", "cat /tmp/in; exit 7") // the last -F counts
	if out, err := ssh.CombinedOutput(); string(out) != "over there\n" || ssh.ProcessState.ExitCode() != 7 {
		t.Errorf("ssh says %q, %v", out, err)
	}

	f.guest(f.dir, `sudo sh -c 'python3 -m http.server -d /tmp 8123 >/dev/null 2>&1 &'`)
	cmd := f.command(f.dir, "forward", "0:8123")
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(said).ReadString('\n')
	address, _, _ := strings.Cut(strings.TrimPrefix(line, "agentvm: "), " is the guest's")
	var got []byte
	for range 300 { // its server is on its way
		var resp *http.Response
		if resp, err = http.Get("http://" + address + "/in"); err == nil {
			got, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if string(got) != "over there\n" || err != nil {
		t.Errorf("%q answers %q, %v", line, got, err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("forward ends with %v", err)
	}
}

// lost cuts the connection under a command, with a machine that goes on and
// with one that pauses.
func (f far) lost(t *testing.T) {
	f.cut(t, "sleep 3; echo late >late", "the machine there goes on")
	if v := f.status(f.dir); v.State != instance.Ready {
		t.Errorf("it is %s: %s", v.State, v.Reason)
	}
	f.arrives(t, "late")

	config, err := os.ReadFile(f.at("agentvm.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	f.write(f.at("agentvm.yaml"), string(config)+"on_disconnect: pause\n")
	f.must(f.dir, "exec", "--", "true") // ends in good order
	f.cut(t, "sleep 30; echo later >later", "the machine there pauses")
	if v := f.until(f.dir, instance.Paused); !strings.Contains(v.Reason, "was lost at ") {
		t.Errorf("it is paused: %s", v.Reason)
	}
	if got := f.guest(f.dir, "cat keep"); got != "anew\n" { // lets it go on
		t.Errorf("the guest says %q", got)
	}
	if v := f.status(f.dir); v.State != instance.Ready {
		t.Errorf("it is %s: %s", v.State, v.Reason)
	}
	f.arrives(t, "later")
}

// arrives waits for a file that something in the guest writes.
func (f far) arrives(t *testing.T, name string) {
	for range 600 {
		f.must(f.dir, "sync")
		if got, _ := os.ReadFile(f.at(name)); len(got) > 0 { // it is empty for a moment
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	f.content(f.at(name), name+"\n")
}

// cut cuts the connection under a script of the guest's.
func (f far) cut(t *testing.T, script, says string) {
	cmd := f.command(f.dir, "exec", "--", "sh", "-c", "echo go; "+script)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "go\n" {
		t.Fatal(line, err)
	}
	f.sshd.Cut()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != exitConnection || !strings.Contains(said.String(), says) || !strings.Contains(said.String(), "hint: agentvm status") {
		t.Errorf("exit code %d\n%s", code, said.String())
	}
}
