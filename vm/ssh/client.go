package ssh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	gossh "golang.org/x/crypto/ssh"
)

const (
	clientVersion = "SSH-2.0-agentvm"

	keepAliveRequest = "keepalive@openssh.com"

	// maxGuestChannels bounds what the guest may have open towards the host.
	maxGuestChannels = 1024
)

// DialFunc opens the byte stream below an SSH connection.
type DialFunc func(ctx context.Context) (net.Conn, error)

// Config says who connects, and to whom.
type Config struct {
	User    string
	Key     gossh.Signer    // authenticates User; nil: the "none" method
	HostKey gossh.PublicKey // the only host key that is accepted

	// Emulated says that the guest's instructions are, which makes AES slow.
	Emulated bool

	// Attempt bounds one handshake. 0: 20 s, which an emulated guest under
	// load still meets.
	Attempt time.Duration

	// DialAttempt bounds one dial. 0: 2 s: short, because a guest without a
	// network yet answers nothing, and TCP asks again ever more rarely.
	DialAttempt time.Duration

	// KeepAlive is the pause between two keepalives, 0: 15 s, negative: none.
	KeepAlive time.Duration

	// KeepAliveTimeout is how long one may stay unanswered before the guest
	// counts as hung. 0: 90 s, long enough for a guest that thrashes.
	KeepAliveTimeout time.Duration

	// OnRetry, if set, is told why an attempt failed that will be repeated.
	OnRetry func(error)
}

func (c Config) withDefaults() Config {
	if c.Attempt == 0 {
		c.Attempt = 20 * time.Second
	}
	if c.DialAttempt == 0 {
		c.DialAttempt = 2 * time.Second
	}
	if c.KeepAlive == 0 {
		c.KeepAlive = 15 * time.Second
	}
	if c.KeepAliveTimeout == 0 {
		c.KeepAliveTimeout = 90 * time.Second
	}
	return c
}

// Client is one live SSH connection. Its methods may be called concurrently.
type Client struct {
	conn gossh.Conn

	done    chan struct{}
	failMu  sync.Mutex
	failure error // why this side closed; the first one wins
	err     error // set before done is closed

	// routeMu is held while a forward is being asked for, so that a channel
	// that the guest opens at once waits until its route exists.
	routeMu sync.Mutex
	routes  map[string]func(gossh.NewChannel)
	slots   chan struct{}

	resting atomic.Bool  // no keepalives are sent
	watches atomic.Int64 // how often that has changed
}

// newClient owns conn from now on.
func newClient(conn gossh.Conn, opens <-chan gossh.NewChannel, reqs <-chan *gossh.Request, cfg Config) *Client {
	c := &Client{
		conn:   conn,
		done:   make(chan struct{}),
		routes: make(map[string]func(gossh.NewChannel)),
		slots:  make(chan struct{}, maxGuestChannels),
	}
	go refuseRequests(reqs)
	go c.acceptChannels(opens)
	go c.wait()
	if cfg.KeepAlive > 0 {
		go c.keepAlive(cfg.KeepAlive, cfg.KeepAliveTimeout)
	}
	return c
}

// Watch says whether a guest that does not answer keepalives counts as hung,
// as it does at first. One that is paused does not.
func (c *Client) Watch(on bool) {
	c.resting.Store(!on)
	c.watches.Add(1)
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err tells why the connection ended, nil while it lives. It wraps
// [ErrClosed] after Close, [ErrHung] or [ErrConnection] otherwise.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Close ends the connection and everything that runs over it.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	<-c.done
	return nil
}

func (c *Client) fail(reason error) {
	c.failMu.Lock()
	if c.failure == nil {
		c.failure = reason
	}
	c.failMu.Unlock()
	c.conn.Close()
}

func (c *Client) wait() {
	err := c.conn.Wait()
	c.failMu.Lock()
	switch {
	case errors.Is(c.failure, ErrClosed):
		c.err = c.failure
	case c.failure != nil:
		c.err = fmt.Errorf("%w: %w", ErrConnection, c.failure)
	default:
		c.err = fmt.Errorf("%w: %w", ErrConnection, err)
	}
	c.failMu.Unlock()
	close(c.done)
}

