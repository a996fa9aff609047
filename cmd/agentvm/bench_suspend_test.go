package main

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkSuspend stops and starts the same machine in every way, in turn, so
// that each is compared with a shutdown and a boot of that minute.
func BenchmarkSuspend(b *testing.B) {
	h := newHost(b)
	dir := h.machine("sleeper", benchMachine)
	defer h.must(dir, "down")
	const rounds = 3
	for b.Loop() {
		took := map[string][]time.Duration{}
		step := func(args ...string) {
			took[args[0]] = append(took[args[0]], h.must(dir, args...).took)
		}
		for i := range rounds {
			step("stop")
			step("start")
			step("suspend")
			step("resume")
			name := fmt.Sprintf("s%d", i)
			begun := time.Now()
			h.must(dir, "snapshot", "create", name)
			took["snapshot create"] = append(took["snapshot create"], time.Since(begun))
			begun = time.Now()
			h.must(dir, "snapshot", "restore", name)
			took["snapshot restore"] = append(took["snapshot restore"], time.Since(begun))
			h.must(dir, "snapshot", "rm", name)
			step("fork")
			h.must(dir+"-fork-1", "down")
			h.shell(h.home, "rm -rf "+dir+"-fork-1")
		}
		t := newTable(fmt.Sprintf("A machine of 1 GiB, median of %d; host at load %s", rounds, load()), "", "takes", "of a boot")
		boot := percentile(took["start"], 50)
		for _, what := range []string{"stop", "start", "suspend", "resume", "snapshot create", "snapshot restore", "fork"} {
			t.add(what, percentile(took[what], 50), ratio(percentile(took[what], 50), boot))
		}
		t.print()
		b.ReportMetric(ratio(percentile(took["resume"], 50), boot), "resume/boot")
	}
	b.ReportMetric(0, "ns/op")
}
