package gpu

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

// board is a host with cards on two NUMA nodes, one of two functions, one with
// a display, and a switch.
func board() *Inventory {
	dev := func(address string, device uint16, class uint32, node int, bar uint64) *Device {
		return &Device{Address: address, Vendor: nvidia, Device: device, VendorName: "NVIDIA", Name: map[uint16]string{0x2330: "H100", 0x2482: "RTX 3070", 0x22a3: "NVSwitch", 0x228b: "Audio"}[device],
			Class: class, Group: address[5:7], Members: []string{address}, ResetMethod: "flr", NUMANode: node,
			BARs: []BAR{{Index: 0, Size: 16 << 20}, {Index: 1, Size: bar, Bits64: true, Prefetchable: true}, {Index: 5, Size: 128, IO: true}, {Index: romIndex, Size: 512 << 10}}}
	}
	inv := &Inventory{IOMMU: true, VFIOLoaded: true, VFIOAvailable: true, Memlock: math.MaxUint64, Devices: []*Device{
		{Address: "0000:00:01.0", Bridge: true},
		dev("0000:01:00.0", 0x2482, 0x030000, 0, 256<<20),
		dev("0000:01:00.1", 0x228b, 0x040300, 0, 16<<10),
		dev("0000:02:00.0", 0x2330, 0x030200, 0, 128<<30),
		dev("0000:03:00.0", 0x2330, 0x030200, 1, 128<<30),
		dev("0000:04:00.0", 0x2330, 0x030200, 1, 128<<30),
		dev("0000:05:00.0", 0x22a3, 0x068000, 1, 32<<20),
	}, Mediated: []*Mdev{{UUID: vgpu, Type: "GRID T4-2Q", Group: "77", Driver: "nvidia-vgpu-vfio"}}}
	for _, a := range []string{"0000:01:00.0", "0000:01:00.1"} {
		inv.Get(a).Members = []string{"0000:00:01.0", "0000:01:00.0", "0000:01:00.1"}
	}
	return inv
}

func addressesOf(slots []vm.Slot) string {
	var list []string
	for _, s := range slots {
		var functions []string
		for _, f := range s.Functions {
			functions = append(functions, f.Address+f.Mediated)
		}
		list = append(list, strings.Join(functions, "+"))
	}
	return strings.Join(list, " ")
}

func TestChoose(t *testing.T) {
	held := func(address string) func(*Inventory) {
		return func(inv *Inventory) { inv.Get(address).Holders = []Holder{{7, "train.py", "/dev/nvidia0", ""}} }
	}
	for _, tt := range []struct {
		name   string
		wants  []Want
		node   int
		taken  string
		change func(*Inventory)
		want   string // addresses, or the beginning of an error
		class  error
	}{
		{"an address brings its slot", []Want{{Use: "01:00.0"}}, NoNode, "", nil, "0000:01:00.0+0000:01:00.1", nil},
		{"the best", []Want{{Use: "auto"}}, NoNode, "", nil, "0000:02:00.0", nil},
		{"on a node", []Want{{Use: "auto"}}, 1, "", nil, "0000:03:00.0", nil},
		{"two stay together", []Want{{Use: "h100", Count: 2}}, 1, "", nil, "0000:03:00.0 0000:04:00.0", nil},
		{"the rest from elsewhere", []Want{{Use: "h100", Count: 3}}, 1, "", nil, "0000:03:00.0 0000:04:00.0 0000:02:00.0", nil},
		{"beside what was named", []Want{{Use: "05:00.0"}, {Use: "auto", Count: 2}}, NoNode, "", nil, "0000:05:00.0 0000:03:00.0 0000:04:00.0", nil},
		{"those in use are passed over", []Want{{Use: "h100", Count: 2}}, NoNode, "", held("0000:02:00.0"), "0000:03:00.0 0000:04:00.0", nil},
		{"those taken too", []Want{{Use: "10de:2330"}}, NoNode, "0000:02:00.0", nil, "0000:03:00.0", nil},
		{"mediated", []Want{{Use: strings.ToUpper(vgpu)}}, NoNode, "", nil, vgpu, nil},
		{"mediated and in use", []Want{{Use: vgpu}}, NoNode, "", func(inv *Inventory) { inv.Mediated[0].Holders = []Holder{{7, "qemu", "/dev/vfio/77", ""}} }, vgpu + " cannot be taken: it is in use by qemu", vm.ErrHost},
		{"mediated and taken", []Want{{Use: vgpu}}, NoNode, vgpu, nil, vgpu + " is taken already, by web", vm.ErrHost},
		{"mediated without its driver", []Want{{Use: vgpu}}, NoNode, "", func(inv *Inventory) { inv.Mediated[0].Driver = "" }, vgpu + " cannot be taken: no driver", vm.ErrHost},
		{"mediated, twice", []Want{{Use: vgpu}, {Use: strings.ToUpper(vgpu)}}, NoNode, "", nil, vgpu + " is named twice", vm.ErrUsage},
		{"a card that is divided", []Want{{Use: "02:00.0"}}, NoNode, "", func(inv *Inventory) { inv.Get("0000:02:00.0").Mediated = []string{vgpu} }, "0000:02:00.0 cannot be taken: mediated devices live on it", vm.ErrHost},
		{"named and in use", []Want{{Use: "02:00.0"}}, NoNode, "", held("0000:02:00.0"), "0000:02:00.0 cannot be taken: it is in use by train.py", vm.ErrHost},
		{"named and taken", []Want{{Use: "02:00.0"}}, NoNode, "0000:02:00.0", nil, "0000:02:00.0 is taken already, by web", vm.ErrHost},
		{"a second function of what is there", []Want{{Use: "01:00.0"}, {Use: "01:00.1"}}, NoNode, "", nil, "0000:01:00.0 is named twice", vm.ErrUsage},
		{"more than there are", []Want{{Use: "h100", Count: 4}}, NoNode, "", nil, `4 devices are wanted as "h100", and this host has 3`, vm.ErrNotFound},
		{"more than are free", []Want{{Use: "h100", Count: 3}}, NoNode, "", held("0000:02:00.0"), `2 of 3 devices that "h100" names are free`, vm.ErrHost},
		{"none of the name", []Want{{Use: "mi300"}}, NoNode, "", nil, "no device of this host", vm.ErrNotFound},
		{"no such part of a card", []Want{{Use: "00000000-f1bb-47f0-914d-32a22e3a8804"}}, NoNode, "", nil, "this host has no mediated device", vm.ErrNotFound},
		{"no IOMMU", []Want{{Use: "02:00.0"}}, NoNode, "", func(inv *Inventory) { inv.IOMMU = false }, "0000:02:00.0 cannot be taken: the host has no IOMMU groups", vm.ErrHost},
		{"auto, and all in use", []Want{{Use: "auto"}}, NoNode, "0000:03:00.0", func(inv *Inventory) {
			for _, d := range inv.Devices {
				held(d.Address)(inv)
			}
		}, "0 of 4 devices that \"auto\" names are free:\n0000:02:00.0 cannot be taken: it is in use by train.py (process 7, /dev/nvidia0)\n0000:03:00.0 is taken already, by web\n", vm.ErrHost},
		{"a group of two", []Want{{Use: "02:00.0"}}, NoNode, "", oneGroup, "0000:02:00.0 cannot be taken: IOMMU group", vm.ErrHost},
		{"a group of two, both", []Want{{Use: "02:00.0"}, {Use: "03:00.0"}}, NoNode, "", oneGroup, "0000:02:00.0 0000:03:00.0", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inv := board()
			if tt.change != nil {
				tt.change(inv)
			}
			slots, err := Choose(inv, tt.wants, tt.node, map[string]Claim{tt.taken: {Owner: "web"}})
			got := addressesOf(slots)
			if err != nil {
				got = err.Error()
			}
			if !errors.Is(err, tt.class) || err == nil && got != tt.want || !strings.HasPrefix(got, tt.want) {
				t.Errorf("got  %q (%v)\nwant %q (%v)", got, err, tt.want, tt.class)
			}
			if err != nil && tt.class != vm.ErrUsage && vm.Hint(err) == "" {
				t.Error("it does not say what to do")
			}
		})
	}
}