// keepAlive notices a guest that is gone without a word. Any answer counts,
// a refusal too: it proves that sshd runs.
func (c *Client) keepAlive(every, timeout time.Duration) {
	for {
		select {
		case <-c.done:
			return
		case <-time.After(every):
		}
		watch := c.watches.Load()
		if c.resting.Load() {
			continue
		}
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			c.conn.SendRequest(keepAliveRequest, true, nil)
		}()
		select {
		case <-c.done:
			return
		case <-answered:
		case <-time.After(timeout):
			if watch != c.watches.Load() {
				continue // it was paused meanwhile
			}
			c.fail(ErrHung)
			return
		}
	}
}

// acceptChannels routes what the other side opens. Without a route it is
// refused.
func (c *Client) acceptChannels(opens <-chan gossh.NewChannel) {
	for open := range opens {
		if !routable(open.ChannelType()) {
			open.Reject(gossh.UnknownChannelType, "not accepted here")
			continue
		}
		select {
		case c.slots <- struct{}{}:
		default:
			open.Reject(gossh.ResourceShortage, "too many open channels")
			continue
		}
		go func() {
			defer func() { <-c.slots }()
			c.routeMu.Lock()
			route := c.routes[routeKey(open.ChannelType(), open.ExtraData())]
			c.routeMu.Unlock()
			if route == nil {
				open.Reject(gossh.Prohibited, "nobody asked for it")
				return
			}
			route(open)
		}()
	}
}

// refuseRequests answers what OpenSSH's sshd asks of a client: host key
// rotation, which a pinned key has no use for, and keepalives, for which any
// answer will do.
func refuseRequests(reqs <-chan *gossh.Request) {
	for r := range reqs {
		if r.WantReply {
			r.Reply(false, nil)
		}
	}
}

// openChannel opens a channel, or returns when ctx ends. An abandoned open is
// closed as soon as the other side confirms it.
func (c *Client) openChannel(ctx context.Context, kind string, extra []byte) (gossh.Channel, <-chan *gossh.Request, error) {
	type result struct {
		ch   gossh.Channel
		reqs <-chan *gossh.Request
		err  error
	}
	opened := make(chan result, 1)
	go func() {
		ch, reqs, err := c.conn.OpenChannel(kind, extra)
		opened <- result{ch, reqs, err}
	}()
	select {
	case r := <-opened:
		if r.err != nil {
			return nil, nil, c.channelError(kind, r.err)
		}
		return r.ch, r.reqs, nil
	case <-ctx.Done():
		go func() {
			if r := <-opened; r.err == nil {
				go gossh.DiscardRequests(r.reqs)
				r.ch.Close()
			}
		}()
		return nil, nil, context.Cause(ctx)
	}
}

// request sends a channel request and waits for its reply, or for ctx. The
// abandoned wait ends with the channel.
func (c *Client) request(ctx context.Context, ch gossh.Channel, name string, payload []byte) (bool, error) {
	type reply struct {
		ok  bool
		err error
	}
	got := make(chan reply, 1)
	go func() {
		ok, err := ch.SendRequest(name, true, payload)
		got <- reply{ok, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			return false, c.connectionError(fmt.Errorf("%s request: %w", name, r.err))
		}
		return r.ok, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

func (c *Client) channelError(kind string, err error) error {
	var refused *gossh.OpenChannelError
	if errors.As(err, &refused) {
		return fmt.Errorf("open %s channel: %s: %s", kind, refused.Reason, refused.Message)
	}
	return c.connectionError(fmt.Errorf("open %s channel: %w", kind, err))
}

// connectionError names the reason for which the connection ended, if it did.
func (c *Client) connectionError(err error) error {
	if reason := c.Err(); reason != nil {
		return fmt.Errorf("%w: %w", ErrConnection, reason)
	}
	return fmt.Errorf("%w: %w", ErrConnection, err)
}
