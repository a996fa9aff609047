package qemu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	goqemu "github.com/digitalocean/go-qemu/qmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/testenv"
)

// awaitRegions waits until there are three functions that are no known device.
const awaitRegions = `#!/bin/busybox sh
b=/bin/busybox
$b mount -t sysfs sys /sys
$b mount -t proc proc /proc
echo "waiting"
until [ "$($b grep -c "	1b360005	" /proc/bus/pci/devices)" = 3 ]; do $b sleep 0.1; done
for d in /sys/bus/pci/devices/*; do
	[ "$($b cat $d/class)" != 0x00ff00 ] || $b sed "s/^/region ${d##*.} /" $d/resource
done
$b poweroff -f
`

// standInMonitor makes cards of pci-testdev, as standIn does.
type standInMonitor struct {
	goqemu.Monitor
	size int64
	told *[]string
}

func (m standInMonitor) Run(command []byte) ([]byte, error) {
	for _, word := range []string{"host", "sysfsdev"} {
		if i := bytes.Index(command, []byte(`"`+word+`":"`)); i >= 0 {
			j := i + len(word) + 4
			j += bytes.IndexByte(command[j:], '"') + 1
			command = slices.Concat(command[:i], fmt.Appendf(nil, `"membar":%d`, m.size), command[j:])
		}
	}
	command = bytes.Replace(command, []byte(`"vfio-pci"`), []byte(`"pci-testdev"`), 1)
	*m.told = append(*m.told, string(command))
	return m.Monitor.Run(command)
}

// TestPlugDevice restores a guest that has booted with empty slots, and plugs in
// large cards: a real kernel has to find room for all of them, and all functions
// of one at once.
func TestPlugDevice(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	caps := realCaps(t)
	caps.Devices = append(caps.Devices, "vfio-pci")
	const size = 32 << 30
	debian := testenv.Debian13(t)
	dir := shortDir(t)
	m := emptyMachine(dir)
	m.Memory, m.Ports, m.MemoryFile = 512*mib, 2, filepath.Join(dir, "memory")
	m.Boot = vm.Boot{Kernel: filepath.Join(debian, "boot/vmlinuz"), Initrd: testenv.Initrd(t, debian, awaitRegions, ""), Cmdline: "console=ttyS0 loglevel=1 no_timer_check"}
	two := card("0000:01:00.0", pref(size))
	two.Functions = append(two.Functions, vm.Function{Address: "0000:01:00.1", Regions: []vm.Region{pref(size)}})
	m.Slots = []vm.Slot{two, card("0000:02:00.0", pref(size))}
	if err := os.WriteFile(m.MemoryFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(m.MemoryFile, m.Memory); err != nil {
		t.Fatal(err)
	}
	console := func() string {
		data, err := os.ReadFile(m.Console)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}

	template := m
	m.Slots, template.Slots = m.SlotsForLater()
	p := start(t, template, caps)
	mon := connect(t, p, template)
	for began := time.Now(); !strings.Contains(console(), "waiting"); time.Sleep(100 * time.Millisecond) {
		if time.Since(began) > 4*time.Minute {
			t.Fatalf("the guest does not boot:\n%s%s", console(), p.Stderr())
		}
	}
	state, err := Save(t.Context(), mon, filepath.Join(dir, "state.sock"), nil)
	if err != nil {
		t.Fatal(err)
	}
	p.Kill()

	m.Saved = dir
	p = start(t, m, caps)
	mon = connect(t, p, m)
	if err := Restore(t.Context(), mon, filepath.Join(dir, "state.sock"), state); err != nil {
		t.Fatal(err)
	}
	var told []string
	for i, s := range m.Slots {
		if err := PlugDevice(t.Context(), standInMonitor{mon, size, &told}, i, s, m.IOMMUFD); err != nil {
			t.Fatal(err)
		}
	}
	if err := qmp.Cont(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Errorf("%v; it was told:\n%s", err, strings.Join(told, "\n"))
	}
	found := map[uint64]string{}
	for line := range strings.Lines(console()) {
		var function string
		var first, last, flags uint64
		if n, _ := fmt.Sscanf(line, "region %s 0x%x 0x%x 0x%x", &function, &first, &last, &flags); n == 4 && last-first == size-1 && first > 0 {
			found[first] = function
		}
	}
	if len(found) != 3 {
		t.Errorf("the guest has %v of 3 large regions; its console:\n%s%s", found, console(), p.Stderr())
	}
}
