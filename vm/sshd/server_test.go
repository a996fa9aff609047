package sshd

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/ssh/wire"
)

// Most of what a client sees is tested in package ssh, with OpenSSH's server
// beside this one. Here is what only a client that goes away sees, and what a
// proxy keeps from others.

func TestMain(m *testing.M) {
	DefaultSignals()
	os.Exit(m.Run())
}

// client logs in to a server; served is closed when that is done with it.
func client(t *testing.T) (c *gossh.Client, served chan struct{}) {
	t.Helper()
	return clientOf(t, User{Home: t.TempDir(), Shell: "/bin/sh"})
}

// clientOf is client for a user who has this user's name.
func clientOf(t *testing.T, u User) (c *gossh.Client, served chan struct{}) {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	hostKey, err := throwaway()
	if err != nil {
		t.Fatal(err)
	}
	key, err := throwaway()
	if err != nil {
		t.Fatal(err)
	}
	here, there, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	u.Name = me.Username
	s := Server{
		User: u, HostKey: hostKey,
		AuthorizedKeys: func() ([]byte, error) { return gossh.MarshalAuthorizedKey(key.PublicKey()), nil },
	}
	served = make(chan struct{})
	go func() {
		defer close(served)
		s.ServeConn(there, nil)
	}()
	conn, channels, requests, err := gossh.NewClientConn(here, "", &gossh.ClientConfig{
		User: me.Username, Auth: []gossh.AuthMethod{gossh.PublicKeys(key)}, HostKeyCallback: gossh.FixedHostKey(hostKey.PublicKey()),
	})
	if err != nil {
		t.Fatal(err)
	}
	c = gossh.NewClient(conn, channels, requests)
	t.Cleanup(func() { c.Close() })
	return c, served
}

func within(t *testing.T, what string, done func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func isClosed(c <-chan struct{}) func() bool {
	return func() bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
}

func onTerminal(t *testing.T, c *gossh.Client) *gossh.Session {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestPty("xterm", 24, 80, gossh.TerminalModes{gossh.ECHO: 0}); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestHangUp has a client go away from a program that ignores its input.
func TestHangUp(t *testing.T) {
	c, served := client(t)
	s := onTerminal(t, c)
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("echo $$; exec sleep 300"); err != nil {
		t.Fatal(err)
	}
	var line [32]byte
	n, err := out.Read(line[:])
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	within(t, "the program is hung up", func() bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) })
	within(t, "the connection is over", isClosed(served))
}

// TestTerminalIsHeld leaves a process behind that has the terminal open.
func TestTerminalIsHeld(t *testing.T) {
	c, _ := client(t)
	s := onTerminal(t, c)
	began := time.Now()
	out, err := s.Output("trap '' HUP; setsid sleep 10 & sleep 0.2; head -c 100000 /dev/zero | tr '\\0' x; exit 3")
	var exit *gossh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 3 || len(out) != 100000 {
		t.Errorf("%v, %d bytes", err, len(out))
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("after %v", took)
	}
}

// forwarded is a connection to ln through a client's.
func forwarded(t *testing.T, c *gossh.Client, ln net.Listener) (near, far net.Conn) {
	t.Helper()
	near, err := c.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	return near, far
}

// TestForwardEnds has a client go away from ports and sockets that say nothing.
func TestForwardEnds(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for name, end := range map[string]func(*gossh.Client, net.Conn){
		"channel":    func(_ *gossh.Client, nc net.Conn) { nc.Close() },
		"connection": func(c *gossh.Client, _ net.Conn) { c.Close() },
	} {
		c, served := client(t)
		near, far := forwarded(t, c, ln)
		end(c, near)
		far.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := far.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
		c.Close()
		within(t, name+": the connection is over", isClosed(served))
	}

	// What was sent before the end arrives, as it does from a command in a pipe.
	c, served := client(t)
	near, far := forwarded(t, c, ln)
	sent := bytes.Repeat([]byte("x"), 1<<20)
	if _, err := near.Write(sent); err != nil {
		t.Fatal(err)
	}
	near.Close()
	if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes, %v", len(got), len(sent), err)
	}

	theirs, err := c.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", theirs.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := theirs.Accept(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	within(t, "the connection is over", isClosed(served))
	if other, err := net.Dial("tcp", theirs.Addr().String()); err == nil {
		other.Close()
		t.Error("the port is still open")
	}
}

func TestEnviron(t *testing.T) {
	c, _ := client(t)
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"PATH": "/bin:/usr/bin:/mine", "HOME": "/nowhere", "SSH_CONNECTION": "x", "A": "b=c"} {
		if err := s.Setenv(name, value); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Setenv("B=C", "d"); err == nil {
		t.Error("a name with an equals sign is taken")
	}
	out, err := s.Output("env")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(out), "\n")
	for _, want := range []string{"PATH=/bin:/usr/bin:/mine", "A=b=c", "SHELL=/bin/sh"} {
		if !slices.Contains(lines, want) {
			t.Errorf("no %s in %q", want, lines)
		}
	}
	if slices.Contains(lines, "HOME=/nowhere") {
		t.Error("the home directory is the client's")
	}
}