func oneGroup(inv *Inventory) {
	for _, a := range []string{"0000:02:00.0", "0000:03:00.0"} {
		inv.Get(a).Members = []string{"0000:02:00.0", "0000:03:00.0"}
		inv.Get(a).Group = "9"
	}
}

func TestDescribe(t *testing.T) {
	slots, err := Choose(board(), []Want{{Use: "01:00.0", ROM: "/rom"}, {Use: "02:00.0"}}, NoNode, nil)
	if err != nil {
		t.Fatal(err)
	}
	regions := func(size int64) []vm.Region {
		return []vm.Region{{Size: 16 << 20}, {Size: size, Bits64: true, Prefetchable: true}}
	}
	want := []vm.Slot{
		{Functions: []vm.Function{
			{Address: "0000:01:00.0", ID: "10de:2482", Name: "NVIDIA RTX 3070", Group: "01", Regions: regions(256 << 20), ROM: "/rom"},
			{Address: "0000:01:00.1", ID: "10de:228b", Name: "NVIDIA Audio", Group: "01", Regions: regions(16 << 10), HideROM: true}}},
		{Functions: []vm.Function{{Address: "0000:02:00.0", ID: "10de:2330", Name: "NVIDIA H100", Group: "02", Regions: regions(128 << 30), HideROM: true}}},
	}
	if diff := cmp.Diff(want, slots); diff != "" {
		t.Error(diff)
	}
}

func TestNUMAOfHost(t *testing.T) {
	f := newFake(t)
	f.put(nodeDir+"/node1/cpulist", "8-10,15\n")
	f.put(nodeDir+"/node1/meminfo", "Node 1 MemTotal:       1024 kB\nNode 1 MemFree:        512 kB\n")
	f.put(nodeDir+"/node1/hugepages/hugepages-2048kB/free_hugepages", "3\n")
	f.put(nodeDir+"/node1/hugepages/hugepages-2048kB/nr_hugepages", "5\n")
	f.put(nodeDir+"/node0/cpulist", "0\n")
	f.put(nodeDir+"/possible", "0-1\n")
	f.put("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "2\n")
	h := f.host()
	n := h.Node(1)
	if n == nil || !slices.Equal(n.CPUs, []int{8, 9, 10, 15}) || h.Nodes() != 2 || h.Node(2) != nil || h.FreeMemory(1) != 512<<10 {
		t.Errorf("%+v, %d nodes, %d free", n, h.Nodes(), h.FreeMemory(1))
	}
	if h.FreePages(2<<20, 1) != 3 || h.Pages(2<<20, 1) != 5 || h.FreePages(1<<30, NoNode) != 2 || h.FreePages(1<<30, 0) != 0 {
		t.Error(h.FreePages(2<<20, 1), h.Pages(2<<20, 1), h.FreePages(1<<30, NoNode), h.FreePages(1<<30, 0))
	}
}
