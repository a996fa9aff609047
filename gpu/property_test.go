package gpu

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// topology is a host with a random past, and what somebody asks of it.
type topology struct {
	devices []fakeDevice
	ask     []string // units
	touch   []string // all functions that may change for that
	spoiled string   // "", or what goes wrong

	fails  int    // which write fails, of spoiled "fails"
	blocks string // whose unbind blocks, of spoiled "blocks"
}

// randomTopology makes a host with one to three slots, in which are cards of one
// to four functions or virtual functions of one that stays, and with other devices
// that must stay as they are.
func randomTopology(r *rand.Rand) topology {
	t := topology{devices: []fakeDevice{
		{address: "0000:00:01.0", id: "8086:1901", class: "0x060400", driver: "pcieport", group: "1"},
		{address: "0000:00:1f.0", id: "8086:1539", class: "0x020000", driver: "igb", group: "9"},
	}, ask: []string{vgpu}, touch: []string{vgpu}}
	slots := []string{"0000:01:00", "0001:41:00", "10000:e1:1f"}
	r.Shuffle(len(slots), func(i, j int) { slots[i], slots[j] = slots[j], slots[i] })
	for i, slot := range slots[:1+r.IntN(3)] {
		group := 10 * (i + 1) // and the next
		if r.IntN(3) == 0 {
			t.virtual(r, slot, group)
		} else {
			t.card(r, slot, group)
		}
	}
	r.Shuffle(len(t.ask), func(i, j int) { t.ask[i], t.ask[j] = t.ask[j], t.ask[i] })
	var onDriver []string
	for _, d := range t.devices {
		if slices.Contains(t.touch, d.address) && d.driver != "" && !isVFIO(d.driver) {
			onDriver = append(onDriver, d.address)
		}
	}
	switch r.IntN(4) {
	case 0:
		t.spoiled, t.fails = "fails", r.IntN(6)
	case 1:
		if len(onDriver) > 0 {
			t.spoiled, t.blocks = "blocks", onDriver[r.IntN(len(onDriver))]
		}
	}
	return t
}

// past gives a function a driver, and a preference for it, by chance.
func past(r *rand.Rand, d fakeDevice, drivers ...string) fakeDevice {
	d.driver = drivers[r.IntN(len(drivers))]
	d.native = []string{"other"}
	if r.IntN(3) == 0 && d.driver != "" {
		d.override = d.driver
	}
	return d
}

func (t *topology) card(r *rand.Rand, slot string, group int) {
	own := r.IntN(2) == 0 // ACS between the functions
	for i := range 1 + r.IntN(4) {
		d := past(r, fakeDevice{address: fmt.Sprintf("%s.%d", slot, i), id: "10de:1aeb", class: "0x040300", group: fmt.Sprint(group)}, "", "nvidia", "nouveau", vfioDriver)
		if own {
			d.group = fmt.Sprint(group + i)
		}
		if i == 0 {
			d.id, d.class = "10de:20f1", []string{"0x030000", "0x030200"}[r.IntN(2)]
		}
		if r.IntN(3) == 0 {
			d.files = map[string]string{"modalias": "pci:v000010DEd00002342sv*sd*bc03sc02i00\n"} // has a variant
		}
		t.devices = append(t.devices, d)
		t.touch = append(t.touch, d.address)
	}
	t.ask = append(t.ask, slot+".0")
}

func (t *topology) virtual(r *rand.Rand, slot string, group int) {
	n := 1 + r.IntN(3)
	t.devices = append(t.devices, fakeDevice{address: slot + ".0", id: "1002:74a1", class: "0x120000", driver: "amdgpu", group: fmt.Sprint(group),
		files: map[string]string{"sriov_numvfs": fmt.Sprintf("%d\n", n), "sriov_totalvfs": "8\n"}})
	for i := range n {
		d := past(r, fakeDevice{address: fmt.Sprintf("%s.%d", slot, i+1), id: "1002:74b5", class: "0x120000", group: fmt.Sprint(group + i + 1), physfn: slot + ".0"}, "", "amdgpu", vfioDriver)
		t.devices = append(t.devices, d)
		if i == 0 || r.IntN(2) == 0 {
			t.ask = append(t.ask, d.address)
			t.touch = append(t.touch, d.address)
		}
	}
}

