package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// libvirtdArg makes a test binary the keeper of a libvirtd.
const libvirtdArg = "keep-libvirtd"

// KeepLibvirtd is for the TestMain of packages that use StartLibvirtd. It does
// not return where the test binary has been started again as the keeper.
func KeepLibvirtd() {
	if len(os.Args) != 3 || os.Args[1] != libvirtdArg {
		return
	}
	if err := keepLibvirtd(os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Libvirtd is a real libvirtd of the tests' own. Root's serves qemu:///system
// in a mount namespace in which its fixed directories are empty ones; an
// ordinary user's serves qemu:///session, in directories of its own. A host's
// libvirt is not touched, and all of it ends with the test.
type Libvirtd struct {
	t    testing.TB
	dir  string
	keep *exec.Cmd
	said string // the file with what it says
}

// StartLibvirtd starts one; programs under test find it through URI.
func StartLibvirtd(t testing.TB) *Libvirtd {
	t.Helper()
	Require(t, "libvirtd", "virsh")
	dir, err := os.MkdirTemp("/tmp", "avml") // short: sockets lie in it
	if err == nil {
		err = os.Chmod(dir, 0o711)
	}
	if err != nil {
		t.Fatal(err)
	}
	l := &Libvirtd{t: t, dir: dir, said: filepath.Join(dir, "said")}
	l.keep = exec.Command("/proc/self/exe", libvirtdArg, dir)
	log, err := os.Create(l.said)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	l.keep.Stdout, l.keep.Stderr = log, log
	l.keep.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "HOME=" + dir, "LC_ALL=C.UTF-8"}
	for _, name := range []string{"RUNTIME", "CACHE", "CONFIG", "DATA"} {
		sub := filepath.Join(dir, strings.ToLower(name))
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		variable := "XDG_" + name + "_HOME"
		if name == "RUNTIME" {
			variable = "XDG_RUNTIME_DIR"
		}
		l.keep.Env = append(l.keep.Env, variable+"="+sub)
	}
	l.keep.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if os.Getuid() == 0 {
		l.keep.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	if err := startOnThread(l.keep); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.end)
	l.await()
	return l
}

// startOnThread starts a child whose parent-death signal is that of a thread
// which lives as long as the tests do (golang.org/issue/27505).
func startOnThread(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		started <- cmd.Start()
		select {}
	}()
	return <-started
}

// Socket is where it listens.
func (l *Libvirtd) Socket() string {
	if os.Getuid() == 0 {
		return filepath.Join(l.dir, "libvirt-sock")
	}
	return filepath.Join(l.dir, "runtime", "libvirt", "libvirt-sock")
}

// URI is its address.
func (l *Libvirtd) URI() string {
	kind := "session"
	if os.Getuid() == 0 {
		kind = "system"
	}
	return "qemu:///" + kind + "?socket=" + l.Socket()
}

