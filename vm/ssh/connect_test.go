package ssh

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/testenv"
)

func TestConnectPinsTheHostKey(t *testing.T) {
	g := newGuest(t)
	cfg := g.config()
	cfg.HostKey = g.key.PublicKey()
	start := time.Now()
	_, err := Connect(timeout(t, time.Minute), g.dial, cfg)
	if !errors.Is(err, ErrHostKey) {
		t.Errorf("got %v", err)
	}
	if time.Since(start) > 10*time.Second {
		t.Error("it was retried")
	}
	socket, _ := g.proxy(Proxy{})
	if _, err := DialProxy(timeout(t, time.Minute), socket, g.key.PublicKey()); !errors.Is(err, ErrHostKey) {
		t.Errorf("proxy: got %v", err)
	}
}

func TestConnectRetriesWhileTheGuestBoots(t *testing.T) {
	g := newGuest(t)
	var attempts, retries atomic.Int32
	cfg := g.config()
	cfg.Attempt = 5 * time.Second
	cfg.OnRetry = func(error) { retries.Add(1) }
	c, err := Connect(timeout(t, time.Minute), func(ctx context.Context) (net.Conn, error) {
		switch n := attempts.Add(1); n {
		case 1:
			return nil, errors.New("connection refused")
		case 2: // a port that accepts and closes
			a, b := net.Pipe()
			b.Close()
			return a, nil
		}
		return g.dial(ctx)
	}, cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if attempts.Load() != 3 || retries.Load() != 2 {
		t.Errorf("%d attempts, %d retries", attempts.Load(), retries.Load())
	}
	if !errors.Is(c.Err(), ErrClosed) {
		t.Errorf("got %v", c.Err())
	}
}

func TestConnectTellsTheLastError(t *testing.T) {
	g := newGuest(t)
	other, _ := testenv.NewKey(t)
	cfg := g.config()
	cfg.Key = other
	_, err := Connect(timeout(t, 3*time.Second), g.dial, cfg)
	if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrAuth) {
		t.Errorf("wrong key: got %v", err)
	}
	silent := func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		t.Cleanup(func() { b.Close() })
		return a, nil
	}
	_, err = Connect(timeout(t, 200*time.Millisecond), silent, g.config())
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent guest: got %v", err)
	}
}

// frozen is a connection through which nothing comes any more once frozen.
type frozen struct {
	net.Conn
	stop chan struct{}
}

func (f *frozen) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	select {
	case <-f.stop:
		for { // swallow the answers
			if _, err := f.Conn.Read(p); err != nil {
				return 0, err
			}
		}
	default:
		return n, err
	}
}

func TestKeepAliveNoticesAHungGuest(t *testing.T) {
	g := newGuest(t)
	stop := make(chan struct{})
	cfg := g.config()
	cfg.KeepAlive, cfg.KeepAliveTimeout = 20*time.Millisecond, 300*time.Millisecond
	c, err := Connect(timeout(t, time.Minute), func(ctx context.Context) (net.Conn, error) {
		nc, err := g.dial(ctx)
		return &frozen{nc, stop}, err
	}, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	time.Sleep(500 * time.Millisecond)
	if c.Err() != nil {
		t.Fatalf("a live guest is thought to hang: %v", c.Err())
	}
	c.Watch(false) // it is paused
	close(stop)
	time.Sleep(time.Second)
	if c.Err() != nil {
		t.Fatalf("a paused guest is thought to hang: %v", c.Err())
	}
	c.Watch(true)
	select {
	case <-c.Done():
	case <-time.After(time.Minute):
		t.Fatal("not noticed")
	}
	if !errors.Is(c.Err(), ErrHung) || !errors.Is(c.Err(), ErrConnection) {
		t.Errorf("got %v", c.Err())
	}
}

func TestLinkConnectsAgain(t *testing.T) {
	g := newGuest(t)
	link := NewLink(g.dial, g.config())
	ctx := timeout(t, time.Minute)
	first, err := link.Client(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := link.Client(ctx); again != first {
		t.Error("a second connection although the first one lives")
	}
	g.kill()
	<-first.Done()
	second, err := link.Client(ctx)
	if err != nil {
		t.Fatal(err)
	}
	output(t, second, Command{Argv: []string{"true"}})
	link.Close()
	if _, err := link.Client(ctx); !errors.Is(err, ErrClosed) || second.Err() == nil {
		t.Errorf("after close: %v, %v", err, second.Err())
	}
}

// A dial into a network without a guest must be given up soon, or the guest's
// arrival is seen late.
func TestConnectDialsAgainSoon(t *testing.T) {
	g := newGuest(t)
	var attempts atomic.Int32
	cfg := g.config()
	cfg.DialAttempt = 50 * time.Millisecond
	c, err := Connect(timeout(t, time.Minute), func(ctx context.Context) (net.Conn, error) {
		if attempts.Add(1) < 4 {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return g.dial(ctx)
	}, cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestCiphers: an emulated guest is asked for the cipher that it is quick at
// first, and every guest may have the others.
func TestCiphers(t *testing.T) {
	var b bool
	for emulated, first := range map[bool]string{false: gossh.CipherAES128GCM, true: gossh.CipherChaCha20Poly1305} {
		key, _ := testenv.NewKey(t)
		got := clientConfig(Config{HostKey: key.PublicKey(), Emulated: emulated}, &b, &b).Ciphers
		if len(got) != 3 || got[0] != first {
			t.Errorf("emulated: %v: %q", emulated, got)
		}
	}
}
