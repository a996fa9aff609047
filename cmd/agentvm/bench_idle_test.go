package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-units"
)

const (
	settleTime = 20 * time.Second // what a boot leaves to do later
	idleTime   = 30 * time.Second
)

// BenchmarkIdle measures what a machine costs that nobody uses.
func BenchmarkIdle(b *testing.B) {
	h := newHost(b)
	dir := h.machine("idle", "resources: {memory: 2GiB}\n")
	processes := h.status(dir).Processes
	names := slices.Sorted(maps.Keys(processes))
	time.Sleep(settleTime)
	for b.Loop() {
		before := map[string]time.Duration{}
		for _, name := range names {
			before[name] = cpuTime(b, processes[name])
		}
		begun := time.Now()
		time.Sleep(idleTime)
		took := time.Since(begun)
		t := newTable(fmt.Sprintf("An idle machine of 2 GiB, over %s; host at load %s", idleTime, load()),
			"process", "CPU, % of one", "RSS", "of it memory shared with the guest")
		for _, name := range names {
			cpu := 100 * ratio(cpuTime(b, processes[name])-before[name], took)
			memory := memoryOf(b, processes[name])
			t.add(name, cpu, units.BytesSize(memory["VmRSS"]), units.BytesSize(memory["RssShmem"]))
			b.ReportMetric(cpu, name+"-%")
		}
		t.print()
	}
	b.ReportMetric(0, "ns/op")
}

// cpuTime is what a process has used so far, in user and kernel mode: fields
// 14 and 15 of proc_pid_stat(5), in ticks of which Linux on amd64 and arm64
// has 100 a second for user space.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]) // the third on
	var ticks int64
	for _, field := range fields[11:13] {
		n, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// memoryOf reads the sizes in proc_pid_status(5), in bytes.
func memoryOf(b *testing.B, pid int) map[string]float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	sizes := map[string]float64{}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		var kib float64
		if n, _ := fmt.Sscanf(value, "%f kB", &kib); n == 1 {
			sizes[name] = kib * 1024
		}
	}
	return sizes
}

// load is the host's load average of the last minute.
func load() string {
	s, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(s), " ")
	return first
}
