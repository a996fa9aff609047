package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/docker/go-units"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

// benchMachine is the machine that starts are measured with.
const benchMachine = "resources: {memory: 1GiB}\n"

const warmRounds = 5

// usable is the time from nothing to the end of a first command in the workspace.
type usable struct {
	up    started
	exec  time.Duration
	total time.Duration
}

// use makes a machine and runs a command in it.
func (h *host) use(dir string, flags ...string) (u usable) {
	h.t.Helper()
	begun := time.Now()
	u.up = h.upEvents(dir, flags...)
	u.exec = h.must(dir, "exec", "--", "true").took
	u.total = time.Since(begun)
	return u
}

// warm is use of a machine that must have gone on from a template.
func (h *host) warm(dir string) usable {
	h.t.Helper()
	u := h.use(dir)
	if !u.up.Restored {
		h.t.Fatalf("it was not restored: %s", u.up.said)
	}
	return u
}

// BenchmarkWarmUp compares machines that go on from a template with machines
// that boot and with a stock guest that boots on the same hardware.
func BenchmarkWarmUp(b *testing.B) {
	h := newHost(b)
	dir := h.project("warm", "version: 1\nname: warm\n"+benchMachine)
	h.must(dir, "image", "build")
	image := stockImage(b)
	template := h.template(dir)
	for b.Loop() {
		// What else runs on the host only ever slows, and comes and goes. So what
		// is compared with is measured before and after, and the faster counts.
		var colds, stocks, idles, handshakes []time.Duration
		var logins, loads []string
		var machine vm.Machine
		boots := func() {
			before := load()
			colds = append(colds, h.use(dir, "--cold").total)
			machine = h.spec("warm").Machine
			h.must(dir, "down")
			stock := bootStock(b, image, machine)
			stocks, logins = append(stocks, stock.finished), append(logins, short(stock.login))
			idles, handshakes = append(idles, stock.qemu), append(handshakes, stock.handshake)
			loads = append(loads, before+" to "+load())
		}
		boots()
		var rounds []usable
		before := load()
		for range warmRounds {
			rounds = append(rounds, h.warm(dir))
			h.must(dir, "down")
		}
		during := before + " to " + load()
		pooled, poolLoad, spare := h.pooled(dir)
		boots()
		byTotal := func(a, b usable) int { return cmp.Compare(a.total, b.total) }
		slices.SortFunc(rounds, byTotal)
		slices.SortFunc(pooled, byTotal)
		warm, claimed := rounds[len(rounds)/2], pooled[len(pooled)/2]
		cold, stock := slices.Min(colds), slices.Min(stocks)

		t := newTable(fmt.Sprintf("From nothing to the end of a first command, 2 CPUs and 1 GiB (%s)", machine.Accel), "", "time", "warm / this", "host's load")
		t.add(fmt.Sprintf("warm, the median of %d", warmRounds), warm.total, 1, during)
		t.add("warm, fastest and slowest", short(rounds[0].total)+", "+short(rounds[len(rounds)-1].total), "", "")
		t.add(fmt.Sprintf("from the pool, the median of %d", warmRounds), claimed.total, ratio(warm.total, claimed.total), poolLoad)
		t.add("from the pool, fastest and slowest", short(pooled[0].total)+", "+short(pooled[len(pooled)-1].total), "", "")
		for i, when := range []string{"before", "after"} {
			t.add("cold, "+when, colds[i], ratio(warm.total, colds[i]), loads[i])
			t.add("stock guest to end of cloud-init, "+when, stocks[i], ratio(warm.total, stocks[i]), loads[i])
			t.add("stock guest to first login, "+when, logins[i], "", loads[i])
		}
		t.add("the faster cold start", cold, ratio(warm.total, cold), "")
		t.add("the faster stock guest", stock, ratio(warm.total, stock), "")
		t.add("from the pool / the faster cold start", "", ratio(claimed.total, cold), "")
		t.add("memory of one that waits", units.BytesSize(float64(spare.Resident)), "", "")
		t.add("making the template, once", time.Duration(template.Seconds*float64(time.Second)), "", "")
		t.print()

		warm.phases("The median warm start").print()
		claimed.phases("The median start from the pool").print()
		warm.account().print()
		warm.floor(template.Disk, memoryCopy(b, template.Disk), slices.Min(idles), slices.Min(handshakes)).print()
		b.ReportMetric(warm.total.Seconds()*1000, "warm-ms")
		b.ReportMetric(ratio(cold, warm.total), "cold/warm")
		b.ReportMetric(ratio(cold, claimed.total), "cold/pool")
		b.ReportMetric(ratio(stock, warm.total), "stock/warm")
	}
	b.ReportMetric(0, "ns/op")
}

