package network

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// testGuest is a guest without a machine: a second network stack that speaks
// QEMU's framing over a unix socket, as QEMU would for a virtio card.
type testGuest struct {
	t     testing.TB
	net   *Network
	stack *stack.Stack
	conn  net.Conn
	ch    *channel.Endpoint
	host  *fakeHost
	log   *decisionLog
}

type decisionLog struct {
	mu    sync.Mutex
	lines []Decision
}

func (l *decisionLog) add(d Decision) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, d)
}

// find waits for a line that matches.
func (l *decisionLog) find(t testing.TB, what string, match func(Decision) bool) Decision {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		l.mu.Lock()
		for _, d := range l.lines {
			if match(d) {
				l.mu.Unlock()
				return d
			}
		}
		l.mu.Unlock()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	t.Fatalf("no %s in the log: %+v", what, l.lines)
	return Decision{}
}

// fakeHost resolves names from a table and connects every address to one
// handler. It remembers what was asked.
type fakeHost struct {
	mu      sync.Mutex
	addrs   map[string][]netip.Addr
	lookups []string
	dials   []string
	serve   func(net.Conn)
	refuse  bool
}

func (h *fakeHost) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lookups = append(h.lookups, host)
	if a, ok := h.addrs[host]; ok {
		return a, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

func (h *fakeHost) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dials = append(h.dials, network+" "+address)
	if h.refuse {
		return nil, fmt.Errorf("connection refused")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
	if err != nil {
		return nil, err
	}
	s, err := ln.Accept()
	if err != nil {
		return nil, err
	}
	go func() { defer s.Close(); h.serve(s) }()
	return c, nil
}

func (h *fakeHost) asked() (lookups, dials []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.lookups...), append([]string(nil), h.dials...)
}

// echo sends everything back behind a greeting.
func echo(c net.Conn) {
	_, _ = io.WriteString(c, "hello\n")
	_, _ = io.Copy(c, c)
}

func mustPolicy(t testing.TB, services []Service, rules ...string) *Policy {
	t.Helper()
	var parsed []Rule
	for _, s := range rules {
		r, err := ParseRule(s)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, r)
	}
	p, err := NewPolicy(parsed, services)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// publicAddr is an address that no rule protects.
var publicAddr = netip.MustParseAddr("93.184.215.14")

// serveNetwork starts a network that waits for its guest at a unix socket.
func serveNetwork(t testing.TB, cfg Config) (n *Network, socket string) {
	t.Helper()
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	socket = filepath.Join(t.TempDir(), "net.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- n.Serve(context.Background(), ln) }()
	t.Cleanup(func() {
		_ = n.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return n, socket
}

// newGuest starts a network with a policy and connects a guest with its
// address set. Everything ends with the test, which fails on a leak.
func newGuest(t testing.TB, policy *Policy, change ...func(*Config)) *testGuest {
	t.Helper()
	checkLeaks(t)
	host := &fakeHost{serve: echo, addrs: map[string][]netip.Addr{
		"registry.example.org": {publicAddr},
		"other.example.org":    {publicAddr},
		"rebind.example.org":   {netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("192.168.1.1")},
		"mixed.example.org":    {netip.MustParseAddr("10.0.0.5"), publicAddr},
		"internal.example.org": {netip.MustParseAddr("10.1.2.3")},
	}}
	log := &decisionLog{}
	cfg := Config{Policy: policy, Resolver: host, Dialer: host, Log: log.add}
	for _, c := range change {
		c(&cfg)
	}
	n, socket := serveNetwork(t, cfg)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g := &testGuest{t: t, net: n, conn: conn, host: host, log: log}
	g.start()
	return g
}

func (g *testGuest) start() {
	t := g.t
	mac, _ := net.ParseMAC(DefaultGuestMAC)
	g.ch = channel.New(1024, 65520+header.EthernetMinimumSize, tcpip.LinkAddress(mac))
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := s.CreateNIC(1, ethernet.New(g.ch)); err != nil {
		t.Fatal(err)
	}
	if err := s.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4([4]byte{192, 168, 127, 2}), PrefixLen: 24},
	}, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	local, _ := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{192, 168, 127, 0}), tcpip.MaskFromBytes([]byte{255, 255, 255, 0}))
	s.SetRouteTable([]tcpip.Route{
		{Destination: local, NIC: 1},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFrom4([4]byte{192, 168, 127, 1}), NIC: 1},
	})
	g.stack = s
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for pkt := g.ch.ReadContext(ctx); pkt != nil; pkt = g.ch.ReadContext(ctx) {
			frame := withLength(pkt.AsSlices())
			_, _ = frame.WriteTo(g.conn)
			pkt.DecRef()
		}
	})
	wg.Go(func() {
		buf := make([]byte, maxFrame)
		for {
			n, err := readFrame(g.conn, buf)
			if err != nil {
				return
			}
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(buf[:n])})
			g.ch.InjectInbound(0, pkt)
			pkt.DecRef()
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = g.conn.Close()
		wg.Wait()
		g.ch.Close()
		s.Destroy()
	})
}

