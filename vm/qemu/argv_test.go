package qemu

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/agentvm/agentvm/vm"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// testCaps are those of QEMU 7.2, as far as they matter here.
func testCaps() Caps {
	return Caps{
		Binary:       "/usr/bin/qemu-system-x86_64",
		Machine:      "pc-q35-7.2",
		MachineProps: []string{"vmport", "hpet", "smm", "usb", "graphics", "sata", "smbus", "i8042"},
		Devices:      []string{"pcie-root-port", "pvpanic-pci", "vhost-user-fs-pci", "virtio-balloon-pci", "virtio-blk-pci", "virtserialport", "vmgenid"},
		Objects:      []string{"memory-backend-file", "memory-backend-memfd", "rng-builtin"},
		Netdevs:      []string{"stream"},
		Accels:       []Accel{vm.AccelTCG, vm.AccelKVM},
		TCGProps:     []string{"tb-size", "thread"},
		Sandbox:      true,
		UEFI:         &UEFI{Code: "/usr/share/OVMF/OVMF_CODE_4M.fd", CodeFormat: "raw", Vars: "/v.fd", VarsFormat: "raw"},
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
		Shares:  []vm.Share{{Tag: "workspace", Socket: "/r/fs0.sock"}, {Tag: "pi", Socket: "/r/fs1.sock", Queues: 2}},
		NICs:    []vm.NIC{{MAC: "5a:94:ef:e4:0c:ee", Socket: "/r/net.sock"}},
		Console: "/s/console.log", QMP: "/r/qmp.sock", PIDFile: "/r/qemu.pid", Line: "/r/line.sock", Ports: 4,
	}
}

func TestArgvGolden(t *testing.T) {
	for name, change := range map[string]func(*vm.Machine, *Caps){
		"direct-kernel": func(*vm.Machine, *Caps) {},
		"kvm-uefi": func(m *vm.Machine, _ *Caps) {
			m.Accel = vm.AccelKVM
			m.Boot = vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: "/s/vars.fd"}
		},
		"bios-odd-paths": func(m *vm.Machine, _ *Caps) {
			m.Boot = vm.Boot{Firmware: vm.FirmwareBIOS}
			m.CPUModel = "Haswell-noTSX,hle=off"
			m.MemoryFile = "/s/a,b/ram"
			m.Disks[0].Path = `/home/ada/my project, "v2",readonly=on/größe/root.qcow2`
			m.Console = "/s/=,,=/console"
		},
		"restored": func(m *vm.Machine, _ *Caps) { m.Saved, m.MemoryFile = "/t/saved", "/proc/self/fd/3" },
		"few-caps": func(_ *vm.Machine, c *Caps) {
			c.MachineProps = nil
			c.TCGProps = nil
			c.Devices = []string{"pcie-root-port", "vhost-user-fs-pci", "virtserialport"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, caps := testMachine(), testCaps()
			change(&m, &caps)
			argv, err := Argv(m, caps)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, argv)
		})
	}
}

// golden compares a command line with a file that has one option a line.
func golden(t *testing.T, name string, argv []string) {
	t.Helper()
	var b strings.Builder
	for i, w := range argv {
		if i > 0 {
			b.WriteString(map[bool]string{true: "\n", false: " "}[strings.HasPrefix(w, "-")])
		}
		b.WriteString(strings.TrimPrefix(vm.ShellCommand("", w), "'' "))
	}
	b.WriteByte('\n')
	file := filepath.Join("testdata", name+".args")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("-want +got, or run with -update:\n%s", diff)
	}
}

func TestArgvRefuses(t *testing.T) {
	for name, change := range map[string]func(*vm.Machine){
		"name":     func(m *vm.Machine) { m.Name = "" },
		"UUID":     func(m *vm.Machine) { m.UUID = "x,y" },
		"CPUs":     func(m *vm.Machine) { m.CPUs = 0 },
		"memory":   func(m *vm.Machine) { m.Memory = 1<<20 + 1 },
		"accel":    func(m *vm.Machine) { m.Accel = "tcg,one-insn-per-tb=on" },
		"relative": func(m *vm.Machine) { m.Console = "console.log" },
		"NUL":      func(m *vm.Machine) { m.Disks[0].Path = "/a\x00b" },
		"cmdline":  func(m *vm.Machine) { m.Boot.Cmdline = "a\nb" },
		"format":   func(m *vm.Machine) { m.Disks[0].Format = "" },
		"disk id":  func(m *vm.Machine) { m.Disks[0].ID = "a,b" },
		"two ids":  func(m *vm.Machine) { m.Disks[1].ID = m.Disks[0].ID },
		"serial":   func(m *vm.Machine) { m.Disks[0].Serial = strings.Repeat("x", 21) },
		"tag":      func(m *vm.Machine) { m.Shares[0].Tag = strings.Repeat("x", 37) },
		"socket":   func(m *vm.Machine) { m.Shares[0].Socket = "/" + strings.Repeat("x", 107) },
		"no QMP":   func(m *vm.Machine) { m.QMP = "" },
		"MAC":      func(m *vm.Machine) { m.NICs[0].MAC = "5A:94" },
		"vars":     func(m *vm.Machine) { m.Boot = vm.Boot{Firmware: vm.FirmwareUEFI} },
		"ports":    func(m *vm.Machine) { m.Ports = 1 },
		"line":     func(m *vm.Machine) { m.Line = "relative" },
		"firmware": func(m *vm.Machine) { m.Boot = vm.Boot{Firmware: "coreboot"} },
	} {
		m := testMachine()
		change(&m)
		if argv, err := Argv(m, testCaps()); err == nil {
			t.Errorf("%s: made %v", name, argv)
		}
	}
}

