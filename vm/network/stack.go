package network

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const nicID = 1

// Limits of the stack towards the guest.
const (
	tcpBufferDefault = 256 << 10
	tcpBufferMax     = 1 << 20 // per direction and flow
	synRetries       = 4       // a handshake fails after about 30 s
	timeWait         = 5 * time.Second
	finWait          = 30 * time.Second
)

// newStack makes a stack that is the gateway and, promiscuously, everything
// behind it, and reaches the guest through the card.
func newStack(cfg Config, c *card) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := configureStack(s, ethernet.New(c), cfg); err != nil {
		s.Destroy()
		return nil, err
	}
	return s, nil
}

func configureStack(s *stack.Stack, link stack.LinkEndpoint, cfg Config) error {
	if err := setTCPOptions(s); err != nil {
		return err
	}
	if err := s.CreateNIC(nicID, link); err != nil {
		return fmt.Errorf("create the card: %s", err)
	}
	gateway := tcpip.AddrFrom4(cfg.Gateway.As4())
	if err := s.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: gateway.WithPrefix(),
	}, stack.AddressProperties{}); err != nil {
		return fmt.Errorf("set the gateway's address: %s", err)
	}
	// Answer as, and receive for, every address that the guest dials.
	s.SetSpoofing(nicID, true)
	s.SetPromiscuousMode(nicID, true)
	subnet, err := tcpip.NewSubnet(tcpip.AddrFrom4(cfg.Subnet.Addr().As4()), tcpip.MaskFromBytes(net.CIDRMask(cfg.Subnet.Bits(), 32)))
	if err != nil {
		return fmt.Errorf("subnet %s: %w", cfg.Subnet, err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: nicID}})
	// There is one guest: nothing to ask for, and nothing to poison.
	guest := tcpip.AddrFrom4(cfg.GuestIP.As4())
	if err := s.AddStaticNeighbor(nicID, ipv4.ProtocolNumber, guest, tcpip.LinkAddress(cfg.GuestMAC)); err != nil {
		return fmt.Errorf("set the guest's link address: %s", err)
	}
	return nil
}

func setTCPOptions(s *stack.Stack) error {
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBufferDefault, Max: tcpBufferMax}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBufferDefault, Max: tcpBufferMax}
	syn, tw, fw := tcpip.TCPSynRetriesOption(synRetries), tcpip.TCPTimeWaitTimeoutOption(timeWait), tcpip.TCPLingerTimeoutOption(finWait)
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &receive, &send, &syn, &tw, &fw} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("set TCP option %T: %s", o, err)
		}
	}
	return nil
}

// listenUDP binds a UDP port of the stack. The zero address binds all, which
// receives broadcasts and may send them.
func listenUDP(s *stack.Stack, addr netip.Addr, port uint16) (*gonet.UDPConn, error) {
	var wq waiter.Queue
	ep, err := s.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &wq)
	if err != nil {
		return nil, fmt.Errorf("UDP port %d: %s", port, err)
	}
	ep.SocketOptions().SetBroadcast(true)
	if err := ep.Bind(fullAddress(addr, port)); err != nil {
		ep.Close()
		return nil, fmt.Errorf("bind UDP port %d: %s", port, err)
	}
	return gonet.NewUDPConn(&wq, ep), nil
}

func fullAddress(addr netip.Addr, port uint16) tcpip.FullAddress {
	a := tcpip.FullAddress{NIC: nicID, Port: port}
	if addr.IsValid() {
		a.Addr = tcpip.AddrFrom4(addr.As4())
	}
	return a
}
