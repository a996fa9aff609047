package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
	goqemu "github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// Options are what a QEMU process needs beside its arguments.
type Options struct {
	RunAs      *vm.Owner  // nil: the calling user
	Groups     []int      // supplementary groups with RunAs, for /dev/kvm say
	LogFile    string     // receives stderr, bounded; "" for none
	ExtraFiles []*os.File // become file descriptors 3, 4, ...
	Lock       uint64     // bytes of memory that it may lock; 0: as this process
	CPUs       []int      // of the host, that it runs on; none: all
}

// environ is QEMU's. It touches some 30 MiB of its own until a guest runs; in
// huge pages, where the kernel lets a process ask for them, that is tens of page
// faults and not thousands
// (https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html).
var environ = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"}

// Process is a running QEMU. The kernel kills it when the process that
// started it ends, however that ends.
type Process struct {
	id   vm.ProcID
	cmd  *exec.Cmd
	log  *stderrLog
	done chan struct{} // closed after err is set
	err  error
}

// Start runs argv, which Argv made. It returns as soon as the process exists;
// whether QEMU likes its arguments shows in Connect or in Done. ctx bounds
// only the start.
func Start(ctx context.Context, argv []string, opts Options) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	log, err := openLog(opts.LogFile)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = environ
	cmd.Stderr = log
	cmd.ExtraFiles = opts.ExtraFiles
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true, // a Ctrl-C in our terminal is not QEMU's
		Pdeathsig: syscall.SIGKILL,
	}
	if opts.RunAs != nil && (opts.RunAs.UID != os.Geteuid() || opts.RunAs.GID != os.Getegid()) {
		cmd.SysProcAttr.Credential = credential(*opts.RunAs, opts.Groups)
	}
	p := &Process{cmd: cmd, log: log, done: make(chan struct{})}
	started := make(chan error, 1)
	go p.keep(opts, started)
	if err := <-started; err != nil {
		log.close()
		return nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	return p, nil
}

func credential(owner vm.Owner, groups []int) *syscall.Credential {
	c := &syscall.Credential{Uid: uint32(owner.UID), Gid: uint32(owner.GID)}
	for _, g := range groups {
		c.Groups = append(c.Groups, uint32(g))
	}
	return c
}

// keep starts the process and waits for its end on one OS thread: Linux sends
// the parent-death signal when the *thread* that forked ends, and Go ends
// threads as it likes (golang.org/issue/27505).
func (p *Process) keep(opts Options, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := p.startLent(opts); err != nil {
		if p.cmd.Process != nil { // it runs, and this process could not be put back
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
		started <- err
		return
	}
	// Not yet waited for, so the number is still this process's. The error is
	// that it has ended already, which Done tells better.
	p.id, _ = vm.ProcessID(p.cmd.Process.Pid)
	started <- nil

	err := p.cmd.Wait()
	p.log.close()
	p.err = &ExitError{Err: err, Stderr: p.log.String()}
	close(p.done)
}

// ID identifies the process beyond the reuse of its number.
func (p *Process) ID() vm.ProcID { return p.id }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the process and returns nil if it ended by itself
// with status 0, as it does after a guest's shutdown, and an *ExitError if not.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		return fmt.Errorf("wait for QEMU to end: %w", context.Cause(ctx))
	}
	var exit *ExitError
	if errors.As(p.err, &exit) && exit.Err == nil {
		return nil
	}
	return p.err
}

// Kill ends the process at once and waits until it is gone. It may be called
// at any time.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stderr is the last of what QEMU has written to its standard error.
func (p *Process) Stderr() string { return p.log.String() }

// Connect waits for the monitor that listens on socket. When QEMU ends
// first, the error is an *ExitError with what QEMU said.
func (p *Process) Connect(ctx context.Context, socket string) (*qmp.Client, error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		mon, err := qmp.Dial(ctx, socket)
		if err == nil {
			return mon, nil
		}
		if !notListening(err) {
			return nil, p.explain(err)
		}
		select {
		case <-tick.C:
		case <-p.done:
			return nil, p.explain(err)
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for QEMU's monitor: %w%s", context.Cause(ctx), said(p.Stderr()))
		}
	}
}

func notListening(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && (errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED))
}

// explain prefers QEMU's own last words to err, which came of talking to it.
func (p *Process) explain(err error) error {
	select {
	case <-p.done:
		return p.err
	case <-time.After(200 * time.Millisecond): // dying takes a moment
		return err
	}
}

// Shutdown presses the guest's power button until QEMU ends, and kills QEMU
// when ctx ends first. It reports whether the guest shut down by itself.
func (p *Process) Shutdown(ctx context.Context, mon goqemu.Monitor) bool {
	if qmp.PowerdownUntil(ctx, mon, p.done) {
		return true
	}
	p.Kill()
	return false
}

// ExitError says how QEMU ended.
type ExitError struct {
	Err    error  // nil for status 0, else from os/exec
	Stderr string // the last of it
}

func (e *ExitError) Error() string {
	how := "exit status 0"
	if e.Err != nil {
		how = e.Err.Error()
	}
	return "QEMU ended with " + how + said(e.Stderr)
}

func (e *ExitError) Unwrap() error { return e.Err }

// said appends the last lines of QEMU's standard error, without the time and
// program name that -msg puts before each.
func said(stderr string) string {
	const most = 5
	lines := strings.FieldsFunc(stderr, func(r rune) bool { return r == '\n' })
	lines = lines[max(0, len(lines)-most):]
	for i, l := range lines {
		lines[i] = messagePrefix().ReplaceAllString(l, "")
	}
	if len(lines) == 0 {
		return ""
	}
	return ": " + strings.Join(lines, "; ")
}

var messagePrefix = vm.Pattern(`^(\d{4}-\d\d-\d\dT[\d:.]+Z )?(qemu-system-\w+: )?`)

// KVMGroups is what a process under another user needs to open /dev/kvm: the
// group that owns the device, where the device lets its group in.
func KVMGroups() []int { return nodeGroups(kvmDevice) }

// Groups are those that the machine's process needs under another user.
func Groups(m vm.Machine) (groups []int) {
	if m.Accel == vm.AccelKVM {
		groups = KVMGroups()
	}
	if usesIOMMUFD(m) {
		groups = append(groups, nodeGroups(iommuDevice)...)
	}
	return groups
}

// nodeGroups is the group that may use a device, unless it is root's.
func nodeGroups(path string) []int {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || !lendable(st) {
		return nil
	}
	return []int{int(st.Gid)}
}

func lendable(st unix.Stat_t) bool { return st.Mode&0o060 == 0o060 && st.Gid != 0 }
