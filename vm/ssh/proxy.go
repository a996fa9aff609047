package ssh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

const (
	// proxyHandshake bounds a local client's handshake.
	proxyHandshake = 10 * time.Second

	// drainTime is how long data may take to reach a side that goes away.
	drainTime = 5 * time.Second
)

// Proxy is an SSH server for local clients that hands every channel to the
// one connection to the guest. It presents the guest's own host key, so that
// a client that pins it cannot tell the two apart. It authenticates nobody
// over SSH: the unix socket's mode and the peer's uid decide who may connect.
type Proxy struct {
	// HostKey is the guest's.
	HostKey gossh.Signer

	// Upstream returns the connection to the guest. It is called for each
	// local client, and may connect first.
	Upstream func(context.Context) (*Client, error)

	// Allow decides about every kind of channel that either side opens and
	// of listener that a client asks for (by its SSH name: "session",
	// "direct-tcpip", "tcpip-forward", "auth-agent@openssh.com", ...).
	// nil: [AllowChannel].
	Allow func(kind string) error

	// Log, if set, gets refused peers and failed handshakes.
	Log *slog.Logger
}

// AllowChannel is the default policy: everything that a user asks for, except
// lending the host's SSH agent to the guest.
func AllowChannel(kind string) error {
	switch kind {
	case sessionChannel, directTCPIP, directStreamlocal, tcpipForward, streamlocalForward:
		return nil
	}
	return fmt.Errorf("%w: %s", vm.ErrPolicy, kind)
}

// Serve accepts clients on ln, a unix listener, until ctx ends. Then it ends
// all of them, and returns when nothing of them is left. A guest that hangs
// holds that up until the connection to it is closed too.
func (p *Proxy) Serve(ctx context.Context, ln net.Listener) error {
	config := &gossh.ServerConfig{NoClientAuth: true, ServerVersion: clientVersion}
	config.AddHostKey(p.HostKey)

	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	for {
		nc, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept ssh clients on %s: %w", ln.Addr(), err)
		}
		clients.Go(func() {
			if err := p.serve(ctx, nc, config); err != nil && ctx.Err() == nil && p.Log != nil {
				p.Log.Warn("local ssh client", "err", err)
			}
		})
	}
}

func (p *Proxy) serve(ctx context.Context, nc net.Conn, config *gossh.ServerConfig) error {
	defer nc.Close()
	if err := checkPeer(nc); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { nc.Close() })()

	nc.SetDeadline(time.Now().Add(proxyHandshake))
	conn, opens, reqs, err := gossh.NewServerConn(nc, config)
	if err != nil {
		return err
	}
	nc.SetDeadline(time.Time{})

	// A guest that cannot be reached is reported per channel: that is the
	// first place where OpenSSH shows a message to its user.
	up, upErr := p.Upstream(ctx)
	d := &downstream{conn: conn, up: up, upErr: upErr, allow: p.Allow}
	if d.allow == nil {
		d.allow = AllowChannel
	}
	d.run(opens, reqs)
	return nil
}

// checkPeer lets in the supervisor's own user and root.
func checkPeer(nc net.Conn) error {
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("refuse a peer over %T: it has no credentials", nc)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("peer credentials: %w", credErr)
	}
	if !peerAllowed(int(cred.Uid), os.Getuid()) {
		return fmt.Errorf("%w: uid %d may not use the socket of uid %d", vm.ErrPolicy, cred.Uid, os.Getuid())
	}
	return nil
}

func peerAllowed(peer, self int) bool { return peer == self || peer == 0 }

// downstream is one local client of the proxy.
type downstream struct {
	conn  gossh.Conn
	up    *Client
	upErr error // why there is no up
	allow func(kind string) error

	mu       sync.Mutex
	final    bool      // no-more-sessions was asked for
	agent    bool      // the guest's agent channels come here
	forwards []forward // listeners in the guest
	splices  sync.WaitGroup
}

