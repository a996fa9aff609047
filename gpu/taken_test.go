package gpu

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

// TestSelectPassesOverTaken: what is taken is selected only by its address, or
// where a name means nothing else.
func TestSelectPassesOverTaken(t *testing.T) {
	for _, tt := range []struct {
		name, wanted string
		taken        []string
		want         string // addresses, or the beginning of an error
	}{
		{"auto, none taken", "auto", nil, "0000:02:00.0"},
		{"auto, one of equal cards", "auto", []string{"0000:02:00.0"}, "0000:03:00.0"},
		{"auto, only the display is left", "auto", []string{"0000:02:00.0", "0000:03:00.0", "0000:04:00.0"}, "0000:01:00.0"},
		{"auto, another function of the slot", "auto", []string{"0000:01:00.1", "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"},
			"no card of this host is free:\n0000:01:00.1 is taken already, by web\n0000:02:00.0 is taken already, by web\n0000:03:00.0 is taken already, by web\n0000:04:00.0 is taken already, by web"},
		{"a pattern", "h100", []string{"0000:03:00.0"}, "0000:02:00.0 0000:04:00.0"},
		{"an id", "10de:2330", []string{"0000:02:00.0", "0000:03:00.0"}, "0000:04:00.0"},
		{"all of a name", "h100", []string{"0000:02:00.0", "0000:03:00.0", "0000:04:00.0"}, "0000:02:00.0 0000:03:00.0 0000:04:00.0"},
		{"an address", "02:00.0", []string{"0000:02:00.0"}, "0000:02:00.0"},
		{"others", "3070", []string{"0000:02:00.0", vgpu}, "0000:01:00.0"},
	} {
		taken := map[string]Claim{}
		for _, a := range tt.taken {
			taken[a] = Claim{Owner: "web"}
		}
		found, err := Select(board(), tt.wanted, taken)
		var list []string
		for _, d := range found {
			list = append(list, d.Address)
		}
		got := strings.Join(list, " ")
		if err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestCheckTaken: it says who has a device and how to get it back, and nothing of
// the driver that it is on meanwhile.
func TestCheckTaken(t *testing.T) {
	for _, tt := range []struct {
		name, taken, who, fix string
		claim                 Claim
	}{
		{"a machine's", "0000:01:00.0", "web", "agentvm stop web", Claim{Owner: "web"}},
		{"by its other function", "0000:01:00.1", "web", "agentvm stop web", Claim{Owner: "web"}},
		{"another user's", "0000:01:00.0", "web of alice", "agentvm stop web", Claim{Owner: "web of alice"}},
		{"by hand", "0000:01:00.0", "agentvm gpu bind", "agentvm gpu release 0000:01:00.0", Claim{Owner: "gpu bind", Kept: true}},
		{"by hand, through the helper", "0000:01:00.1", "agentvm gpu bind of alice", "agentvm gpu release 0000:01:00.1", Claim{Owner: "gpu bind of alice", Kept: true}},
		{"by nobody who says so", "0000:01:00.0", "another process", "agentvm gpu release 0000:01:00.0", Claim{}},
		{"left behind", "0000:01:00.0", "web, which has left it behind", "agentvm gpu recover", Claim{Owner: "web", Left: true}},
		{"mediated", vgpu, "web", "agentvm stop web", Claim{Owner: "web"}},
	} {
		inv, taken := board(), map[string]Claim{tt.taken: tt.claim}
		var got []Finding
		if tt.taken == vgpu {
			got = CheckMediated(inv, inv.Mediated[0], taken)
		} else {
			inv.Get(tt.taken).Driver = vfioDriver
			got = Check(inv, inv.Get("0000:01:00.0"), taken)
		}
		want := []Finding{{Code: Taken, Severity: Problem, Device: tt.taken, Detail: "it is taken already, by " + tt.who, Fix: tt.fix}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(tt.name, diff)
		}
	}
	if got := Check(board(), board().Get("0000:02:00.0"), map[string]Claim{"0000:03:00.0": {Owner: "web"}}); len(got) > 0 {
		t.Error("of another card:", got)
	}
}

// TestBindAutoTwice: of two equal cards the second bind takes the second.
func TestBindAutoTwice(t *testing.T) {
	_, m := manager(t, fakeDevice{address: "0000:01:00.0", id: "10de:2330", class: "0x030200", driver: "nvidia", group: "1"},
		fakeDevice{address: "0000:02:00.0", id: "10de:2330", class: "0x030200", driver: "nvidia", group: "2"})
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	byHand := Claim{Owner: "gpu bind", Kept: true}
	want := map[string]Claim{}
	for _, address := range []string{"0000:01:00.0", "0000:02:00.0"} {
		inv, err := m.Host.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		taken, err := m.Taken()
		if diff := cmp.Diff(want, taken); diff != "" || err != nil {
			t.Fatal(diff, err)
		}
		found, err := Select(inv, Auto, taken)
		if err != nil || len(found) != 1 || found[0].Address != address {
			t.Fatalf("%+v, %v; want %s", found, err, address)
		}
		if _, err := m.Bind(t.Context(), ask(Owner{Name: byHand.Owner, Process: self, Keep: true}, address)); err != nil {
			t.Fatal(err)
		}
		want[address] = byHand
	}
	m.Host.Root = t.TempDir()
	if taken, err := m.Taken(); len(taken) > 0 || err != nil {
		t.Error("a host without journals:", taken, err)
	}
}
