package network

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

func TestDialGuest(t *testing.T) {
	g := newGuest(t, nil)
	ln, err := gonet.ListenTCP(g.stack, fullAddress(netip.MustParseAddr(DefaultGuestIP), 22), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			echo(c)
			c.Close()
		}
	}()
	// The guest has not sent a single frame yet, as after a restore.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := g.net.DialGuest(ctx, 22)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	go func() {
		_, _ = io.WriteString(conn, text)
		_ = conn.(*gonet.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "hello\n"+text {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	_ = conn.Close()
	if _, err := g.net.DialGuest(ctx, 23); err == nil {
		t.Error("connected to a closed port")
	}
}

// ping returns when the gateway has answered anything.
func (g *testGuest) ping(t *testing.T) {
	t.Helper()
	g.query("udp", "ping.invalid.", dns.TypeA)
}

func TestUDPDropped(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "8.8.8.8:53,443", "0.0.0.0/0:443"))
	for _, dst := range []string{"8.8.8.8:53", "8.8.8.8:443", "93.184.215.14:443", "192.168.127.1:123"} {
		a := netip.MustParseAddrPort(dst)
		remote := fullAddress(a.Addr(), a.Port())
		conn, err := gonet.DialUDP(g.stack, nil, &remote, ipv4.ProtocolNumber)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("x"))
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := conn.Read(make([]byte, 10)); err == nil {
			t.Errorf("%s answered %d bytes", dst, n)
		}
		conn.Close()
		g.log.find(t, "UDP denial", func(d Decision) bool { return d.Protocol == "udp" && d.Addr == a.Addr().String() && d.Port == a.Port() })
	}
	if _, dials := g.host.asked(); len(dials) != 0 {
		t.Errorf("the host dialled %v", dials)
	}
}

func TestDHCP(t *testing.T) {
	g := newGuest(t, nil)
	conn, err := listenUDP(g.stack, netip.Addr{}, dhcpClientPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mac, _ := net.ParseMAC(DefaultGuestMAC)
	exchange := func(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
		t.Helper()
		if _, err := conn.WriteTo(m.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpServerPort}); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 1500)
		_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			return nil
		}
		reply, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			t.Fatal(err)
		}
		return reply
	}
	discover, _ := dhcpv4.NewDiscovery(mac)
	offer := exchange(discover)
	if offer == nil || offer.MessageType() != dhcpv4.MessageTypeOffer || !offer.YourIPAddr.Equal(net.IP{192, 168, 127, 2}) {
		t.Fatalf("offer %v", offer)
	}
	request, _ := dhcpv4.NewRequestFromOffer(offer)
	ack := exchange(request)
	if ack.MessageType() != dhcpv4.MessageTypeAck || ack.DNS()[0].String() != DefaultGateway || ack.Router()[0].String() != DefaultGateway ||
		ack.SubnetMask().String() != "ffffff00" || ack.IPAddressLeaseTime(0) != leaseTime {
		t.Errorf("ack %v", ack)
	}
	request.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IP{192, 168, 127, 3}))
	if nak := exchange(request); nak.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("got %v for another address", nak)
	}
	stranger, _ := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 0, 1})
	if got := exchange(stranger); got != nil {
		t.Errorf("a stranger was offered %v", got)
	}
}

func TestHostileFrames(t *testing.T) {
	g := newGuest(t, nil)
	for _, f := range [][]byte{{}, {1}, make([]byte, 13), make([]byte, 14), make([]byte, 60), bytes.Repeat([]byte{0xff}, 1500)} {
		g.sendFrame(f)
	}
	g.ping(t) // still alive
	if s := g.net.Stats(); s.FramesDropped < 6 {
		t.Errorf("stats %+v", s)
	}
	// A length that QEMU never sends ends the connection and nothing else.
	_, _ = g.conn.Write([]byte{0xff, 0xff, 0xff, 0xff})
	_ = g.conn.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(io.Discard, g.conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection goes on")
	}
}

func TestHalfOpenEndsWithClose(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "93.184.215.14:443"))
	mac := g.net.filter
	syn := buildTCP(mac, publicAddr, 443, header.TCPFlagSyn)
	g.conn.SetDeadline(time.Now().Add(time.Minute))
	g.sendFrame(syn)
	g.log.find(t, "allowed flow", func(d Decision) bool { return d.Verdict == VerdictAllow })
	start := time.Now()
	if err := g.net.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("Close took %v", d)
	}
}

func TestProxy(t *testing.T) {
	proxyURL, _ := url.Parse("http://user:pass@proxy.corp:3128")
	viaProxy := func(c *Config) {
		c.Proxy = func(u *url.URL) (*url.URL, error) {
			if u.Hostname() == "direct.example.org" {
				return nil, nil
			}
			return proxyURL, nil
		}
	}
	g := newGuest(t, mustPolicy(t, []Service{{Name: "model.internal", Port: 1, Target: "127.0.0.1:2"}}, "elsewhere.example.org:22", "denied.example.org:22"), viaProxy)
	got := make(chan *http.Request, 2)
	g.host.serve = func(c net.Conn) {
		req, err := http.ReadRequest(newReader(c))
		if err != nil {
			return
		}
		got <- req
		if req.Host == "denied.example.org:22" {
			_, _ = io.WriteString(c, "HTTP/1.1 403 Forbidden\r\n\r\n")
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nhello\n") // the server speaks first
		_, _ = io.Copy(c, c)
	}
	// The host cannot resolve the name; the proxy can.
	if err := g.talk("elsewhere.example.org", 22, "x", "hello\nx"); err != nil {
		t.Error(err)
	}
	req := <-got
	if req.Method != "CONNECT" || req.Host != "elsewhere.example.org:22" || req.Header.Get("Proxy-Authorization") != "Basic dXNlcjpwYXNz" {
		t.Errorf("asked the proxy for %+v", req)
	}
	if err := g.talk("denied.example.org", 22, "x", "hello\n"); err == nil {
		t.Error("the proxy's refusal was not passed on")
	}
	lookups, dials := g.host.asked()
	if len(lookups) != 0 || dials[0] != "tcp proxy.corp:3128" {
		t.Errorf("looked up %v, dialled %v", lookups, dials)
	}
	g.host.mu.Lock()
	g.host.serve = echo
	g.host.mu.Unlock()
	if err := g.talk("model.internal", 1, "", "hello\n"); err != nil {
		t.Errorf("a service goes around the proxy: %v", err)
	}
}

func TestConfig(t *testing.T) {
	for what, change := range map[string]func(*Config){
		"subnet overlaps names": func(c *Config) { c.Subnet = netip.MustParsePrefix("198.18.0.0/24") },
		"IPv6":                  func(c *Config) { c.Subnet = netip.MustParsePrefix("fd00::/64") },
		"guest elsewhere":       func(c *Config) { c.GuestIP = netip.MustParseAddr("10.0.0.1") },
		"multicast MAC":         func(c *Config) { c.GuestMAC = net.HardwareAddr{1, 0, 0, 0, 0, 0} },
		"MTU":                   func(c *Config) { c.MTU = 65536 },
	} {
		t.Run(what, func(t *testing.T) {
			var cfg Config
			change(&cfg)
			if n, err := New(cfg); err == nil {
				_ = n.Close()
				t.Error("accepted")
			}
		})
	}
}

func TestCloseTwice(t *testing.T) {
	checkLeaks(t)
	n, err := New(Config{Proxy: noProxy})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}
