package qemu

import (
	"fmt"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/line"
)

// Argv renders m as the command line of the QEMU that caps describe. It is a
// pure function; it refuses what QEMU would misread, and fails with
// vm.ErrHost where QEMU lacks a part that m needs.
func Argv(m vm.Machine, caps Caps) ([]string, error) {
	if err := check(m, caps); err != nil {
		return nil, fmt.Errorf("command line of %s: %w", m.Name, err)
	}
	a := &args{argv: []string{caps.Binary}}
	a.identity(m)
	a.platform(m, caps)
	a.boot(m, caps)
	a.control(m)
	a.basics(m, caps)
	a.panics(m, caps)
	for i, n := range m.NICs {
		a.nic(i, n)
	}
	for i, d := range m.Disks {
		a.disk(i, d)
	}
	for i := range m.Ports {
		a.option("-device", "pcie-root-port", "id", port(i), "chassis", i+1, "slot", i+1)
	}
	a.devices(m)
	if m.Saved != "" {
		a.add("-incoming", "defer") // Restore says from where
		return a.argv, nil
	}
	for i, s := range m.Shares {
		a.share(i, s)
	}
	return a.argv, nil
}

func (a *args) identity(m vm.Machine) {
	// The process name is what ps -o comm and top show, cut at 15 bytes.
	a.option("-name", "", "guest", m.Name, "process", "qemu:"+m.Name, "debug-threads", true)
	if m.UUID != "" {
		a.add("-uuid", m.UUID)
	}
	a.add("-no-user-config", "-nodefaults", "-display", "none", "-vga", "none")
	a.option("-msg", "", "timestamp", true, "guest-name", false)
	a.option("-sandbox", "on", "obsolete", "deny", "elevateprivileges", "deny", "spawn", "deny", "resourcecontrol", "deny")
	if m.PIDFile != "" {
		a.add("-pidfile", m.PIDFile)
	}
}

func (a *args) platform(m vm.Machine, caps Caps) {
	pairs := []any{
		"memory-backend", "mem",
		"dump-guest-core", false, // guest memory holds secrets
		// Parts of a PC that no guest of ours uses are parts that it
		// cannot attack or spend boot time on.
		"vmport", caps.ifMachine("vmport", false),
		"hpet", caps.ifMachine("hpet", false),
		"smm", caps.ifMachine("smm", false),
		"usb", caps.ifMachine("usb", false),
		"graphics", caps.ifMachine("graphics", false),
		"sata", caps.ifMachine("sata", false),
		"smbus", caps.ifMachine("smbus", false),
		"i8042", caps.ifMachine("i8042", false),
	}
	if needsUEFI(m) {
		pairs = append(pairs, "pflash0", "code", "pflash1", "vars")
	}
	a.option("-machine", caps.Machine, pairs...)
	a.accel(m, caps)
	a.option("-smp", "", "cpus", m.CPUs, "sockets", 1, "cores", m.CPUs, "threads", 1)
	a.option("-m", "", "size", fmt.Sprintf("%dM", m.Memory>>20))
	a.memory(m)
}

// translationMiB bounds the translated guest code that emulation keeps, which
// is otherwise up to 1 GiB beside the guest's own memory.
const translationMiB = 512

// accel sets how guest code runs, and the best CPU model for it.
func (a *args) accel(m vm.Machine, caps Caps) {
	model := m.CPUModel
	if m.Accel == vm.AccelKVM {
		a.add("-accel", "kvm")
		if model == "" {
			model = "host"
		}
		if len(m.Slots) > 0 {
			// Large cards lie beyond the terabyte that guests have by default.
			model += ",host-phys-bits=on"
		}
		// A guest that lost timer ticks while it did not run gets no storm of them.
		a.option("-global", "", "kvm-pit.lost_tick_policy", "delay")
	} else {
		a.option("-accel", "tcg", "thread", "multi", "tb-size", caps.ifTCG("tb-size", translationMiB))
		if model == "" {
			model = "max"
		}
	}
	a.add("-cpu", model)
	a.option("-rtc", "", "base", "utc")
}

func (a *args) boot(m vm.Machine, caps Caps) {
	a.option("-boot", "", "menu", false, "strict", true)
	switch {
	case m.Boot.Kernel != "":
		a.add("-kernel", m.Boot.Kernel)
		if m.Boot.Initrd != "" {
			a.add("-initrd", m.Boot.Initrd)
		}
		if m.Boot.Cmdline != "" {
			a.add("-append", m.Boot.Cmdline)
		}
	case m.Boot.Firmware == vm.FirmwareUEFI:
		a.option("-blockdev", "", "driver", caps.UEFI.CodeFormat, "node-name", "code", "read-only", true,
			"file.driver", "file", "file.filename", caps.UEFI.Code)
		a.option("-blockdev", "", "driver", caps.UEFI.VarsFormat, "node-name", "vars",
			"file.driver", "file", "file.filename", m.Boot.VarsFile)
	}
}

