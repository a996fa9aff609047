package network

import (
	"context"
	"io"
	"net"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

const relayBuffer = 64 << 10

// guestConn is the guest's side of a flow.
type guestConn struct {
	*gonet.TCPConn
	ep tcpip.Endpoint
}

// abort resets the connection: an orderly end would tell the guest that it
// has received everything.
func (c *guestConn) abort() { c.ep.Abort() }

// checkFunc reads the guest's first bytes and returns them if they may go on.
type checkFunc func() ([]byte, error)

// relay copies both ways until both directions have ended, or one has failed
// or ctx has, which resets both. It returns the bytes from and to the guest.
func relay(ctx context.Context, guest *guestConn, upstream net.Conn, check checkFunc) (sent, received int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	aborted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(aborted)
		guest.abort()
		if c, ok := upstream.(*net.TCPConn); ok {
			_ = c.SetLinger(0)
		}
		_ = upstream.Close()
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		var err error
		if sent, err = relayUp(upstream, guest, check); err != nil {
			cancel(err)
		}
	})
	wg.Go(func() {
		var err error
		if received, err = copyHalf(guest, upstream); err != nil {
			cancel(err)
		}
	})
	wg.Wait()
	if !stop() {
		<-aborted
	}
	return sent, received, context.Cause(ctx)
}

func relayUp(upstream net.Conn, guest *guestConn, check checkFunc) (int64, error) {
	if check == nil {
		return copyHalf(upstream, guest)
	}
	first, err := check()
	if err != nil {
		return 0, err
	}
	n, err := upstream.Write(first)
	if err != nil {
		return int64(n), err
	}
	rest, err := copyHalf(upstream, guest)
	return int64(n) + rest, err
}

// copyHalf copies one direction and passes its end on.
func copyHalf(dst, src net.Conn) (int64, error) {
	// The wrapper hides ReadFrom and WriteTo, which would bring buffers of
	// their own and splice nothing: one side is not a socket.
	n, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, relayBuffer))
	if err != nil {
		return n, err
	}
	return n, closeWrite(dst)
}

func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return nil
}
