package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/template"
)

// ownTemplates gives the host a store of templates for itself, empty, for
// tests that count, damage or interrupt them.
func (h *host) ownTemplates() {
	h.t.Helper()
	if err := os.Remove(h.templateDir()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { h.run("template", "prune", "--all") })
}

func (h *host) templateDir() string { return filepath.Join(h.home, "cache", "templates") }

func (h *host) templates() (list []templateView) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(h.home, "template", "ls", "--json").stdout), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}

func (h *host) machines() (list []view) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(h.home, "ls", "--json").stdout), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}

// came is what `up --json` says of a machine.
type came struct {
	Restored bool `json:"restored"`
	Status   view `json:"status"`
	notes    string
}

// up brings the project's machine up, without any warning.
func (h *host) up(dir string, flags ...string) (c came) {
	h.t.Helper()
	o := h.must(dir, append([]string{"up", "--json"}, flags...)...)
	if err := json.Unmarshal([]byte(o.stdout), &c); err != nil {
		h.t.Fatalf("up --json: %v in %s", err, o.stdout)
	}
	if c.Status.State != instance.Ready || len(c.Status.Warnings) > 0 {
		h.t.Errorf("it is %s: %v", c.Status.State, c.Status.Warnings)
	}
	c.notes = o.stderr
	return c
}

// when runs a command, and acts once it has said something.
func (h *host) when(dir, says string, act func(*os.Process), args ...string) outcome {
	h.t.Helper()
	cmd := h.command(dir, args...)
	pipe, err := cmd.StderrPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	defer time.AfterFunc(10*time.Minute, func() { _ = cmd.Process.Kill() }).Stop()
	var stderr strings.Builder
	acted := false
	for lines := bufio.NewScanner(pipe); lines.Scan(); {
		stderr.WriteString(lines.Text() + "\n")
		if !acted && strings.Contains(lines.Text(), says) {
			acted = true
			act(cmd.Process)
		}
	}
	_ = cmd.Wait()
	if !acted {
		h.t.Fatalf("agentvm %q never says %q:\n%s", args, says, &stderr)
	}
	return outcome{"", stderr.String(), cmd.ProcessState.ExitCode(), time.Since(begun)}
}

