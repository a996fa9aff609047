package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// serialConsole is where QEMU connects the guest's console to. Libvirt tells no
// process number; who connects here is the machine's QEMU, and the kernel says
// which process that is.
type serialConsole struct {
	l    *net.UnixListener
	file *os.File // receives what the guest says
	done chan struct{}
}

// listenConsole listens on socket for QEMU alone, which runs as owner (nil: as
// us). What the guest says goes to file.
func listenConsole(socket, file string, owner *vm.Owner) (*serialConsole, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the console: %w", err)
	}
	c := &serialConsole{l: l, done: make(chan struct{})}
	if err = os.Chmod(socket, 0o600); err == nil && owner != nil {
		err = os.Chown(socket, owner.UID, owner.GID)
	}
	if err == nil {
		// Appending lets the log be cut short while it is written to.
		c.file, err = os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for the console: %w", err)
	}
	return c, nil
}

// accept waits for QEMU, and begins to write down what the guest says.
func (c *serialConsole) accept(ctx context.Context) (vm.ProcID, error) {
	stop := context.AfterFunc(ctx, func() { c.l.Close() })
	defer stop()
	conn, err := c.l.AcceptUnix()
	if err != nil {
		close(c.done)
		c.file.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return vm.ProcID{}, fmt.Errorf("wait for QEMU: %w", err)
	}
	go func() {
		defer close(c.done)
		defer c.file.Close()
		defer conn.Close()
		_, _ = io.Copy(c.file, conn) // until QEMU ends
	}()
	id, err := peer(conn)
	if err != nil {
		conn.Close()
		return id, fmt.Errorf("find QEMU's process: %w", err)
	}
	return id, nil
}

// peer identifies the process that connected (SO_PEERCRED, unix(7)).
func peer(conn *net.UnixConn) (vm.ProcID, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return vm.ProcID{}, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, credErr); err != nil {
		return vm.ProcID{}, err
	}
	return vm.ProcessID(int(cred.Pid))
}
