package main

import (
	"bytes"
	"encoding/json"
	"errors"
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

// TestInterruptedUp presses Ctrl-C at many moments of the same `up`, which boots:
// TestTemplateKilled does the same to templates.
func TestInterruptedUp(t *testing.T) {
	h := newHost(t)
	dir := h.project("p", "version: 1\nresources: {memory: 512MiB}\n")
	h.must(dir, "image", "build")
	for _, after := range []time.Duration{0, 20, 60, 120, 250, 500, 1000, 2500, 6000} {
		after *= time.Millisecond
		t.Run(after.String(), func(t *testing.T) {
			cmd := h.command(dir, "up", "--cold")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after)
			_ = cmd.Process.Signal(syscall.SIGINT)
			begun := time.Now()
			_ = cmd.Wait()
			if took := time.Since(begun); took > 30*time.Second {
				t.Errorf("it took %s to end", took)
			}
			// A signal that comes before the program listens ends it the plain way.
			if code := cmd.ProcessState.ExitCode(); code != exitInterrupt && code != -1 {
				t.Errorf("exit code %d\n%s", code, &stderr)
			}
			h.nothingLeft()
			var list []view
			if err := json.Unmarshal([]byte(h.run("ls", "--json").stdout), &list); err != nil || len(list) > 0 {
				t.Errorf("left: %+v, %v", list, err)
			}
		})
	}
}

// TestKilledWhileStarting kills -9 the supervisor, QEMU and virtiofsd while the
// guest boots; each time the next command knows what happened.
func TestKilledWhileStarting(t *testing.T) {
	h := newHost(t)
	dir := h.project("p", "version: 1\nname: victim\nresources: {memory: 512MiB}\n")
	h.must(dir, "image", "build")
	for _, tt := range []struct{ process, says string }{
		{"supervisor", "was killed while"},
		{"qemu", "signal: killed"},
		{"virtiofsd-workspace", "share at /workspace is lost"},
	} {
		t.Run(tt.process, func(t *testing.T) {
			cmd := h.command(dir, "up", "--cold")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for range 2400 {
				if o := h.runIn(dir, "", "status", "victim", "--json"); strings.Contains(o.stdout, `"`+tt.process+`":`) && strings.Contains(o.stdout, `"booting"`) {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			h.kill(dir, tt.process)
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != exitFailure || !strings.Contains(stderr.String(), tt.says) {
				t.Errorf("exit code %d, want %q in\n%s", code, tt.says, &stderr)
			}
			if v := h.status(dir); v.State != instance.Failed || !strings.Contains(v.Reason, tt.says) {
				t.Errorf("%s: %s", v.State, v.Reason)
			}
			h.nothingLeft()
		})
	}
}

// TestNeverReady boots a disk with nothing on it.
func TestNeverReady(t *testing.T) {
	h := newHost(t)
	dir := h.project("p", "version: 1\nname: empty\nimage: ./empty.img\nresources: {memory: 256MiB}\n")
	if err := os.WriteFile(filepath.Join(dir, "empty.img"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	o := h.runIn(dir, "", "up", "--timeout", "8s")
	if o.code != exitTimeout {
		t.Errorf("exit code %d", o.code)
	}
	for _, want := range []string{"did not become ready in time", "last console lines", "hint: agentvm logs empty"} {
		if !strings.Contains(o.stderr, want) {
			t.Errorf("want %q in\n%s", want, o.stderr)
		}
	}
	if log := h.must(dir, "logs", "empty", "-s", "console").stdout; log == "" {
		t.Error("the console log is empty")
	}
	h.nothingLeft()
}

// TestFullDisk starts on a file system without room.
func TestFullDisk(t *testing.T) {
	testenv.RequireRoot(t)
	h := newHost(t)
	dir := h.project("p", "version: 1\nresources: {memory: 512MiB}\n")
	h.must(dir, "image", "build")
	// small has act work with a directory that has room for so much.
	small := func(t *testing.T, dir, size string, act func()) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o711); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=711,size="+size); err != nil {
			testenv.Unavailable(t, "needs a small file system: %v", err)
		}
		defer func() {
			if err := syscall.Unmount(dir, 0); err != nil {
				t.Error(errors.Join(err, syscall.Unmount(dir, syscall.MNT_DETACH)))
			}
		}()
		act()
	}
	t.Run("for machines", func(t *testing.T) {
		small(t, filepath.Join(h.home, "state"), "16m", func() {
			o := h.runIn(dir, "", "up", "--cold")
			if o.code != exitHost || !strings.Contains(o.stderr, "MiB free") || !strings.Contains(o.stderr, "hint:") {
				t.Errorf("exit code %d\n%s", o.code, o.stderr)
			}
		})
	})
	t.Run("for templates", func(t *testing.T) {
		h.ownTemplates()
		small(t, h.templateDir(), "640m", func() {
			filler := filepath.Join(h.templateDir(), "filler")
			o := h.when(dir, "QEMU (", func(*os.Process) {
				if out, err := exec.Command("fallocate", "-l", "560m", filler).CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			}, "up")
			if o.code != 0 || !strings.Contains(o.stderr, "there is no template for it") || !strings.Contains(o.stderr, "no space left") || !strings.Contains(o.stderr, "is ready after") {
				t.Errorf("exit code %d\n%s", o.code, o.stderr)
			}
			h.must(dir, "down")
			if err := os.Remove(filler); err != nil {
				t.Error(err)
			}
			left, _ := filepath.Glob(filepath.Join(h.templateDir(), "making", "*"))
			if list := h.templates(); len(list)+len(left) > 0 {
				t.Errorf("left: %+v, %q\n%s", list, left, o.stderr)
			}
		})
	})
}
