package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
)

// BenchmarkColdUp says where the time of a first `up` goes, and compares it
// with a stock guest that the same QEMU boots with the same hardware. The image
// is there already: building it is paid once for all projects.
func BenchmarkColdUp(b *testing.B) {
	h := newHost(b)
	first := h.project("cold", "version: 1\nname: cold\n"+benchMachine)
	h.must(first, "image", "build")
	h.must(first, "up", "--cold", "--dry-run") // probes of the host are remembered
	image := stockImage(b)
	round := 0
	for b.Loop() {
		round++
		name := fmt.Sprintf("cold%d", round)
		dir := h.project(name, "version: 1\nname: "+name+"\n"+benchMachine)
		up := h.upEvents(dir, "--cold")
		analyze := strings.TrimSpace(h.guest(dir, "systemd-analyze time 2>&1 | head -1"))
		machine := h.spec(name).Machine
		h.must(dir, "down")
		stock := bootStock(b, image, machine)
		again := h.upEvents(dir, "--cold") // the second of two stands for the host's mood
		h.must(dir, "stop")
		second := h.must(dir, "start").took
		h.must(dir, "down")

		t := newTable(fmt.Sprintf("A cold start, 2 CPUs and 1 GiB (%s); host at load %s", machine.Accel, load()), "phase", "ends after", "takes", "stock")
		t.add("agentvm: checks, overlay, keys, seed, supervisor", up.before, up.before, "")
		at := up.before
		for _, p := range up.Status.Phases {
			at += p.Took
			t.add(phaseNames[p.Name], at, p.Took, "")
		}
		t.add("whole command", up.took, "", "")
		t.add("", "", "", "")
		login, ready := up.since("qemu", "ssh"), up.since("qemu", "cloud-init")
		loginAgain, readyAgain := again.since("qemu", "ssh"), again.since("qemu", "cloud-init")
		t.add("start of QEMU to first login", login, "", stock.login)
		t.add("start of QEMU to end of cloud-init", ready, "", stock.finished)
		t.add("the same, once more", readyAgain, "", "")
		t.add("ratio to stock, login", ratio(login+loginAgain, 2*stock.login), "", 1)
		t.add("ratio to stock, end of cloud-init", ratio(ready+readyAgain, 2*stock.finished), "", 1)
		t.add("stop, then start again (whole start)", second, "", "")
		t.print()
		fmt.Printf("guest: %s\nstock: %s\n", analyze, stock.analyze)
		b.ReportMetric(up.took.Seconds(), "up-s")
		b.ReportMetric(ratio(login+loginAgain, 2*stock.login), "login/stock")
		b.ReportMetric(ratio(ready+readyAgain, 2*stock.finished), "ready/stock")
	}
	b.ReportMetric(0, "ns/op")
}

// phaseNames are the supervisor's phases in a reader's words.
var phaseNames = map[string]string{
	"network":    "network in the supervisor",
	"share":      "virtiofsd",
	"qemu":       "QEMU until its monitor answers",
	"ssh":        "kernel, userspace, cloud-init's network stage, first SSH handshake",
	"cloud-init": "rest of cloud-init",
	"provision":  "the project's commands",
}

// started is what `up` says about a start.
type started struct {
	Status   view `json:"status"`
	Restored bool `json:"restored"`
	begun    time.Time
	took     time.Duration
	before   time.Duration // until the first phase
	said     string
}

// since is the time from the begin of one phase to the end of another.
func (s started) since(first, last string) (d time.Duration) {
	within := false
	for _, p := range s.Status.Phases {
		within = within || p.Name == first
		if within {
			d += p.Took
		}
		if p.Name == last {
			break
		}
	}
	return d
}

func (h *host) upEvents(dir string, flags ...string) started {
	h.t.Helper()
	begun := time.Now()
	o := h.must(dir, append([]string{"up", "--json"}, flags...)...)
	s := started{begun: begun, took: o.took, said: o.stderr}
	lines := bytes.Split(bytes.TrimSpace([]byte(o.stdout)), []byte("\n"))
	if err := json.Unmarshal(lines[len(lines)-1], &s); err != nil || len(s.Status.Phases) == 0 {
		h.t.Fatalf("up --json: %v in %s", err, o.stdout)
	}
	s.before = s.Status.Phases[0].Start.Sub(begun)
	return s
}

// spec reads what a machine is made of.
func (h *host) spec(name string) instance.Spec {
	h.t.Helper()
	spec, err := h.instance(name).Spec()
	if err != nil {
		h.t.Fatal(err)
	}
	return spec
}