func TestArgvNeedsCaps(t *testing.T) {
	for name, change := range map[string]func(*Caps, *vm.Machine){
		"netdev stream":             func(c *Caps, _ *vm.Machine) { c.Netdevs = nil },
		"device vhost-user-fs-pci":  func(c *Caps, _ *vm.Machine) { c.Devices = []string{"pcie-root-port"} },
		"object memory-backend-mem": func(c *Caps, _ *vm.Machine) { c.Objects = nil },
		"accelerator kvm":           func(c *Caps, m *vm.Machine) { c.Accels, m.Accel = nil, vm.AccelKVM },
		"seccomp sandbox":           func(c *Caps, _ *vm.Machine) { c.Sandbox = false },
		"UEFI firmware": func(c *Caps, m *vm.Machine) {
			c.UEFI, m.Boot = nil, vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: "/v"}
		},
	} {
		m, caps := testMachine(), testCaps()
		change(&caps, &m)
		_, err := Argv(m, caps)
		if !errors.Is(err, vm.ErrHost) || !strings.Contains(err.Error(), name) || vm.Hint(err) == "" {
			t.Errorf("%s: %v, hint %q", name, err, vm.Hint(err))
		}
	}
}

func TestFindUEFI(t *testing.T) {
	descriptor := func(code, features string) *fstest.MapFile {
		return &fstest.MapFile{Data: []byte(`{"interface-types": ["uefi"], "mapping": {"device": "flash",
			"executable": {"filename": "/fw/` + code + `", "format": "raw"},
			"nvram-template": {"filename": "/fw/vars", "format": "raw"}},
			"targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}], "features": [` + features + `]}`)}
	}
	root := fstest.MapFS{
		"fw/smm": {}, "fw/plain": {}, "fw/vars": {}, "fw/mine": {},
		"usr/share/qemu/firmware/10-broken.json":  {Data: []byte("{")},
		"usr/share/qemu/firmware/20-missing.json": descriptor("missing", ""),
		"usr/share/qemu/firmware/50-secure.json":  descriptor("smm", `"requires-smm"`),
		"usr/share/qemu/firmware/60-plain.json":   descriptor("plain", `"acpi-s3"`),
	}
	if u := FindUEFI(root, "pc-q35-7.2"); u == nil || u.Code != "/fw/plain" || u.Vars != "/fw/vars" {
		t.Errorf("found %+v", u)
	}
	if u := FindUEFI(root, "microvm"); u != nil {
		t.Errorf("for microvm: found %+v", u)
	}
	root["etc/qemu/firmware/60-plain.json"] = descriptor("mine", "")
	if u := FindUEFI(root, "pc-q35-7.2"); u == nil || u.Code != "/fw/mine" {
		t.Errorf("the administrator's choice is ignored: %+v", u)
	}
}

func TestNewVarsKeepsBootEntries(t *testing.T) {
	dir := t.TempDir()
	u := UEFI{Vars: filepath.Join(dir, "template")}
	file := filepath.Join(dir, "vars")
	if err := u.NewVars(file); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("without a template: %v", err)
	}
	os.WriteFile(u.Vars, []byte("empty"), 0o600)
	for _, want := range []string{"empty", "used"} {
		if err := u.NewVars(file); err != nil {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile(file); string(b) != want {
			t.Errorf("got %q, want %q", b, want)
		}
		os.WriteFile(file, []byte("used"), 0o600)
	}
}

func TestStderrIsBounded(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	l, err := openLog(file)
	if err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		l.Write([]byte(strings.Repeat("x", 1000) + "\n"))
	}
	l.Write([]byte("the end\n"))
	l.close()
	if s := l.String(); len(s) > stderrTail || !strings.HasSuffix(s, "the end\n") {
		t.Errorf("kept %d bytes ending in %q", len(s), s[len(s)-10:])
	}
	if info, err := os.Stat(file); err != nil || info.Size() != stderrInFile {
		t.Errorf("the file: %v, %v", info.Size(), err)
	}
}

func TestExitErrorIsReadable(t *testing.T) {
	err := &ExitError{Stderr: "2026-11-23T12:13:28.142158Z qemu-system-x86_64: -m: bad\nqemu-system-x86_64: more\n"}
	if want := "QEMU ended with exit status 0: -m: bad; more"; err.Error() != want {
		t.Errorf("got %q", err)
	}
}
