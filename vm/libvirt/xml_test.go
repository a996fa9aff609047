package libvirt

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/testenv"
)

var update = flag.Bool("update", false, "write the golden files anew")

// testConfig is for a QEMU 7.2, as far as it matters here.
func testConfig() Config {
	return Config{
		Caps: qemu.Caps{
			Binary: "/usr/bin/qemu-system-x86_64", Machine: "pc-q35-7.2",
			MachineProps: []string{"vmport", "hpet", "smm", "usb", "graphics", "sata", "smbus", "i8042"},
			Devices:      []string{"pcie-root-port", "vfio-pci", "vhost-user-fs-pci", "virtio-balloon-pci", "virtio-blk-pci", "virtserialport"},
			Objects:      []string{"memory-backend-file", "memory-backend-memfd", "rng-builtin"},
			Netdevs:      []string{"stream"},
			Accels:       []vm.Accel{vm.AccelTCG, vm.AccelKVM},
			Sandbox:      true,
			UEFI:         &qemu.UEFI{Code: "/usr/share/OVMF/OVMF_CODE_4M.fd", CodeFormat: "raw", Vars: "/v.fd", VarsFormat: "raw"},
		},
		Metadata: Metadata{ID: testMachine().UUID, Name: "proj-a1", Workspace: "/home/ada/a <b> \"c\" & 'd'\nü", User: 1000, Config: strings.Repeat("0f", 32)},
		Console:  "/r/vm/console.sock",
		Owner:    &vm.Owner{UID: 1878982656, GID: 1878982656},
	}
}

func testMachine() vm.Machine {
	return vm.Machine{
		Name: "proj-a1", UUID: "6f0c2e8e-4f7f-4c36-9f2a-1d1b8f0c7f11", CPUs: 2, Memory: 4 << 30, Accel: vm.AccelTCG,
		Boot: vm.Boot{Kernel: "/i/vmlinuz", Initrd: "/i/initrd.img", Cmdline: `root=/dev/vda console=ttyS0 a="b, c"`},
		Disks: []vm.Disk{
			{ID: "root", Path: "/s/root.qcow2", Format: "qcow2", Serial: "root"},
			{ID: "seed", Path: "/s/seed.iso", Format: "raw", Serial: "seed", ReadOnly: true},
		},
		Shares:  []vm.Share{{Tag: "workspace", Socket: "/r/fs0.sock"}, {Tag: "mount0", Socket: "/r/fs1.sock"}},
		NICs:    []vm.NIC{{MAC: "5a:94:ef:e4:0c:ee", Socket: "/r/net.sock", MTU: 65520}},
		Console: "/s/console.log", QMP: "/r/vm/qmp.sock", Line: "/r/vm/line.sock", Ports: 4,
	}
}

// TestXMLGolden also asks libvirt's own schema.
func TestXMLGolden(t *testing.T) {
	for name, change := range map[string]func(*vm.Machine, *Config){
		"direct-kernel": func(*vm.Machine, *Config) {},
		"kvm-uefi": func(m *vm.Machine, _ *Config) {
			m.Accel = vm.AccelKVM
			m.Boot = vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: "/s/vars.fd"}
		},
		"session-bios-odd-paths": func(m *vm.Machine, c *Config) {
			c.Owner = nil
			m.Boot = vm.Boot{Firmware: vm.FirmwareBIOS}
			m.CPUModel = "Haswell-noTSX"
			m.Disks[0].Path = `/home/ada/my project, "v2",readonly=on/<größe> & 'x'/root.qcow2`
			m.NICs[0].Socket = "/r/a,b<c>/net.sock"
		},
		"few-caps": func(_ *vm.Machine, c *Config) { c.Caps.MachineProps = nil },
	} {
		t.Run(name, func(t *testing.T) {
			m, c := testMachine(), testConfig()
			change(&m, &c)
			golden(t, name, m, c)
		})
	}
}

// golden compares the domain with a file, and asks libvirt's schema of it.
func golden(t *testing.T, name string, m vm.Machine, c Config) (text string) {
	t.Helper()
	got, err := XML(m, c)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", name+".xml")
	if *update {
		if err := os.WriteFile(file, []byte(got+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got+"\n"); diff != "" {
		t.Error(diff)
	}
	validate(t, file)
	return got
}

// validate asks libvirt's schema (virt-xml-validate(1)).
func validate(t *testing.T, file string) {
	testenv.Require(t, "virt-xml-validate", "xmllint")
	if out, err := exec.Command("virt-xml-validate", file, "domain").CombinedOutput(); err != nil {
		t.Errorf("libvirt's schema: %v\n%s", err, out)
	}
}

func TestXMLRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*vm.Machine, *Config)
		says   string
	}{
		"ROM": {func(m *vm.Machine, _ *Config) {
			m.Slots = []vm.Slot{{Functions: []vm.Function{{Address: "0000:01:00.0", ROM: "/rom\xff"}}}}
		}, "cannot carry"},
		"address": {func(m *vm.Machine, _ *Config) { m.Slots = []vm.Slot{testenv.Card("01:00.0")} }, "is not a PCI address"},
		"no VFIO": {func(m *vm.Machine, c *Config) {
			m.Slots, c.Caps.Devices = []vm.Slot{testenv.A100}, nil
		}, "vfio-pci"},
		"memory":         {func(m *vm.Machine, _ *Config) { m.MemoryFile, m.PIDFile = "/m", "/p" }, "cannot ask libvirt for: PIDFile, MemoryFile"},
		"line":           {func(m *vm.Machine, _ *Config) { m.Line = "/a\xff" }, "cannot carry"},
		"no UUID":        {func(m *vm.Machine, _ *Config) { m.UUID = "" }, "no UUID"},
		"not UTF-8":      {func(m *vm.Machine, _ *Config) { m.Disks[0].Path = "/a\xff" }, "cannot carry"},
		"control":        {func(m *vm.Machine, _ *Config) { m.Shares[0].Socket = "/a\x01" }, "cannot carry"},
		"workspace":      {func(_ *vm.Machine, c *Config) { c.Metadata.Workspace = "/a\x1b" }, "cannot carry"},
		"network":        {func(m *vm.Machine, _ *Config) { m.NICs[0].Socket = "/\xc3" }, "cannot carry"},
		"no stream":      {func(_ *vm.Machine, c *Config) { c.Caps.Netdevs = nil }, "netdev stream"},
		"no accelerator": {func(_ *vm.Machine, c *Config) { c.Caps.Accels = nil }, "accelerator tcg"},
		"no UEFI": {func(m *vm.Machine, c *Config) {
			m.Boot, c.Caps.UEFI = vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: "/v"}, nil
		}, "no UEFI firmware"},
	} {
		t.Run(name, func(t *testing.T) {
			m, c := testMachine(), testConfig()
			tt.change(&m, &c)
			if text, err := XML(m, c); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want one with %q\n%s", err, tt.says, text)
			}
		})
	}
}

func TestMetadataComesBack(t *testing.T) {
	want := testConfig().Metadata
	text, err := want.element()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseMetadata(text)
	got.XMLName = want.XMLName
	if err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}