// pid waits for a process of this host with all these words in its arguments.
func (h *host) pid(words ...string) int {
	h.t.Helper()
	for range 6000 {
		for _, p := range h.processes() {
			number, args, _ := strings.Cut(p, ": ")
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(args, w) }) {
				pid, _ := strconv.Atoi(number)
				return pid
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.t.Fatalf("no process has %q", words)
	return 0
}

// TestTemplateDamaged starts from templates that are good no more: each time
// the machine boots, says why, and the template is gone. A supervisor that is
// killed once may not be the template's fault.
func TestTemplateDamaged(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.ownTemplates()
	const config = "version: 1\nresources: {memory: 512MiB}\n"
	dir := h.project("p", config)
	h.must(dir, "template", "build")
	id := h.templates()[0].ID
	at := filepath.Join(h.templateDir(), id)
	whole := filepath.Join(h.home, "whole")
	copyDir := func(from, to string) {
		t.Helper()
		if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	copyDir(at, whole)
	edit := func(name string, change func([]byte) []byte) {
		t.Helper()
		path := filepath.Join(at, name)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, change(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	half := func(b []byte) []byte { return b[:len(b)/2] }
	for _, tt := range []struct {
		name, says string
		damage     func(t *testing.T)
		kill       []string // words of the process's arguments
		kept       bool
	}{
		{"a byte of memory", "memory has changed", func(*testing.T) {
			edit("memory", func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}, nil, false},
		{"state cut short", "state has changed", func(*testing.T) {
			edit("state", func(b []byte) []byte { return b[:len(b)-100] })
		}, nil, false},
		{"saved.json cut short", "saved.json", func(*testing.T) { edit("saved.json", half) }, nil, false},
		{"a byte of the disk", template.DiskFile + " has changed", func(*testing.T) {
			edit(template.DiskFile, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}, nil, false},
		{"no disk", template.DiskFile, func(t *testing.T) {
			if err := os.Remove(filepath.Join(at, template.DiskFile)); err != nil {
				t.Fatal(err)
			}
		}, nil, false},
		{"QEMU is killed", "signal: killed", nil, []string{qemuBinary, "instances"}, false},
		{"the supervisor is killed", "was killed while", nil, []string{"supervise", "instances"}, true},
		{"and the next one's too", "was killed while", nil, []string{"supervise", "instances"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := os.Stat(at); err != nil {
				copyDir(whole, at)
			}
			var o outcome
			if tt.damage != nil {
				tt.damage(t)
				o = h.must(dir, "up")
			} else { // the template is good, and the machine that goes on from it dies
				o = h.when(dir, "running again", func(*os.Process) {
					_ = syscall.Kill(h.pid(tt.kill...), syscall.SIGKILL)
				}, "up")
			}
			if o.code != 0 || !strings.Contains(o.stderr, "it boots instead") || !strings.Contains(o.stderr, tt.says) || !strings.Contains(o.stderr, "is ready after") {
				t.Errorf("exit code %d, want %q in\n%s", o.code, tt.says, o.stderr)
			}
			if v := h.status(dir); v.State != instance.Ready || len(v.Warnings) > 0 {
				t.Errorf("it is %s: %v", v.State, v.Warnings)
			}
			h.guest(dir, "echo x >/workspace/made")
			if list := h.templates(); (len(list) > 0) != tt.kept {
				t.Errorf("templates: %+v, want one: %v", list, tt.kept)
			}
			h.must(dir, "down")
		})
	}
	t.Run("the next makes another", func(t *testing.T) {
		copyDir(whole, at)
		edit("template.json", half)
		if o := h.must(h.home, "template", "ls", "--json"); o.stdout != "[]\n" || !strings.Contains(o.stderr, id+" takes") || !strings.Contains(o.stderr, "damaged") {
			t.Errorf("a damaged template takes room unseen:\n%s%s", o.stdout, o.stderr)
		}
		next := h.project("next", config)
		o := h.when(next, "making a template", func(p *os.Process) { _ = p.Signal(syscall.SIGINT) }, "up")
		if o.code != exitInterrupt {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		h.nothingLeft()
		h.must(h.home, "template", "prune")
		if _, err := os.Stat(at); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the damaged template stays: %v", err)
		}
	})
}

// TestTemplateKilled ends what makes a template, and what starts from one, in
// the middle. Nothing half made is ever found.
func TestTemplateKilled(t *testing.T) {
	h := newHost(t)
	h.ownTemplates()
	dir := h.project("p", "version: 1\nname: victim\nresources: {memory: 512MiB}\n")
	h.must(dir, "image", "build")
	signal := func(s syscall.Signal) func(*os.Process) { return func(p *os.Process) { _ = p.Signal(s) } }
	// inMiddle waits for the template's guest to boot.
	inMiddle := func(act func(*os.Process)) func(*os.Process) {
		return func(p *os.Process) {
			h.pid(qemuBinary, "making")
			time.Sleep(time.Second)
			act(p)
		}
	}
	clean := func(t *testing.T) {
		t.Helper()
		h.nothingLeft()
		if list := h.templates(); len(list) > 0 {
			t.Errorf("half a template is found: %+v", list)
		}
		if left, _ := filepath.Glob(filepath.Join(h.templateDir(), "making", "*")); len(left) > 0 {
			t.Errorf("left half made: %v", left)
		}
	}
	const making = "making a template"

	t.Run("interrupted", func(t *testing.T) {
		o := h.when(dir, making, inMiddle(signal(syscall.SIGINT)), "up")
		if o.code != exitInterrupt || o.took > time.Minute {
			t.Errorf("exit code %d after %s\n%s", o.code, o.took, o.stderr)
		}
		clean(t)
		if list := h.machines(); len(list) > 0 {
			t.Errorf("left: %+v", list)
		}
	})

	t.Run("up is killed", func(t *testing.T) {
		h.when(dir, making, inMiddle(signal(syscall.SIGKILL)), "up")
		if list := h.templates(); len(list) > 0 {
			t.Errorf("half a template is found: %+v", list)
		}
		h.must(dir, "template", "prune")
		clean(t)
	})

	t.Run("supervisor is killed", func(t *testing.T) {
		o := h.when(dir, making, inMiddle(func(*os.Process) {
			_ = syscall.Kill(h.pid("supervise", "making"), syscall.SIGKILL)
		}), "template", "build")
		if o.code != exitFailure || !strings.Contains(o.stderr, "was killed while") {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		clean(t)
	})

	// onceWritten waits for a file of what is saved.
	onceWritten := func(file string, act func(*os.Process)) func(*os.Process) {
		return func(p *os.Process) {
			for range 60_000 {
				if there, _ := filepath.Glob(filepath.Join(h.templateDir(), "making", "*", instance.SavedDir, file)); len(there) > 0 {
					act(p)
					return
				}
				time.Sleep(time.Millisecond)
			}
			h.t.Errorf("%s is never written", file)
		}
	}
	t.Run("supervisor is killed while memory is written", func(t *testing.T) {
		o := h.when(dir, making, onceWritten("memory", func(*os.Process) {
			_ = syscall.Kill(h.pid("supervise", "making"), syscall.SIGKILL)
		}), "template", "build")
		if o.code != exitFailure || !strings.Contains(o.stderr, "was killed while") {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		clean(t)
	})
	t.Run("build is killed once all is written", func(t *testing.T) {
		h.when(dir, making, onceWritten("saved.json", signal(syscall.SIGKILL)), "template", "build")
		if list := h.templates(); len(list) > 0 { // it was faster: then it is whole
			if c := h.up(dir); !c.Restored {
				t.Errorf("a template is found, and %q boots:\n%s", dir, c.notes)
			}
			h.must(dir, "down")
			h.must(dir, "template", "rm", list[0].ID)
		}
		h.must(dir, "template", "prune")
		clean(t)
	})

	t.Run("QEMU is killed", func(t *testing.T) {
		o := h.when(dir, making, inMiddle(func(*os.Process) {
			_ = syscall.Kill(h.pid(qemuBinary, "making"), syscall.SIGKILL)
		}), "up")
		if o.code != 0 || !strings.Contains(o.stderr, "there is no template for it") || !strings.Contains(o.stderr, "signal: killed") {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		if v := h.status(dir); v.State != instance.Ready {
			t.Errorf("it is %s: %s", v.State, v.Reason)
		}
		h.must(dir, "down")
		clean(t)
	})

	t.Run("cold", func(t *testing.T) {
		o := h.when(dir, "QEMU (", signal(syscall.SIGINT), "up", "--cold")
		if o.code != exitInterrupt || strings.Contains(o.stderr, making) {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		clean(t)
	})

	if c := h.up(dir); !c.Restored {
		t.Errorf("after all that it boots:\n%s", c.notes)
	}
	h.must(dir, "down")
	before := h.templates()
	if len(before) != 1 {
		t.Fatalf("templates: %+v", before)
	}
	for _, says := range []string{"memory loaded", "running again"} {
		t.Run("interrupted after "+says, func(t *testing.T) {
			o := h.when(dir, says, signal(syscall.SIGINT), "up")
			if o.code != exitInterrupt || o.took > time.Minute {
				t.Errorf("exit code %d after %s\n%s", o.code, o.took, o.stderr)
			}
			h.nothingLeft()
			if list := h.machines(); len(list) > 0 {
				t.Errorf("left: %+v", list)
			}
			if list := h.templates(); len(list) != 1 || list[0].ID != before[0].ID {
				t.Errorf("templates: %+v", list)
			}
		})
	}
	t.Run("to be deleted while a machine starts from it", func(t *testing.T) {
		o := h.when(dir, "network (", func(up *os.Process) {
			signal(syscall.SIGSTOP)(up) // it holds the template for as long as the test takes
			h.fails(h.home, exitUsage, "is in use", "template", "rm", before[0].ID)
			signal(syscall.SIGCONT)(up)
		}, "up")
		if o.code != 0 || !strings.Contains(o.stderr, "is restored after") {
			t.Errorf("exit code %d\n%s", o.code, o.stderr)
		}
		h.must(dir, "down")
		if list := h.templates(); len(list) != 1 || list[0].ID != before[0].ID {
			t.Errorf("templates: %+v", list)
		}
	})
	used := h.templates()[0].Used
	if c := h.up(dir, "--cold"); c.Restored || !h.templates()[0].Used.Equal(used) {
		t.Error("--cold has used the template")
	}
}
