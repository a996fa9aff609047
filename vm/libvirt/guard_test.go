package libvirt

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestMain lets the test binary be a guard, or the keeper of a libvirtd.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == GuardArg {
		os.Exit(GuardMain(os.Args))
	}
	testenv.KeepLibvirtd()
	os.Exit(m.Run())
}

// victim is a process that would live for a minute.
func victim(t *testing.T) (vm.ProcID, chan error) {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	id, err := vm.ProcessID(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return id, ended
}

func TestGuardEndsQEMUWithItsOwner(t *testing.T) {
	id, ended := victim(t)
	g, err := startGuard("/proc/self/exe", id)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		t.Fatal("it ended although its owner lives")
	case <-time.After(200 * time.Millisecond):
	}
	g.stop() // closes the pipe, as the kernel does with its owner's death
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("it outlives its owner")
	}
}

func TestGuardEndsWithQEMU(t *testing.T) {
	id, ended := victim(t)
	g, err := startGuard("/proc/self/exe", id)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Kill(); err != nil {
		t.Fatal(err)
	}
	<-ended
	gone := make(chan error, 1)
	go func() { gone <- g.cmd.Wait() }()
	select {
	case err := <-gone:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the guard outlives QEMU")
	}
}

// TestGuardSparesOthers has a process number that is somebody else's by now.
func TestGuardSparesOthers(t *testing.T) {
	id, ended := victim(t)
	g, err := startGuard("/proc/self/exe", vm.ProcID{PID: id.PID, Start: id.Start + 1})
	if err != nil {
		t.Fatal(err)
	}
	g.stop()
	select {
	case <-ended:
		t.Fatal("another process was killed")
	case <-time.After(200 * time.Millisecond):
	}
}

func TestGuardWantsItsArguments(t *testing.T) {
	for _, args := range [][]string{{"agentvm", GuardArg}, {"agentvm", GuardArg, "x", "1"}, {"agentvm", GuardArg, "1", "x"}} {
		if code := GuardMain(args); code != 2 {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}

// TestConsoleKnowsItsPeer has QEMU's part played by this process.
func TestConsoleKnowsItsPeer(t *testing.T) {
	dir := t.TempDir()
	c, err := listenConsole(filepath.Join(dir, "s"), filepath.Join(dir, "log"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.l.Close()
	conn, err := net.Dial("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := c.accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	<-c.done
	got, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil || string(got) != "hello" || id.PID != os.Getpid() {
		t.Errorf("process %+v said %q, %v", id, got, err)
	}
}