// pooled is use of machines that waited in the pool, of the host's load then,
// and of what one took while it waited.
func (h *host) pooled(dir string) (rounds []usable, during string, spare spareView) {
	h.t.Helper()
	h.poolSize("1")
	h.must(dir, "pool", "fill")
	before := load()
	for range warmRounds {
		spare = h.filled(1)[0]
		u := h.use(dir)
		if u.up.phase("qemu").Took != 0 {
			h.t.Fatalf("it did not come from the pool: %s", u.up.said)
		}
		rounds = append(rounds, u)
		h.must(dir, "down")
	}
	during = before + " to " + load()
	h.filled(1)
	h.poolSize("0")
	h.must(dir, "pool", "drain")
	return rounds, during, spare
}

// phases lists the phases of a start.
func (u usable) phases(title string) *table {
	t := newTable(title+", phase by phase; phases overlap", "phase", "begins after", "takes")
	for _, p := range u.up.Status.Phases {
		t.add(phaseName(p.Name), p.Start.Sub(u.up.begun), p.Took)
	}
	t.add("agentvm up, whole", time.Duration(0), u.up.took)
	t.add("agentvm exec -- true, whole", u.up.took, u.exec)
	return t
}

// account lays a warm start out one stretch after the other. Of each it says
// whether it is there whatever agentvm does: starting QEMU while memory is
// copied, loading the devices, a handshake with the guest's SSH server.
func (u usable) account() *table {
	end := map[string]time.Duration{}
	for _, p := range u.up.Status.Phases {
		end[p.Name] = p.Start.Add(p.Took).Sub(u.up.begun)
	}
	qemu, ssh := u.up.phase("qemu"), u.up.phase("ssh")
	marks := []struct {
		name  string
		end   time.Duration
		floor bool
	}{
		{"command: configuration, keys, seed, disk, supervisor", u.up.before, false},
		{"network", qemu.Start.Sub(u.up.begun), false},
		{"QEMU until its monitor answers, and memory", max(end["qemu"], end["memory"]), true},
		{"devices", end["state"], true},
		{"shares plugged in, guest runs", end["resume"], false},
		{"guest wakes", ssh.Start.Sub(u.up.begun), false},
		{"SSH handshake", end["ssh"], true},
		{"guest becomes its own machine, state, command ends", u.up.took, false},
		{"agentvm exec -- true", u.total, false},
	}
	t := newTable("The same, one after the other", "stretch", "takes", "% of all", "floor")
	var at, floor time.Duration
	for _, m := range marks {
		took := m.end - at
		at = m.end
		kind := ""
		if m.floor {
			floor += took
			kind = "yes"
		}
		t.add(m.name, took, 100*ratio(took, u.total), kind)
	}
	t.add("floor", floor, 100*ratio(floor, u.total), "yes")
	t.add("the rest", u.total-floor, 100*ratio(u.total-floor, u.total), "")
	return t
}

// phase is a phase of the start by its name; one that there was not is empty.
func (s started) phase(name string) (p instance.Phase) {
	if i := slices.IndexFunc(s.Status.Phases, func(p instance.Phase) bool { return p.Name == name }); i >= 0 {
		p = s.Status.Phases[i]
	}
	return p
}

// template makes the project's template anew.
func (h *host) template(dir string) (made struct {
	templateView
	Seconds float64
}) {
	h.t.Helper()
	find := func() {
		if err := json.Unmarshal([]byte(h.must(dir, "template", "build", "--json").stdout), &made); err != nil {
			h.t.Fatal(err)
		}
	}
	find()
	h.must(dir, "template", "rm", made.ID)
	begun := time.Now()
	find()
	made.Seconds = time.Since(begun).Seconds()
	return made
}

// BenchmarkClones measures what machines from one template cost together.
func BenchmarkClones(b *testing.B) {
	h := newHost(b)
	counts := []int{1, 2, 4, 8}
	var dirs []string
	for i := range slices.Max(counts) {
		name := fmt.Sprintf("clone%d", i+1)
		dirs = append(dirs, h.project(name, "version: 1\nname: "+name+"\n"+benchMachine))
	}
	h.must(dirs[0], "image", "build")
	var template templateView
	if err := json.Unmarshal([]byte(h.must(dirs[0], "template", "build", "--json").stdout), &template); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		t := newTable(fmt.Sprintf("Machines of 1 GiB from a template of %s on disk; host at load %s", units.BytesSize(float64(template.Disk)), load()),
			"machines", "the last one's start", "guest memory each", "QEMU besides, each", "virtiofsd each", "disk each", "host's MemAvailable, less by")
		before := meminfo(b, "MemAvailable")
		for i := range dirs {
			last, n := h.warm(dirs[i]).total, i+1
			if !slices.Contains(counts, n) {
				continue
			}
			time.Sleep(2 * time.Second)
			var memory, besides, share, disk float64
			for _, dir := range dirs[:n] {
				v := h.status(dir)
				memory += guestMemory(b, v.Processes["qemu"])
				besides += pssAnon(b, v.Processes["qemu"])
				share += pssAnon(b, v.Processes["virtiofsd-workspace"])
				disk += allocatedAt(b, h.instance(v.Name).Path(lifecycle.OverlayFile))
			}
			each := func(sum float64) string { return units.BytesSize(sum / float64(n)) }
			t.add(n, last, each(memory), each(besides), each(share), each(disk), units.BytesSize(before-meminfo(b, "MemAvailable")))
			b.ReportMetric(memory/float64(n)/(1<<20), fmt.Sprintf("MiB-each-of-%d", n))
		}
		t.print()
		for _, dir := range dirs {
			h.must(dir, "down")
		}
	}
	b.ReportMetric(float64(template.Disk)/(1<<20), "template-MiB")
	b.ReportMetric(0, "ns/op")
}

