package network

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"
)

// BenchmarkRelay moves data through the whole path except the virtual card:
// framing, filter, both stacks, relay and a socket of the host.
func BenchmarkRelay(b *testing.B) {
	const size = 8 << 20
	for _, mtu := range []int{1500, 9000, 32000, 65520} {
		for _, direction := range []string{"up", "down"} {
			b.Run(fmt.Sprint(direction, mtu), func(b *testing.B) {
				g := newGuest(b, mustPolicy(b, nil, "registry.example.org:22"), func(c *Config) { c.MTU = mtu })
				g.host.serve = func(c net.Conn) {
					if direction == "up" {
						_, _ = io.Copy(io.Discard, c)
						return
					}
					_, _ = io.CopyN(c, zeros{}, size)
				}
				addr := g.resolve("registry.example.org")
				b.SetBytes(size)
				for b.Loop() {
					conn, err := g.dial(addr, 22)
					if err != nil {
						b.Fatal(err)
					}
					_ = conn.SetDeadline(time.Now().Add(time.Minute))
					if direction == "up" {
						_, err = io.CopyN(conn, zeros{}, size)
						_ = conn.(interface{ CloseWrite() error }).CloseWrite()
						_, _ = io.Copy(io.Discard, conn)
					} else {
						_, err = io.CopyN(io.Discard, conn, size)
					}
					if err != nil {
						b.Error(err)
					}
					_ = conn.Close()
				}
			})
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
