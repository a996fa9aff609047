package network

import (
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// frameFilter decides which of the guest's Ethernet frames reach the stack:
// the guest's own TCP segments, DNS queries and pings to the gateway, DHCP
// requests, and ARP for the gateway. It is the first decision point and keeps
// everything odd (IPv6, fragments, IP options, forged addresses) away from
// the code behind it.
type frameFilter struct {
	guestMAC, gatewayMAC tcpip.LinkAddress
	guestIP, gatewayIP   netip.Addr
}

func newFrameFilter(cfg Config) *frameFilter {
	gateway, _ := net.ParseMAC(gatewayMAC)
	return &frameFilter{
		guestMAC: tcpip.LinkAddress(cfg.GuestMAC), gatewayMAC: tcpip.LinkAddress(gateway),
		guestIP: cfg.GuestIP, gatewayIP: cfg.Gateway,
	}
}

// A dropped frame's facts, for the log. Chatter that every guest sends
// unasked (ARP, IPv6 solicitations, multicast) is quiet.
type drop struct {
	reason   string
	protocol string
	addr     netip.Addr
	port     uint16
	quiet    bool
}

func quietly(reason string) *drop { return &drop{reason: reason, protocol: "ethernet", quiet: true} }

func loudly(reason string) *drop { return &drop{reason: reason, protocol: "ethernet"} }

// check returns nil when the frame may pass.
func (f *frameFilter) check(frame []byte) *drop {
	if len(frame) < header.EthernetMinimumSize {
		return loudly("short frame")
	}
	eth := header.Ethernet(frame)
	if eth.SourceAddress() != f.guestMAC {
		return loudly("forged source MAC address")
	}
	dst := eth.DestinationAddress()
	broadcast := dst == header.EthernetBroadcastAddress
	if dst != f.gatewayMAC && !broadcast {
		return quietly("not for the gateway")
	}
	payload := frame[header.EthernetMinimumSize:]
	switch eth.Type() {
	case header.ARPProtocolNumber:
		return f.checkARP(payload)
	case header.IPv4ProtocolNumber:
		return f.checkIPv4(payload, broadcast)
	}
	return quietly("neither IPv4 nor ARP")
}

func (f *frameFilter) checkARP(b []byte) *drop {
	arp := header.ARP(b)
	if len(b) < header.ARPSize || !arp.IsValid() {
		return quietly("malformed ARP")
	}
	sender := addr4(arp.ProtocolAddressSender())
	switch {
	case tcpip.LinkAddress(arp.HardwareAddressSender()) != f.guestMAC,
		sender != f.guestIP && !sender.IsUnspecified():
		return loudly("forged ARP")
	case addr4(arp.ProtocolAddressTarget()) != f.gatewayIP:
		return quietly("ARP for another address than the gateway's")
	}
	return nil
}

func (f *frameFilter) checkIPv4(b []byte, broadcast bool) *drop {
	ip := header.IPv4(b)
	if !ip.IsValid(len(b)) {
		return loudly("malformed IPv4")
	}
	src, dst := addr4(ip.SourceAddressSlice()), addr4(ip.DestinationAddressSlice())
	transport := b[ip.HeaderLength():ip.TotalLength()]
	deny := func(protocol, reason string) *drop {
		return &drop{reason: reason, protocol: protocol, addr: dst, quiet: dst.IsMulticast()}
	}
	switch {
	case ip.HeaderLength() != header.IPv4MinimumSize:
		return deny("ipv4", "IP options")
	case ip.More() || ip.FragmentOffset() != 0:
		return deny("ipv4", "fragment")
	}
	if d, ok := f.checkDHCP(ip.Protocol(), src, dst, transport); ok {
		return d
	}
	switch {
	case src != f.guestIP:
		return deny("ipv4", "forged source address "+src.String())
	case broadcast:
		return quietly("broadcast")
	}
	switch tcpip.TransportProtocolNumber(ip.Protocol()) {
	case header.TCPProtocolNumber:
		if len(transport) < header.TCPMinimumSize {
			return deny("tcp", "malformed TCP")
		}
		return nil // decided per flow
	case header.UDPProtocolNumber:
		if len(transport) < header.UDPMinimumSize {
			return deny("udp", "malformed UDP")
		}
		if port := header.UDP(transport).DestinationPort(); dst != f.gatewayIP || port != dnsPort {
			d := deny("udp", "only DNS to the gateway leaves over UDP")
			d.port = port
			return d
		}
		return nil
	case header.ICMPv4ProtocolNumber:
		if len(transport) < header.ICMPv4MinimumSize || dst != f.gatewayIP ||
			header.ICMPv4(transport).Type() != header.ICMPv4Echo {
			return deny("icmp", "only pings to the gateway are answered")
		}
		return nil
	}
	return deny("ipv4", "neither TCP, UDP nor ICMP")
}

// checkDHCP decides about what goes to a DHCP server, which alone may come
// from no address.
func (f *frameFilter) checkDHCP(protocol uint8, src, dst netip.Addr, b []byte) (d *drop, ok bool) {
	if tcpip.TransportProtocolNumber(protocol) != header.UDPProtocolNumber || len(b) < header.UDPMinimumSize ||
		header.UDP(b).DestinationPort() != dhcpServerPort {
		return nil, false
	}
	if (src == f.guestIP || src.IsUnspecified()) && (dst == f.gatewayIP || dst == broadcast4) {
		return nil, true
	}
	return &drop{reason: "DHCP to another server", protocol: "udp", addr: dst, port: dhcpServerPort}, true
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func addr4(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }
