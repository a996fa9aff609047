package images

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/agentvm/agentvm/vm"
)

// sandbox runs programs as root: real root in its own mount and process
// namespaces, or, for an ordinary user, the root of a user namespace as well, in
// which the user is root and the user's subordinate ids are everyone else.
//
// unshare(1) sets it up. The program is process 1 of its namespace and dies with
// unshare, which dies with us (pdeathsig); with process 1 the kernel ends every
// process of the namespace and, with the last of them, every mount.
type sandbox struct{ prefix []string }

func newSandbox(uid int) sandbox {
	args := []string{"unshare"}
	if uid != 0 {
		args = append(args, "--user", "--map-root-user", "--map-auto")
	}
	return sandbox{append(args, "--mount", "--pid", "--fork", "--kill-child", "--")}
}

// command is one program to run in a sandbox.
type command struct {
	args   []string
	env    []string // the whole environment
	stdin  io.Reader
	stdout io.Writer         // nil: lines of standard output go to line too
	line   func(text string) // called for every line of output; nil: ignored
}

// killDelay bounds the wait for a killed program's last output.
const killDelay = 10 * time.Second

// run runs the command and waits until nothing of it is left. When ctx ends,
// everything is killed at once: nothing that runs here is worth saving. The
// error has the program's last lines in it.
func (s sandbox) run(ctx context.Context, c command) error {
	// Pdeathsig fires when the starting *thread* ends, so the thread is kept
	// until the program is done: https://go.dev/issue/27505.
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- s.runHere(ctx, c)
	}()
	return <-done
}

func (s sandbox) runHere(ctx context.Context, c command) error {
	args := append(append([]string{}, s.prefix...), c.args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = c.env
	cmd.Dir = "/"
	cmd.Stdin = c.stdin
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = killDelay

	out := &lineWriter{line: c.line}
	cmd.Stderr = out
	cmd.Stdout = c.stdout
	if c.stdout == nil {
		cmd.Stdout = out
	}
	err := cmd.Run()
	out.flush()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", c.args[0], context.Cause(ctx))
	}
	return explain(c.args[0], out.tail, err)
}

// explain makes an error of a failed program and its last lines of output.
func explain(program string, tail []string, err error) error {
	if errors.Is(err, exec.ErrNotFound) {
		return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("start %s: %w", program, err)),
			"sudo apt-get install "+debianPackageOf("unshare"))
	}
	text := strings.Join(tail, "\n")
	err = fmt.Errorf("%s: %w", program, err)
	if text != "" {
		err = fmt.Errorf("%w; it said:\n\t%s", err, strings.Join(tail, "\n\t"))
	}
	for _, sign := range []string{"Temporary failure resolving", "Could not connect", "Unable to connect", "ENOTFOUND", "ECONNREFUSED", "Connection timed out"} {
		if strings.Contains(text, sign) {
			return vm.WithHint(err, "check the host's network, and http_proxy and https_proxy if it has a proxy")
		}
	}
	if strings.Contains(text, "NO_PUBKEY") || strings.Contains(text, "is not signed") {
		return vm.WithHint(vm.Classify(vm.ErrHost, err), "sudo apt-get install debian-archive-keyring")
	}
	if program == "unshare" || strings.Contains(text, "unshare failed") || strings.Contains(text, "newuidmap") {
		return vm.WithHint(vm.Classify(vm.ErrHost, err), "agentvm doctor")
	}
	return diskFull(text, err)
}

// removeTree removes a tree whose files may belong to subordinate ids, which
// only the root of the user namespace may remove.
func (s sandbox) removeTree(ctx context.Context, dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	return s.run(ctx, command{
		args: []string{"rm", "-rf", "--one-file-system", "--", dir},
		env:  baseEnv(),
	})
}

// baseEnv is the environment of programs that need nothing from the caller's.
func baseEnv() []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LANG=C.UTF-8",
		"HOME=/",
	}
}

// lineWriter cuts what is written to it into lines, and remembers the last.
// os/exec serializes the writes when it serves both output streams.
type lineWriter struct {
	line func(string)
	tail []string
	rest []byte
}

const (
	tailLines = 15
	lineLimit = 4 << 10
)

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		i := bytes.IndexAny(w.rest, "\n\r")
		if i < 0 {
			break
		}
		w.emit(w.rest[:i])
		w.rest = w.rest[i+1:]
	}
	if len(w.rest) > lineLimit {
		w.emit(w.rest)
		w.rest = nil
	}
	return len(p), nil
}

func (w *lineWriter) flush() {
	s := bufio.NewScanner(bytes.NewReader(w.rest))
	for s.Scan() {
		w.emit(s.Bytes())
	}
	w.rest = nil
}

func (w *lineWriter) emit(b []byte) {
	text := strings.TrimRight(string(b), " \t")
	if text == "" {
		return
	}
	if len(w.tail) == tailLines {
		w.tail = w.tail[1:]
	}
	w.tail = append(w.tail, text)
	if w.line != nil {
		w.line(text)
	}
}
