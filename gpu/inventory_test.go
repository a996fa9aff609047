package gpu

import (
	"errors"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

// Resource files of real cards, from what people have shown of them.
var (
	// A100 PCIe, addresses as the kernel assigned them:
	// github.com/triton-inference-server/server/issues/4154
	a100 = resourceLines(
		"0x0000000042000000 0x0000000042ffffff 0x0000000000040200",
		"0x0000003000000000 0x0000003fffffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000004000000000 0x0000004001ffffff 0x000000000014220c")
	// H100 SXM, by lspci: github.com/fastfetch-cli/fastfetch/issues/1658
	h100 = resourceLines(
		"0x0000088042000000 0x0000088042ffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000084000000000 0x0000085fffffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000088040000000 0x0000088041ffffff 0x000000000014220c")
	// H200 SXM, in a machine that has it and no IOMMU, as its sysfs shows it.
	h200 = resourceLines(
		"0x0000104002000000 0x0000104002ffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000100000000000 0x0000103fffffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000104000000000 0x0000104001ffffff 0x000000000014220c")
	// Quadro RTX 8000, with I/O ports and a ROM, by lspci:
	// github.com/geerlingguy/raspberry-pi-pcie-devices/issues/480
	rtx8000 = strings.Join([]string{
		"0x0000000618000000 0x0000000618ffffff 0x0000000000040200",
		"0x0000000600000000 0x000000060fffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000000610000000 0x0000000611ffffff 0x000000000014220c",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000",
		"0x0000000000001000 0x000000000000107f 0x0000000000040101",
		"0x0000000619000000 0x000000061907ffff 0x0000000000046200",
		"0x0000000000000000 0x0000000000000000 0x0000000000000000"}, "\n")
)

func TestBARsOfRealCards(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for _, tt := range []struct {
		name, resource string
		want           []BAR
	}{
		{"A100", a100, []BAR{{Index: 0, Size: 16 * mib}, {Index: 1, Size: 64 * gib, Bits64: true, Prefetchable: true}, {Index: 3, Size: 32 * mib, Bits64: true, Prefetchable: true}}},
		{"H100", h100, []BAR{{Index: 0, Size: 16 * mib, Bits64: true, Prefetchable: true}, {Index: 2, Size: 128 * gib, Bits64: true, Prefetchable: true}, {Index: 4, Size: 32 * mib, Bits64: true, Prefetchable: true}}},
		{"H200", h200, []BAR{{Index: 0, Size: 16 * mib, Bits64: true, Prefetchable: true}, {Index: 2, Size: 256 * gib, Bits64: true, Prefetchable: true}, {Index: 4, Size: 32 * mib, Bits64: true, Prefetchable: true}}},
		{"RTX 8000", rtx8000, []BAR{{Index: 0, Size: 16 * mib}, {Index: 1, Size: 256 * mib, Bits64: true, Prefetchable: true}, {Index: 3, Size: 32 * mib, Bits64: true, Prefetchable: true},
			{Index: 5, Size: 128, IO: true}, {Index: 6, Size: 512 << 10, Prefetchable: true}}},
		{"nothing", resourceLines(), nil},
	} {
		got, err := parseBARs(tt.resource)
		if err != nil {
			t.Fatal(tt.name, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s:\n%s", tt.name, diff)
		}
	}
	for _, bad := range []string{"x", "0x1 0x2", "0x2 0x1 0x200", "0x0 0xffffffffffffffff 0x200", "0x0 0x10000000000000000 0x200"} {
		if got, err := parseBARs(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func FuzzBARs(f *testing.F) {
	for _, seed := range []string{a100, h100, h200, rtx8000, "", "0x2 0x1 0x200"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		bars, err := parseBARs(text)
		if err == nil && slices.ContainsFunc(bars, func(b BAR) bool { return b.Size == 0 || b.Index > romIndex }) {
			t.Errorf("%+v", bars)
		}
	})
}

func TestInventory(t *testing.T) {
	f := newFake(t, fakeDevice{address: "0000:3b:00.0", id: "10de:2330", class: "0x030200", driver: "nvidia", group: "7", files: map[string]string{
		"resource": h100, "sriov_totalvfs": "20\n", "numa_node": "1\n", "current_link_width": "16\n", "drm/card1/x": "", "drm/renderD129/x": "", "drm/version": ""}},
		fakeDevice{address: "0000:00:01.0", id: "8086:1901", class: "0x060400", driver: "pcieport", group: "7"},
		fakeDevice{address: "0000:05:00.0", id: "10de:1af1", class: "0x068000", group: "8"})
	f.put("/usr/share/misc/pci.ids", "10de  NVIDIA Corporation\n\t2330  GH100 [H100 SXM5 80GB]\n")
	f.put("/proc/driver/nvidia/gpus/0000:3b:00.0/information", "Model: \t\t NVIDIA H100\nDevice Minor: \t 3\n")
	f.put("/proc/42/comm", "py\x1b[31mthon3\n")
	f.put("/proc/42/cgroup", "0::/system.slice/jupyter.service\n")
	f.put("/proc/44/cgroup", "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.service\n")
	f.symlink("/dev/nvidia3", "/proc/42/fd/5")
	f.symlink("/dev/nvidia3", "/proc/42/fd/6")
	f.symlink("/dev/nvidia0", "/proc/43/fd/5")
	f.put("/proc/44/comm", "Xorg\n")
	f.symlink("/dev/dri/card1", "/proc/44/fd/9")
	inv, err := f.host().Inventory()
	if err != nil {
		t.Fatal(err)
	}
	if got := inv.GPUs(); len(got) != 2 || !got[0].IsSwitch() || len(inv.Devices) != 3 || !inv.IOMMU || !inv.VFIOLoaded || inv.CPUVendor != "GenuineIntel" {
		t.Fatalf("%+v", inv)
	}
	d := inv.Get("0000:3b:00.0")
	want := []Holder{{42, "py[31mthon3", "/dev/nvidia3", "jupyter.service"}, {44, "Xorg", "/dev/dri/card1", ""}}
	if diff := cmp.Diff(want, d.Holders); diff != "" {
		t.Error(diff)
	}
	if d.Title() != "NVIDIA Corporation GH100 [H100 SXM5 80GB]" || d.Memory() != 128<<30 || d.TotalVFs != 20 || d.NUMANode != 1 || d.Override != "" ||
		!slices.Equal(d.Members, []string{"0000:00:01.0", "0000:3b:00.0"}) || !inv.Get("0000:00:01.0").Bridge {
		t.Errorf("%+v", d)
	}
	empty, err := Host{Root: t.TempDir()}.Inventory()
	if err != nil || len(empty.Devices) > 0 || empty.IOMMU {
		t.Error(empty, err)
	}
}

// TestWithoutIOMMU: all that is known of a real card, in a virtual machine that has
// it without an IOMMU, without VFIO and without a database of names.
func TestWithoutIOMMU(t *testing.T) {
	const address = "0000:00:06.0"
	f := newFake(t, fakeDevice{address: address, id: "10de:2335", class: "0x030200", driver: "nvidia", files: map[string]string{
		"resource": h200, "numa_node": "-1\n", "reset_method": "flr\n", "subsystem_vendor": "0x10de\n", "subsystem_device": "0x18bf\n", "revision": "0xa1\n", "power_state": "D0\n",
		"modalias": "pci:v000010DEd00002335sv000010DEsd000018BFbc03sc02i00\n", "current_link_speed": "32.0 GT/s PCIe\n", "current_link_width": "16\n"}},
		fakeDevice{address: "0000:00:00.0", id: "8086:0d57", class: "0x060000"}, fakeDevice{address: "0000:00:01.0", id: "1af4:1042", class: "0x018000", driver: "virtio-pci"})
	f.must(os.Remove(f.at(pciDrivers, vfioDriver)))
	f.put("/proc/driver/nvidia/gpus/"+address+"/information", "Model: \t\t NVIDIA H200\nIRQ:   \t\t 41\nBus Type: \t PCIe\nBus Location: \t 0000:00:06.0\nDevice Minor: \t 0\nGPU Excluded:\t No\n")
	f.put("/proc/765/comm", "python3\n")
	f.symlink("/dev/nvidia0", "/proc/765/fd/3")
	inv, err := f.host().Inventory()
	if err != nil {
		t.Fatal(err)
	}
	want := &Device{Address: address, Vendor: nvidia, Device: 0x2335, Subsystem: "10de:18bf", Class: 0x030200, Revision: 0xa1, VendorName: "NVIDIA", Name: "H200",
		Modalias: "pci:v000010DEd00002335sv000010DEsd000018BFbc03sc02i00", Driver: "nvidia", PowerState: "D0", ResetMethod: "flr", NUMANode: NoNode, LinkSpeed: "32.0 GT/s PCIe", LinkWidth: "16",
		BARs:  []BAR{{Index: 0, Size: 16 << 20, Bits64: true, Prefetchable: true}, {Index: 2, Size: 256 << 30, Bits64: true, Prefetchable: true}, {Index: 4, Size: 32 << 20, Bits64: true, Prefetchable: true}},
		Nodes: []string{"/dev/nvidia0"}, Holders: []Holder{{765, "python3", "/dev/nvidia0", ""}}, Hidden: os.Geteuid() != 0}
	cards := inv.GPUs()
	if diff := cmp.Diff([]*Device{want}, cards); diff != "" {
		t.Fatal(diff)
	}
	if inv.IOMMU || inv.VFIOLoaded || inv.VFIOAvailable || len(inv.Devices) != 3 {
		t.Errorf("%+v", inv)
	}
	findings := Check(inv, cards[0], nil)
	if diff := cmp.Diff([]string{NoIOMMU, NoVFIO, Held}, codes(findings, Problem)); diff != "" {
		t.Error(diff)
	}
	if warnings := codes(findings, Warning); !slices.Contains(warnings, MIG) || os.Geteuid() == 0 && len(warnings) > 1 {
		t.Error(warnings)
	}
	if _, err := Choose(inv, []Want{{Use: "h200"}}, NoNode, nil); err == nil || !strings.HasPrefix(err.Error(), address+" cannot be taken: the host has no IOMMU groups") {
		t.Error(err)
	}
	// On a host with an IOMMU the guest would have a window of twice its memory.
	if s := inv.slot(cards[0], ""); s.Window() != 512<<30 || s.ForLater().Window() != 512<<30+48<<20 {
		t.Error(s.Window(), s.ForLater().Window())
	}
}

// TestNames: what the database does not know NVIDIA's driver may, and what neither
// knows goes by its id.
func TestNames(t *testing.T) {
	const database = "10de  NVIDIA Corporation\n\t2335  GH100 [H200 SXM 141GB]\n"
	for _, tt := range []struct{ name, database, driver, says, want string }{
		{"the database's", database, "nvidia", "Model: \t\t NVIDIA H200\n", "NVIDIA Corporation GH100 [H200 SXM 141GB]"},
		{"no database", "", "nvidia", "Model: \t\t NVIDIA H200\nIRQ:   \t\t 41\n", "NVIDIA H200"},
		{"an older database", "10de  NVIDIA Corporation\n", "nvidia", "Model: \t\t NVIDIA H200\n", "NVIDIA Corporation H200"},
		{"an older driver", "", "nvidia", "Model: \t\t Tesla K80\n", "NVIDIA Tesla K80"},
		{"not the first line", "", "nvidia", "Device Minor: \t 0\nModel: \t\t NVIDIA H200", "NVIDIA H200"},
		{"what could drive a terminal", "", "nvidia", "Model: \t\t NVIDIA\x1b[31m \tH\x07200\n", "NVIDIA NVIDIA[31m H200"},
		{"the driver does not know", "", "nvidia", "Model: \t\t Unknown\n", "10de:2335"},
		{"nothing after it", "", "nvidia", "Model: \t\t \nIRQ:   \t\t 41\n", "10de:2335"},
		{"it says nothing", "", "nvidia", "", "10de:2335"},
		{"another driver has it", "", vfioDriver, "Model: \t\t NVIDIA H200\n", "10de:2335"},
	} {
		f := newFake(t, fakeDevice{address: "0000:00:06.0", id: "10de:2335", class: "0x030200", driver: tt.driver})
		if tt.database != "" {
			f.put("/usr/share/misc/pci.ids", tt.database)
		}
		f.put("/proc/driver/nvidia/gpus/0000:00:06.0/information", tt.says)
		inv, err := f.host().Inventory()
		if err != nil {
			t.Fatal(err)
		}
		d := inv.Get("0000:00:06.0")
		if d.Title() != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, d.Title(), tt.want)
		}
		found, err := Select(inv, "h200", nil)
		if known := strings.Contains(tt.want, "H200"); known != (err == nil) || known && found[0] != d {
			t.Errorf("%s: h200 selects %v, %v", tt.name, found, err)
		}
	}
}

func codes(findings []Finding, s Severity) (codes []string) {
	for _, f := range findings {
		if f.Severity == s {
			codes = append(codes, f.Code)
		}
		if f.Detail == "" || strings.ContainsAny(f.Detail+f.Fix, "\n") || f.Severity == Problem && f.Fix == "" {
			codes = append(codes, "not said: "+f.Code)
		}
	}
	return codes
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name     string
		change   func(inv *Inventory, card, audio, nic *Device)
		problems []string
		warnings []string
	}{
		{"a card with its audio", func(*Inventory, *Device, *Device, *Device) {}, nil, nil},
		{"no IOMMU", func(inv *Inventory, _, _, _ *Device) { inv.IOMMU = false }, []string{NoIOMMU}, nil},
		{"module not loaded", func(inv *Inventory, _, _, _ *Device) { inv.VFIOLoaded = false }, []string{NoVFIO}, nil},
		{"no module", func(inv *Inventory, _, _, _ *Device) { inv.VFIOLoaded, inv.VFIOAvailable = false, false }, []string{NoVFIO}, nil},
		{"no group", func(_ *Inventory, c, _, _ *Device) { c.Group = "" }, []string{NoGroup}, nil},
		{"a network card in the group", func(_ *Inventory, c, _, n *Device) { c.Members = append(c.Members, n.Address) }, []string{Companions}, nil},
		{"something unseen in the group", func(_ *Inventory, c, _, _ *Device) { c.Members = append(c.Members, "0000:09:00.0") }, []string{Companions}, nil},
		{"the display", func(_ *Inventory, c, _, _ *Device) { c.BootVGA = true }, []string{BootVGA}, nil},
		{"the console", func(_ *Inventory, c, _, _ *Device) { c.Framebuffer = "fb0" }, []string{Framebuffer}, nil},
		{"in use", func(_ *Inventory, c, _, _ *Device) { c.Holders = []Holder{{1, "x", "/dev/nvidia0", ""}} }, []string{Held}, nil},
		{"audio in use", func(_ *Inventory, _, a, _ *Device) { a.Holders = []Holder{{1, "x", "/dev/vfio/1", ""}} }, []string{Held}, nil},
		{"override", func(_ *Inventory, c, _, _ *Device) { c.Override = "nouveau" }, []string{OtherOverride}, nil},
		{"memlock", func(inv *Inventory, _, _, _ *Device) { inv.Memlock = 8 << 20 }, nil, []string{MemlockLow}},
		{"no reset", func(_ *Inventory, c, _, _ *Device) { c.ResetMethod = "" }, nil, []string{NoReset}},
		{"prebound", func(_ *Inventory, c, _, _ *Device) { c.Driver = vfioDriver }, nil, []string{Prebound}},
		{"virtual function", func(_ *Inventory, c, _, _ *Device) { c.PhysFn = "0000:02:00.0" }, []string{Companions}, []string{VirtualFn}},
		{"has virtual functions", func(_ *Inventory, c, _, _ *Device) { c.NumVFs = 4 }, []string{HasVirtualFns}, nil},
		{"has mediated devices", func(_ *Inventory, c, _, _ *Device) { c.Mediated = []string{vgpu} }, []string{HasMediated}, nil},
		{"mediated", func(_ *Inventory, c, _, _ *Device) { c.MdevTypes = []string{"nvidia-63"} }, nil, []string{Mediated}},
		{"MIG", func(_ *Inventory, c, _, _ *Device) { c.Class, c.Driver = 0x030200, "nvidia" }, nil, []string{MIG}},
		{"vGPU", func(_ *Inventory, c, _, _ *Device) { c.TotalVFs = 20 }, nil, []string{VGPU}},
		{"variant", func(_ *Inventory, c, _, _ *Device) { c.Variant = "nvgrace_gpu_vfio_pci" }, nil, []string{VariantDriver}},
		{"ordinary user", func(inv *Inventory, c, _, _ *Device) {
			inv.User, c.Nodes = 1000, []string{"/dev/nvidia0"}
			inv.hideHolders()
		}, nil, []string{HoldersHidden}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			members := []string{"0000:00:01.0", "0000:01:00.0", "0000:01:00.1"}
			card := &Device{Address: "0000:01:00.0", Vendor: nvidia, Class: 0x030000, Driver: "nouveau", Group: "1", Members: members, ResetMethod: "bus"}
			if tt.name == "override" {
				card.Driver = "nvidia"
			}
			audio := &Device{Address: "0000:01:00.1", Vendor: nvidia, Class: 0x040300, Group: "1", Members: members}
			nic := &Device{Address: "0000:03:00.0", Vendor: 0x8086, Class: 0x020000, Group: "1", Driver: "igb"}
			bridge := &Device{Address: "0000:00:01.0", Bridge: true, Group: "1", Driver: "pcieport"}
			inv := &Inventory{Devices: []*Device{bridge, card, audio, nic}, IOMMU: true, VFIOLoaded: true, VFIOAvailable: true, Memlock: math.MaxUint64}
			tt.change(inv, card, audio, nic)
			findings := Check(inv, card, nil)
			if diff := cmp.Diff(tt.problems, codes(findings, Problem)); diff != "" {
				t.Error("problems", diff)
			}
			if diff := cmp.Diff(tt.warnings, codes(findings, Warning)); diff != "" {
				t.Error("warnings", diff)
			}
			if tt.name == "a network card in the group" && len(Check(inv, card, nil, nic)) > 0 {
				t.Error("not even together")
			}
		})
	}
}

