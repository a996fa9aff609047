package qemu

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Fingerprint names everything of m that its guest can observe, and the QEMU
// that runs it: two machines with one fingerprint can go on from each other's
// state. Where things lie on the host, and what is in the kernel's files and the
// disks, is not part of it; nor are the name, the UUID and the shares, which a restored machine gets
// anew.
func Fingerprint(m vm.Machine, caps Caps) (string, error) {
	m.Name, m.UUID, m.Shares, m.RunAs, m.Saved, m.PIDFile = "machine", "", nil, nil, "", ""
	m.MemoryFile, m.QMP, m.Line, m.Console = "/memory", "/qmp", "/line", "/console"
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
	cpu := ""
	if m.Accel == vm.AccelKVM {
		if cpu, err = hostCPU("/proc/cpuinfo"); err != nil {
			return "", err
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(append(argv, caps.Build, cpu), "\x00")))
	return hex.EncodeToString(sum[:]), nil
}

var cpuLine = regexp.MustCompile(`(?m)^(vendor_id|cpu family|model|model name|stepping|microcode|flags)\s*:.*$`)

// hostCPU is what a guest sees of the first processor (proc_cpuinfo(5)).
func hostCPU(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("look at the host's processor: %w", err)
	}
	first, _, _ := strings.Cut(string(data), "\n\n")
	return strings.Join(cpuLine.FindAllString(first, -1), "\n"), nil
}
