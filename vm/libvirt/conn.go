package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/agentvm/agentvm/vm"
)

// DefaultTimeout bounds a call whose context has no deadline.
const DefaultTimeout = 30 * time.Second

// minVersion is the first libvirt with everything that a domain of ours says:
// what a machine with cards needs came last. QEMU as new as we need is not found
// beside an older one.
const minVersion = 8_007_000 // 8.7.0

// ErrLost means that the connection ended before libvirt answered. What was
// asked for may have been done.
var ErrLost = errors.New("the connection to libvirt was lost")

// Conn is a way to a libvirt. It connects when it is first needed, and again
// when the connection has been lost. It is safe for concurrent use.
type Conn struct {
	uri    URI
	getenv func(string) string

	connecting chan struct{} // holds one token: whoever has it may connect

	mu     sync.Mutex
	live   *link // nil: not connected
	closed bool
}

// link is one connection.
type link struct {
	rpc  *golibvirt.Libvirt
	sock net.Conn
}

// Open connects to a libvirt and makes sure that it is one that can be used.
func Open(ctx context.Context, uri URI) (*Conn, error) {
	c := newConn(uri)
	ctx, cancel := bounded(ctx)
	defer cancel()
	if _, err := c.connected(ctx); err != nil {
		return nil, err
	}
	version, err := call(ctx, c, "ask libvirt for its version", (*golibvirt.Libvirt).ConnectGetLibVersion)
	if err == nil && version < minVersion {
		err = vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("libvirt %s at %s is too old", versionText(version), uri.Text)),
			"use libvirt "+versionText(minVersion)+" or newer (Debian 12 and later have it), or backend: qemu")
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func newConn(uri URI) *Conn {
	return &Conn{uri: uri, getenv: os.Getenv, connecting: make(chan struct{}, 1)}
}

// Version is libvirt's version as text.
func (c *Conn) Version(ctx context.Context) (string, error) {
	v, err := call(ctx, c, "ask libvirt for its version", (*golibvirt.Libvirt).ConnectGetLibVersion)
	return versionText(v), err
}

// versionText writes a version as people do
// (https://libvirt.org/html/libvirt-libvirt-host.html#virConnectGetLibVersion).
func versionText(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

// Close ends the connection, and every call under way with it.
func (c *Conn) Close() error {
	c.mu.Lock()
	c.closed = true
	live := c.live
	c.live = nil
	c.mu.Unlock()
	if live == nil {
		return nil
	}
	// go-libvirt's own Disconnect asks first and waits for an answer.
	return live.sock.Close()
}

// drop forgets a connection that is of no use any more.
func (c *Conn) drop(l *link) {
	c.mu.Lock()
	if c.live == l {
		c.live = nil
	}
	c.mu.Unlock()
	_ = l.sock.Close() // lost already, or about to be
}

// call asks libvirt something and returns by ctx's deadline, or DefaultTimeout's
// where it has none. go-libvirt knows no contexts: its call ends because its
// connection is closed.
func call[T any](ctx context.Context, c *Conn, what string, ask func(*golibvirt.Libvirt) (T, error)) (T, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	var none T
	l, err := c.connected(ctx)
	if err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	type result struct {
		value T
		err   error
	}
	ended := make(chan result, 1)
	go func() {
		value, err := ask(l.rpc)
		ended <- result{value, err}
	}()
	select {
	case r := <-ended:
		if lost(r.err) {
			c.drop(l)
			r.err = fmt.Errorf("%w: %v", ErrLost, r.err)
		}
		if r.err != nil {
			return none, fmt.Errorf("%s: %w", what, r.err)
		}
		return r.value, nil
	case <-ctx.Done():
		c.drop(l)
		return none, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
}

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, DefaultTimeout,
		vm.Classify(vm.ErrTimeout, fmt.Errorf("no answer from libvirt within %v: %w", DefaultTimeout, context.DeadlineExceeded)))
}

// lost tells the end of a connection from an answer that says no.
func lost(err error) bool {
	var op *net.OpError
	return errors.Is(err, golibvirt.ErrInterrupted) || errors.Is(err, syscall.EINVAL) || errors.Is(err, net.ErrClosed) || errors.As(err, &op)
}

// connected returns the connection, making it where there is none.
func (c *Conn) connected(ctx context.Context) (*link, error) {
	select {
	case c.connecting <- struct{}{}:
		defer func() { <-c.connecting }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	c.mu.Lock()
	live, closed := c.live, c.closed
	c.mu.Unlock()
	if closed {
		return nil, net.ErrClosed
	}
	if live != nil && live.rpc.IsConnected() {
		return live, nil
	}
	l, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		l.sock.Close()
		return nil, net.ErrClosed
	}
	c.live = l
	return l, nil
}

// connect makes a connection and introduces itself on it.
func (c *Conn) connect(ctx context.Context) (*link, error) {
	sock, err := c.uri.dial(ctx, c.getenv)
	if err != nil {
		return nil, err
	}
	l := &link{rpc: golibvirt.NewWithDialer(dialed{sock}), sock: sock}
	stop := context.AfterFunc(ctx, func() { sock.Close() })
	defer stop()
	if err = l.rpc.ConnectToURI(golibvirt.ConnectURI(c.uri.driver())); err == nil {
		// A question that every libvirt answers: it shows that the way is open,
		// and go-libvirt shares what it knows of the connection with its reader.
		_, err = l.rpc.ConnectGetType()
	}
	if err == nil {
		return l, nil
	}
	sock.Close()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, c.uri.refused(err)
}

// refused explains a libvirt that is there and does not want us.
func (u URI) refused(err error) error {
	wrapped := vm.Classify(vm.ErrHost, fmt.Errorf("connect to libvirt at %s: %w", u.Text, err))
	var said golibvirt.Error
	if !errors.As(err, &said) {
		return wrapped
	}
	switch golibvirt.ErrorNumber(said.Code) {
	case golibvirt.ErrAuthFailed, golibvirt.ErrAuthCancelled, golibvirt.ErrAuthUnavailable, golibvirt.ErrAccessDenied:
		return vm.WithHint(wrapped, joinLibvirt)
	}
	return wrapped
}

// dialed gives go-libvirt a connection that is there already.
type dialed struct{ conn net.Conn }

func (d dialed) Dial() (net.Conn, error) { return d.conn, nil }
