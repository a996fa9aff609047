package share

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

// guest is a tiny Linux in QEMU with the share at /workspace, and a shell of
// root's on a virtual console.
type guest struct {
	t      testing.TB
	qemu   *exec.Cmd
	stderr strings.Builder // QEMU's; whole once it has ended
	conn   net.Conn
	r      *bufio.Reader
	log    string
}

// boot starts a guest on a share's socket. It is emulated, so that it runs
// anywhere, and has one processor: two meet QEMU's races
// (docs/decisions/0034-emulated-processors.md).
func boot(t testing.TB, socket string) *guest {
	t.Helper()
	testenv.RequireQEMU(t)
	dir := publicDir(t)
	console := filepath.Join(dir, "console")
	g := &guest{t: t, log: filepath.Join(dir, "log")}
	g.qemu = exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic",
		"-M", "q35,accel=tcg,memory-backend=mem", "-cpu", "max", "-smp", "1", "-m", "512M",
		"-object", "memory-backend-memfd,id=mem,size=512M,share=on",
		"-kernel", kernel(t), "-initrd", initrd(t), "-append", "console=ttyS0 quiet panic=-1", "-no-reboot",
		"-serial", "file:"+g.log,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=con,server=on,wait=off,path="+console, "-device", "virtconsole,chardev=con",
		"-chardev", "socket,id=fs,path="+socket, "-device", "vhost-user-fs-pci,chardev=fs,tag=workspace,queue-size=1024")
	g.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	g.qemu.Stderr = &g.stderr
	if err := g.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.kill)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var err error
		if g.conn, err = net.Dial("unix", console); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no console: %v\n%s", err, g.end())
		}
	}
	g.r = bufio.NewReader(g.conn)
	out, rc := g.answer(time.Minute)
	if rc != "0" {
		t.Fatalf("the guest cannot mount its share: %s\n%s", out, g.end())
	}
	return g
}

func (g *guest) kill() {
	if g.conn != nil {
		g.conn.Close()
	}
	_ = g.qemu.Process.Kill()
	_ = g.qemu.Wait()
}

// end returns how QEMU ended, which is killed if it does not, what it said, and
// the guest's last words.
func (g *guest) end() string {
	time.Sleep(time.Second) // its sockets close before it ends
	g.kill()
	return fmt.Sprintf("QEMU: %v\n%s%s", g.qemu.ProcessState, g.stderr.String(), g.console())
}

func (g *guest) console() string {
	b, _ := os.ReadFile(g.log)
	return string(b)
}

// answer reads up to the end of one command.
func (g *guest) answer(limit time.Duration) (out, rc string) {
	g.t.Helper()
	_ = g.conn.SetReadDeadline(time.Now().Add(limit))
	var lines []string
	for {
		line, err := g.r.ReadString('\n')
		if err != nil {
			g.t.Fatalf("the guest does not answer: %v; so far: %q\n%s", err, lines, g.end())
		}
		line = strings.TrimRight(line, "\r\n")
		if end, ok := strings.CutPrefix(line, "@end "); ok {
			return strings.TrimSpace(strings.Join(lines, "\n")), end
		}
		lines = append(lines, line)
	}
}

// try runs one line of shell as root and returns what it printed and its status.
func (g *guest) try(format string, args ...any) (out string, ok bool) {
	g.t.Helper()
	fmt.Fprintf(g.conn, "cd /workspace; "+format+"\n", args...)
	out, rc := g.answer(2 * time.Minute)
	return out, rc == "0"
}

// agent runs one line of shell, without single quotes in it, as the agent.
func (g *guest) agent(format string, args ...any) (out string, ok bool) {
	g.t.Helper()
	return g.try("su agent -c 'cd /workspace; %s'", fmt.Sprintf(format, args...))
}

// do runs one line as root, which must succeed.
func (g *guest) do(format string, args ...any) string {
	g.t.Helper()
	out, ok := g.try(format, args...)
	if !ok {
		g.t.Errorf("in the guest, %s: %s", fmt.Sprintf(format, args...), out)
	}
	return out
}

// refuse runs one line as root, which must fail and say why.
func (g *guest) refuse(why, format string, args ...any) {
	g.t.Helper()
	out, ok := g.try(format, args...)
	if ok || !strings.Contains(out, why) {
		g.t.Errorf("in the guest, %s: ok=%v, %q; want a failure with %q", fmt.Sprintf(format, args...), ok, out, why)
	}
}
