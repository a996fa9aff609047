package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

// BenchmarkLibvirt boots a new machine by agentvm itself and by libvirt, in
// turn, so that each is compared with the other in that minute.
func BenchmarkLibvirt(b *testing.B) {
	h := newHost(b)
	lv := testenv.StartLibvirtd(b)
	backends := []struct{ name, config string }{
		{"direct", ""}, {"libvirt", "backend: libvirt\nuri: " + lv.URI() + "\n"},
	}
	dirs := map[string]string{}
	for _, by := range backends {
		dirs[by.name] = h.project(by.name, "version: 1\nname: "+by.name+"\n"+benchMachine+by.config)
	}
	h.must(dirs["direct"], "image", "build")
	h.must(dirs["direct"], "up", "--cold", "--dry-run") // probes of the host are remembered
	lv.Virsh("domcapabilities", "--virttype", "qemu")   // and libvirt's own
	const rounds = 3
	for b.Loop() {
		up, qemu, busy, stop := map[string][]time.Duration{}, map[string][]time.Duration{}, map[string][]time.Duration{}, map[string][]time.Duration{}
		for range rounds {
			for _, by := range backends {
				s := h.upEvents(dirs[by.name], "--cold")
				up[by.name] = append(up[by.name], s.took)
				qemu[by.name] = append(qemu[by.name], s.since("qemu", "qemu"))
				busy[by.name] = append(busy[by.name], cpuTime(b, h.status(dirs[by.name]).Processes["qemu"]))
				stop[by.name] = append(stop[by.name], h.must(dirs[by.name], "stop").took)
				h.must(dirs[by.name], "down")
			}
		}
		t := newTable(fmt.Sprintf("A cold start of 1 GiB by each backend, median of %d; host at load %s", rounds, load()), "", "direct", "libvirt", "ratio")
		for _, row := range []struct {
			name  string
			times map[string][]time.Duration
		}{{"up", up}, {"of it, until QEMU runs", qemu}, {"QEMU's processor time until then", busy}, {"stop", stop}} {
			direct, libvirt := percentile(row.times["direct"], 50), percentile(row.times["libvirt"], 50)
			t.add(row.name, direct, libvirt, ratio(libvirt, direct))
		}
		t.print()
		b.ReportMetric(ratio(percentile(up["libvirt"], 50), percentile(up["direct"], 50)), "libvirt/direct")
	}
	b.ReportMetric(0, "ns/op")
}
