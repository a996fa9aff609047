package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/testenv"
)

const listRegions = `#!/bin/busybox sh
/bin/busybox mount -t sysfs sys /sys
for d in /sys/bus/pci/devices/*; do
	[ "$(/bin/busybox cat $d/class)" != 0x00ff00 ] || /bin/busybox sed "s/^/region /" $d/resource
done
/bin/busybox poweroff -f
`

// standIn makes cards of pci-testdev, whose memory is of any size and nowhere.
func standIn(argv []string, size int64) []string {
	for i, w := range argv {
		if options, ok := strings.CutPrefix(w, "vfio-pci,host="); ok {
			_, options, _ = strings.Cut(options, ",")
			argv[i] = fmt.Sprintf("pci-testdev,membar=%d,%s", size, options)
		}
	}
	return argv
}

// TestLargeRegions boots a real kernel with three cards of 128 GiB each, by
// each firmware: it has to have found an address for all.
func TestLargeRegions(t *testing.T) {
	if testing.Short() {
		t.Skip("boots virtual machines")
	}
	caps := realCaps(t)
	debian := testenv.Debian13(t)
	initrd := testenv.Initrd(t, debian, listRegions, "")
	kernel := filepath.Join(debian, "boot/vmlinuz")
	const cmdline = "console=ttyS0 loglevel=1 no_timer_check"
	for name, boot := range map[string]vm.Boot{
		"kernel": {Kernel: kernel, Initrd: initrd, Cmdline: cmdline},
		"UEFI":   {Firmware: vm.FirmwareUEFI},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			m := emptyMachine(dir)
			m.Memory, m.Ports, m.Boot = 512*mib, 4, boot
			var more []string
			if boot.Firmware == vm.FirmwareUEFI {
				if caps.UEFI == nil {
					testenv.Unavailable(t, "no UEFI firmware is installed")
				}
				m.Boot.VarsFile = filepath.Join(dir, "vars")
				if err := caps.UEFI.NewVars(m.Boot.VarsFile); err != nil {
					t.Fatal(err)
				}
				more = []string{"-kernel", kernel, "-initrd", initrd, "-append", cmdline}
			}
			const size = 128 << 30
			for i := range 3 {
				m.Slots = append(m.Slots, card(fmt.Sprintf("0000:0%d:00.0", i+1), pref(size)))
			}
			withVFIO := caps
			withVFIO.Devices = append(withVFIO.Devices, "vfio-pci")
			argv, err := Argv(m, withVFIO)
			if err != nil {
				t.Fatal(err)
			}
			p, err := Start(t.Context(), append(standIn(argv, size), more...), Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(p.Kill)
			select {
			case <-p.Done():
			case <-time.After(4 * time.Minute):
				t.Error("the guest does not end")
				p.Kill()
			}
			console, err := os.ReadFile(m.Console)
			if err != nil {
				t.Fatal(err)
			}
			found := map[uint64]bool{}
			for line := range strings.Lines(string(console)) {
				var start, end, flags uint64
				if n, _ := fmt.Sscanf(line, "region 0x%x 0x%x 0x%x", &start, &end, &flags); n == 3 && end-start == size-1 && start > 0 {
					found[start] = true
				}
			}
			if len(found) != 3 {
				t.Errorf("the guest has %d of 3 large regions, its console:\n%s%s", len(found), console, p.Stderr())
			}
		})
	}
}

// TestNearMemory: the real QEMU takes its memory from one node, and runs there.
func TestNearMemory(t *testing.T) {
	caps := realCaps(t)
	if _, err := os.Stat("/sys/devices/system/node/node0"); err != nil {
		testenv.Unavailable(t, "the kernel knows no NUMA nodes: %v", err)
	}
	m := emptyMachine(shortDir(t))
	m.Near = &vm.Node{ID: 0, CPUs: []int{0}}
	argv, err := Argv(m, caps)
	if err != nil {
		t.Fatal(err)
	}
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before); err != nil {
		t.Fatal(err)
	}
	p, err := Start(t.Context(), append(argv, "-S"), Options{CPUs: m.Near.CPUs, Lock: before.Cur})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	mon := connect(t, p, m)
	if _, err := qmp.Status(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", p.ID().PID))
	if err != nil || !strings.Contains(string(maps), "bind:0") {
		t.Errorf("its memory is not bound to node 0: %v\n%s", err, maps)
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(p.ID().PID, &cpus); err != nil || cpus.Count() != 1 || !cpus.IsSet(0) {
		t.Errorf("it runs on %d CPUs, %v", cpus.Count(), err)
	}
}

// TestTooFewHugePages: a lack of them makes QEMU refuse to start, and not die of
// it later.
func TestTooFewHugePages(t *testing.T) {
	caps := realCaps(t)
	text, err := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
	if err != nil {
		testenv.Unavailable(t, "the kernel has no huge pages: %v", err)
	}
	free, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	m := emptyMachine(shortDir(t))
	m.HugePages, m.Memory = 2*mib, (free+16)*2*mib
	p := start(t, m, caps, "-S")
	select {
	case <-p.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("it runs")
	}
	var exit *ExitError
	if err := p.Wait(t.Context()); !errors.As(err, &exit) || !strings.Contains(exit.Stderr, "memory") {
		t.Errorf("it ended with %v", err)
	}
}

// TestLocked lends QEMU a limit that this process does not have.
func TestLocked(t *testing.T) {
	caps := realCaps(t)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
		t.Fatal(err)
	}
	low := unix.Rlimit{Cur: 1 << 20, Max: old.Max}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &low); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old) })
	argv, err := Argv(emptyMachine(shortDir(t)), caps)
	if err != nil {
		t.Fatal(err)
	}
	wanted := min(uint64(3<<20), old.Max)
	p, err := Start(t.Context(), append(argv, "-S"), Options{Lock: wanted})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	var has, mine unix.Rlimit
	if err := unix.Prlimit(p.ID().PID, unix.RLIMIT_MEMLOCK, nil, &has); err != nil || has.Cur != wanted {
		t.Errorf("QEMU may lock %d bytes, %v; want %d", has.Cur, err, wanted)
	}
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &mine); err != nil || mine != low {
		t.Errorf("this process may lock %d bytes now, %v", mine.Cur, err)
	}
	if old.Max == unix.RLIM_INFINITY {
		return
	}
	err = CheckLockable(old.Max + 1<<30)
	if os.Geteuid() == 0 {
		if err != nil && !errors.Is(err, vm.ErrHost) { // root without CAP_SYS_RESOURCE may not either
			t.Error(err)
		}
	} else if !errors.Is(err, vm.ErrHost) || !strings.Contains(vm.Hint(err), "LimitMEMLOCK=") || !strings.Contains(vm.Hint(err), "hard memlock ") {
		t.Errorf("%v, %q", err, vm.Hint(err))
	}
}
