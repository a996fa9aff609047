package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/testenv"
)

func realCaps(t testing.TB) Caps {
	t.Helper()
	testenv.RequireQEMU(t)
	caps, err := Probe(t.Context(), Binary, "")
	if err != nil {
		t.Fatal(err)
	}
	return caps
}

// shortDir is a directory whose path leaves room for a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "q")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func emptyMachine(dir string) vm.Machine {
	return vm.Machine{
		Name: "t", CPUs: 1, Memory: 64 << 20, Accel: vm.AccelTCG,
		Console: filepath.Join(dir, "console.log"),
		QMP:     filepath.Join(dir, "qmp.sock"),
	}
}

func start(t *testing.T, m vm.Machine, caps Caps, more ...string) *Process {
	t.Helper()
	argv, err := Argv(m, caps)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(t.Context(), append(argv, more...), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

func connect(t *testing.T, p *Process, m vm.Machine) *qmp.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	mon, err := p.Connect(ctx, m.QMP)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mon.Close() })
	return mon
}

func TestProbeRealQEMU(t *testing.T) {
	testenv.RequireQEMU(t)
	dir := t.TempDir()
	first, err := Probe(t.Context(), Binary, probes.Store(dir))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(first.Machine, "pc-q35-") || !first.Sandbox || !first.hasAccel(vm.AccelTCG) ||
		!first.HasDevice("virtio-blk-pci") || !first.HasObject("rng-builtin") || !first.HasNetdev("user") {
		t.Errorf("implausible: %+v", first)
	}
	kept := func() time.Time {
		files, _ := filepath.Glob(filepath.Join(dir, "*"))
		if len(files) != 1 {
			t.Fatalf("kept as %q", files)
		}
		fi, err := os.Stat(files[0])
		if err != nil {
			t.Fatal(err)
		}
		return fi.ModTime()
	}
	written := kept()
	again, err := Probe(t.Context(), Binary, probes.Store(dir))
	if err != nil || again.Build != first.Build || len(again.Devices) != len(first.Devices) {
		t.Errorf("the cache answers %+v, %v", again, err)
	}
	if !kept().Equal(written) {
		t.Error("it was asked again")
	}
}

func TestProbeNoQEMU(t *testing.T) {
	_, err := Probe(t.Context(), "/nonexistent/qemu", "")
	if !errors.Is(err, vm.ErrHost) || !strings.Contains(vm.Hint(err), "apt-get install") {
		t.Errorf("got %v, hint %q", err, vm.Hint(err))
	}
}

func TestProbeNotQEMU(t *testing.T) {
	begin := time.Now()
	if _, err := Probe(t.Context(), "/bin/false", ""); err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("noticed only after %v", took)
	}
}

