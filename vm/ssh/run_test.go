package ssh

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestRunArguments(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		argv := []string{"printf", `<%s>\n`, "", " ", "a b", "*", "$HOME", "`id`", `\`, `"`, "'", "a'b''c", "line\nbreak", "-n", "~", "ü", "\xff\x01", "#x", "!!"}
		out, _, status := output(t, c, Command{Argv: argv})
		var want strings.Builder
		for _, arg := range argv[2:] {
			fmt.Fprintf(&want, "<%s>\n", arg)
		}
		if out != want.String() || status != (ExitStatus{}) {
			t.Errorf("got %q, %+v, want %q", out, status, want.String())
		}
	})
}

func TestRunExitStatus(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		for _, tt := range []struct {
			cmd  Command
			want ExitStatus
			code int
		}{
			{Command{Argv: []string{"true"}}, ExitStatus{}, 0},
			{Command{Argv: []string{"false"}}, ExitStatus{Code: 1}, 1},
			{Command{Shell: "exit 42"}, ExitStatus{Code: 42}, 42},
			{Command{Shell: "exit 255"}, ExitStatus{Code: 255}, 255},
			{Command{Argv: []string{"no-such-program"}}, ExitStatus{Code: 127}, 127},
			{Command{Argv: []string{"/etc/passwd"}}, ExitStatus{Code: 126}, 126},
			{Command{Shell: "kill -TERM $$"}, ExitStatus{Signal: "TERM"}, 143},
			{Command{Shell: "kill -KILL $$"}, ExitStatus{Signal: "KILL"}, 137},
			{Command{Argv: []string{"true"}, Dir: "/nowhere"}, ExitStatus{Code: 1}, 1},
		} {
			_, _, got := output(t, c, tt.cmd)
			if got != tt.want || got.ExitCode() != tt.code {
				t.Errorf("%q %q: got %+v, %d", tt.cmd.Argv, tt.cmd.Shell, got, got.ExitCode())
			}
		}
	})
}

func TestRunDirectoryAndEnvironment(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		dir := filepath.Join(g.home, "it's a -dir")
		for _, d := range []string{dir, filepath.Join(g.home, "-")} {
			if err := os.Mkdir(d, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		secret := "s3cr3t 'quoted'\nsecond line"
		env := map[string]string{"TOKEN": secret, "EMPTY": "", "CDPATH": "/tmp"}
		out, errOut, _ := output(t, c, Command{Dir: dir, Env: env, Argv: []string{"sh", "-c", `pwd; printf '%s|%s' "$TOKEN" "${EMPTY-unset}"`}})
		if want := dir + "\n" + secret + "|"; out != want || errOut != "" {
			t.Errorf("got %q, %q, want %q", out, errOut, want)
		}
		if out, _, _ := output(t, c, Command{Dir: "-", Shell: "pwd # comment"}); out != filepath.Join(g.home, "-")+"\n" {
			t.Errorf("relative directory: %q", out)
		}
		if out, _, _ := output(t, c, Command{Env: env, Argv: []string{"sh", "-c", "tr '\\0' ' ' </proc/$PPID/cmdline; cat /proc/$$/cmdline"}}); strings.Contains(out, "s3cr3t") {
			t.Errorf("a secret is in an argument: %q", out)
		}
	})
}

