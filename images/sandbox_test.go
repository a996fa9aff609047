package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

func requireSandbox(t testing.TB) sandbox {
	t.Helper()
	s := newSandbox(os.Getuid())
	if err := s.run(context.Background(), command{args: []string{"true"}, env: baseEnv()}); err != nil {
		testenv.Unavailable(t, "%v", err)
	}
	return s
}

// running counts the processes whose command line has the marker in it.
func running(t testing.TB, marker string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(data), marker) && !strings.Contains(f, fmt.Sprint("/", os.Getpid(), "/")) {
			n++
		}
	}
	return n
}

// grandchildren mounts something and leaves processes behind that ignore
// every signal they can, in sessions of their own.
func grandchildren(dir, marker string) command {
	script := fmt.Sprintf(`trap '' INT TERM HUP; mount -t tmpfs %s "$0"; setsid sh -c 'trap "" INT TERM HUP; sleep 60; : %s' & sleep 60; : %s`, marker, marker, marker)
	return command{args: []string{"sh", "-c", script, dir}, env: baseEnv()}
}

func waitRunning(t testing.TB, marker string, want func(int) bool) {
	t.Helper()
	for range 100 {
		if want(running(t, marker)) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("%d processes of %s run", running(t, marker), marker)
}

func mounted(t testing.TB, marker string) bool {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(data), marker)
}

// Ctrl-C: the whole tree dies, whatever it ignores, and no mount is left.
func TestSandboxCancel(t *testing.T) {
	s := requireSandbox(t)
	marker := fmt.Sprintf("images-cancel-%d", os.Getpid())
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.run(ctx, grandchildren(t.TempDir(), marker)) }()
	waitRunning(t, marker, func(n int) bool { return n >= 2 })
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want Canceled", err)
	}
	waitRunning(t, marker, func(n int) bool { return n == 0 })
	if mounted(t, marker) {
		t.Error("a mount is left")
	}
}

// TestHelperSandbox is not a test: TestSandboxParentKilled runs it as a process.
func TestHelperSandbox(t *testing.T) {
	marker := os.Getenv("IMAGES_TEST_MARKER")
	if marker == "" {
		t.Skip("helper process")
	}
	t.Fatal(newSandbox(os.Getuid()).run(context.Background(), grandchildren(t.TempDir(), marker)))
}

// kill -9 of the builder: the same.
func TestSandboxParentKilled(t *testing.T) {
	requireSandbox(t)
	marker := fmt.Sprintf("images-kill-%d", os.Getpid())
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelperSandbox$")
	cmd.Env = append(os.Environ(), "IMAGES_TEST_MARKER="+marker, "TMPDIR="+t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitRunning(t, marker, func(n int) bool { return n >= 2 })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	waitRunning(t, marker, func(n int) bool { return n == 0 })
	if mounted(t, marker) {
		t.Error("a mount is left")
	}
}

// What a subordinate id owns can be removed all the same.
func TestRemoveTree(t *testing.T) {
	s := requireSandbox(t)
	dir := filepath.Join(t.TempDir(), "tree")
	ctx := context.Background()
	err := s.run(ctx, command{
		args: []string{"sh", "-c", `mkdir -p "$0/a/b"; touch "$0/a/b/c"; chown -R 100:100 "$0/a"; chmod 700 "$0/a"`, dir},
		env:  baseEnv(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.removeTree(ctx, dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

func TestSandboxError(t *testing.T) {
	s := requireSandbox(t)
	err := s.run(context.Background(), command{args: []string{"sh", "-c", "echo first; echo last >&2; exit 3"}, env: baseEnv()})
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(err.Error(), "last") {
		t.Errorf("error %v", err)
	}
}
