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

	// upstreamTime bounds the wait for a guest that is not connected.
	upstreamTime = 30 * time.Second

	// drainTime is how long data may take to reach a side that goes away.
	drainTime = 5 * time.Second

	// hungTime is how long a Proxy waits for its clients to end.
	hungTime = 3 * time.Second
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
// all of them, and returns when nothing of them is left; a guest that hangs
// delays that by 3 s at most, and what then waits for an answer of it
// ends with the connection to it.
func (p *Proxy) Serve(ctx context.Context, ln net.Listener) error {
	config := &gossh.ServerConfig{NoClientAuth: true, ServerVersion: clientVersion}
	config.AddHostKey(p.HostKey)

	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	var clients sync.WaitGroup
	defer waitAtMost(&clients, hungTime)
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

func waitAtMost(wg *sync.WaitGroup, limit time.Duration) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(limit):
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
	up, upErr := p.upstream(ctx, conn)
	d := &downstream{conn: conn, up: up, upErr: upErr, allow: p.Allow}
	if d.allow == nil {
		d.allow = AllowChannel
	}
	d.run(opens, reqs)
	return nil
}

// upstream gives up when the client does.
func (p *Proxy) upstream(ctx context.Context, conn gossh.Conn) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTime)
	defer cancel()
	go func() {
		conn.Wait()
		cancel()
	}()
	return p.Upstream(ctx)
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