func TestSelect(t *testing.T) {
	dev := func(address, name string, device uint16, class uint32, bar uint64) *Device {
		return &Device{Address: address, Vendor: nvidia, Device: device, VendorName: "NVIDIA Corporation", Name: name, Class: class, Group: address, Members: []string{address}, ResetMethod: "flr",
			BARs: []BAR{{Size: bar}}}
	}
	inv := &Inventory{IOMMU: true, VFIOLoaded: true, VFIOAvailable: true, Memlock: math.MaxUint64, Devices: []*Device{
		{Address: "0000:00:01.0", Bridge: true},
		dev("0000:01:00.0", "GA104 [GeForce RTX 3070 / 3070 Ti]", 0x2482, 0x030000, 256<<30),
		dev("0000:02:00.0", "GH100 [H100 SXM5 80GB]", 0x2330, 0x030200, 64<<30),
		dev("0001:02:00.0", "GH100 [H100 SXM5 80GB]", 0x2330, 0x030200, 128<<30),
		dev("0000:05:00.0", "NVSwitch", 0x1af1, 0x068000, 512<<30),
	}}
	for _, tt := range []struct{ wanted, got string }{
		{"01:00.0", "0000:01:00.0"}, {"0001:02:00.0", "0001:02:00.0"}, {"10DE:2482", "0000:01:00.0"}, {"10de:2330", "0000:02:00.0 0001:02:00.0"},
		{"h100", "0000:02:00.0 0001:02:00.0"}, {"*3070 Ti*", "0000:01:00.0"}, {"nvswitch", "0000:05:00.0"}, {"auto", "0001:02:00.0"},
	} {
		found, err := Select(inv, tt.wanted, nil)
		var got []string
		for _, d := range found {
			got = append(got, d.Address)
		}
		if err != nil || strings.Join(got, " ") != tt.got {
			t.Errorf("%q: %q, %v; want %q", tt.wanted, got, err, tt.got)
		}
	}
	for wanted, class := range map[string]error{"09:00.0": vm.ErrNotFound, "10de:0000": vm.ErrNotFound, "a100": vm.ErrNotFound, "": vm.ErrUsage, "00:01.0": vm.ErrUsage, "[a": vm.ErrUsage} {
		if found, err := Select(inv, wanted, nil); !errors.Is(err, class) {
			t.Errorf("%q: %v, %v", wanted, found, err)
		}
	}
}