func TestStartupFilePasses(t *testing.T) {
	for text, want := range map[string]bool{
		"":              true,
		"# nothing\n\n": true,
		"[ -z \"${PS1-}\" ] && return\nexport A=1":                       true,
		"# Debian's\n\n  [ -z  \"$PS1\" ]  && return\n\nexport A=1\n":    true,
		"case $- in\n    *i*) ;;\n      *) return;;\nesac\nexport A=1\n": true,
		"case $- in\n    *i*) ;;\n      *) export A=1; return;;\nesac\n": false,
		"case $- in\n    *i*) ;;\n      *) return;;\n":                   false,
		"export A=1\n[ -z \"$PS1\" ] && return\n":                        false,
		"[ -z \"$PS1\" ] && return || export A=1\n":                      false,
		"[ -z \"$PS1\" ] && return\r\nexport A=1\r\n":                    false,
		"# " + strings.Repeat("x", maxStartup):                           false,
	} {
		file := filepath.Join(t.TempDir(), "rc")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := passes(file); got != want {
			t.Errorf("%.80q: %v", text, got)
		}
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if passes(pipe) {
		t.Error("a pipe has nothing to say")
	}
	if !passes("/none/rc") {
		t.Error("a file that is not there has a say")
	}
}

// A program whose shell would have something to do first is left to the shell.
func TestProgramIsTheShells(t *testing.T) {
	home := t.TempDir()
	for _, tt := range []struct {
		shell, rc string
		env       []string
		want      bool
	}{
		{"/bin/bash", "", nil, true},
		{"/bin/bash", "export A=1", nil, false},
		{"/bin/bash", "", []string{"BASH_ENV=/etc/profile"}, false},
		{"/bin/bash", "", []string{"PATH=bin:/usr/bin"}, false},
		{"/bin/bash", "", []string{"PATH=/nowhere"}, false},
		{"/bin/bash", "", []string{"SHLVL=1"}, false},
		{"/bin/dash", "", []string{"PATH=/nowhere"}, false},
		{"/bin/dash", "export A=1", nil, true},
		{"/usr/bin/fish", "", nil, false},
	} {
		if err := os.WriteFile(filepath.Join(home, ".bashrc"), []byte(tt.rc), 0o600); err != nil {
			t.Fatal(err)
		}
		c, _ := clientOf(t, User{Home: home, Shell: tt.shell})
		ch, requests, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go gossh.DiscardRequests(requests)
		for _, e := range tt.env {
			name, value, _ := strings.Cut(e, "=")
			if _, err := ch.SendRequest("env", true, gossh.Marshal(&struct{ Name, Value string }{name, value})); err != nil {
				t.Fatal(err)
			}
		}
		got, err := ch.SendRequest(wire.ProgramRequest, true, wire.Program{Argv: []string{"pwd"}}.Marshal())
		if got != tt.want || err != nil {
			t.Errorf("%+v: %v, %v", tt, got, err)
		}
		if !got {
			// The session is still to be had, for the shell.
			if got, err = ch.SendRequest("exec", true, gossh.Marshal(&struct{ Line string }{"pwd"})); err != nil {
				t.Fatal(err)
			}
		}
		if got {
			if out, _ := io.ReadAll(ch); string(out) != home+"\n" {
				t.Errorf("%+v: %q", tt, out)
			}
		}
		ch.Close()
	}
}

func TestAssignments(t *testing.T) {
	got := assignments("# LANG=x\n\nLANG=\"de_DE.UTF-8\"\n LC_ALL='C' \nnonsense\n=x\n")
	if want := []string{"LANG=de_DE.UTF-8", "LC_ALL=C"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestAuthorized(t *testing.T) {
	key, err := throwaway()
	if err != nil {
		t.Fatal(err)
	}
	other, err := throwaway()
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs := gossh.MarshalAuthorizedKey(key.PublicKey()), gossh.MarshalAuthorizedKey(other.PublicKey())
	for name, c := range map[string]struct {
		file []byte
		want bool
	}{
		"empty":         {nil, false},
		"alone":         {mine, true},
		"other":         {theirs, false},
		"after others":  {slices.Concat([]byte("# comment\n\nnonsense\n"), theirs, mine), true},
		"no line end":   {bytes.TrimSpace(mine), true},
		"with options":  {append([]byte(`command="true" `), mine...), false},
		"commented out": {append([]byte("#"), mine...), false},
	} {
		if got := authorized(c.file, key.PublicKey()); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestRehearse(t *testing.T) {
	if err := Rehearse(); err != nil {
		t.Fatal(err)
	}
}

func FuzzModes(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{53, 0, 0, 0, 0, 1, 0, 0, 0, 3, 90, 0, 0, 0, 1, 0})
	f.Add([]byte{255, 1, 2})
	f.Add([]byte{53, 0})
	f.Fuzz(func(t *testing.T, modes []byte) {
		var state unix.Termios
		applyModes(&state, modes)
	})
}

func TestModes(t *testing.T) {
	state := unix.Termios{Lflag: unix.ECHO | unix.ICANON, Cflag: unix.CS8}
	applyModes(&state, []byte{
		53, 0, 0, 0, 0, // ECHO off
		50, 0, 0, 0, 1, // ISIG on
		1, 0, 0, 0, 3, // VINTR ^C
		2, 0, 0, 0, 255, // VQUIT none
		90, 0, 0, 0, 1, // CS7
		128, 0, 0, 0x96, 0, // a speed
		0,
		51, 0, 0, 0, 0, // after the end
	})
	want := unix.Termios{Lflag: unix.ICANON | unix.ISIG, Cflag: unix.CS7}
	want.Cc[unix.VINTR] = 3
	if state != want {
		t.Errorf("%+v", state)
	}
}
