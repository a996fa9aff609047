package qemu

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Fingerprint names everything of m that its guest can observe, and the QEMU
// that runs it: two machines with one fingerprint can go on from each other's
// state. Where things lie on the host, and what is in the kernel's files and the
// disks, is not part of it; nor are the name, the UUID and the shares, which a restored machine gets
// anew, and what is in its slots, which is plugged in later. It fails with
// vm.ErrHost where there is no room for that.
func Fingerprint(m vm.Machine, caps Caps) (string, error) {
	m.Name, m.UUID, m.Shares, m.RunAs, m.Saved, m.PIDFile = "machine", "", nil, nil, "", ""
	m.MemoryFile, m.QMP, m.Line, m.Console = "/memory", "/qmp", "/line", "/console"
	_, m.Slots = m.SlotsForLater()
	if m.Boot.Kernel != "" {
		m.Boot.Kernel = "/kernel"
	}
	if m.Boot.Initrd != "" {
		m.Boot.Initrd = "/initrd"
	}
	disks, nics := m.Disks, m.NICs
	m.Disks, m.NICs = nil, nil
	for _, d := range disks {
		d.Path = "/" + d.ID
		m.Disks = append(m.Disks, d)
	}
	for i, n := range nics {
		n.Socket = fmt.Sprintf("/net%d", i)
		m.NICs = append(m.NICs, n)
	}
	argv, err := Argv(m, caps)
	if err != nil {
		return "", err
	}
	if err := checkRoom(m, cpuInfo); err != nil {
		return "", err
	}
	cpu := ""
	if m.Accel == vm.AccelKVM {
		if cpu, err = hostCPU(cpuInfo); err != nil {
			return "", err
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(append(argv, caps.Build, cpu), "\x00")))
	return hex.EncodeToString(sum[:]), nil
}

const cpuInfo = "/proc/cpuinfo"

// emulatedBits is the width of physical addresses of QEMU's own processors
// (target/i386/cpu.h: TCG_PHYS_ADDR_BITS).
const emulatedBits = 40

var addressSizes = vm.Pattern(`(?m)^address sizes\s*:\s*([0-9]+) bits physical`)

// checkRoom sees that the processor can address what is plugged in later, with
// the room that it needs because firmware has not met it. file is proc_cpuinfo(5).
func checkRoom(m vm.Machine, file string) error {
	if len(m.Slots) == 0 {
		return nil
	}
	bits := emulatedBits
	if m.Accel == vm.AccelKVM {
		data, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("look at the host's processor: %w", err)
		}
		found := addressSizes().FindSubmatch(data)
		if found == nil {
			return vm.Classify(vm.ErrHost, errors.New("the kernel does not say how far the processor can address"))
		}
		if bits, err = strconv.Atoi(string(found[1])); err != nil || bits > 62 {
			return vm.Classify(vm.ErrHost, fmt.Errorf("the processor addresses %s bits", found[1]))
		}
	}
	const low = 4 << 30 // memory and devices below that are below it whatever their size
	if top := low + m.Memory + hole64(m); top > 1<<bits {
		return vm.Classify(vm.ErrHost, fmt.Errorf("devices that are plugged in later need addresses up to %d GiB, and the processor has %d bits", (top+1<<30-1)>>30, bits))
	}
	return nil
}

var cpuLine = vm.Pattern(`(?m)^(vendor_id|cpu family|model|model name|stepping|microcode|flags)\s*:.*$`)

// hostCPU is what a guest sees of the first processor (proc_cpuinfo(5)).
func hostCPU(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("look at the host's processor: %w", err)
	}
	first, _, _ := strings.Cut(string(data), "\n\n")
	return strings.Join(cpuLine().FindAllString(first, -1), "\n"), nil
}