// TestAutoSaysWhy: where none is free auto says what is in the way of each card,
// and what to do where that is the same for all.
func TestAutoSaysWhy(t *testing.T) {
	const refused, each = "no card of this host is free", "agentvm gpu check says what to do about each"
	one := func(inv *Inventory) { inv.Devices = []*Device{inv.Get("0000:02:00.0")} }
	for _, tt := range []struct {
		name       string
		change     func(*Inventory)
		taken      string
		want, hint string
	}{
		{"no IOMMU", func(inv *Inventory) { one(inv); inv.IOMMU = false }, "", refused + ": 0000:02:00.0 cannot be taken: the host has no IOMMU groups; without an IOMMU a device reaches all of the host's memory",
			"switch the IOMMU (VT-d or AMD-Vi) on in the firmware's setup, add intel_iommu=on or amd_iommu=on to the kernel's command line, and boot again"},
		{"taken", one, "0000:02:00.0", refused + ": 0000:02:00.0 is taken already, by web", "agentvm stop web"},
		{"one group", func(inv *Inventory) { one(inv); inv.Devices[0].Members = []string{"0000:02:00.0", "0000:09:00.0"} }, "",
			refused + ": 0000:02:00.0 cannot be taken: IOMMU group 02 holds other devices too: 0000:09:00.0", "name them all in one bind where they can all be spared, or move the card to another slot; ACS in the firmware's setup makes groups smaller"},
		{"several cards", func(inv *Inventory) {
			for _, d := range inv.Devices {
				d.Holders = []Holder{{7, "train.py", "/dev/nvidia0", ""}}
			}
			inv.Get("0000:03:00.0").BootVGA = true
		}, "0000:04:00.0", refused + ":\n" +
			"0000:01:00.0 cannot be taken: it is in use by train.py (process 7, /dev/nvidia0)\n" +
			"0000:02:00.0 cannot be taken: it is in use by train.py (process 7, /dev/nvidia0)\n" +
			"0000:03:00.0 cannot be taken: the host booted with this card as its display\n" +
			"0000:04:00.0 is taken already, by web", each},
		{"no module, for all", func(inv *Inventory) { inv.VFIOLoaded = false }, "", refused + ":\n" +
			"0000:01:00.0 cannot be taken: the driver vfio-pci is not loaded\n" +
			"0000:02:00.0 cannot be taken: the driver vfio-pci is not loaded\n" +
			"0000:03:00.0 cannot be taken: the driver vfio-pci is not loaded\n" +
			"0000:04:00.0 cannot be taken: the driver vfio-pci is not loaded", "sudo modprobe vfio-pci"},
		{"a switch alone", func(inv *Inventory) { inv.Devices = []*Device{inv.Get("0000:05:00.0")} }, "", "this host has no card", "agentvm gpu ls lists what it has"},
	} {
		inv := board()
		tt.change(inv)
		found, err := Select(inv, Auto, map[string]Claim{tt.taken: {Owner: "web"}})
		if !errors.Is(err, vm.ErrNotFound) || err.Error() != tt.want || vm.Hint(err) != tt.hint {
			t.Errorf("%s: %v, %v\nhint: %s", tt.name, found, err, vm.Hint(err))
		}
	}
}