// Virsh runs libvirt's own client and returns what it printed.
func (l *Libvirtd) Virsh(args ...string) string {
	l.t.Helper()
	out, err := exec.Command("virsh", append([]string{"-c", l.URI()}, args...)...).CombinedOutput()
	if err != nil {
		l.t.Fatalf("virsh %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// Domains lists the names of all domains.
func (l *Libvirtd) Domains() []string {
	l.t.Helper()
	return strings.Fields(l.Virsh("list", "--all", "--name"))
}

// Kill ends libvirtd, with a signal of the caller's choice, until Start.
func (l *Libvirtd) Kill(sig syscall.Signal) {
	l.t.Helper()
	if err := os.WriteFile(l.held(), nil, 0o600); err != nil {
		l.t.Fatal(err)
	}
	pid := l.pid()
	if err := syscall.Kill(pid, sig); err != nil {
		l.t.Fatal(err)
	}
	for range 300 {
		if syscall.Kill(pid, 0) != nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	l.t.Fatalf("libvirtd does not end\n%s", l.log())
}

// Start lets libvirtd run again.
func (l *Libvirtd) Start() {
	l.t.Helper()
	if err := os.Remove(l.held()); err != nil {
		l.t.Fatal(err)
	}
	l.await()
}

// Signal sends libvirtd a signal and does not wait: SIGSTOP makes one that hangs.
func (l *Libvirtd) Signal(sig syscall.Signal) {
	l.t.Helper()
	if err := syscall.Kill(l.pid(), sig); err != nil {
		l.t.Fatal(err)
	}
}

func (l *Libvirtd) pid() (pid int) {
	data, err := os.ReadFile(filepath.Join(l.dir, "pid"))
	if err == nil {
		_, err = fmt.Sscan(string(data), &pid)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return pid
}

func (l *Libvirtd) held() string { return filepath.Join(l.dir, "held") }

// log is what it has said so far.
func (l *Libvirtd) log() []byte {
	text, err := os.ReadFile(l.said)
	if err != nil {
		l.t.Error(err)
	}
	return text
}

// await waits until it answers.
func (l *Libvirtd) await() {
	l.t.Helper()
	var out []byte
	var err error
	for range 600 {
		if out, err = exec.Command("virsh", "-c", l.URI(), "version").CombinedOutput(); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	l.t.Fatalf("libvirtd does not answer: %v\n%s%s", err, out, l.log())
}

func (l *Libvirtd) end() {
	_ = l.keep.Process.Signal(syscall.SIGTERM)
	if err := l.keep.Wait(); err != nil {
		l.t.Errorf("libvirtd: %v\n%s", err, l.log())
	}
	if err := os.RemoveAll(l.dir); err != nil {
		l.t.Error(err)
	}
}

// keepLibvirtd keeps a libvirtd running in dir, and is the parent of whatever
// it leaves behind: not every machine's first process reaps what it is given.
// It ends at SIGTERM.
func keepLibvirtd(dir string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	setup := exec.Command("sh", "-eu", "-c", libvirtdSetup, "sh", dir)
	if os.Getuid() != 0 {
		setup = exec.Command("true")
	}
	if out, err := setup.CombinedOutput(); err != nil {
		return fmt.Errorf("set up libvirtd's directories: %w\n%s", err, out)
	}
	k := keeper{dir: dir}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM)
	for {
		_, err := os.Stat(filepath.Join(dir, "held"))
		if k.pid == 0 && err != nil {
			if err := k.start(); err != nil {
				return err
			}
		}
		select {
		case <-asked:
			k.finish()
			return nil
		case <-time.After(20 * time.Millisecond):
			k.reap()
		}
	}
}

// keeper is the state of keepLibvirtd.
type keeper struct {
	dir string
	pid int // libvirtd's; 0: it has ended
}

func (k *keeper) start() error {
	args := []string{"libvirtd", "-p", filepath.Join(k.dir, "pidfile")}
	if os.Getuid() == 0 {
		args = append(args, "-f", "/etc/libvirt/libvirtd.conf")
	}
	path, err := exec.LookPath("libvirtd")
	if err != nil {
		return err
	}
	// Not os/exec: reap waits for every child.
	pid, err := syscall.ForkExec(path, args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}})
	if err != nil {
		return err
	}
	k.pid = pid
	return os.WriteFile(filepath.Join(k.dir, "pid"), fmt.Append(nil, pid), 0o600)
}

// reap collects whoever has ended.
func (k *keeper) reap() {
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if pid <= 0 {
			return
		}
		if pid == k.pid {
			k.pid = 0
		}
	}
}

// finish ends libvirtd, and what it has left: all of it is a child of ours.
func (k *keeper) finish() {
	if k.pid != 0 {
		_ = syscall.Kill(k.pid, syscall.SIGTERM)
	}
	for range 500 {
		if k.reap(); k.pid == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	for range 50 {
		var children []string
		threads, _ := filepath.Glob("/proc/self/task/*/children")
		for _, file := range threads {
			list, _ := os.ReadFile(file)
			children = append(children, strings.Fields(string(list))...)
		}
		for _, child := range children {
			if pid, err := strconv.Atoi(child); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if k.reap(); len(children) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// libvirtdSetup hides the host's libvirt from root's. The account that
// libvirt's packages make for QEMU is there for libvirtd alone; so is a
// /dev/kvm that it can open, or it would ask QEMU anew at each start.
const libvirtdSetup = `
for dir in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt; do
	mkdir -p $dir
	mount -t tmpfs -o mode=755 tmpfs $dir
done
for file in passwd group; do
	cp /etc/$file "$1/$file"
	chmod 644 "$1/$file"
done
grep -q ^libvirt-qemu: "$1/passwd" || echo libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin >>"$1/passwd"
grep -q ^libvirt-qemu: "$1/group" || echo libvirt-qemu:x:64055: >>"$1/group"
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
if [ -c /dev/kvm ]; then
	mknod -m 666 "$1/kvm" c 10 232
	mount --bind "$1/kvm" /dev/kvm
fi
cat >/etc/libvirt/libvirtd.conf <<E
unix_sock_dir = "$1"
auth_unix_rw = "none"
auth_unix_ro = "none"
E
echo 'stdio_handler = "file"' >/etc/libvirt/qemu.conf
`
