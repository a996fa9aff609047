package ssh

import "testing"

// What a second command costs: a connection to the proxy, and a channel. The
// guest's own part is that of a native sshd here.
func BenchmarkExecThroughProxy(b *testing.B) {
	g := newGuest(b)
	socket, _ := g.proxy(Proxy{})
	for b.Loop() {
		c, err := DialProxy(b.Context(), socket, g.hostKey.PublicKey())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Run(b.Context(), Command{Argv: []string{"true"}}); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

// The local handshake alone.
func BenchmarkDialProxy(b *testing.B) {
	g := newGuest(b)
	socket, _ := g.proxy(Proxy{})
	for b.Loop() {
		c, err := DialProxy(b.Context(), socket, g.hostKey.PublicKey())
		if err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
