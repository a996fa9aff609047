package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// What the guest finds unless Config says otherwise.
const (
	DefaultSubnet   = "192.168.127.0/24"
	DefaultGateway  = "192.168.127.1"
	DefaultGuestIP  = "192.168.127.2"
	DefaultGuestMAC = "5a:94:ef:e4:0c:ee"

	// DefaultMTU is what the DHCP lease offers; see docs/network.md for what
	// it is worth. A guest that keeps 1500 works as well.
	DefaultMTU = 65520

	gatewayMAC = "5a:94:ef:e4:0c:dd"

	// maxHandshakes bounds connection requests that are not decided yet;
	// more are dropped, and repeated by the guest.
	maxHandshakes = 256
)

// Config describes a network. The zero value of each field has a default.
type Config struct {
	Subnet   netip.Prefix
	Gateway  netip.Addr // also DNS and DHCP server
	GuestIP  netip.Addr
	GuestMAC net.HardwareAddr
	MTU      int // 576 to 65520 bytes

	Policy *Policy // nil: nothing leaves

	// Log receives every decision, one call at a time, and an allowed flow
	// before it is dialled. It must not block for long.
	Log func(Decision)

	Resolver Resolver // default: the host's
	Dialer   Dialer   // default: the host's
	// Proxy chooses the host's way out, usually ProxyFromEnvironment(). nil
	// connects directly.
	Proxy func(*url.URL) (*url.URL, error)

	Logger *slog.Logger // what went wrong inside; default: discarded
}

// Network is the network of one guest.
type Network struct {
	subnet           netip.Prefix
	gateway, guestIP netip.Addr
	filter           *frameFilter
	logger           *slog.Logger

	policy atomic.Pointer[Policy]
	names  *nameTable
	out    *outbound
	rec    *recorder
	flows  flowTable
	stats  counters

	stack   *stack.Stack
	card    *card
	serving sync.Mutex // held while a guest is connected

	cancel   context.CancelFunc
	services errgroup.Group // DNS and DHCP
	done     <-chan struct{}
	close    func() error
}

// New starts a network. It runs until Close; Serve connects the guest to it.
func New(cfg Config) (*Network, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	c := newCard(cfg.MTU)
	s, err := newStack(cfg, c)
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &Network{
		subnet: cfg.Subnet, gateway: cfg.Gateway, guestIP: cfg.GuestIP,
		logger: cfg.Logger,
		names:  newNameTable(),
		out:    &outbound{resolver: newHostResolver(cfg.Resolver), dialer: cfg.Dialer, proxy: cfg.Proxy, own: hostAddrs},
		rec:    newRecorder(cfg.Log),
		flows:  flowTable{flows: make(map[*flow]struct{})},
		stack:  s, card: c,
		cancel: cancel, done: ctx.Done(),
	}
	n.filter = newFrameFilter(cfg)
	n.policy.Store(cfg.Policy)
	n.close = sync.OnceValue(n.shutdown)
	if err := n.start(ctx, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("network: %w", err), n.Close())
	}
	return n, nil
}

func (c *Config) complete() error {
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix(DefaultSubnet)
	}
	if !c.Gateway.IsValid() {
		c.Gateway = netip.MustParseAddr(DefaultGateway)
	}
	if !c.GuestIP.IsValid() {
		c.GuestIP = netip.MustParseAddr(DefaultGuestIP)
	}
	if c.GuestMAC == nil {
		c.GuestMAC, _ = net.ParseMAC(DefaultGuestMAC)
	}
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.Policy == nil {
		c.Policy = &Policy{}
	}
	if c.Resolver == nil {
		c.Resolver = net.DefaultResolver
	}
	if c.Dialer == nil {
		c.Dialer = &net.Dialer{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case !c.Subnet.Addr().Is4() || c.Subnet != c.Subnet.Masked():
		return fmt.Errorf("subnet %s: want an IPv4 network", c.Subnet)
	case c.Subnet.Overlaps(namePool):
		return fmt.Errorf("subnet %s overlaps %s, where names get their addresses", c.Subnet, namePool)
	case !c.Subnet.Contains(c.Gateway) || !c.Subnet.Contains(c.GuestIP) || c.Gateway == c.GuestIP:
		return fmt.Errorf("gateway %s and guest %s: want two addresses inside %s", c.Gateway, c.GuestIP, c.Subnet)
	case len(c.GuestMAC) != 6 || c.GuestMAC[0]&1 != 0:
		return fmt.Errorf("guest MAC address %s: want six bytes, not multicast", c.GuestMAC)
	case c.MTU < 576 || c.MTU > 65520:
		return fmt.Errorf("MTU %d: want 576 to 65520", c.MTU)
	}
	return nil
}