// A program that is run by its arguments sees what it would see if the user's
// shell had started it, whether the shell has or not.
func TestRunAsTheShellWould(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		dir := filepath.Join(g.home, "dir")
		script, tool := filepath.Join(dir, "script"), filepath.Join(dir, "tool")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for path, text := range map[string]string{script: "echo no interpreter $1\n", tool: "#!/bin/sh\npwd; echo $0\n"} {
			if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink("dir", filepath.Join(g.home, "link")); err != nil {
			t.Fatal(err)
		}
		rc := filepath.Join(g.home, ".bashrc")
		for _, startup := range []string{"", "[ -z \"$PS1\" ] && return\nexport SEEN=never\n", "export SEEN=always\n"} {
			os.Remove(rc)
			if startup != "" {
				if err := os.WriteFile(rc, []byte(startup), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, in := range []string{"", dir, dir + "/../dir/", "dir", "./link//"} {
				cd := ""
				if in != "" {
					cd = "cd -- " + in + " && "
				}
				env := map[string]string{"PATH": dir + ":/usr/bin:/bin", "SSH_CLIENT": "192.0.2.1 1 22"} // bash looks for the second
				sorted := func(c *Client, cmd Command) string {
					out, _, _ := output(t, c, cmd)
					lines := strings.Split(out, "\n")
					slices.Sort(lines)
					return strings.Join(lines, "\n")
				}
				got, want := sorted(c, Command{Argv: []string{"env"}, Dir: in, Env: env}), sorted(c, Command{Shell: cd + "exec env", Env: env})
				if got != want || strings.Contains(got, "SEEN=always") != strings.Contains(startup, "always") {
					t.Errorf("after %q, in %q: the environment is\n%s\nand by the shell\n%s", startup, in, got, want)
				}
				// OpenSSH's server does not take a PATH.
				if got, _, _ := output(t, c, Command{Argv: []string{"tool"}, Dir: in, Env: env}); ours && !strings.HasSuffix(got, "\n"+tool+"\n") {
					t.Errorf("in %q: %q", in, got)
				}
			}
			if got, _, _ := output(t, c, Command{Argv: []string{"./tool"}, Dir: dir}); got != dir+"\n"+tool+"\n" {
				t.Errorf("by a relative path: %q", got)
			}
			if got, _, _ := output(t, c, Command{Argv: []string{"./script", "at all"}, Dir: dir}); got != "no interpreter at all\n" {
				t.Errorf("a script without its interpreter's name says %q", got)
			}
			if got, _, _ := output(t, c, Command{Argv: []string{"./script", "at all"}, Dir: dir, TTY: true}); got != "no interpreter at all\r\n" {
				t.Errorf("on a terminal, it says %q", got)
			}
			if _, errOut, status := output(t, c, Command{Argv: []string{"nothing-such"}}); status.Code != 127 || !strings.Contains(errOut, "not found") {
				t.Errorf("a program that is not there: %+v, %q", status, errOut)
			}
			if _, errOut, status := output(t, c, Command{Argv: []string{"true"}, Dir: "nowhere"}); status.Code != 1 || !strings.Contains(errOut, "nowhere") {
				t.Errorf("a directory that is not there: %+v, %q", status, errOut)
			}
		}
	})
}

func TestRunEnvironmentRefused(t *testing.T) {
	if ours { // which takes everything
		return
	}
	g := newGuest(t, "AcceptEnv NOTHING")
	config := filepath.Join(g.dir, "sshd_config")
	content, _ := os.ReadFile(config)
	os.WriteFile(config, bytes.ReplaceAll(content, []byte("AcceptEnv *"), nil), 0o600)
	_, err := g.viaProxy().Run(timeout(t, time.Minute), Command{Argv: []string{"true"}, Env: map[string]string{"TOKEN": "secret"}})
	if !errors.Is(err, ErrEnvRefused) || !strings.Contains(err.Error(), "TOKEN") || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}

func TestRunRejects(t *testing.T) {
	g := newGuest(t)
	c := g.connect()
	for _, cmd := range []Command{
		{Argv: []string{""}},
		{Argv: []string{"a"}, Shell: "b"},
		{Argv: []string{"a\x00b"}},
		{Argv: []string{"echo", strings.Repeat("x", 200_000)}},
		{Argv: []string{"true"}, Env: map[string]string{"A=B": ""}},
		{Argv: []string{"true"}, Env: map[string]string{"": ""}},
	} {
		if _, err := c.Run(timeout(t, time.Minute), cmd); err == nil {
			t.Errorf("%.40q %v: accepted", cmd.Argv, cmd.Env)
		}
	}
	if out, _, _ := output(t, c, Command{Argv: []string{"echo", strings.Repeat("x", 131_000)}}); len(out) != 131_001 {
		t.Errorf("long argument: %d bytes", len(out))
	}
}

func TestRunStreams(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		data := make([]byte, 8<<20)
		rand.Read(data)
		sum := sha256.Sum256(data)
		hash := sha256.New()
		// Hiding the buffer's WriterTo, as a pipe would.
		in := struct{ io.Reader }{bytes.NewReader(data)}
		status, err := c.Run(timeout(t, time.Minute), Command{Argv: []string{"cat"}, Stdin: in, Stdout: hash})
		if err != nil || status.ExitCode() != 0 || !bytes.Equal(hash.Sum(nil), sum[:]) {
			t.Errorf("8 MiB through cat: %v, %v", status, err)
		}

		out, errOut, _ := output(t, c, Command{Shell: "echo out; echo err >&2"})
		if out != "out\n" || errOut != "err\n" {
			t.Errorf("got %q, %q", out, errOut)
		}
		if out, _, _ := output(t, c, Command{Argv: []string{"cat"}}); out != "" {
			t.Errorf("no input: got %q", out)
		}
		// Input that nobody reads must not hold up the end.
		if _, _, status := output(t, c, Command{Argv: []string{"true"}, Stdin: zeros{}}); status.ExitCode() != 0 {
			t.Errorf("unread input: %v", status)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// slow is a reader that the window's flow control has to wait for.
type slow struct {
	n    int
	last time.Time
}

func (s *slow) Write(p []byte) (int, error) {
	if time.Since(s.last) > 20*time.Millisecond {
		time.Sleep(20 * time.Millisecond)
		s.last = time.Now()
	}
	s.n += len(p)
	return len(p), nil
}

func TestRunSlowReaderGetsEverything(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		out, errOut := &slow{}, &slow{}
		_, err := c.Run(timeout(t, 60*time.Second), Command{
			Shell: "head -c 6000000 /dev/zero & head -c 5000000 /dev/zero >&2; wait", Stdout: out, Stderr: errOut})
		if err != nil || out.n != 6000000 || errOut.n != 5000000 {
			t.Errorf("got %d and %d bytes, %v", out.n, errOut.n, err)
		}
	})
}

func TestRunOutputError(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		r, w := io.Pipe()
		r.Close()
		_, err := c.Run(timeout(t, time.Minute), Command{Argv: []string{"yes", "output error"}, Stdout: w})
		if !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("got %v", err)
		}
		g.gone("yes output error")
	})
}

