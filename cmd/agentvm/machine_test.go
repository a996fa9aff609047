package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/instance"
)

// oddName has what paths may have: spaces, commas, quotes, a newline, what is
// special to shells, to QEMU and to systemd, and length.
var oddName = "a b,c=d'e\"f%g$h\\i;j*k\nü日" + strings.Repeat("x", 180)

// TestMachine takes one machine through a working day.
func TestMachine(t *testing.T) {
	h := newHost(t)
	d := newDay(t, h, "")
	dir := d.dir

	t.Run("up twice at once", func(t *testing.T) {
		var wait sync.WaitGroup
		results := make([]outcome, 2)
		for i := range results {
			wait.Go(func() { results[i] = h.runIn(dir, "", "up") })
		}
		wait.Wait()
		already := 0
		for _, r := range results {
			if r.code != 0 {
				t.Fatalf("exit code %d\n%s", r.code, r.stderr)
			}
			if strings.Contains(r.stderr, "already running") {
				already++
			}
		}
		if already != 1 {
			t.Errorf("%d of 2 found it running:\n%s\n%s", already, results[0].stderr, results[1].stderr)
		}
		if v := h.status(dir); v.State != instance.Ready || len(v.Warnings) != 0 {
			t.Fatalf("%+v", v)
		}
	})

	for _, c := range slices.Concat(dayCases, localCases) {
		t.Run(c.name, func(t *testing.T) { c.run(t, d) })
	}

	t.Run("supervisor is killed", func(t *testing.T) {
		h.kill(dir, "supervisor")
		v := h.until(dir, instance.Failed)
		if !strings.Contains(v.Reason, "was killed while ready") {
			t.Errorf("reason %q", v.Reason)
		}
		h.nothingLeft()
		h.fails(dir, exitConnection, "was killed while ready", "exec", "--", "true")
	})

	t.Run("guest powers itself off", func(t *testing.T) {
		o := h.must(dir, "start")
		if !strings.Contains(o.stderr, "was killed while ready") {
			t.Errorf("start does not say what happened:\n%s", o.stderr)
		}
		h.runIn(dir, "", "exec", "--", "sudo", "systemctl", "poweroff")
		if v := h.until(dir, instance.Stopped); !strings.Contains(v.Reason, "powered itself off") {
			t.Errorf("reason %q", v.Reason)
		}
		h.nothingLeft()
	})

	t.Run("damaged disk", func(t *testing.T) {
		path := filepath.Join(h.home, "state", "instances", "day", "root.qcow2")
		if err := os.WriteFile(path, []byte("not a disk"), 0o644); err != nil {
			t.Fatal(err)
		}
		h.fails(dir, exitFailure, "qcow2", "start")
		h.nothingLeft()
	})

	t.Run("down", func(t *testing.T) {
		h.must(dir, "down")
		h.fails(dir, exitNotFound, "no virtual machine", "status", "day")
		if _, err := os.Stat(filepath.Join(dir, "made")); err != nil {
			t.Error("the workspace was touched")
		}
		left, _ := filepath.Glob(filepath.Join(h.home, "state", "instances", "*"))
		if len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// httpService answers on the host.
func httpService(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "the service") })}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return l.Addr().String()
}

// TestDryRun prints what it would start, for a shell and for a program, and
// makes no machine. A disk file needs no image to be built.
func TestDryRun(t *testing.T) {
	h := newHost(t)
	dir := h.project(oddName, "version: 1\nname: dry\nimage: ./empty.img\nresources: {memory: 256MiB, cpus: 3}\n")
	if err := os.WriteFile(filepath.Join(dir, "empty.img"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	plain := h.must(dir, "up", "--dry-run").stdout
	words, err := exec.Command("sh", "-c", `printf '%s\0' `+plain).Output()
	if err != nil {
		t.Fatalf("a shell does not read it: %v\n%s", err, plain)
	}
	shell := strings.Split(strings.TrimSuffix(string(words), "\x00"), "\x00")
	var list []string
	if err := json.Unmarshal([]byte(h.must(dir, "up", "--dry-run", "--json").stdout), &list); err != nil {
		t.Fatal(err)
	}
	// Nothing remembers the first run, so the second has another id.
	for _, argv := range [][]string{shell, list} {
		at := slices.Index(argv, "-uuid") + 1
		if at == 0 || len(argv[at]) != 36 {
			t.Fatalf("no id in %q", argv)
		}
		id := argv[at]
		for i := range argv {
			argv[i] = strings.ReplaceAll(strings.ReplaceAll(argv[i], id, "ID"), id[:8], "RUN")
		}
	}
	if diff := cmp.Diff(list, shell); diff != "" {
		t.Errorf("(-JSON +text):\n%s", diff)
	}
	if filepath.Base(list[0]) != qemuBinary || !slices.Contains(list, "size=256M") ||
		!slices.ContainsFunc(list, func(s string) bool { return strings.HasPrefix(s, "cpus=3,") }) {
		t.Errorf("it is not this project's: %q", list)
	}
	if got := h.run("ls", "--json").stdout; got != "[]\n" {
		t.Errorf("left: %s", got)
	}
	h.nothingLeft()
}
