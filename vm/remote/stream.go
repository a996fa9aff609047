package remote

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// Conn makes a connection of a call's streams, once what they began with has
// been read. Its Close ends the call, and says what ssh had to say.
func (k *Call) Conn() net.Conn { return &callConn{call: k} }

type callConn struct {
	call *Call
	once sync.Once
	err  error
}

func (c *callConn) Read(p []byte) (int, error)  { return c.call.Out.Read(p) }
func (c *callConn) Write(p []byte) (int, error) { return c.call.In.Write(p) }

// CloseWrite ends what goes there.
func (c *callConn) CloseWrite() error { return c.call.In.Close() }

func (c *callConn) Close() error {
	c.once.Do(func() {
		if c.err = c.call.End(net.ErrClosed); errors.Is(c.err, net.ErrClosed) {
			c.err = nil
		}
	})
	return c.err
}

func (c *callConn) LocalAddr() net.Addr              { return callAddr{} }
func (c *callConn) RemoteAddr() net.Addr             { return callAddr{} }
func (c *callConn) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (c *callConn) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (c *callConn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// callAddr is the address of what has none.
type callAddr struct{}

func (callAddr) Network() string { return "ssh" }
func (callAddr) String() string  { return "ssh" }
