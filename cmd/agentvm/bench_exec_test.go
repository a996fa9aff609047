package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/testenv"
)

// BenchmarkExec times whole processes that run `true` in a machine: agentvm's
// own, OpenSSH through the proxy, and OpenSSH with a handshake with the guest.
func BenchmarkExec(b *testing.B) {
	testenv.Require(b, "ssh")
	h := newHost(b)
	dir := h.machine("exec", "resources: {memory: 1GiB}\n")
	config := filepath.Join(h.home, "w", "ssh_config")
	if err := os.WriteFile(config, []byte(h.must(dir, "ssh-config").stdout), 0o600); err != nil {
		b.Fatal(err)
	}
	address, end := h.forward(dir, "22")
	defer end()
	key := h.instance("exec").Path(lifecycle.ClientKeyFile)
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		b.Fatal(err)
	}
	const program = "/bin/true" // agentvm starts the program; a shell has a `true` of its own
	ways := []struct {
		name    string
		runs    int
		command func() *exec.Cmd
	}{
		{"agentvm exec -- true", 40, func() *exec.Cmd { return h.command(dir, "exec", "--", "true") }},
		{"agentvm exec, with stdin, environment and directory", 40, func() *exec.Cmd {
			return h.command(dir, "exec", "-w", "/", "-e", "A=1", "-e", "B=2", "-e", "C=3", "--", "true")
		}},
		{"ssh, through ssh-config", 20, func() *exec.Cmd { return exec.Command("ssh", "-F", config, "exec", program) }},
		{"ssh, a handshake with the guest", 10, func() *exec.Cmd {
			return exec.Command("ssh", "-F", "/dev/null", "-i", key, "-p", port, "-o", "IdentitiesOnly=yes",
				"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", lifecycle.GuestUser+"@"+host, program)
		}},
	}
	for b.Loop() {
		t := newTable("`true` in a running machine, whole processes", "way", "runs", "p50", "p95", "p50 / agentvm exec")
		var base time.Duration
		for _, way := range ways {
			samples := make([]time.Duration, way.runs)
			for i := range samples {
				begun := time.Now()
				if out, err := way.command().CombinedOutput(); err != nil {
					b.Fatalf("%s: %v\n%s", way.name, err, out)
				}
				samples[i] = time.Since(begun)
			}
			p50 := percentile(samples, 50)
			if base == 0 {
				base = p50
				b.ReportMetric(float64(p50.Milliseconds()), "p50-ms")
				b.ReportMetric(float64(percentile(samples, 95).Milliseconds()), "p95-ms")
			}
			t.add(way.name, way.runs, p50, percentile(samples, 95), ratio(p50, base))
		}
		t.print()
	}
	b.ReportMetric(0, "ns/op")
}

// instance opens a machine's directory.
func (h *host) instance(name string) *instance.Instance {
	h.t.Helper()
	inst, err := h.store().Get(name)
	if err != nil {
		h.t.Fatal(err)
	}
	return inst
}

// store is where this home's machines are.
func (h *host) store() instance.Store {
	h.t.Helper()
	dirs, err := instance.FindDirs(func(string) string { return h.home }, os.Getuid())
	if err != nil {
		h.t.Fatal(err)
	}
	return instance.Store{Dirs: dirs}
}

// forward makes a port of the guest reachable until end is called.
func (h *host) forward(dir, port string) (address string, end func()) {
	h.t.Helper()
	cmd := h.command(dir, "forward", "0:"+port)
	out, err := cmd.StderrPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	if _, err := fmt.Fscanf(out, "agentvm: %s is the guest's", &address); err != nil {
		h.t.Fatal(err)
	}
	return address, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}