// host makes the host, and whoever takes devices from it.
func (p topology) host(t *testing.T) (*fake, *Manager) {
	f, m := manager(t, p.devices...)
	f.put("/lib/modules/6.12.0/modules.alias", modulesAlias)
	f.dir(pciDrivers, "nvgrace_gpu_vfio_pci")
	f.mediate(vgpu, "0000:00:1f.0", "77")
	switch p.spoiled {
	case "blocks":
		f.blocks[p.blocks] = true
	case "fails":
		f.fails = p.fails
	}
	return f, m
}

// TestKilledAtEachStep kills binding after each journal entry and each write,
// and recovering too, on hosts of every kind, on which a write fails or blocks by
// chance, and finds every device as it was.
func TestKilledAtEachStep(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(16) {
		p := randomTopology(rand.New(rand.NewPCG(seed, 1)))
		step := 1
		if seed >= 4 { // it is how the host is that differs
			step = 3
		}
		for n, ended := int(seed)%step, false; !ended; n += step {
			f, m := p.host(t)
			before := f.state()
			killAt(m, n)
			ended = survive(func() {
				if _, err := m.Bind(t.Context(), ask(gone, p.ask...)); err != nil && p.spoiled == "" {
					t.Fatalf("seed %d: %v", seed, err)
				}
			})
			seen["points"]++
			if p.spoiled == "fails" && f.fails < 0 {
				seen["failed"]++
			}
			f.fails = -1
			if len(f.pending) > 0 {
				seen["blocked"]++
				p.recoverOthers(t, f, m, n%5, before)
				f.letGo(p.blocks)
			}
			f.blocks = nil
			recoverAll(t, m, n%3) // the owner is dead, and so are some recoverers
			p.check(t, f, m, before, fmt.Sprintf("seed %d, killed at %d", seed, n))
		}
	}
	if seen["points"] < 150 || seen["failed"] == 0 || seen["blocked"] == 0 {
		t.Errorf("too little was tried: %v", seen)
	}
}

// check finds all as it was, and that nothing was written to what nobody asked for.
func (p topology) check(t *testing.T, f *fake, m *Manager, before map[string]string, when string) {
	t.Helper()
	if diff := cmp.Diff(before, f.state()); diff != "" {
		t.Fatalf("%s (-before +after):\n%s\nwrites %q", when, diff, f.writes)
	}
	if left, err := m.Journals(); err != nil || len(left) > 0 {
		t.Fatalf("%s: journals are left: %v, %v", when, left, err)
	}
	for _, w := range f.writes {
		path, data, _ := strings.Cut(w, "=")
		if address := filepath.Base(filepath.Dir(path)); !slices.Contains(p.touch, address) && !slices.Contains(p.touch, data) {
			t.Fatalf("%s: %q", when, w)
		}
	}
}

// recoverOthers recovers while a function is blocked: the others come back. It is
// killed at the n-th point first.
func (p topology) recoverOthers(t *testing.T, f *fake, m *Manager, n int, before map[string]string) {
	t.Helper()
	killAt(m, n)
	survive(func() { _, _ = m.Recover(t.Context()) })
	m.hook = nil
	if _, err := m.Recover(t.Context()); !errors.Is(err, ErrBlocked) {
		t.Fatal("recover while it blocks:", err)
	}
	now := f.state()
	delete(now, p.blocks)
	before = maps.Clone(before)
	delete(before, p.blocks)
	if diff := cmp.Diff(before, now); diff != "" {
		t.Fatalf("while %s blocks (-before +after):\n%s", p.blocks, diff)
	}
}
