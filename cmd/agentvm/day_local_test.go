package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// localCases are what every backend on this host has to get right, beside
// [dayCases]: they look at processes and ports of the host.
var localCases = []struct {
	name string
	run  func(*testing.T, day)
}{
	{"forward", dayForward},
	{"OpenSSH", func(t *testing.T, d day) { openSSH(t, d.h, d.dir, d.data) }},
	{"virtiofsd is killed", dayShareKilled},
	{"guest restarts itself", dayReboot},
}

func dayForward(t *testing.T, d day) {
	h, dir := d.h, d.dir
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
	for range 600 {
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
}

// dayShareKilled: what is lost is said, and a restart brings it back.
func dayShareKilled(t *testing.T, d day) {
	h, dir := d.h, d.dir
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
}

func dayReboot(t *testing.T, d day) {
	h, dir := d.h, d.dir
	boot := h.guest(dir, "cat /proc/sys/kernel/random/boot_id; touch ~/kept")
	h.runIn(dir, "", "exec", "--", "sudo", "systemctl", "reboot")
	h.until(dir, instance.Booting)
	h.must(dir, "up")
	if now := h.guest(dir, "cat /proc/sys/kernel/random/boot_id; ls ~/kept >/dev/null"); now == boot {
		t.Error("it is the same boot")
	}
	h.guest(dir, "echo x >after-reboot")
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
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
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
