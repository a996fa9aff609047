package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
)

// DialGuest connects to a port or a unix socket as a program in the guest
// would. network is "tcp" (addr: host:port) or "unix" (addr: path).
func (c *Client) DialGuest(ctx context.Context, network, addr string) (net.Conn, error) {
	kind, payload, err := dialPayload(network, addr)
	if err != nil {
		return nil, err
	}
	ch, reqs, err := c.openChannel(ctx, kind, payload)
	if err != nil {
		return nil, fmt.Errorf("dial %s in the guest: %w", addr, err)
	}
	go gossh.DiscardRequests(reqs)
	return &channelConn{Channel: ch, network: network, addr: addr}, nil
}

func dialPayload(network, addr string) (kind string, payload []byte, err error) {
	switch network {
	case "tcp":
		host, port, err := splitPort(addr)
		if err != nil {
			return "", nil, err
		}
		return directTCPIP, gossh.Marshal(&openedMsg{host, port, "127.0.0.1", 0}), nil
	case "unix":
		return directStreamlocal, gossh.Marshal(&struct {
			Path, Reserved string
			ReservedPort   uint32
		}{Path: addr}), nil
	}
	return "", nil, fmt.Errorf("no network %q in the guest", network)
}

func splitPort(addr string) (host string, port uint32, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q is no port number", p)
	}
	return host, uint32(n), nil
}

// ForwardLocal connects each connection that arrives on ln, on the host, to
// addr in the guest. It returns when ctx or the connection to the guest ends,
// with ln and every forwarded connection closed. onError, if set, is told of
// each connection that found nobody in the guest.
func (c *Client) ForwardLocal(ctx context.Context, ln net.Listener, network, addr string, onError func(error)) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	go func() {
		select {
		case <-c.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		near, err := ln.Accept()
		if err != nil {
			if reason := c.Err(); reason != nil {
				return reason
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		}
		conns.Go(func() {
			far, err := c.DialGuest(ctx, network, addr)
			if err != nil {
				near.Close()
				if onError != nil && ctx.Err() == nil {
					onError(err)
				}
				return
			}
			join(ctx, near, far)
		})
	}
}

// ForwardRemote listens on addr in the guest and connects each connection
// there to what dial returns. The guest decides when: dial must reach nothing
// that the user did not name. bound gets the guest's address once it listens;
// ForwardRemote returns when ctx or the connection to the guest ends.
func (c *Client) ForwardRemote(ctx context.Context, addr string, dial DialFunc, bound func(addr string), onError func(error)) error {
	host, port, err := splitPort(addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex // orders conns.Go before conns.Wait
	var conns sync.WaitGroup
	accept := func(open gossh.NewChannel) {
		mu.Lock()
		if ctx.Err() != nil {
			mu.Unlock()
			open.Reject(gossh.Prohibited, "no longer forwarded")
			return
		}
		conns.Add(1)
		mu.Unlock()
		defer conns.Done()
		if err := acceptForwarded(ctx, open, dial); err != nil && onError != nil {
			onError(err)
		}
	}
	f, reply, err := c.listen(tcpipForward, gossh.Marshal(&listenMsg{host, port}), accept)
	if err != nil {
		cancel()
		return fmt.Errorf("listen on %s in the guest: %w", addr, err)
	}
	defer func() {
		c.unlisten(f)
		mu.Lock()
		cancel()
		mu.Unlock()
		conns.Wait()
	}()
	if bound != nil {
		var m struct{ Port uint32 }
		if port == 0 && gossh.Unmarshal(reply, &m) == nil {
			port = m.Port
		}
		bound(net.JoinHostPort(host, strconv.Itoa(int(port))))
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.Err()
	}
}

func acceptForwarded(ctx context.Context, open gossh.NewChannel, dial DialFunc) error {
	near, err := dial(ctx)
	if err != nil {
		open.Reject(gossh.ConnectionFailed, "nobody listens on the host")
		return err
	}
	ch, reqs, err := open.Accept()
	if err != nil {
		near.Close()
		return err
	}
	go gossh.DiscardRequests(reqs)
	join(ctx, near, &channelConn{Channel: ch, network: "tcp", addr: "guest"})
	return nil
}

// join copies both ways until both ends have finished, passes on each half's
// end, and closes both. When ctx ends, so do they.
func join(ctx context.Context, a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	defer context.AfterFunc(ctx, func() { a.Close(); b.Close() })()
	var halves sync.WaitGroup
	half := func(to, from net.Conn) {
		io.Copy(to, from)
		if w, ok := to.(interface{ CloseWrite() error }); !ok || w.CloseWrite() != nil {
			to.Close()
		}
	}
	halves.Go(func() { half(a, b) })
	halves.Go(func() { half(b, a) })
	halves.Wait()
}

// channelConn is a channel seen as a connection. It has no deadlines.
type channelConn struct {
	gossh.Channel
	network, addr string
}

type channelAddr struct{ network, addr string }

func (a channelAddr) Network() string { return a.network }
func (a channelAddr) String() string  { return a.addr }

var errNoDeadline = errors.New("an ssh channel has no deadlines")

func (c *channelConn) LocalAddr() net.Addr              { return channelAddr{c.network, "host"} }
func (c *channelConn) RemoteAddr() net.Addr             { return channelAddr{c.network, c.addr} }
func (c *channelConn) SetDeadline(time.Time) error      { return errNoDeadline }
func (c *channelConn) SetReadDeadline(time.Time) error  { return errNoDeadline }
func (c *channelConn) SetWriteDeadline(time.Time) error { return errNoDeadline }
