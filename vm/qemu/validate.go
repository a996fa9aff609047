package qemu

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// maxSocketPath is what sun_path holds besides its NUL (unix(7)).
const maxSocketPath = 107

var (
	diskID   = vm.Pattern(`^[a-z][a-z0-9-]*$`)
	macText  = vm.Pattern(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)
	uuidText = vm.Pattern(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)
)

// check refuses a machine that QEMU would misread or cannot run. It sees all
// faults at once.
func check(m vm.Machine, caps Caps) error {
	return errors.Join(checkMachine(m), checkDevices(m), checkSlots(m), checkCaps(m, caps))
}

func checkMachine(m vm.Machine) error {
	var errs []error
	fault := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	fault(m.Name == "" || strings.ContainsFunc(m.Name, isControl), "name %q is empty or holds control characters", m.Name)
	fault(m.UUID != "" && !uuidText().MatchString(m.UUID), "%q is not a UUID", m.UUID)
	fault(m.CPUs < 1, "%d CPUs", m.CPUs)
	fault(m.Memory <= 0 || m.Memory%(1<<20) != 0, "%d bytes of memory is not a multiple of 1 MiB", m.Memory)
	fault(m.Accel != vm.AccelKVM && m.Accel != vm.AccelTCG, "unknown accelerator %q", m.Accel)
	fault(strings.ContainsFunc(m.CPUModel, isControl), "CPU model %q holds control characters", m.CPUModel)
	fault(strings.ContainsAny(m.Boot.Cmdline, "\x00\n"), "kernel command line %q holds a newline or NUL", m.Boot.Cmdline)
	switch m.Boot.Firmware {
	case "", vm.FirmwareBIOS, vm.FirmwareUEFI:
	default:
		fault(true, "unknown firmware %q", m.Boot.Firmware)
	}
	errs = append(errs,
		checkPath("console", m.Console, true),
		checkPath("monitor socket", m.QMP, true), checkSocket("monitor", m.QMP),
		checkPath("line", m.Line, false), checkSocket("line", m.Line),
		checkPath("pid file", m.PIDFile, false),
		checkPath("memory file", m.MemoryFile, false),
		checkPath("kernel", m.Boot.Kernel, false),
		checkPath("initrd", m.Boot.Initrd, false),
		checkPath("UEFI variables", m.Boot.VarsFile, needsUEFI(m)),
	)
	return errors.Join(errs...)
}

func checkDevices(m vm.Machine) error {
	var errs []error
	fault := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	seen := make(map[string]bool)
	for _, d := range m.Disks {
		fault(!diskID().MatchString(d.ID), "disk id %q is not a name", d.ID)
		fault(seen[d.ID], "two disks are called %q", d.ID)
		seen[d.ID] = true
		fault(d.Format != "raw" && d.Format != "qcow2", "disk %s has format %q, not raw or qcow2", d.ID, d.Format)
		fault(len(d.Serial) > 20 || strings.ContainsFunc(d.Serial, isControl), "serial %q of disk %s is too long or holds control characters", d.Serial, d.ID)
		errs = append(errs, checkPath("disk "+d.ID, d.Path, true))
	}
	fault(m.Ports < len(m.Shares) || m.Ports > 32, "%d ports for %d shares", m.Ports, len(m.Shares))
	for _, s := range m.Shares {
		fault(s.Tag == "" || len(s.Tag) > 36 || strings.ContainsFunc(s.Tag, isControl), "share tag %q does not have 1 to 36 bytes", s.Tag)
		fault(s.Queues < 0 || s.Queues > 64, "%d request queues for share %s", s.Queues, s.Tag)
		errs = append(errs, checkPath("socket of share "+s.Tag, s.Socket, true), checkSocket("share "+s.Tag, s.Socket))
	}
	for _, n := range m.NICs {
		fault(!macText().MatchString(n.MAC), "%q is not a MAC address in lower case", n.MAC)
		errs = append(errs, checkPath("network socket", n.Socket, true), checkSocket("network", n.Socket))
	}
	return errors.Join(errs...)
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// checkPath wants an absolute path. NUL is the one byte that an argument
// cannot carry.
func checkPath(what, path string, needed bool) error {
	switch {
	case path == "" && !needed:
		return nil
	case path == "":
		return fmt.Errorf("no %s given", what)
	case strings.ContainsRune(path, 0):
		return fmt.Errorf("%s %q holds a NUL byte", what, path)
	case !filepath.IsAbs(path):
		return fmt.Errorf("%s %q is not an absolute path", what, path)
	}
	return nil
}

func checkSocket(what, path string) error {
	if len(path) > maxSocketPath {
		return fmt.Errorf("%s socket %q has %d bytes, more than the %d that a unix socket may have", what, path, len(path), maxSocketPath)
	}
	return nil
}

func needsUEFI(m vm.Machine) bool {
	return m.Boot.Kernel == "" && m.Boot.Firmware == vm.FirmwareUEFI
}

const newerQEMU = "install QEMU 7.2 or newer (Debian 12 and later have it): " + installQEMU

// checkCaps compares what the machine needs with what QEMU has.
func checkCaps(m vm.Machine, caps Caps) error {
	var missing []string
	need := func(wanted, have bool, what string) {
		if wanted && !have {
			missing = append(missing, what)
		}
	}
	need(true, caps.Machine != "", "machine type q35")
	need(true, caps.Sandbox, "seccomp sandbox")
	need(true, caps.HasDevice("pcie-root-port"), "device pcie-root-port")
	need(m.Line != "", caps.HasDevice("virtserialport"), "device virtserialport")
	need(m.MemoryFile == "", caps.HasObject("memory-backend-memfd"), "object memory-backend-memfd")
	need(m.MemoryFile != "", caps.HasObject("memory-backend-file"), "object memory-backend-file")
	need(m.HasDevices(), caps.HasDevice("vfio-pci"), "device vfio-pci")
	need(len(m.NICs) > 0, caps.HasNetdev("stream"), "netdev stream")
	need(len(m.Shares) > 0, caps.HasDevice("vhost-user-fs-pci"), "device vhost-user-fs-pci")
	need(m.Accel != "", caps.hasAccel(m.Accel), "accelerator "+string(m.Accel))
	var err error
	if len(missing) > 0 {
		err = vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("QEMU %v (%s) lacks %s", caps.Version, caps.Binary, strings.Join(missing, ", "))), newerQEMU)
	}
	if needsUEFI(m) && caps.UEFI == nil {
		err = errors.Join(err, vm.WithHint(vm.Classify(vm.ErrHost, errors.New("no UEFI firmware for virtual machines is installed")), installOVMF))
	}
	return err
}

const installOVMF = "sudo apt-get install ovmf"