// guestMemory is what is allocated of the file that is a guest's memory.
func guestMemory(b *testing.B, qemu int) float64 {
	b.Helper()
	// memoryFile as QEMU knows it.
	return allocatedAt(b, strings.Replace(memoryFile, "self", strconv.Itoa(qemu), 1))
}

func allocatedAt(b *testing.B, path string) float64 {
	b.Helper()
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	return float64(info.Sys().(*syscall.Stat_t).Blocks * 512)
}

// pssAnon is a process's memory of its own, that it does not share with the guest.
func pssAnon(b *testing.B, pid int) float64 {
	b.Helper()
	return kibOf(b, fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss_Anon")
}

func meminfo(b *testing.B, name string) float64 {
	b.Helper()
	return kibOf(b, "/proc/meminfo", name)
}

// kibOf reads a size from one of /proc's lists, in bytes.
func kibOf(b *testing.B, path, name string) float64 {
	b.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var kib float64
		if key, value, _ := strings.Cut(line, ":"); key == name {
			if _, err := fmt.Sscanf(value, "%f kB", &kib); err == nil {
				return kib * 1024
			}
		}
	}
	b.Fatalf("%s has no %s", path, name)
	return 0
}

// BenchmarkRestores makes and deletes one machine after the other, as many as
// AGENTVM_BENCH_RESTORES says, and looks for what accumulates.
func BenchmarkRestores(b *testing.B) {
	count := 10
	if text := os.Getenv("AGENTVM_BENCH_RESTORES"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil || count < 1 {
			b.Fatalf("AGENTVM_BENCH_RESTORES=%s is not a number of restores", text)
		}
	}
	h := newHost(b)
	dir := h.project("again", "version: 1\nname: again\n"+benchMachine)
	h.must(dir, "image", "build")
	h.must(dir, "template", "build")
	for b.Loop() {
		h.warm(dir) // fills the caches, makes what is made once
		h.must(dir, "down")
		files, processes, shmem := h.listing(), len(h.processes()), meminfo(b, "Shmem")
		free := meminfo(b, "MemAvailable")
		var up, total, down []time.Duration
		for range count {
			u := h.warm(dir)
			up, total = append(up, u.up.took), append(total, u.total)
			down = append(down, h.must(dir, "down").took)
		}
		t := newTable(fmt.Sprintf("%d machines from a template, one after the other; host at load %s", count, load()), "", "p50", "p95", "p99", "slowest")
		for _, row := range []struct {
			name    string
			samples []time.Duration
		}{{"agentvm up", up}, {"to the end of a first command", total}, {"agentvm down", down}} {
			t.add(row.name, percentile(row.samples, 50), percentile(row.samples, 95), percentile(row.samples, 99), percentile(row.samples, 100))
		}
		t.print()
		b.ReportMetric(float64(percentile(total, 50).Milliseconds()), "p50-ms")
		b.ReportMetric(float64(percentile(total, 95).Milliseconds()), "p95-ms")
		b.ReportMetric(float64(percentile(total, 99).Milliseconds()), "p99-ms")

		if now := h.listing(); !slices.Equal(now, files) {
			b.Errorf("files before:\n%s\nand after:\n%s", strings.Join(files, "\n"), strings.Join(now, "\n"))
		}
		if now := h.processes(); len(now) != processes {
			b.Errorf("%d processes before, and after:\n%s", processes, strings.Join(now, "\n"))
		}
		// What other programs do shows in these too, so only much is a finding.
		grown := meminfo(b, "Shmem") - shmem
		fmt.Printf("shared memory grew by %s, available memory shrank by %s\n", units.BytesSize(max(0, grown)), units.BytesSize(max(0, free-meminfo(b, "MemAvailable"))))
		if grown > float64(count*(8<<20)) {
			b.Errorf("shared memory grew by %s over %d restores", units.BytesSize(grown), count)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// listing lists the files in this home, and in the caches that it shares.
func (h *host) listing() (list []string) {
	h.t.Helper()
	for _, top := range []string{"state", "run", "cache", "cache/images/", "cache/templates/", "w"} {
		root := h.home + "/" + top
		err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			list = append(list, path)
			return err
		})
		if err != nil {
			h.t.Fatal(err)
		}
	}
	return list
}