// Every option is accepted by the real QEMU, whatever the paths look like.
func TestRealQEMUTakesAnyPath(t *testing.T) {
	caps := realCaps(t)
	names := map[string]string{
		"plain":     "disk",
		"space":     "a disk",
		"comma":     "a,b,,c=d,readonly=on",
		"quotes":    `a"b'c\d`,
		"unicode":   "größe-磁盘-🦊",
		"not utf-8": "\xff\xfe",
		"newline":   "a\nb",
		"percent":   "100%s{x}$HOME",
		"colon":     "nbd:unix:x",
		"long":      strings.Repeat("x", 200),
	}
	for title, name := range names {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			run := shortDir(t)
			odd := filepath.Join(t.TempDir(), name)
			if err := os.MkdirAll(odd, 0o755); err != nil {
				t.Fatal(err)
			}
			m := emptyMachine(run)
			if len(run)+len(name)+9 <= maxSocketPath {
				m.QMP = filepath.Join(run, name+".sock")
			}
			m.UUID = "6f0c2e8e-4f7f-4c36-9f2a-1d1b8f0c7f11"
			m.Console = filepath.Join(odd, name+".log")
			m.PIDFile = filepath.Join(odd, "pid")
			m.MemoryFile = filepath.Join(odd, "ram")
			for _, f := range []string{"root", "seed"} {
				disk := filepath.Join(odd, name+f)
				if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
					t.Fatal(err)
				}
				m.Disks = append(m.Disks, vm.Disk{ID: f, Path: disk, Format: "raw", ReadOnly: f == "seed", Serial: f})
			}
			sock := filepath.Join(run, "n,"+name[:min(len(name), 40)])
			l, err := net.Listen("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			m.NICs = []vm.NIC{{MAC: "5a:94:ef:e4:0c:ee", Socket: sock}}

			p := start(t, m, caps, "-S")
			mon := connect(t, p, m)
			if s, err := qmp.Status(t.Context(), mon); err != nil || s.State != "prelaunch" {
				t.Errorf("status %+v, %v", s, err)
			}
			if s := p.Stderr(); s != "" {
				t.Errorf("QEMU complains: %s", s)
			}
			for _, f := range []string{m.Console, m.PIDFile, m.MemoryFile} {
				if _, err := os.Stat(f); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestUEFIStarts(t *testing.T) {
	t.Parallel()
	caps := realCaps(t)
	if caps.UEFI == nil {
		testenv.Unavailable(t, "needs UEFI firmware (package ovmf)")
	}
	dir := shortDir(t)
	m := emptyMachine(dir)
	m.Memory = 256 << 20
	m.Boot = vm.Boot{Firmware: vm.FirmwareUEFI, VarsFile: filepath.Join(dir, "vars.fd")}
	if err := caps.UEFI.NewVars(m.Boot.VarsFile); err != nil {
		t.Fatal(err)
	}
	mon := connect(t, start(t, m, caps), m)
	if s, err := qmp.Status(t.Context(), mon); err != nil || !s.Running {
		t.Errorf("status %+v, %v", s, err)
	}
	waitFor(t, "the firmware to speak", func() bool {
		b, _ := os.ReadFile(m.Console)
		return strings.Contains(string(b), "BdsDxe") // EDK II's boot device selection
	})
}

func TestImmediateExitShowsStderr(t *testing.T) {
	caps := realCaps(t)
	m := emptyMachine(shortDir(t))
	m.Boot.Kernel = "/nonexistent/vmlinuz"
	p := start(t, m, caps)
	_, err := p.Connect(t.Context(), m.QMP)
	var exit *ExitError
	if !errors.As(err, &exit) || !strings.Contains(err.Error(), "could not open kernel file '/nonexistent/vmlinuz'") {
		t.Errorf("got %v", err)
	}
	if err := p.Wait(t.Context()); err == nil {
		t.Error("Wait reports a clean end")
	}
}

// TestHugePages has QEMU's own memory asked for in huge pages, by a C library that
// knows how, on a kernel that leaves that to programs.
func TestHugePages(t *testing.T) {
	m := emptyMachine(shortDir(t))
	p := start(t, m, realCaps(t))
	connect(t, p, m)
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.ID().PID))
	if err != nil || !strings.Contains(string(environ), "GLIBC_TUNABLES=glibc.malloc.hugetlb=1\x00") {
		t.Errorf("%q, %v", environ, err)
	}
	mode, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err != nil || !strings.Contains(string(mode), "[madvise]") {
		return // nobody has to ask, or nobody gets any
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", p.ID().PID))
	if err != nil {
		t.Fatal(err)
	}
	_, heap, _ := strings.Cut(string(maps), "[heap]")
	_, flags, _ := strings.Cut(heap, "VmFlags:")
	flags, _, _ = strings.Cut(flags, "\n")
	if !slices.Contains(strings.Fields(flags), "hg") {
		t.Errorf("the heap has the flags %q", flags)
	}
}

func TestMonitorOfRealQEMU(t *testing.T) {
	caps := realCaps(t)
	m := emptyMachine(shortDir(t))
	m.Ports = 1
	p := start(t, m, caps)
	mon := connect(t, p, m)
	sub, err := mon.Subscribe(t.Context(), qmp.LifecycleEvents...)
	if err != nil {
		t.Fatal(err)
	}
	schema, err := querySchema(t.Context(), mon) // the reply that go-qemu could not read
	if err != nil || len(schema) < 500 {
		t.Errorf("schema of %d entities, %v", len(schema), err)
	}
	if v, err := qmp.QueryVersion(t.Context(), mon); err != nil || v != caps.Version {
		t.Errorf("version %v, %v", v, err)
	}
	if err := qmp.Stop(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	if s, err := qmp.Status(t.Context(), mon); err != nil || s.Running || s.State != "paused" {
		t.Errorf("status %+v, %v", s, err)
	}
	if err := qmp.Cont(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	err = qmp.DeviceAdd(t.Context(), mon, "nonsense", "x", nil)
	var refused *qmp.Error
	if !errors.As(err, &refused) || refused.Command != "device_add" {
		t.Errorf("got %v", err)
	}
	if err := qmp.DeviceAdd(t.Context(), mon, "virtio-rng-pci", "late", map[string]any{"bus": "rp0"}); err != nil {
		t.Errorf("hotplug: %v", err)
	}
	if err := qmp.Quit(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-mon.Done()
	var last string
	for ev := range sub.C {
		last = ev.Event
		if s, ok := qmp.ShutdownOf(ev); ok && s.Reason != "host-qmp-quit" {
			t.Errorf("shutdown: %+v", s)
		}
	}
	if last != qmp.EventShutdown {
		t.Errorf("the last event is %q", last)
	}
	if p.ID().Alive() {
		t.Error("the process lives on")
	}
}

func TestShutdownKillsADeafGuest(t *testing.T) {
	caps := realCaps(t)
	m := emptyMachine(shortDir(t)) // SeaBIOS with nothing to boot hears no button
	p := start(t, m, caps)
	mon := connect(t, p, m)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if p.Shutdown(ctx, mon) {
		t.Error("the guest is said to have shut down")
	}
	if p.ID().Alive() {
		t.Error("QEMU lives on")
	}
}

// nobody is a user without rights, for tests that run as root.
var nobody = vm.Owner{UID: 65534, GID: 65534}

func TestRunAsAnotherUser(t *testing.T) {
	testenv.RequireRoot(t)
	caps := realCaps(t)
	dir := shortDir(t)
	if err := os.Chown(dir, nobody.UID, nobody.GID); err != nil {
		t.Fatal(err)
	}
	m := emptyMachine(dir)
	argv, err := Argv(m, caps)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(t.Context(), argv, Options{RunAs: &nobody, LogFile: filepath.Join(dir, "qemu.log")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	connect(t, p, m)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.ID().PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "Groups:\t \n",
		"CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("status lacks %q:\n%s", want, status)
		}
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.ID().PID))
	if err != nil || strings.Contains(string(environ), "HOME=") {
		t.Errorf("environment: %q", environ)
	}
}

// QEMU dies with whoever started it, however that ends, also when it runs as
// another user.
func TestParentKilled(t *testing.T) {
	if dir := os.Getenv("AGENTVM_TEST_PARENT"); dir != "" {
		beParent(t, dir)
		return
	}
	realCaps(t)
	dir := shortDir(t)
	if os.Getuid() == 0 {
		if err := os.Chown(dir, nobody.UID, nobody.GID); err != nil {
			t.Fatal(err)
		}
	}
	parent := exec.Command(os.Args[0], "-test.run=^TestParentKilled$")
	parent.Env = append(os.Environ(), "AGENTVM_TEST_PARENT="+dir)
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	defer parent.Process.Kill()
	mark := filepath.Join(dir, "qmp.sock")
	waitFor(t, "QEMU to run", func() bool { _, err := os.Stat(mark); return err == nil })
	qemu := running(t, mark)
	if len(qemu) != 1 {
		t.Fatalf("%d QEMUs run before the kill", len(qemu))
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	parent.Wait()
	waitFor(t, "QEMU to die", func() bool { return len(running(t, mark)) == 0 })
}

func beParent(t *testing.T, dir string) {
	argv, err := Argv(emptyMachine(dir), realCaps(t))
	if err != nil {
		t.Fatal(err)
	}
	var opts Options
	if os.Getuid() == 0 {
		opts.RunAs = &nobody
	}
	p, err := Start(t.Context(), argv, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	// Many threads come and go; QEMU must not go with the one that forked it.
	for range 50 {
		var wg sync.WaitGroup
		wg.Go(runtime.LockOSThread) // the thread ends with the goroutine
		wg.Wait()
	}
	select {
	case <-p.Done():
		os.RemoveAll(dir) // fails the test above
	case <-time.After(time.Minute):
	}
}

// running lists the processes whose arguments hold mark.
func running(t *testing.T, mark string) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), mark) {
			pids = append(pids, f)
		}
	}
	return pids
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// TestSaveAndRestore moves a machine from one QEMU to another by way of files.
func TestSaveAndRestore(t *testing.T) {
	caps := realCaps(t)
	dir := shortDir(t)
	m := emptyMachine(dir)
	m.MemoryFile, m.Line, m.Ports = filepath.Join(dir, "memory"), filepath.Join(dir, "line.sock"), 2
	if err := os.WriteFile(m.MemoryFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(m.MemoryFile, m.Memory); err != nil {
		t.Fatal(err)
	}
	p := start(t, m, caps)
	mon := connect(t, p, m)
	state, err := Save(t.Context(), mon, filepath.Join(dir, "state.sock"), nil)
	if err != nil || len(state) == 0 {
		t.Fatalf("%d bytes, %v", len(state), err)
	}
	if s, err := qmp.Status(t.Context(), mon); err != nil || s.Running {
		t.Errorf("after saving: %+v, %v", s, err)
	}

	restore := func(m vm.Machine, state []byte) (*qmp.Client, error) {
		m.Saved = dir
		p.Kill() // the last one's sockets are these
		p = start(t, m, caps)
		mon := connect(t, p, m)
		return mon, Restore(t.Context(), mon, filepath.Join(dir, "state.sock"), state)
	}
	mon, err = restore(m, state)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := qmp.Status(t.Context(), mon); err != nil || s.Running {
		t.Errorf("a restored machine waits: %+v, %v", s, err)
	}
	if err := qmp.Cont(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	if s, err := qmp.Status(t.Context(), mon); err != nil || !s.Running {
		t.Errorf("status %+v, %v", s, err)
	}

	for name, harm := range map[string]func() (vm.Machine, []byte){
		"a state cut short": func() (vm.Machine, []byte) { return m, state[:len(state)/2] },
		"another machine":   func() (vm.Machine, []byte) { other := m; other.Ports = 1; return other, state },
		"no state at all":   func() (vm.Machine, []byte) { return m, []byte("nonsense") },
	} {
		if _, err := restore(harm()); err == nil {
			t.Errorf("%s: restored", name)
		}
	}
}