// control opens the two ways to watch the machine: its console and QMP.
func (a *args) control(m vm.Machine) {
	a.option("-chardev", "socket", "id", "qmp", "path", m.QMP, "server", true, "wait", false)
	a.option("-mon", "", "chardev", "qmp", "mode", "control")
	// Appending lets the log be cut short while QEMU writes to it.
	a.option("-chardev", "file", "id", "console", "path", m.Console, "append", true)
	a.option("-serial", "chardev:console")
	if m.Line != "" {
		a.line(m.Line)
	}
}

func (a *args) line(socket string) {
	a.option("-chardev", "socket", "id", "line", "path", socket, "server", true, "wait", false)
	a.option("-device", "virtio-serial-pci", "max_ports", 2, "disable-legacy", true)
	a.option("-device", "virtserialport", "chardev", "line", "name", line.Port)
}

// LineArgs are the arguments of the serial line with a socket, for who starts
// QEMU otherwise than by Argv. The fourth is that of the line's PCI device.
func LineArgs(socket string) []string {
	var a args
	a.line(socket)
	return a.argv
}

// basics are the small devices that every machine has.
func (a *args) basics(m vm.Machine, caps Caps) {
	a.option("-object", "rng-builtin", "id", "rng")
	a.option("-device", "virtio-rng-pci", "rng", "rng", "disable-legacy", true)
	// What a device of the host may reach cannot be given back.
	if caps.HasDevice("virtio-balloon-pci") && len(m.Slots) == 0 {
		// Never inflated; it tells the host which memory the guest has
		// freed. After a short busy spell that is a fifth of QEMU's RSS.
		a.option("-device", "virtio-balloon-pci", "free-page-reporting", true, "disable-legacy", true)
	}
	if caps.HasDevice("vmgenid") {
		a.option("-device", "vmgenid", "guid", "auto")
	}
}

// panics is what is told of a guest's kernel that fails.
func (a *args) panics(m vm.Machine, caps Caps) {
	if !caps.HasDevice("pvpanic-pci") {
		return
	}
	a.add("-device", "pvpanic-pci")
	if m.Boot.Kernel != "" {
		// Its command line has it start over. A disk's own kernel may just
		// stop, and its machine ends then.
		a.option("-action", "", "panic", "none")
	}
}

func (a *args) nic(i int, n vm.NIC) {
	id := fmt.Sprintf("net%d", i)
	a.option("-netdev", "stream", "id", id, "server", false, "addr.type", "unix", "addr.path", n.Socket)
	// No option ROM: nothing boots from the network.
	a.option("-device", "virtio-net-pci", "netdev", id, "mac", n.MAC,
		"host_mtu", unless(n.MTU == 0, n.MTU), "romfile", "", "disable-legacy", true)
}

// NICArgs are the arguments of network card i, for who starts QEMU otherwise
// than by Argv. The last is the device's.
func NICArgs(i int, n vm.NIC) []string {
	var a args
	a.nic(i, n)
	return a.argv
}

func (a *args) disk(i int, d vm.Disk) {
	node := "disk-" + d.ID
	a.option("-blockdev", "", "driver", d.Format, "node-name", node, "read-only", d.ReadOnly,
		"discard", "unmap", "detect-zeroes", unless(d.ReadOnly, "unmap"),
		"file.driver", "file", "file.filename", d.Path, "file.aio", "threads",
		"file.discard", "unmap")
	a.option("-device", "virtio-blk-pci", "drive", node, "id", node, "serial", unless(d.Serial == "", d.Serial),
		"bootindex", unless(i > 0, 1), "disable-legacy", true)
}

func (a *args) share(i int, s vm.Share) {
	chardev, device := shareIDs(i)
	a.option("-chardev", "socket", "id", chardev, "path", s.Socket)
	a.option("-device", shareDriver, "chardev", chardev, "id", device, "bus", port(i), "tag", s.Tag,
		"queue-size", shareQueueSize, "num-request-queues", unless(s.Queues == 0, s.Queues))
}

// unless leaves an option out on a condition.
func unless(cond bool, value any) any {
	if cond {
		return nil
	}
	return value
}
