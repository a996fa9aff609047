package libvirt

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"libvirt.org/go/libvirtxml"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qemu"
)

// Config is what a domain needs beside its machine.
type Config struct {
	Caps     qemu.Caps // of the QEMU that libvirt is to start
	Metadata Metadata
	Console  string    // unix socket at which somebody waits for the serial console
	Owner    *vm.Owner // whom QEMU runs as; nil: whom libvirt itself runs as, in a user's own
}

// translationMiB bounds the translated guest code that emulation keeps, as the
// direct backend does.
const translationMiB = 512

// XML renders m as a domain. It is a pure function, and refuses what libvirt or
// the QEMU behind it would misread or lacks.
func XML(m vm.Machine, c Config) (string, error) {
	if err := check(m, c); err != nil {
		return "", fmt.Errorf("domain of %s: %w", m.Name, err)
	}
	meta, err := c.Metadata.element()
	if err != nil {
		return "", fmt.Errorf("domain of %s: %w", m.Name, err)
	}
	d := libvirtxml.Domain{
		Type: "qemu", Name: DomainName(m), UUID: m.UUID,
		GenID:         &libvirtxml.DomainGenID{}, // libvirt makes one up at each start
		Title:         "agentvm " + m.Name,
		Metadata:      &libvirtxml.DomainMetadata{XML: meta},
		Memory:        &libvirtxml.DomainMemory{Value: uint(m.Memory >> 10), Unit: "KiB", DumpCore: "off"}, // it holds secrets
		CurrentMemory: &libvirtxml.DomainCurrentMemory{Value: uint(m.Memory >> 10), Unit: "KiB"},
		MemoryBacking: memoryBacking(m),
		VCPU:          &libvirtxml.DomainVCPU{Placement: "static", Value: uint(m.CPUs)},
		OS:            operatingSystem(m, c),
		Features:      features(m),
		CPU:           processor(m),
		Clock:         clock(m),
		OnPoweroff:    "destroy", OnReboot: "restart", OnCrash: "restart",
		Devices:         devices(m, c),
		QEMUCommandline: commandline(m, c),
	}
	if m.Accel == vm.AccelKVM {
		d.Type = "kvm"
	}
	passThrough(&d, m)
	near(&d, m.Near)
	if o := c.Owner; o != nil {
		// The files are that user's already: nothing is to be relabelled.
		d.SecLabel = []libvirtxml.DomainSecLabel{{Type: "static", Model: "dac", Relabel: "no", Label: fmt.Sprintf("+%d:+%d", o.UID, o.GID)}}
	}
	return d.Marshal()
}

// DomainName is what libvirt calls the machine: one host may have machines of
// several users with one name.
func DomainName(m vm.Machine) string {
	id, _, _ := strings.Cut(m.UUID, "-")
	return "agentvm-" + m.Name + "-" + id
}

// check refuses what cannot be rendered. What a machine may be at all, package
// qemu has checked: whoever renders it has rendered its arguments before.
func check(m vm.Machine, c Config) error {
	if m.UUID == "" {
		return errors.New("the machine has no UUID")
	}
	if more := unrendered(m); len(more) > 0 {
		return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("agentvm cannot ask libvirt for: %s", strings.Join(more, ", "))), "backend: qemu has it")
	}
	for what, path := range map[string]string{"console": c.Console, "serial line": m.Line, "kernel": m.Boot.Kernel, "initrd": m.Boot.Initrd, "UEFI variables": m.Boot.VarsFile, "workspace": c.Metadata.Workspace, "kernel command line": m.Boot.Cmdline} {
		if err := checkText(what, path); err != nil {
			return err
		}
	}
	for _, d := range m.Disks {
		if err := checkText("disk "+d.ID, d.Path); err != nil {
			return err
		}
	}
	for _, s := range m.Shares {
		if err := checkText("socket of share "+s.Tag, s.Socket); err != nil {
			return err
		}
	}
	for _, s := range m.Slots {
		for _, f := range s.Functions {
			if err := checkText("ROM of "+f.Title(), f.ROM); err != nil {
				return err
			}
		}
	}
	for _, n := range m.NICs {
		if err := checkText("network socket", n.Socket); err != nil {
			return err
		}
	}
	_, err := qemu.Argv(m, c.Caps)
	return err
}

