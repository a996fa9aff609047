package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// host is a home of its own for the real program, with the test run's image
// cache in it.
type host struct {
	t       testing.TB
	home    string
	program string
}

// buildOnce compiles the real program; a test binary cannot stand in for it,
// because the supervisor is the same program started again.
var buildOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "agentvm-bin")
	if err != nil {
		return "", err
	}
	built = dir
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	program := filepath.Join(dir, "agentvm")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return program, nil
})

var built string // buildOnce's directory, for TestMain to remove

// newHost makes a home that the unprivileged users of root's machines can
// reach, and whose path is short enough for sockets.
func newHost(t testing.TB) *host {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	testenv.RequireQEMU(t)
	testenv.RequireMmdebstrap(t)
	program, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.MkdirTemp("/tmp", "avm")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(home, 0o711); err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, home: home, program: program}
	t.Cleanup(func() {
		h.run("down", "--all")
		h.run("pool", "drain")
		h.nothingLeft()
		if err := os.RemoveAll(home); err != nil {
			t.Error(err)
		}
	})
	if cache := os.Getenv("AGENTVM_TEST_CACHE"); cache != "" {
		if err := os.MkdirAll(filepath.Join(home, "cache"), 0o711); err != nil {
			t.Fatal(err)
		}
		for _, what := range []string{"images", "templates"} {
			shared := filepath.Join(cache, "agentvm-"+what)
			if err := os.MkdirAll(shared, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(shared, filepath.Join(home, "cache", what)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return h
}

// project makes a workspace with an agentvm.yaml.
func (h *host) project(name, config string) string {
	h.t.Helper()
	dir := filepath.Join(h.home, "w", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "agentvm.yaml"), []byte(config), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

// command is the real program in a directory.
func (h *host) command(dir string, args ...string) *exec.Cmd {
	cmd := exec.Command(h.program, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "AGENTVM_HOME="+h.home, "AGENTVM_TEST_SECRET=not for the guest")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

type outcome struct {
	stdout, stderr string
	code           int
	took           time.Duration
}

func (h *host) run(args ...string) outcome { return h.runIn(h.home, "", args...) }

func (h *host) runIn(dir, stdin string, args ...string) outcome {
	h.t.Helper()
	cmd := h.command(dir, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	begun := time.Now()
	err := cmd.Run()
	o := outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), time.Since(begun)}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatalf("agentvm %q: %v\n%s", args, err, o.stderr)
	}
	return o
}

// must runs a command that has to succeed.
func (h *host) must(dir string, args ...string) outcome {
	h.t.Helper()
	o := h.runIn(dir, "", args...)
	if o.code != 0 {
		h.t.Fatalf("agentvm %q: exit code %d\n%s%s", args, o.code, o.stdout, o.stderr)
	}
	return o
}

// fails runs a command that must end with a code and say something.
func (h *host) fails(dir string, code int, says string, args ...string) {
	h.t.Helper()
	o := h.runIn(dir, "", args...)
	if o.code != code || !strings.Contains(o.stderr, says) {
		h.t.Errorf("agentvm %q: exit code %d, want %d; want %q in\n%s", args, o.code, code, says, o.stderr)
	}
}

// guest runs a shell line in the machine and wants it to succeed.
func (h *host) guest(dir, script string) string {
	h.t.Helper()
	return h.must(dir, "exec", "--", "sh", "-c", script).stdout
}

func (h *host) status(dir string) view {
	h.t.Helper()
	var v view
	if err := json.Unmarshal([]byte(h.must(dir, "status", "--json").stdout), &v); err != nil {
		h.t.Fatal(err)
	}
	return v
}

// processes lists what runs with this home in its arguments or environment.
func (h *host) processes() (list []string) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(args) == 0 || filepath.Base(dir) == strconv.Itoa(os.Getpid()) {
			continue // gone, or a zombie
		}
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))
		if bytes.Contains(args, []byte(h.home)) || bytes.Contains(env, []byte("AGENTVM_HOME="+h.home+"\x00")) {
			list = append(list, fmt.Sprintf("%s: %s", filepath.Base(dir), bytes.ReplaceAll(args, []byte{0}, []byte{' '})))
		}
	}
	return list
}

// nothingLeft checks for processes, mounts and sockets of this home. Dying
// takes the kernel a moment.
func (h *host) nothingLeft() {
	h.t.Helper()
	var left []string
	for range 300 {
		left = h.processes()
		mounts, _ := os.ReadFile("/proc/self/mounts")
		if strings.Contains(string(mounts), h.home) {
			left = append(left, "a mount")
		}
		sockets, _ := filepath.Glob(filepath.Join(h.home, "run", "*"))
		left = append(left, sockets...)
		if len(left) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	h.t.Errorf("left behind: %s", strings.Join(left, "\n"))
}

// kill -9 a process of the machine.
func (h *host) kill(dir, process string) {
	h.t.Helper()
	pid := h.status(dir).Processes[process]
	if pid == 0 {
		h.t.Fatalf("no process %s in %v", process, h.status(dir).Processes)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
}

// until waits for a state.
func (h *host) until(dir string, want instance.State) view {
	h.t.Helper()
	for range 1800 {
		if v := h.status(dir); v.State == want {
			return v
		}
		time.Sleep(100 * time.Millisecond)
	}
	v := h.status(dir)
	h.t.Fatalf("state %s (%s), want %s", v.State, v.Reason, want)
	return v
}
