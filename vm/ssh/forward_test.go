package ssh

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// echo answers with what it got, in upper case, once its peer has finished.
func echo(t *testing.T, network, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				said, _ := io.ReadAll(nc)
				io.WriteString(nc, strings.ToUpper(string(said)))
			}()
		}
	}()
	return ln
}

func ask(t *testing.T, network, addr, question string) string {
	t.Helper()
	nc, err := net.Dial(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(nc, question)
	nc.(interface{ CloseWrite() error }).CloseWrite()
	said, err := io.ReadAll(nc)
	if err != nil {
		t.Error(err)
	}
	return string(said)
}

func TestForwardLocal(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		question := strings.Repeat("hello ", 100_000)
		for _, network := range []string{"tcp", "unix"} {
			inGuest := echo(t, network, map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(g.home, "s")}[network])
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var forwarding sync.WaitGroup
			forwarding.Go(func() {
				if err := c.ForwardLocal(ctx, ln, network, inGuest.Addr().String(), nil); !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
			})
			var asking sync.WaitGroup
			for range 10 {
				asking.Go(func() {
					if got := ask(t, "tcp", ln.Addr().String(), question); got != strings.ToUpper(question) {
						t.Errorf("%s: %d bytes came back", network, len(got))
					}
				})
			}
			asking.Wait()
			cancel()
			forwarding.Wait()
		}
	})
}

func TestForwardLocalToNobody(t *testing.T) {
	g := newGuest(t)
	c := g.viaProxy()
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	if _, err := c.DialGuest(t.Context(), "tcp", nobody.Addr().String()); err == nil || errors.Is(err, ErrConnection) {
		t.Errorf("got %v", err)
	}
	for _, addr := range []string{"nowhere", "a:b", "a:99999"} {
		if _, err := c.DialGuest(t.Context(), "tcp", addr); err == nil {
			t.Errorf("%s: no error", addr)
		}
	}
}

func TestForwardRemote(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		onHost := echo(t, "tcp", "127.0.0.1:0")
		ctx, cancel := context.WithCancel(t.Context())
		bound := make(chan string, 1)
		var forwarding sync.WaitGroup
		forwarding.Go(func() {
			err := c.ForwardRemote(ctx, "127.0.0.1:0", func(ctx context.Context) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "tcp", onHost.Addr().String())
			}, func(addr string) { bound <- addr }, nil)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
		addr := <-bound
		if got := ask(t, "tcp", addr, "from the guest"); got != "FROM THE GUEST" {
			t.Errorf("got %q", got)
		}
		cancel()
		forwarding.Wait()
		eventually(t, "the guest stops to listen", func() bool {
			nc, err := net.Dial("tcp", addr)
			if err == nil {
				nc.Close()
			}
			return err != nil
		})
	})
}

func TestForwardThroughOpenSSH(t *testing.T) {
	g := newGuest(t)
	socket, up := g.proxy(Proxy{})
	config := g.openSSH(socket)
	onHost := echo(t, "unix", filepath.Join(g.dir, "host.sock"))
	inGuest := filepath.Join(g.home, "guest.sock")
	c := g.dialProxy(socket)
	out := g.command("", "ssh", "-F", config, "-o", "ExitOnForwardFailure=yes", "-R", inGuest+":"+onHost.Addr().String(), "vm1", "python3 -c '"+
		"import socket; s = socket.socket(socket.AF_UNIX); s.connect(\""+inGuest+"\"); s.send(b\"streamlocal\"); s.shutdown(1); print(s.recv(99).decode())'")
	if out != "STREAMLOCAL\n" {
		t.Errorf("got %q", out)
	}
	eventually(t, "its routes are gone", func() bool {
		up.routeMu.Lock()
		defer up.routeMu.Unlock()
		return len(up.routes) == 0
	})
	output(t, c, Command{Argv: []string{"true"}})
}