// rendered are the parts of a machine that become parts of the domain, or that
// libvirt sees to by itself.
var rendered = []string{
	"Name", "UUID", "CPUs", "Memory", "Accel", "CPUModel", "Boot", "Disks", "Shares", "NICs",
	"Console", "QMP", "RunAs", "Ports", "Slots", "IOMMUFD", "HugePages", "Near",
	"Line", "Saved",
}

// unrendered names what the machine has beyond that: it is refused, never left out.
func unrendered(m vm.Machine) (names []string) {
	v := reflect.ValueOf(m)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; !v.Field(i).IsZero() && !slices.Contains(rendered, name) {
			names = append(names, name)
		}
	}
	return names
}

// checkText wants what XML can carry (https://www.w3.org/TR/xml/#charsets).
func checkText(what, text string) error {
	bad := func(r rune) bool {
		return r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == utf8.RuneError || r == 0xFFFE || r == 0xFFFF
	}
	if !utf8.ValidString(text) || strings.ContainsFunc(text, bad) {
		return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s %q: libvirt's XML cannot carry this name", what, text)), "backend: qemu takes every name")
	}
	return nil
}

func operatingSystem(m vm.Machine, c Config) *libvirtxml.DomainOS {
	os := &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: c.Caps.Machine, Type: "hvm"}}
	switch {
	case m.Boot.Kernel != "":
		os.Kernel, os.Initrd, os.Cmdline = m.Boot.Kernel, m.Boot.Initrd, m.Boot.Cmdline
	case m.Boot.Firmware == vm.FirmwareUEFI:
		u := c.Caps.UEFI
		os.Loader = &libvirtxml.DomainLoader{Path: u.Code, Readonly: "yes", Type: "pflash", Format: unlessRaw(u.CodeFormat)}
		os.NVRam = &libvirtxml.DomainNVRam{NVRam: m.Boot.VarsFile, Format: unlessRaw(u.VarsFormat)}
	}
	return os
}

// unlessRaw leaves out what older libvirts take for granted and do not know a word for.
func unlessRaw(format string) string {
	if format == "raw" {
		return ""
	}
	return format
}

func features(m vm.Machine) *libvirtxml.DomainFeatureList {
	f := &libvirtxml.DomainFeatureList{
		ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{},
		VMPort: &libvirtxml.DomainFeatureState{State: "off"},
		SMM:    &libvirtxml.DomainFeatureSMM{State: "off"},
	}
	if m.Accel == vm.AccelTCG {
		f.TCG = &libvirtxml.DomainFeatureTCG{TBCache: &libvirtxml.DomainFeatureTCGTBCache{Unit: "MiB", Size: translationMiB}}
	}
	return f
}

func processor(m vm.Machine) *libvirtxml.DomainCPU {
	cpu := &libvirtxml.DomainCPU{Check: "none", Topology: &libvirtxml.DomainCPUTopology{Sockets: 1, Cores: m.CPUs, Threads: 1}}
	switch {
	case m.CPUModel != "":
		cpu.Mode, cpu.Match, cpu.Model = "custom", "exact", &libvirtxml.DomainCPUModel{Fallback: "forbid", Value: m.CPUModel}
	case m.Accel == vm.AccelKVM:
		cpu.Mode = "host-passthrough"
	default:
		cpu.Mode = "maximum"
	}
	return cpu
}

func clock(m vm.Machine) *libvirtxml.DomainClock {
	c := &libvirtxml.DomainClock{Offset: "utc", Timer: []libvirtxml.DomainTimer{{Name: "hpet", Present: "no"}}}
	if m.Accel == vm.AccelKVM {
		// A guest that lost timer ticks while it did not run gets no storm of them.
		c.Timer = append(c.Timer, libvirtxml.DomainTimer{Name: "pit", TickPolicy: "delay"})
	}
	return c
}

