package testenv

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// SSHD is an SSH server of the tests' own, on the loopback interface, whose
// only user is the one that runs the tests. It has keys of its own.
type SSHD struct {
	Port int
	Bin  string // a directory with an ssh that knows it as "elsewhere", and as "stranger" without its key

	t   testing.TB
	cmd *exec.Cmd
}

// StartSSHD starts one whose sessions have the variables of env.
func StartSSHD(t testing.TB, env ...string) *SSHD {
	t.Helper()
	Require(t, "ssh", "ssh-keygen", "/usr/sbin/sshd")
	dir, err := os.MkdirTemp("/tmp", "avms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &SSHD{t: t, Port: l.Addr().(*net.TCPAddr).Port, Bin: filepath.Join(dir, "bin")}
	l.Close()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, key := range []string{"host", "user"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path(key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	read := func(name string) string {
		data, err := os.ReadFile(path(name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.Bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"authorized": read("user.pub"),
		"known":      fmt.Sprintf("[127.0.0.1]:%d %s", s.Port, read("host.pub")),
		"config": fmt.Sprintf("Host stranger\n\tUserKnownHostsFile /dev/null\nHost elsewhere stranger\n\tHostName 127.0.0.1\n\tPort %d\n\tIdentityFile %s\n\tIdentitiesOnly yes\n\tUserKnownHostsFile %s\n\tGlobalKnownHostsFile /dev/null\n\tStrictHostKeyChecking yes\n",
			s.Port, path("user"), path("known")),
		"sshd_config": fmt.Sprintf("ListenAddress 127.0.0.1:%d\nHostKey %s\nPidFile none\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPrintMotd no\nSetEnv %s\n",
			s.Port, path("host"), path("authorized"), strings.Join(env, " ")),
		"bin/ssh": "#!/bin/sh\nexec " + ssh + " -F " + path("config") + " \"$@\"\n",
	} {
		if err := os.WriteFile(path(name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.Start(path("sshd_config"))
	t.Cleanup(s.end)
	return s
}

// Start starts the server and waits until it answers.
func (s *SSHD) Start(config string) {
	s.t.Helper()
	var said bytes.Buffer
	s.cmd = exec.Command("/usr/sbin/sshd", "-D", "-e", "-f", config)
	s.cmd.Stderr = &said
	s.cmd.WaitDelay = time.Second
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := startOnThread(s.cmd); err != nil {
		s.t.Fatal(err)
	}
	for range 100 {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port))
		if err == nil {
			c.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("sshd does not answer\n%s", said.String())
}

// Cut ends every connection, as a network that fails does.
func (s *SSHD) Cut() {
	for _, pid := range s.sessions() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// sessions are the server's children.
func (s *SSHD) sessions() (pids []int) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.cmd.Process.Pid))
	for _, file := range threads {
		list, _ := os.ReadFile(file)
		for word := range strings.FieldsSeq(string(list)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func (s *SSHD) end() {
	s.Cut()
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}
