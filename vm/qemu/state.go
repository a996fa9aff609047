package qemu

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"

	goqemu "github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sync/errgroup"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
)

// maxState bounds what QEMU may give as its devices' state, which is below a
// megabyte, in bytes.
const maxState = 256 << 20

// Save pauses the machine and returns the state of its devices. Its memory is
// a shared file, which has to be kept beside it. The machine stays paused; no
// vhost-user share may be plugged in. socket is a path that QEMU, running as
// runAs, may connect to.
func Save(ctx context.Context, mon goqemu.Monitor, socket string, runAs *vm.Owner) ([]byte, error) {
	if err := qmp.Stop(ctx, mon); err != nil {
		return nil, fmt.Errorf("save the machine: %w", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("save the machine: %w", err)
	}
	defer l.Close()
	if err = os.Chmod(socket, 0o600); err == nil && runAs != nil {
		err = os.Chown(socket, runAs.UID, runAs.GID)
	}
	if err != nil {
		return nil, fmt.Errorf("save the machine: %w", err)
	}
	var state bytes.Buffer
	var receive errgroup.Group
	receive.Go(func() error {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		if n, err := io.Copy(&state, io.LimitReader(conn, maxState)); err != nil || n == maxState {
			return fmt.Errorf("received %d bytes: %w", n, err)
		}
		return nil
	})
	if err := qmp.SaveState(ctx, mon, "unix:"+socket); err != nil {
		l.Close()
		_ = receive.Wait()
		return nil, fmt.Errorf("save the machine: %w", err)
	}
	if err := receive.Wait(); err != nil {
		return nil, fmt.Errorf("save the machine: %w", err)
	}
	return state.Bytes(), nil
}

// Restore gives a machine that was started with Saved, and has its memory, the
// state of its devices. The machine is paused then. socket is a path that QEMU
// may make.
func Restore(ctx context.Context, mon goqemu.Monitor, socket string, state []byte) error {
	err := qmp.LoadState(ctx, mon, "unix:"+socket, func() error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		_, err = conn.Write(state)
		return err
	})
	if err != nil {
		return fmt.Errorf("restore the machine: %w", err)
	}
	return nil
}