func devices(m vm.Machine, c Config) *libvirtxml.DomainDeviceList {
	port := uint(0)
	list := &libvirtxml.DomainDeviceList{
		Emulator: c.Caps.Binary,
		Controllers: []libvirtxml.DomainController{
			{Type: "usb", Model: "none"},
		},
		Serials: []libvirtxml.DomainSerial{{
			Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "connect", Path: c.Console}},
			Target: &libvirtxml.DomainSerialTarget{Type: "isa-serial", Port: &port},
		}},
		// Never inflated; it tells the host which memory the guest has freed.
		MemBalloon: &libvirtxml.DomainMemBalloon{Model: "virtio-non-transitional", FreePageReporting: "on", Address: rootBus(balloonSlot)},
		RNGs:       []libvirtxml.DomainRNG{{Model: "virtio-non-transitional", Backend: &libvirtxml.DomainRNGBackend{BuiltIn: &libvirtxml.DomainRNGBackendBuiltIn{}}, Address: rootBus(rngSlot)}},
		Panics:     []libvirtxml.DomainPanic{{Model: "isa"}},
	}
	for i, d := range m.Disks {
		list.Disks = append(list.Disks, disk(i, d))
	}
	for i, s := range m.Shares {
		list.Filesystems = append(list.Filesystems, filesystem(i, s))
	}
	return list
}

// filesystem is share i, which may be plugged in and out.
func filesystem(i int, s vm.Share) libvirtxml.DomainFilesystem {
	return libvirtxml.DomainFilesystem{
		Driver: &libvirtxml.DomainFilesystemDriver{Type: "virtiofs", Queue: 1024},
		Source: &libvirtxml.DomainFilesystemSource{Mount: &libvirtxml.DomainFilesystemSourceMount{Socket: s.Socket}},
		Target: &libvirtxml.DomainFilesystemTarget{Dir: s.Tag},
		Alias:  &libvirtxml.DomainAlias{Name: shareAlias(i)},
	}
}

func disk(i int, d vm.Disk) libvirtxml.DomainDisk {
	x := libvirtxml.DomainDisk{
		Device: "disk", Model: "virtio-non-transitional",
		Driver: &libvirtxml.DomainDiskDriver{Name: "qemu", Type: d.Format, IO: "threads", Discard: "unmap"},
		Source: &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: d.Path}},
		Target: &libvirtxml.DomainDiskTarget{Dev: "vd" + string(rune('a'+i)), Bus: "virtio"},
		Serial: d.Serial,
	}
	if d.ReadOnly {
		x.ReadOnly = &libvirtxml.DomainDiskReadOnly{}
	} else {
		x.Driver.DetectZeros = "unmap"
	}
	if slot := uint(diskSlot + i); slot < lineSlot {
		x.Address = rootBus(slot)
	}
	if i == 0 {
		x.Boot = &libvirtxml.DomainDeviceBoot{Order: 1}
	}
	return x
}

// Slots of the root bus for what a machine keeps, as package qemu has it. libvirt
// would give each a port, which costs a guest's firmware and kernel time. Ports
// come from below, and libvirt does not know of the line and the network cards.
const (
	balloonSlot = 0x6
	rngSlot     = 0x7
	diskSlot    = 0x8  // the first disk's; one that finds no room gets a port
	lineSlot    = 0xf  // the serial line's
	nicSlot     = 0x10 // the first network card's
)

func rootBus(slot uint) *libvirtxml.DomainAddress {
	bus, function := uint(0), uint(0)
	return &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{Bus: &bus, Slot: &slot, Function: &function}}
}

// commandline is what libvirt has no element for: a network card whose frames
// go to a unix stream socket, a serial line whose socket is QEMU's own and not
// libvirt's, and the parts of a PC that are better left out.
func commandline(m vm.Machine, c Config) *libvirtxml.DomainQEMUCommandline {
	line := &libvirtxml.DomainQEMUCommandline{}
	add := func(words ...string) {
		for _, w := range words {
			line.Args = append(line.Args, libvirtxml.DomainQEMUCommandlineArg{Value: w})
		}
	}
	for i, n := range m.NICs {
		words := qemu.NICArgs(i, n)
		words[len(words)-1] += fmt.Sprintf(",bus=pcie.0,addr=%#x", nicSlot+i)
		add(words...)
	}
	if m.Line != "" {
		words := qemu.LineArgs(m.Line)
		words[3] += fmt.Sprintf(",bus=pcie.0,addr=%#x", lineSlot)
		add(words...)
	}
	var without []string
	for _, part := range []string{"graphics", "sata", "smbus", "i8042"} {
		if slices.Contains(c.Caps.MachineProps, part) {
			without = append(without, part+"=off")
		}
	}
	if len(without) > 0 {
		add("-machine", strings.Join(without, ","))
	}
	return line
}