// TestHiddenHolders: an ordinary user cannot know who has a node open, and nobody
// has open what has no node.
func TestHiddenHolders(t *testing.T) {
	f := newFake(t, fakeDevice{address: "0000:01:00.0", id: "10de:2335", class: "0x030200", driver: "nvidia"}, fakeDevice{address: "0000:02:00.0", id: "10de:2335", class: "0x030200"})
	f.mediate(vgpu, "0000:01:00.0", "77")
	inv, err := f.host().Inventory()
	if err != nil {
		t.Fatal(err)
	}
	card, bare, part := inv.Devices[0], inv.Devices[1], inv.Mediated[0]
	if inv.User != os.Geteuid() || card.Hidden != (inv.User != 0) {
		t.Errorf("%d: %v", inv.User, card.Hidden)
	}
	for user, hidden := range map[int]bool{0: false, 1000: true} {
		inv.User = user
		inv.hideHolders()
		told := func(list []Finding) bool {
			return slices.ContainsFunc(list, func(f Finding) bool { return f.Code == HoldersHidden })
		}
		if card.Hidden != hidden || part.Hidden != hidden || bare.Hidden {
			t.Error(user, card.Hidden, part.Hidden, bare.Hidden)
		}
		if told(Check(inv, card, nil)) != hidden || told(CheckMediated(inv, part, nil)) != hidden || told(Check(inv, bare, nil)) {
			t.Error(user, "check says otherwise")
		}
	}
}

