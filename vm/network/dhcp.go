package network

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

const (
	dhcpServerPort = 67
	dhcpClientPort = 68
	leaseTime      = 24 * time.Hour
)

// dhcpServer leases its one address to the one guest.
type dhcpServer struct {
	guestMAC net.HardwareAddr
	guestIP  netip.Addr
	gateway  netip.Addr
	subnet   netip.Prefix
	mtu      uint16
}

// serve answers on conn until ctx ends.
func (s *dhcpServer) serve(ctx context.Context, conn net.PacketConn) error {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	buf := make([]byte, 1500)
	for {
		n, _, err := conn.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the guest's DHCP server: %w", err)
		}
		request, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			continue // malformed; the guest's loss
		}
		if reply := s.reply(request); reply != nil {
			// Broadcast: the guest may have no address to send to yet.
			_, _ = conn.WriteTo(reply.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpClientPort})
		}
	}
}

// reply returns the answer to a request, nil for none.
func (s *dhcpServer) reply(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	if m.OpCode != dhcpv4.OpcodeBootRequest || !bytes.Equal(m.ClientHWAddr, s.guestMAC) {
		return nil
	}
	var kind dhcpv4.MessageType
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		kind = dhcpv4.MessageTypeAck
		if want := requestedIP(m); want.IsValid() && want != s.guestIP {
			kind = dhcpv4.MessageTypeNak
		}
	default:
		return nil
	}
	gateway := net.IP(s.gateway.AsSlice())
	options := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(gateway)),
	}
	if kind != dhcpv4.MessageTypeNak {
		options = append(options,
			dhcpv4.WithYourIP(net.IP(s.guestIP.AsSlice())),
			dhcpv4.WithLeaseTime(uint32(leaseTime.Seconds())),
			dhcpv4.WithNetmask(net.CIDRMask(s.subnet.Bits(), 32)),
			dhcpv4.WithRouter(gateway),
			dhcpv4.WithDNS(gateway),
			dhcpv4.WithOption(dhcpv4.Option{Code: dhcpv4.OptionInterfaceMTU, Value: dhcpv4.Uint16(s.mtu)}),
		)
	}
	reply, err := dhcpv4.NewReplyFromRequest(m, options...)
	if err != nil {
		return nil
	}
	return reply
}

// requestedIP returns the address that a client wants to keep or get.
func requestedIP(m *dhcpv4.DHCPv4) netip.Addr {
	for _, ip := range []net.IP{m.RequestedIPAddress(), m.ClientIPAddr} {
		if a, ok := netip.AddrFromSlice(ip.To4()); ok && !a.IsUnspecified() {
			return a
		}
	}
	return netip.Addr{}
}