func (g *testGuest) sendFrame(frame []byte) { _, _ = g.conn.Write(framed(frame)) }

// framed puts frames on a stream as QEMU does.
func framed(frames ...[]byte) (stream []byte) {
	for _, f := range frames {
		stream = append(binary.BigEndian.AppendUint32(stream, uint32(len(f))), f...)
	}
	return stream
}

func (g *testGuest) dial(addr netip.Addr, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := gonet.DialContextTCP(ctx, g.stack, fullAddress(addr, port), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return conn, nil
}

func (g *testGuest) query(network, name string, qtype uint16) *dns.Msg {
	g.t.Helper()
	var conn net.Conn
	var err error
	if network == "tcp" {
		conn, err = g.dial(netip.MustParseAddr(DefaultGateway), 53)
	} else {
		remote := fullAddress(netip.MustParseAddr(DefaultGateway), 53)
		conn, err = gonet.DialUDP(g.stack, nil, &remote, ipv4.ProtocolNumber)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	c := &dns.Conn{Conn: conn}
	if network == "udp" { // dns.Conn tells packets by net.PacketConn
		c.Conn = conn.(*gonet.UDPConn)
	}
	if err := c.WriteMsg(new(dns.Msg).SetQuestion(name, qtype)); err != nil {
		g.t.Fatal(err)
	}
	m, err := c.ReadMsg()
	if err != nil {
		g.t.Fatalf("query %s: %v", name, err)
	}
	return m
}

// resolve returns the address of a name, which must have one.
func (g *testGuest) resolve(name string) netip.Addr {
	g.t.Helper()
	m := g.query("udp", name+".", dns.TypeA)
	if len(m.Answer) != 1 {
		g.t.Fatalf("query %s: %v", name, m)
	}
	a, _ := netip.AddrFromSlice(m.Answer[0].(*dns.A).A.To4())
	return a
}

// talk sends text on a new connection to name:port and reads until want.
func (g *testGuest) talk(name string, port uint16, text, want string) error {
	g.t.Helper()
	conn, err := g.dial(g.resolve(name), port)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if string(got) != want {
		return fmt.Errorf("read %q, want %q", got, want)
	}
	return nil
}

// checkLeaks fails the test if goroutines of this package or of the stack
// outlive it.
func checkLeaks(t testing.TB) {
	before := ours()
	t.Cleanup(func() {
		var after []string
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if after = ours(); len(after) <= len(before) {
				return
			}
		}
		t.Errorf("%d goroutines left over:\n%s", len(after)-len(before), strings.Join(after, "\n\n"))
	})
}

func ours() (found []string) {
	buf := make([]byte, 4<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, "testing.tRunner") || strings.Contains(stack, "testing.(*T)") {
			continue
		}
		if strings.Contains(stack, "vm/network") || strings.Contains(stack, "gvisor") {
			found = append(found, stack)
		}
	}
	return found
}

func noProxy(*url.URL) (*url.URL, error) { return nil, nil }