// TestStopHolders: services are stopped as such, and everything else by its user.
func TestStopHolders(t *testing.T) {
	for _, tt := range []struct{ cgroup, service string }{
		{"0::/system.slice/nvidia-persistenced.service\n", "nvidia-persistenced.service"},
		{"0::/system.slice/system-getty.slice/getty@tty1.service\n", "getty@tty1.service"},
		{"12:cpu:/x.service\n1:name=systemd:/system.slice/gdm.service\n0::/\n", "gdm.service"},
		{"0::/user.slice/user-1000.slice/user@1000.service/app.slice/evil.service\n", ""},
		{"0::/system.slice/docker-abc.scope\n", ""}, {"0::/system.slice/a b.service\n", ""}, {"0::/system.slice/x.service/sub\n", ""}, {"", ""},
	} {
		f := newFake(t)
		f.put("/proc/7/cgroup", tt.cgroup)
		if got := f.host().service("7"); got != tt.service {
			t.Errorf("%q: %q, want %q", tt.cgroup, got, tt.service)
		}
	}
	a, b, c := Holder{Service: "a.service"}, Holder{Service: "b.service"}, Holder{}
	for _, tt := range []struct {
		holders []Holder
		want    string
	}{
		{[]Holder{c}, "stop them"}, {[]Holder{a, b, a}, "sudo systemctl stop a.service b.service"}, {[]Holder{a, c}, "sudo systemctl stop a.service, and stop the others"},
	} {
		if got := stopHolders(tt.holders); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.holders, got, tt.want)
		}
	}
}