// gone waits until no process of the guest has this command line.
func (g *guest) gone(commandLine string) {
	g.t.Helper()
	eventually(g.t, commandLine+" is gone", func() bool { return len(findProcess(commandLine)) == 0 })
}

// findProcess looks for a command line. The guest's processes are the host's.
func findProcess(commandLine string) (pids []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		content, _ := os.ReadFile(f)
		if strings.TrimSpace(strings.ReplaceAll(string(content), "\x00", " ")) == commandLine {
			pids = append(pids, f)
		}
	}
	return pids
}

func TestRunSignals(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1} {
			signals := make(chan os.Signal, 1)
			out := &trigger{on: "ready", do: func() { signals <- sig }}
			status, err := c.Run(timeout(t, time.Minute), Command{
				Argv:   []string{"sh", "-c", "trap 'exit 3' USR1; echo ready; while :; do sleep 0.1; done"},
				Stdout: out, Signals: signals})
			want := 128 + int(sig)
			if sig == syscall.SIGUSR1 {
				want = 3
			}
			if err != nil || status.ExitCode() != want {
				t.Errorf("%v: got %+v, %v", sig, status, err)
			}
		}
	})
}

// trigger calls do once the output contains on.
type trigger struct {
	on   string
	do   func()
	once sync.Once
	got  bytes.Buffer
}

