package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

// DefaultTimeout bounds a command whose context has no deadline.
const DefaultTimeout = 30 * time.Second

// Client is one connection to a QEMU monitor. It is safe for concurrent use.
type Client struct {
	conn    net.Conn
	version qmp.Version

	writing chan struct{} // holds one token: whoever has it may write

	mu      sync.Mutex
	lastID  uint64
	waiting map[string]chan message // by command id
	subs    map[*Subscription]struct{}

	done chan struct{} // closed after err is set
	err  error
}

var _ qmp.Monitor = (*Client)(nil)

// Dial connects to the monitor that listens on a unix socket and negotiates
// with it. A monitor serves one client at a time and keeps a second one
// waiting until ctx ends.
func Dial(ctx context.Context, socket string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to monitor: %w", err)
	}
	return NewClient(ctx, conn)
}

// NewClient negotiates over conn, which it then owns and closes also when it
// fails.
func NewClient(ctx context.Context, conn net.Conn) (*Client, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()

	r := bufio.NewReader(conn)
	hello, err := readGreeting(ctx, conn, r)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("monitor greeting: %w", err)
	}
	c := &Client{
		conn:    conn,
		version: hello.Version,
		writing: make(chan struct{}, 1),
		waiting: make(map[string]chan message),
		subs:    make(map[*Subscription]struct{}),
		done:    make(chan struct{}),
	}
	go c.read(r)
	// The reader already runs, so an event before the reply is no trouble.
	if _, err := c.RunContext(ctx, []byte(`{"execute":"qmp_capabilities"}`)); err != nil {
		c.Close()
		return nil, fmt.Errorf("monitor negotiation: %w", err)
	}
	return c, nil
}

func readGreeting(ctx context.Context, conn net.Conn, r *bufio.Reader) (*greeting, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	for {
		m, err := readMessage(r, MaxMessage)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			stop()
			return nil, err
		}
		if m.Greeting == nil {
			continue
		}
		if !stop() { // too late: the connection's deadline is set
			return nil, context.Cause(ctx)
		}
		return m.Greeting, nil
	}
}

// bounded gives ctx a deadline where it has none.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, DefaultTimeout,
		fmt.Errorf("no reply from qemu within %v: %w", DefaultTimeout, context.DeadlineExceeded))
}

// Version is QEMU's version, as it said when we connected.
func (c *Client) Version() qmp.Version { return c.version }

// Done is closed when the connection has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is nil while the connection lives, and then wraps ErrClosed.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Close ends the connection and waits for the reader to end. QEMU lives on.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Connect implements qmp.Monitor. A Client is connected from the start.
func (c *Client) Connect() error { return c.Err() }

// Disconnect implements qmp.Monitor; it is Close.
func (c *Client) Disconnect() error { return c.Close() }

// Run implements qmp.Monitor: RunContext bounded by DefaultTimeout.
func (c *Client) Run(command []byte) ([]byte, error) {
	return c.RunContext(context.Background(), command)
}

// RunContext sends a command, a JSON object with "execute" and maybe
// "arguments", and returns QEMU's whole reply. QEMU's refusal is an *Error.
func (c *Client) RunContext(ctx context.Context, command []byte) ([]byte, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()

	id, answer := c.expect()
	defer c.forget(id)
	line, name, err := encodeCommand(command, id)
	if err != nil {
		return nil, err
	}
	if err := c.send(ctx, line); err != nil {
		return nil, fmt.Errorf("qmp %s: %w", name, err)
	}
	select {
	case m := <-answer:
		return reply(m, name)
	case <-ctx.Done():
		return nil, fmt.Errorf("qmp %s: %w", name, context.Cause(ctx))
	case <-c.done:
		select {
		case m := <-answer: // the last words count
			return reply(m, name)
		default:
			return nil, fmt.Errorf("qmp %s: %w", name, c.err)
		}
	}
}

func reply(m message, name string) ([]byte, error) {
	if m.Error != nil {
		return nil, &Error{Class: m.Error.Class, Desc: m.Error.Desc, Command: name}
	}
	return m.line, nil
}

func (c *Client) expect() (id string, answer chan message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastID++
	id = strconv.FormatUint(c.lastID, 10)
	answer = make(chan message, 1)
	c.waiting[id] = answer
	return id, answer
}

func (c *Client) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

// send writes a whole line or nothing; half a line would spoil the stream, so
// then the connection ends.
func (c *Client) send(ctx context.Context, line []byte) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.conn.SetWriteDeadline(time.Time{})
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		c.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	n, err := c.conn.Write(line)
	if !stop() {
		<-interrupted // else it could strike the next writer
	}
	if err == nil {
		return nil
	}
	if n > 0 {
		c.conn.Close()
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return &closedError{err}
}

// read is the one reader of the connection. It never waits for anything but
// QEMU, and ends when the connection does.
func (c *Client) read(r *bufio.Reader) {
	for {
		m, err := readMessage(r, MaxMessage)
		if err == nil {
			err = c.dispatch(m)
		}
		if err != nil {
			c.conn.Close()
			c.end(&closedError{err})
			return
		}
	}
}

func (c *Client) dispatch(m message) error {
	if m.Event != "" {
		ev, err := decodeEvent(m)
		if err == nil {
			c.publish(ev)
		}
		return err
	}
	var id string
	if json.Unmarshal(m.ID, &id) != nil {
		// Only a command that QEMU could not parse is answered without its
		// id, and we send none such.
		return fmt.Errorf("reply %.80q answers no command", m.line)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer, ok := c.waiting[id]; ok {
		delete(c.waiting, id)
		answer <- m // has room for its only message
	}
	return nil
}

func (c *Client) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	close(c.done)
	for s := range c.subs {
		c.drop(s)
	}
}
