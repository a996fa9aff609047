package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	gossh "golang.org/x/crypto/ssh"
)

const (
	retryFirst = 50 * time.Millisecond
	retryMax   = 250 * time.Millisecond

	// authPatience is how long a guest may refuse the key before that is
	// final. While it boots, pam_nologin or a missing authorized_keys file
	// refuses it too.
	authPatience = 30 * time.Second
)

// Connect opens the connection to the guest and retries until ctx ends: while
// a guest boots, refused and reset connections and silence are all normal. It
// returns at once on [ErrHostKey], and on [ErrAuth] when that persists.
func Connect(ctx context.Context, dial DialFunc, cfg Config) (*Client, error) {
	cfg = cfg.withDefaults()
	pause := retryFirst
	var refusedSince time.Time
	var last error
	for {
		client, err := connectOnce(ctx, dial, cfg)
		// An attempt that ctx cut short says less than the one before it.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		switch {
		case err == nil:
			return client, nil
		case errors.Is(err, ErrHostKey):
			return nil, err
		case ctx.Err() != nil:
			return nil, fmt.Errorf("connect to the guest: %w: %w", context.Cause(ctx), last)
		case !errors.Is(err, ErrAuth):
			refusedSince = time.Time{}
		case refusedSince.IsZero():
			refusedSince = time.Now()
		case time.Since(refusedSince) > authPatience:
			return nil, err
		}
		if cfg.OnRetry != nil {
			cfg.OnRetry(err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to the guest: %w: %w", context.Cause(ctx), last)
		case <-time.After(pause):
		}
		pause = min(pause*2, retryMax)
	}
}

func connectOnce(ctx context.Context, dial DialFunc, cfg Config) (*Client, error) {
	dialCtx, stop := context.WithTimeout(ctx, cfg.DialAttempt)
	nc, err := dial(dialCtx)
	stop()
	if err != nil {
		return nil, fmt.Errorf("dial the guest: %w", err)
	}
	ctx, stop = context.WithTimeout(ctx, cfg.Attempt)
	defer stop()
	return handshake(ctx, nc, cfg)
}

// handshake owns nc: it closes it on failure.
func handshake(ctx context.Context, nc net.Conn, cfg Config) (*Client, error) {
	// Closing is the only interruption that every net.Conn understands.
	stop := context.AfterFunc(ctx, func() { nc.Close() })

	var mismatch, tried bool
	conn, opens, reqs, err := gossh.NewClientConn(nc, "guest", clientConfig(cfg, &mismatch, &tried))
	if !stop() && err == nil {
		conn.Close()
		err = context.Cause(ctx)
	}
	switch {
	case err == nil:
		return newClient(conn, opens, reqs, cfg), nil
	case mismatch:
		return nil, fmt.Errorf("ssh handshake with the guest: %w (want %s)", ErrHostKey, gossh.FingerprintSHA256(cfg.HostKey))
	case ctx.Err() != nil:
		return nil, fmt.Errorf("ssh handshake with the guest: %w", context.Cause(ctx))
	case tried && !broken(err):
		return nil, fmt.Errorf("log in to the guest as %s: %w", cfg.User, ErrAuth)
	}
	return nil, fmt.Errorf("ssh handshake with the guest: %w", err)
}

// broken tells a stream that ended from a server that said no.
func broken(err error) bool {
	var ne net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.As(err, &ne)
}

func clientConfig(cfg Config, mismatch, tried *bool) *gossh.ClientConfig {
	cc := &gossh.ClientConfig{
		User:          cfg.User,
		ClientVersion: clientVersion,
		HostKeyCallback: func(_ string, _ net.Addr, key gossh.PublicKey) error {
			if !bytes.Equal(key.Marshal(), cfg.HostKey.Marshal()) {
				*mismatch = true
				return ErrHostKey
			}
			return nil
		},
		HostKeyAlgorithms: hostKeyAlgorithms(cfg.HostKey),
	}
	// An emulated guest takes 1.2 s for a handshake with the post-quantum
	// mlkem768x25519, which protects against a recording adversary that a
	// connection within one host does not have, and 1.0 s with this one.
	cc.KeyExchanges = []string{gossh.KeyExchangeCurve25519}
	cc.Ciphers = []string{gossh.CipherAES128GCM, gossh.CipherChaCha20Poly1305, gossh.CipherAES128CTR}
	if cfg.Emulated { // 1.4 times as many bytes a second
		cc.Ciphers = []string{gossh.CipherChaCha20Poly1305, gossh.CipherAES128GCM, gossh.CipherAES128CTR}
	}
	if cfg.Key != nil {
		cc.Auth = []gossh.AuthMethod{gossh.PublicKeysCallback(func() ([]gossh.Signer, error) {
			*tried = true
			return []gossh.Signer{cfg.Key}, nil
		})}
	}
	return cc
}

func hostKeyAlgorithms(key gossh.PublicKey) []string {
	if key.Type() == gossh.KeyAlgoRSA {
		return []string{gossh.KeyAlgoRSASHA512, gossh.KeyAlgoRSASHA256}
	}
	return []string{key.Type()}
}

// DialProxy connects to a [Proxy] on a unix socket. hostKey is the guest's,
// which the proxy presents too.
func DialProxy(ctx context.Context, socket string, hostKey gossh.PublicKey) (*Client, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConnection, err)
	}
	return OverProxy(ctx, nc, hostKey)
}

// OverProxy logs in to a [Proxy] at the other end of nc, which it closes on
// failure.
func OverProxy(ctx context.Context, nc net.Conn, hostKey gossh.PublicKey) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	// The proxy ends this connection when the guest's ends: no keepalive.
	client, err := handshake(ctx, nc, Config{User: "agent", HostKey: hostKey, KeepAlive: -1})
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrConnection, nc.RemoteAddr(), err)
	}
	return client, nil
}