func (tr *trigger) Write(p []byte) (int, error) {
	tr.got.Write(p)
	if strings.Contains(tr.got.String(), tr.on) {
		tr.once.Do(tr.do)
	}
	return len(p), nil
}

func TestRunCancelled(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		for name, command := range map[string]string{
			"polite":   "echo ready; exec sleep 4711",
			"stubborn": "trap '' TERM HUP; echo ready; while :; do sleep 0.1; done # 4711",
		} {
			ctx, cancel := context.WithCancel(t.Context())
			_, err := c.Run(ctx, Command{
				Argv: []string{"sh", "-c", command}, Grace: 200 * time.Millisecond,
				Stdout: &trigger{on: "ready", do: cancel}})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: got %v", name, err)
			}
		}
		g.gone("sleep 4711")
		g.gone("sh -c trap '' TERM HUP; echo ready; while :; do sleep 0.1; done # 4711")
	})
}

func TestRunTerminal(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		resize := make(chan WindowSize, 1)
		out := &trigger{on: "24 81", do: func() { resize <- WindowSize{99, 33} }}
		status, err := c.Run(timeout(t, time.Minute), Command{
			Argv: []string{"sh", "-c", `trap 'stty size; exit 5' WINCH; echo $TERM; stty -a | grep -o iutf8; stty size; while :; do sleep 0.1; done`},
			TTY:  true, Term: "vt100", Size: WindowSize{81, 24}, Resize: resize, Stdout: out})
		got := strings.ReplaceAll(out.got.String(), "\r", "")
		if want := "vt100\niutf8\n24 81\n33 99\n"; err != nil || status.Code != 5 || got != want {
			t.Errorf("got %q, %+v, %v", got, status, err)
		}
		// A terminal turns ^C into a signal by itself, and ^D into the end.
		in, typed := io.Pipe()
		out = &trigger{on: "ready", do: func() { go typed.Write([]byte{3}) }}
		status, err = c.Run(timeout(t, time.Minute), Command{
			Argv: []string{"sh", "-c", "echo ready; exec sleep 4712"}, TTY: true, Stdin: in, Stdout: out})
		typed.Close()
		if err != nil || status.ExitCode() != 130 {
			t.Errorf("^C: got %+v, %v", status, err)
		}
	})
}

func TestRunLoginShell(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		for _, dir := range []string{"", "/usr"} {
			want := dir
			if dir == "" {
				want = g.home
			}
			out, _, _ := output(t, c, Command{Dir: dir, Stdin: strings.NewReader("pwd; shopt login_shell\n")})
			if !strings.HasSuffix(out, want+"\nlogin_shell    \ton\n") {
				t.Errorf("in %q: got %q", dir, out)
			}
		}
	})
}

func TestRunManyAtOnce(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		var all sync.WaitGroup
		for i := range 100 {
			all.Go(func() {
				var out bytes.Buffer
				status, err := c.Run(timeout(t, 60*time.Second), Command{
					Shell: fmt.Sprintf("cat; exit %d", i), Stdin: strings.NewReader(fmt.Sprint(i)), Stdout: &out})
				if err != nil || status.Code != i || out.String() != fmt.Sprint(i) {
					t.Errorf("%d: got %q, %+v, %v", i, out.String(), status, err)
				}
			})
		}
		all.Wait()
	})
}

// The program's end must be seen while a terminal or a pipe has no input, and
// input that comes later belongs to whoever reads next.
func TestRunLeavesLaterInput(t *testing.T) {
	g := newGuest(t)
	c := g.viaProxy()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, _, status := output(t, c, Command{Argv: []string{"true"}, Stdin: r}); status.Code != 0 {
		t.Fatal(status)
	}
	time.Sleep(50 * time.Millisecond)
	w.WriteString("later")
	buf := make([]byte, 16)
	if n, _ := r.Read(buf); string(buf[:n]) != "later" {
		t.Errorf("got %q", buf[:n])
	}
}
