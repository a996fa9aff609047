package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/testenv"
)

//go:embed testdata/bench/files.py
var filesScript string

const (
	smallFiles = 5000
	largeMiB   = 1024
	repoFiles  = 20_000
)

// repositorySize is smaller where virtiofsd may not open as many files: it
// keeps one open for each that the guest remembers.
func repositorySize(b *testing.B) int {
	b.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		b.Fatal(err)
	}
	return int(min(repoFiles, limit.Max*3/4))
}

// dropCaches makes the guest ask again. The host's cache stays warm, under the
// share as under the guest's disk, so that neither is measured by a device.
const dropCaches = "sync; echo 3 | sudo -n tee /proc/sys/vm/drop_caches >/dev/null"

// BenchmarkShare compares the workspace with the guest's own disk and with the
// same directory on the host. The host's Python is not emulated and the guest's
// may be: that part of a ratio is the same for the disk and for the workspace.
func BenchmarkShare(b *testing.B) {
	testenv.Require(b, "python3")
	h := newHost(b)
	dir := h.machine("share", "resources: {memory: 2GiB}\n")
	for b.Loop() {
		args := func(at, drop string) []string {
			return []string{"python3", "-", at, "", fmt.Sprint(smallFiles), fmt.Sprint(largeMiB), drop}
		}
		c := comparison{
			host:      h.files(b, exec.Command("python3", args(".", "true")[1:]...), dir),
			disk:      h.files(b, h.command(dir, append([]string{"exec", "--"}, args("/home/agent", dropCaches)...)...), dir),
			workspace: h.files(b, h.command(dir, append([]string{"exec", "--"}, args(".", dropCaches)...)...), dir),
		}
		c.print(b, fmt.Sprintf("%d files of 100 bytes, %d MiB; host at load %s", smallFiles, largeMiB, load()),
			"create", "stat, caches empty", "stat again", "read", "delete", "write large", "read large")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkRepository does the same with git status in a large clone.
func BenchmarkRepository(b *testing.B) {
	testenv.Require(b, "git", "python3")
	h := newHost(b)
	dir := h.machine("repo", "resources: {memory: 2GiB}\n")
	size := repositorySize(b)
	makeRepository(b, dir, size)
	for b.Loop() {
		clone := func(to string) string { return "git clone -q repo.git " + to }
		args := func(repository, drop string) []string {
			return []string{"python3", "-", ".", repository, "0", "0", drop}
		}
		h.shell(dir, clone("on-host"))
		h.shell(dir, clone("shared")) // each has an index of its own, which git status writes
		h.guest(dir, clone("/home/agent/own"))
		c := comparison{
			host:      h.files(b, exec.Command("python3", args("on-host", "true")[1:]...), dir),
			disk:      h.files(b, h.command(dir, append([]string{"exec", "--"}, args("/home/agent/own", dropCaches)...)...), dir),
			workspace: h.files(b, h.command(dir, append([]string{"exec", "--"}, args("shared", dropCaches)...)...), dir),
		}
		c.print(b, fmt.Sprintf("A repository of %d files; host at load %s", size, load()),
			"git status, first", "git status, caches empty", "git status again")
		h.shell(dir, "rm -rf on-host shared")
		h.guest(dir, "rm -rf ~/own")
	}
	b.ReportMetric(0, "ns/op")
}

// comparison has the times of each step in three places.
type comparison struct{ host, disk, workspace map[string]time.Duration }

func (c comparison) print(b *testing.B, title string, steps ...string) {
	t := newTable(title, "", "host", "guest's disk", "workspace", "workspace / disk", "workspace / host")
	for _, step := range steps {
		host, disk, workspace := c.host[step], c.disk[step], c.workspace[step]
		t.add(step, host, disk, workspace, ratio(workspace, disk), ratio(workspace, host))
		b.ReportMetric(ratio(workspace, disk), strings.NewReplacer(", ", "-", " ", "-").Replace(step)+"-x-disk")
	}
	t.print()
}

// files runs the script and reads what it says.
func (h *host) files(b *testing.B, cmd *exec.Cmd, dir string) map[string]time.Duration {
	b.Helper()
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, strings.NewReader(filesScript), &out, &errs
	if err := cmd.Run(); err != nil {
		b.Fatalf("%q: %v\n%s", cmd.Args, err, &errs)
	}
	var seconds map[string]float64
	if err := json.Unmarshal(out.Bytes(), &seconds); err != nil {
		b.Fatalf("%v in %q", err, &out)
	}
	times := map[string]time.Duration{}
	for step, s := range seconds {
		times[step] = time.Duration(s * float64(time.Second))
	}
	return times
}

// makeRepository makes a bare repository that is quick to clone: one pack.
func makeRepository(b *testing.B, dir string, files int) {
	b.Helper()
	var stream strings.Builder
	fmt.Fprint(&stream, "commit refs/heads/main\ncommitter a <a@b> 1 +0000\ndata 0\n")
	for i := range files {
		content := fmt.Sprintf("package p%d\n%s", i, strings.Repeat("// line\n", i%50))
		fmt.Fprintf(&stream, "M 644 inline d%03d/f%05d.go\ndata %d\n%s\n", i/100, i, len(content), content)
	}
	cmd := exec.Command("sh", "-euc", "git init -q --bare -b main repo.git; git -C repo.git fast-import --quiet")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(stream.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("make a repository: %v\n%s", err, out)
	}
}

// shell runs a line on the host.
func (h *host) shell(dir, line string) {
	h.t.Helper()
	cmd := exec.Command("sh", "-euc", line)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v\n%s", line, err, out)
	}
}
