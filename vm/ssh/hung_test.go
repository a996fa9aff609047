package ssh

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// hungGuest is a connection to a guest that stops answering at freeze.
func hungGuest(t *testing.T) (g *guest, c *Client, freeze func()) {
	t.Helper()
	g = newGuest(t)
	stop := make(chan struct{})
	c, err := Connect(timeout(t, time.Minute), func(ctx context.Context) (net.Conn, error) {
		nc, err := g.dial(ctx)
		return &frozen{nc, stop}, err
	}, g.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return g, c, func() { close(stop) }
}

func TestRunCancelledWhileTheGuestHangs(t *testing.T) {
	_, c, freeze := hungGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	out := &trigger{on: "ready", do: func() { freeze(); cancel() }}
	start := time.Now()
	_, err := c.Run(ctx, Command{Shell: "echo ready; while echo x; do sleep 0.1; done", Stdout: out, Grace: 100 * time.Millisecond})
	if !errors.Is(err, context.Canceled) || time.Since(start) > 5*time.Second {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := c.Run(ctx, Command{Argv: []string{"true"}}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("new command: got %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.Upload(ctx, "/etc/passwd", "x", CopyOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("copy: got %v", err)
	}
}

func TestProxyStopsWhileTheGuestHangs(t *testing.T) {
	g, up, freeze := hungGuest(t)
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	p := &Proxy{HostKey: g.hostKey, Upstream: func(context.Context) (*Client, error) { return up, nil }}
	go func() { served <- p.Serve(ctx, ln) }()
	c := g.dialProxy(ln.Addr().String())
	ended := make(chan error, 1)
	out := &trigger{on: "ready", do: freeze}
	go func() {
		_, err := c.Run(context.Background(), Command{Shell: "echo ready; exec sleep 20", Stdout: out})
		ended <- err
	}()
	time.Sleep(500 * time.Millisecond)
	cancel()
	if err := <-ended; !errors.Is(err, ErrConnection) {
		t.Errorf("client: got %v", err)
	}
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(2 * hungTime):
		t.Error("the proxy does not stop")
	}
}

func TestCopyCancelledWhileTheGuestHangs(t *testing.T) {
	_, c, freeze := hungGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	start := time.Now()
	var once sync.Once
	err := c.ReadFile(ctx, "/dev/zero", writerFunc(func(p []byte) (int, error) {
		once.Do(func() { freeze(); cancel() })
		return len(p), nil
	}))
	if !errors.Is(err, context.Canceled) || time.Since(start) > 2*closeTime {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
