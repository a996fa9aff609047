package libvirt

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// GuardArg makes this program a guard: whoever started it waits at the other
// end of its standard input.
const GuardArg = "libvirt-guard"

// guard is a process that ends a domain's QEMU when its owner, this process,
// ends in whatever way. The kernel cannot do it: QEMU is no child of ours.
type guard struct {
	cmd  *exec.Cmd
	hold io.Closer // our end: while it is open, nothing happens
}

func startGuard(program string, qemu vm.ProcID) (*guard, error) {
	cmd := exec.Command(program, GuardArg, strconv.Itoa(qemu.PID), strconv.FormatUint(qemu.Start, 10))
	cmd.Dir, cmd.Env = "/", []string{}
	// A group of its own: what is sent to the supervisor's is not for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	hold, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start the guard of QEMU: %w", err)
	}
	return &guard{cmd, hold}, nil
}

// stop ends the guard, and with it QEMU, should it still run.
func (g *guard) stop() {
	_ = g.hold.Close()
	_ = g.cmd.Wait()
}

// GuardMain is the guard. It returns the program's exit code.
func GuardMain(args []string) int {
	if len(args) != 4 {
		return 2
	}
	pid, err := strconv.Atoi(args[2])
	start, startErr := strconv.ParseUint(args[3], 10, 64)
	if err != nil || startErr != nil {
		return 2
	}
	qemu := vm.ProcID{PID: pid, Start: start}
	if watch(qemu, int(os.Stdin.Fd())) {
		return 0
	}
	if err := qemu.Kill(); err != nil {
		return 1
	}
	return 0
}

// watch waits until the process has ended, which it reports, or nobody holds
// the other end of the pipe any more.
func watch(p vm.ProcID, pipe int) (ended bool) {
	process, err := openProcess(p)
	if err != nil {
		return true
	}
	defer unix.Close(process)
	fds := []unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}, {Fd: int32(pipe)}} // a hang-up needs no asking
	for {
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return false
		}
		switch {
		case fds[0].Revents != 0:
			return true
		case fds[1].Revents != 0:
			return false
		}
	}
}

// openProcess opens a descriptor of this very process, readable when it has ended.
func openProcess(p vm.ProcID) (int, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return 0, fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	if !p.Alive() {
		unix.Close(fd)
		return 0, fmt.Errorf("watch process %d: it has ended", p.PID)
	}
	return fd, nil
}