func (d *downstream) run(opens <-chan gossh.NewChannel, reqs <-chan *gossh.Request) {
	var requests sync.WaitGroup
	requests.Go(func() {
		for r := range reqs {
			d.request(r)
		}
	})
	defer requests.Wait()

	var upGone <-chan struct{}
	if d.up != nil {
		upGone = d.up.Done()
	}
	for {
		select {
		case open, ok := <-opens:
			if !ok {
				requests.Wait()
				d.cleanUp()
				d.splices.Wait()
				return
			}
			d.splices.Go(func() { d.open(open) })
		case <-upGone:
			d.guestGone(opens)
			return
		}
	}
}

// guestGone ends this client after what the guest said last has reached it.
func (d *downstream) guestGone(opens <-chan gossh.NewChannel) {
	var refusals sync.WaitGroup
	refusals.Go(func() {
		for open := range opens {
			open.Reject(gossh.ConnectionFailed, "the guest is gone")
		}
	})
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		d.splices.Wait()
	}()
	select {
	case <-drained:
	case <-time.After(drainTime):
	}
	d.conn.Close()
	<-drained
	refusals.Wait()
}

// cleanUp gives back what this client had in the guest.
func (d *downstream) cleanUp() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.forwards {
		d.up.unlisten(f)
	}
	if d.agent {
		d.up.unroute(authAgent)
	}
}

// request answers a global request of the client.
func (d *downstream) request(r *gossh.Request) {
	ok, reply := d.handle(r)
	if r.WantReply {
		r.Reply(ok, reply)
	}
}

func (d *downstream) handle(r *gossh.Request) (ok bool, reply []byte) {
	if r.Type == noMoreSessions {
		// OpenSSH's client means its own connection, not the shared one.
		d.mu.Lock()
		d.final = true
		d.mu.Unlock()
		return true, nil
	}
	if d.up == nil {
		return false, nil
	}
	switch r.Type {
	case tcpipForward, streamlocalForward:
		return d.listen(r)
	case cancelTCPIPForward, cancelStreamlocalForward:
		return d.unlisten(r), nil
	case keepAliveRequest:
		ok, reply, _ = d.up.conn.SendRequest(r.Type, r.WantReply, r.Payload)
		return ok, reply
	}
	return false, nil
}

func (d *downstream) listen(r *gossh.Request) (ok bool, reply []byte) {
	if d.allow(r.Type) != nil {
		return false, nil
	}
	f, reply, err := d.up.listen(r.Type, r.Payload, d.openBack)
	if err != nil {
		return false, reply
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forwards = append(d.forwards, f)
	return true, reply
}

func (d *downstream) unlisten(r *gossh.Request) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, f := range d.forwards {
		if f.cancel == r.Type && string(f.msg) == string(r.Payload) {
			d.forwards = append(d.forwards[:i], d.forwards[i+1:]...)
			d.up.unlisten(f)
			return true
		}
	}
	return false
}

// open opens upstream what the client wants to open.
func (d *downstream) open(open gossh.NewChannel) {
	kind := open.ChannelType()
	if err := d.allow(kind); err != nil {
		open.Reject(gossh.Prohibited, err.Error())
		return
	}
	d.mu.Lock()
	refuse := d.final && kind == sessionChannel
	d.mu.Unlock()
	if refuse {
		open.Reject(gossh.Prohibited, "no more sessions were promised")
		return
	}
	if d.up == nil {
		open.Reject(gossh.ConnectionFailed, d.upErr.Error())
		return
	}
	s := &splice{session: kind == sessionChannel, filter: d.filter}
	if s.join(open, d.up.conn, false) {
		s.run()
	}
}

// openBack opens at the client what the guest wants to open.
func (d *downstream) openBack(open gossh.NewChannel) {
	s := &splice{filter: d.filter}
	if s.join(open, d.conn, true) {
		s.run()
	}
}

// filter decides about a channel request of the client: false refuses it.
func (d *downstream) filter(r *gossh.Request) bool {
	switch r.Type {
	case "x11-req":
		return false
	case "auth-agent-req@openssh.com":
		if d.allow(authAgent) != nil {
			return false
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.agent = true
		d.up.route(authAgent, d.openBack)
	}
	return true
}
