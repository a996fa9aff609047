package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/testenv"
)

// TestMain lets the test binary be the program.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-test.") {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// daemon is the program, running as who runs the test.
type daemon struct {
	t                *testing.T
	user             string
	address, hostKey string
	pidFile          string
	client           gossh.Signer
	cmd              *exec.Cmd
	ended            chan struct{}
}

func start(t *testing.T, hostKey func(path string)) *daemon {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	dir := t.TempDir()
	d := &daemon{t: t, user: me.Username, address: l.Addr().String(), hostKey: filepath.Join(dir, "key"), pidFile: filepath.Join(dir, "pid"), ended: make(chan struct{})}
	hostKey(d.hostKey)
	var authorized []byte
	d.client, _ = testenv.NewKey(t)
	authorized = gossh.MarshalAuthorizedKey(d.client.PublicKey())
	keys := filepath.Join(dir, "authorized_keys")
	if err := os.WriteFile(keys, authorized, 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A file: a worker may outlive the monitor, and would keep a pipe.
	said := must(os.Create(filepath.Join(dir, "said")))
	d.cmd = exec.Command(self, "-listen", d.address, "-host-key", d.hostKey, "-pid-file", d.pidFile, "-authorized-keys", keys, "-shell", "/bin/sh", d.user)
	d.cmd.Stderr = said
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.cmd.Wait()
		close(d.ended)
	}()
	t.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.ended
		if t.Failed() {
			t.Logf("%s", must(os.ReadFile(said.Name())))
		}
	})
	return d
}

// dial logs in, and expects the host key.
func (d *daemon) dial(hostKey gossh.Signer) (*gossh.Client, error) {
	nc, err := net.DialTimeout("tcp", d.address, time.Minute)
	if err != nil {
		return nil, err
	}
	nc.SetDeadline(time.Now().Add(time.Minute))
	conn, channels, requests, err := gossh.NewClientConn(nc, d.address, &gossh.ClientConfig{
		User: d.user, Auth: []gossh.AuthMethod{gossh.PublicKeys(d.client)}, HostKeyCallback: gossh.FixedHostKey(hostKey.PublicKey()),
	})
	if err != nil {
		nc.Close()
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	return gossh.NewClient(conn, channels, requests), nil
}

func (d *daemon) mustDial(hostKey gossh.Signer) *gossh.Client {
	d.t.Helper()
	for range 1200 {
		c, err := d.dial(hostKey)
		if err == nil {
			d.t.Cleanup(func() { c.Close() })
			return c
		}
		if !errors.Is(err, unix.ECONNREFUSED) { // it has yet to begin
			d.t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	d.t.Fatal("nobody listens")
	return nil
}

func run(t *testing.T, c *gossh.Client, script string) string {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out, err := s.CombinedOutput(script)
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (d *daemon) awaitPID() {
	d.t.Helper()
	for range 6000 {
		if pid, err := os.ReadFile(d.pidFile); err == nil && len(pid) > 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	d.t.Fatal("no pid file")
}

// TestHostKeyComes has connections wait for a host key that is still to come,
// and checks that nothing of the worker's is for the user to read.
func TestHostKeyComes(t *testing.T) {
	d := start(t, func(path string) {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	key, pem := testenv.NewKey(t)
	client := make(chan *gossh.Client)
	go func() {
		defer close(client)
		client <- d.mustDial(key)
	}()
	select {
	case <-client:
		t.Fatal("logged in without a host key")
	case <-time.After(time.Second):
	}
	if _, err := os.Stat(d.pidFile); err == nil {
		t.Error("it says that it serves")
	}
	if err := os.WriteFile(d.hostKey, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	c := <-client
	d.awaitPID()
	if got := run(t, c, "echo $0 $HOME; cd /proc/$PPID && ls fd 2>&1 || :"); os.Getuid() != 0 && !strings.Contains(got, "denied") {
		t.Errorf("the worker's descriptors: %q", got)
	}
	if got := run(t, c, "kill -TERM "+strings.TrimSpace(string(must(os.ReadFile(d.pidFile))))+"; echo still here"); got != "still here" {
		t.Errorf("a connection at the end: %q", got)
	}
	<-d.ended
	if got := run(t, c, "echo again"); got != "again" {
		t.Errorf("a connection after the end: %q", got)
	}
	if nc, err := net.Dial("tcp", d.address); err == nil {
		nc.Close()
		t.Error("it accepts connections after its end")
	}
	if _, err := os.Stat(d.pidFile); err == nil {
		t.Error("the pid file is left")
	}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

// TestHostKeyChanges has one connection go on over a change of the host key,
// and none see the old one after it, while others connect all the time.
func TestHostKeyChanges(t *testing.T) {
	first, pem := testenv.NewKey(t)
	d := start(t, func(path string) { check(os.WriteFile(path, pem, 0o600)) })
	old := d.mustDial(first)
	s, err := old.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	in, out := must(s.StdinPipe()), must(s.StdoutPipe())
	if err := s.Start("cat"); err != nil {
		t.Fatal(err)
	}
	d.awaitPID()

	ctx, cancel := context.WithCancel(context.Background())
	refused := make(chan error, 1)
	go func() {
		defer close(refused)
		for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) { // so as not to fill the server
			nc, err := net.Dial("tcp", d.address)
			if err != nil {
				refused <- err
				return
			}
			nc.Close()
		}
	}()
	second, pem := testenv.NewKey(t)
	check(os.WriteFile(d.hostKey, pem, 0o600))
	check(os.Remove(d.pidFile))
	check(d.cmd.Process.Signal(unix.SIGHUP))
	d.awaitPID()
	for range 20 {
		run(t, d.mustDial(second), "true")
	}
	cancel()
	if err := <-refused; err != nil {
		t.Error(err)
	}
	must(io.WriteString(in, "over the change\n"))
	in.Close()
	if got := must(io.ReadAll(out)); string(got) != "over the change\n" {
		t.Errorf("the connection from before says %q", got)
	}
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
}

// TestKilled leaves no worker that serves after its monitor.
func TestKilled(t *testing.T) {
	key, pem := testenv.NewKey(t)
	d := start(t, func(path string) { check(os.WriteFile(path, pem, 0o600)) })
	c := d.mustDial(key)
	d.cmd.Process.Kill()
	<-d.ended
	for until := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		nc, err := net.Dial("tcp", d.address)
		if err != nil {
			break
		}
		nc.Close()
		if time.Now().After(until) {
			t.Fatal("somebody listens")
		}
	}
	run(t, c, "true")
}