// start binds the gateway's services and the flow handler.
func (n *Network) start(ctx context.Context, cfg Config) error {
	forwarder := tcp.NewForwarder(n.stack, 0, maxHandshakes, func(r *tcp.ForwarderRequest) { n.handleFlow(ctx, r) })
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, forwarder.HandlePacket)

	dnsUDP, err := listenUDP(n.stack, cfg.Gateway, dnsPort)
	if err != nil {
		return err
	}
	dnsTCP, err := gonet.ListenTCP(n.stack, fullAddress(cfg.Gateway, dnsPort), ipv4.ProtocolNumber)
	if err != nil {
		_ = dnsUDP.Close()
		return err
	}
	dhcpUDP, err := listenUDP(n.stack, netip.Addr{}, dhcpServerPort)
	if err != nil {
		_, _ = dnsUDP.Close(), dnsTCP.Close()
		return err
	}
	dns := &dnsServer{
		policy: n.policy.Load, names: n.names, exists: n.out.exists, record: n.rec.record, stats: &n.stats,
		running: semaphore.NewWeighted(maxDNSQueries),
		pace:    rate.NewLimiter(queriesPerSec, queriesBurst),
	}
	dhcp := &dhcpServer{
		guestMAC: cfg.GuestMAC, guestIP: cfg.GuestIP, gateway: cfg.Gateway, subnet: cfg.Subnet, mtu: uint16(cfg.MTU),
	}
	n.run(func() error { return dns.serve(ctx, dnsUDP, dnsTCP) })
	n.run(func() error { return dhcp.serve(ctx, dhcpUDP) })
	return nil
}

func (n *Network) run(service func() error) {
	n.services.Go(func() error {
		err := service()
		if err != nil {
			n.logger.Error("a network service has ended", "error", err)
		}
		return err
	})
}

// Serve accepts the guest's connections on ln, one at a time, and carries
// their frames until ctx ends, the network is closed or ln fails. It closes
// ln. The end of a connection, such as QEMU's death, does not end Serve.
func (n *Network) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	conns.Go(func() {
		select {
		case <-n.done:
			cancel()
		case <-ctx.Done():
		}
	})
	defer ln.Close()
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept the guest's network connection: %w", err)
		}
		if !n.serving.TryLock() {
			n.logger.Warn("refused a second connection to the guest's network")
			_ = conn.Close()
			continue
		}
		conns.Go(func() {
			defer n.serving.Unlock()
			n.carry(ctx, conn)
		})
	}
}

// carry moves frames between the guest and the stack until one end is gone.
func (n *Network) carry(ctx context.Context, conn net.Conn) {
	link := newGuestLink(conn, n.filter, &n.stats, n.recordDrop)
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	err := n.card.connect(link)
	if err != nil && !errors.Is(err, io.EOF) && ctx.Err() == nil {
		n.logger.Warn("the guest's network connection has ended", "error", err)
	}
}

func (n *Network) recordDrop(d *drop) {
	if d.quiet {
		return
	}
	n.rec.record(Decision{Protocol: d.protocol, Verdict: VerdictDeny, Addr: addrString(d.addr), Port: d.port, Reason: d.reason})
}

// DialGuest connects to a TCP port of the guest. A guest that is not up yet
// does not answer: bound the wait with ctx and try again.
func (n *Network) DialGuest(ctx context.Context, port uint16) (net.Conn, error) {
	conn, err := gonet.DialTCPWithBind(ctx, n.stack, fullAddress(n.gateway, 0), fullAddress(n.guestIP, port), ipv4.ProtocolNumber)
	if err != nil {
		return nil, fmt.Errorf("dial port %d of the guest: %w", port, err)
	}
	return conn, nil
}

// Policy returns the policy in force.
func (n *Network) Policy() *Policy { return n.policy.Load() }

// SetPolicy replaces the policy and ends the flows that it does not allow.
func (n *Network) SetPolicy(p *Policy) {
	if p == nil {
		p = &Policy{}
	}
	n.policy.Store(p)
	n.flows.cancel(errPolicyChanged, func(f *flow) bool {
		_, err := n.decide(p, f.dst)
		return err == nil
	})
}

// Stats are figures since the network was started.
type Stats struct {
	FramesIn      uint64 `json:"frames_in"`      // from the guest
	FramesDropped uint64 `json:"frames_dropped"` // of these, by the filter
	FramesLost    uint64 `json:"frames_lost"`    // to the guest, which did not take them
	FlowsAllowed  int64  `json:"flows_allowed"`
	FlowsDenied   int64  `json:"flows_denied"`
	FlowsOpen     int64  `json:"flows_open"`
	BytesSent     int64  `json:"bytes_sent"`     // from the guest, by flows that have ended
	BytesReceived int64  `json:"bytes_received"` // to the guest, likewise
	DNSQueries    uint64 `json:"dns_queries"`
	DNSDenied     uint64 `json:"dns_denied"`
}

// Stats returns the current figures.
func (n *Network) Stats() Stats {
	c := &n.stats
	return Stats{
		FramesIn: c.framesIn.Load(), FramesDropped: c.framesDropped.Load(), FramesLost: c.framesLost.Load(),
		FlowsAllowed: c.flowsAllowed.Load(), FlowsDenied: c.flowsDenied.Load(), FlowsOpen: c.flowsOpen.Load(),
		BytesSent: c.bytesSent.Load(), BytesReceived: c.bytesReceived.Load(),
		DNSQueries: c.dnsQueries.Load(), DNSDenied: c.dnsDenied.Load(),
	}
}

// Close ends every flow, service and connection and waits for them. It may be
// called more than once.
func (n *Network) Close() error { return n.close() }

func (n *Network) shutdown() error {
	n.cancel()
	n.flows.close()
	err := n.services.Wait()
	n.serving.Lock() // Serve has let go of the guest
	defer n.serving.Unlock()
	n.stack.Destroy()
	return err
}
