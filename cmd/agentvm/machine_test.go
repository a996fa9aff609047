package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// oddName has what paths may have: spaces, commas, quotes, a newline, what is
// special to shells, to QEMU and to systemd, and length.
var oddName = "a b,c=d'e\"f%g$h\\i;j*k\nü日" + strings.Repeat("x", 180)

// TestMachine takes one machine through a working day.
func TestMachine(t *testing.T) {
	h := newHost(t)
	service := httpService(t)
	data := filepath.Join(h.home, "w", "data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, "in"), []byte("of the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := h.project(oddName, fmt.Sprintf(`version: 1
name: day
resources: {memory: 1GiB}
workspace: {protect: [keep], hide: [secret.env]}
mounts: [{source: %q, target: /data, readonly: true}]
provision: {run: ["echo once >>provisioned"]}
network: {services: [{name: model.internal, port: 80, target: %q}]}
git: {name: "Ada O'Lovelace", email: ada@example.org}
env: {GREETING: "it's, me"}
`, data, service))
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("keep", "as it was\n")
	write("secret.env", "TOKEN=1\n")
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}

	t.Run("up twice at once", func(t *testing.T) {
		var wait sync.WaitGroup
		results := make([]outcome, 2)
		for i := range results {
			wait.Go(func() { results[i] = h.runIn(dir, "", "up") })
		}
		wait.Wait()
		already := 0
		for _, r := range results {
			if r.code != 0 {
				t.Fatalf("exit code %d\n%s", r.code, r.stderr)
			}
			if strings.Contains(r.stderr, "already running") {
				already++
			}
		}
		if already != 1 {
			t.Errorf("%d of 2 found it running:\n%s\n%s", already, results[0].stderr, results[1].stderr)
		}
		if v := h.status(dir); v.State != instance.Ready || len(v.Warnings) != 0 {
			t.Fatalf("%+v", v)
		}
	})

	t.Run("files are the owner's", func(t *testing.T) {
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
	})

	t.Run("exec", func(t *testing.T) {
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
	})

	t.Run("interrupt reaches the program", func(t *testing.T) {
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
	})

	t.Run("workspace", func(t *testing.T) {
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
		write("made", "changed by the host\n")
		for range 20 { // at once, or as good as
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
	})

	t.Run("network", func(t *testing.T) {
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
	})

	t.Run("cp", func(t *testing.T) {
		h.must(dir, "cp", data, ":copied")
		if got := h.must(dir, "exec", "-w", "/home/agent", "--", "cat", "copied/in").stdout; got != "of the host\n" {
			t.Errorf("copied in: %q", got)
		}
		h.must(dir, "cp", "day:/etc/hostname", filepath.Join(h.home, "w", "out"))
		if got, _ := os.ReadFile(filepath.Join(h.home, "w", "out")); string(got) != "day\n" {
			t.Errorf("copied out: %q", got)
		}
	})

	t.Run("forward", func(t *testing.T) {
		server := h.command(dir, "exec", "--", "python3", "-m", "http.server", "--directory", "/data", "8123")
		forward := h.command(dir, "forward", "0:8123")
		out, err := forward.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		for _, cmd := range []*exec.Cmd{server, forward} {
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Signal(syscall.SIGTERM)
		}
		var address string
		if _, err := fmt.Fscanf(out, "agentvm: %s is the guest's", &address); err != nil {
			t.Fatal(err)
		}
		go io.Copy(io.Discard, out)
		var body string
		for range 100 {
			if resp, err := http.Get("http://" + address + "/in"); err == nil {
				b, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if body = string(b); body != "" {
					break
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		if body != "of the host\n" {
			t.Errorf("through the forwarded port: %q", body)
		}
	})

	t.Run("OpenSSH", func(t *testing.T) { openSSH(t, h, dir, data) })

	t.Run("virtiofsd is killed", func(t *testing.T) {
		h.kill(dir, "virtiofsd-workspace")
		v := h.until(dir, instance.Degraded)
		if !strings.Contains(v.Reason, "share at /workspace is lost") {
			t.Errorf("reason %q", v.Reason)
		}
		h.fails(dir, exitConnection, "share at /workspace is lost", "exec", "--", "ls")
		if got := h.must(dir, "exec", "-w", "/", "--", "echo", "alive").stdout; got != "alive\n" {
			t.Errorf("outside the share: %q", got)
		}
		h.must(dir, "restart", "--timeout", "2s")
		if got := h.guest(dir, "cat keep; cat provisioned"); got != "as it was\nonce\n" {
			t.Errorf("after the restart: %q", got)
		}
	})

	t.Run("guest restarts itself", func(t *testing.T) {
		boot := h.guest(dir, "cat /proc/sys/kernel/random/boot_id; touch ~/kept")
		h.runIn(dir, "", "exec", "--", "sudo", "systemctl", "reboot")
		h.until(dir, instance.Booting)
		h.must(dir, "up")
		if now := h.guest(dir, "cat /proc/sys/kernel/random/boot_id; ls ~/kept >/dev/null"); now == boot {
			t.Error("it is the same boot")
		}
		h.guest(dir, "echo x >after-reboot")
	})

	t.Run("supervisor is killed", func(t *testing.T) {
		h.kill(dir, "supervisor")
		v := h.until(dir, instance.Failed)
		if !strings.Contains(v.Reason, "was killed while ready") {
			t.Errorf("reason %q", v.Reason)
		}
		h.nothingLeft()
		h.fails(dir, exitConnection, "was killed while ready", "exec", "--", "true")
	})

	t.Run("guest powers itself off", func(t *testing.T) {
		o := h.must(dir, "start")
		if !strings.Contains(o.stderr, "was killed while ready") {
			t.Errorf("start does not say what happened:\n%s", o.stderr)
		}
		h.runIn(dir, "", "exec", "--", "sudo", "systemctl", "poweroff")
		if v := h.until(dir, instance.Stopped); !strings.Contains(v.Reason, "powered itself off") {
			t.Errorf("reason %q", v.Reason)
		}
		h.nothingLeft()
	})

	t.Run("damaged disk", func(t *testing.T) {
		path := filepath.Join(h.home, "state", "instances", "day", "root.qcow2")
		if err := os.WriteFile(path, []byte("not a disk"), 0o644); err != nil {
			t.Fatal(err)
		}
		h.fails(dir, exitFailure, "qcow2", "start")
		h.nothingLeft()
	})

	t.Run("down", func(t *testing.T) {
		h.must(dir, "down")
		h.fails(dir, exitNotFound, "no virtual machine", "status", "day")
		if _, err := os.Stat(filepath.Join(dir, "made")); err != nil {
			t.Error("the workspace was touched")
		}
		left, _ := filepath.Glob(filepath.Join(h.home, "state", "instances", "*"))
		if len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// openSSH uses the programs that people have.
func openSSH(t *testing.T, h *host, dir, data string) {
	testenv.Require(t, "ssh", "scp", "rsync", "git")
	config := filepath.Join(h.home, "w", "ssh_config")
	if err := os.WriteFile(config, []byte(h.must(dir, "ssh-config").stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	sh := func(script string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "sh", "-euc", script)
		cmd.Dir = work
		cmd.Env = append(os.Environ(), "CONFIG="+config, "DATA="+data, "GIT_SSH_COMMAND=ssh -F "+config,
			"GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
		return string(out)
	}
	if got := sh(`ssh -F "$CONFIG" day 'echo "$USER in $(pwd)"'`); got != "agent in /home/agent\n" {
		t.Errorf("ssh: %q", got)
	}
	sh(`scp -q -F "$CONFIG" "$DATA/in" day:by-scp && scp -q -F "$CONFIG" day:by-scp back && cmp back "$DATA/in"`)
	sh(`rsync -a -e "ssh -F $CONFIG" "$DATA/" day:by-rsync/ && ssh -F "$CONFIG" day cat by-rsync/in`)
	sh(`ssh -F "$CONFIG" day git init -q --bare repo.git
		git init -q r && cd r && echo x >f && git add f && git commit -qm m && git push -q day:repo.git HEAD:main
		cd .. && git clone -q -b main day:repo.git clone && cmp clone/f r/f`)
}

// httpService answers on the host.
func httpService(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "the service") })}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return l.Addr().String()
}

// TestDryRun prints what it would start, for a shell and for a program, and
// makes no machine. A disk file needs no image to be built.
func TestDryRun(t *testing.T) {
	h := newHost(t)
	dir := h.project(oddName, "version: 1\nname: dry\nimage: ./empty.img\nresources: {memory: 256MiB, cpus: 3}\n")
	if err := os.WriteFile(filepath.Join(dir, "empty.img"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	plain := h.must(dir, "up", "--dry-run").stdout
	words, err := exec.Command("sh", "-c", `printf '%s\0' `+plain).Output()
	if err != nil {
		t.Fatalf("a shell does not read it: %v\n%s", err, plain)
	}
	shell := strings.Split(strings.TrimSuffix(string(words), "\x00"), "\x00")
	var list []string
	if err := json.Unmarshal([]byte(h.must(dir, "up", "--dry-run", "--json").stdout), &list); err != nil {
		t.Fatal(err)
	}
	// Nothing remembers the first run, so the second has another id.
	for _, argv := range [][]string{shell, list} {
		at := slices.Index(argv, "-uuid") + 1
		if at == 0 || len(argv[at]) != 36 {
			t.Fatalf("no id in %q", argv)
		}
		id := argv[at]
		for i := range argv {
			argv[i] = strings.ReplaceAll(strings.ReplaceAll(argv[i], id, "ID"), id[:8], "RUN")
		}
	}
	if diff := cmp.Diff(list, shell); diff != "" {
		t.Errorf("(-JSON +text):\n%s", diff)
	}
	if filepath.Base(list[0]) != qemuBinary || !slices.Contains(list, "size=256M") ||
		!slices.ContainsFunc(list, func(s string) bool { return strings.HasPrefix(s, "cpus=3,") }) {
		t.Errorf("it is not this project's: %q", list)
	}
	if got := h.run("ls", "--json").stdout; got != "[]\n" {
		t.Errorf("left: %s", got)
	}
	h.nothingLeft()
}
