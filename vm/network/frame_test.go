package network

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func newReader(c net.Conn) *bufio.Reader { return bufio.NewReader(c) }

func testFilter(t testing.TB) *frameFilter {
	t.Helper()
	var cfg Config
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	return newFrameFilter(cfg)
}

// ipFrame builds a frame around an IPv4 payload.
func ipFrame(f *frameFilter, proto tcpip.TransportProtocolNumber, src, dst netip.Addr, payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: f.guestMAC, DstAddr: f.gatewayMAC, Type: header.IPv4ProtocolNumber})
	ip := header.IPv4(frame[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(header.IPv4MinimumSize + len(payload)), TTL: 64, Protocol: uint8(proto),
		SrcAddr: tcpip.AddrFrom4(src.As4()), DstAddr: tcpip.AddrFrom4(dst.As4()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	copy(ip.Payload(), payload)
	return frame
}

func buildUDP(f *frameFilter, src, dst netip.Addr, port uint16) []byte {
	b := make([]byte, header.UDPMinimumSize)
	header.UDP(b).Encode(&header.UDPFields{SrcPort: 68, DstPort: port, Length: header.UDPMinimumSize})
	return ipFrame(f, header.UDPProtocolNumber, src, dst, b)
}

func buildTCP(f *frameFilter, dst netip.Addr, port uint16, flags header.TCPFlags) []byte {
	b := make([]byte, header.TCPMinimumSize)
	header.TCP(b).Encode(&header.TCPFields{SrcPort: 40000, DstPort: port, SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, tcpip.AddrFrom4(f.guestIP.As4()), tcpip.AddrFrom4(dst.As4()), uint16(len(b)))
	header.TCP(b).SetChecksum(^header.TCP(b).CalculateChecksum(sum))
	return ipFrame(f, header.TCPProtocolNumber, f.guestIP, dst, b)
}

func buildICMP(f *frameFilter, dst netip.Addr, kind header.ICMPv4Type) []byte {
	b := make([]byte, header.ICMPv4MinimumSize)
	header.ICMPv4(b).SetType(kind)
	return ipFrame(f, header.ICMPv4ProtocolNumber, f.guestIP, dst, b)
}

func buildARP(f *frameFilter, senderMAC tcpip.LinkAddress, sender, target netip.Addr) []byte {
	frame := make([]byte, header.EthernetMinimumSize+header.ARPSize)
	header.Ethernet(frame).Encode(&header.EthernetFields{SrcAddr: f.guestMAC, DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber})
	a := header.ARP(frame[header.EthernetMinimumSize:])
	a.SetIPv4OverEthernet()
	a.SetOp(header.ARPRequest)
	copy(a.HardwareAddressSender(), senderMAC)
	copy(a.ProtocolAddressSender(), sender.AsSlice())
	copy(a.ProtocolAddressTarget(), target.AsSlice())
	return frame
}

func TestFrameFilter(t *testing.T) {
	f := testFilter(t)
	zero, elsewhere := netip.IPv4Unspecified(), netip.MustParseAddr("8.8.8.8")
	other := netip.MustParseAddr("192.168.127.77")
	edit := func(frame []byte, change func(eth header.Ethernet, ip header.IPv4)) []byte {
		change(header.Ethernet(frame), header.IPv4(frame[header.EthernetMinimumSize:]))
		return frame
	}
	for _, tt := range []struct {
		what  string
		frame []byte
		pass  bool
	}{
		{"TCP to anywhere", buildTCP(f, elsewhere, 443, header.TCPFlagSyn), true},
		{"DNS to the gateway", buildUDP(f, f.guestIP, f.gatewayIP, 53), true},
		{"ping to the gateway", buildICMP(f, f.gatewayIP, header.ICMPv4Echo), true},
		{"DHCP from no address", buildUDP(f, zero, broadcast4, 67), true},
		{"DHCP renewal", buildUDP(f, f.guestIP, f.gatewayIP, 67), true},
		{"ARP for the gateway", buildARP(f, f.guestMAC, f.guestIP, f.gatewayIP), true},

		{"empty", nil, false},
		{"short", make([]byte, 13), false},
		{"DNS elsewhere", buildUDP(f, f.guestIP, elsewhere, 53), false},
		{"QUIC", buildUDP(f, f.guestIP, elsewhere, 443), false},
		{"DHCP elsewhere", buildUDP(f, f.guestIP, elsewhere, 67), false},
		{"DNS from no address", buildUDP(f, zero, f.gatewayIP, 53), false},
		{"DNS from another address", buildUDP(f, other, f.gatewayIP, 53), false},
		{"ping elsewhere", buildICMP(f, elsewhere, header.ICMPv4Echo), false},
		{"ICMP redirect", buildICMP(f, f.gatewayIP, header.ICMPv4Redirect), false},
		{"ARP for another", buildARP(f, f.guestMAC, f.guestIP, other), false},
		{"ARP as the gateway", buildARP(f, f.guestMAC, f.gatewayIP, f.gatewayIP), false},
		{"ARP with another MAC", buildARP(f, f.gatewayMAC, f.guestIP, f.gatewayIP), false},
		{"GRE", ipFrame(f, 47, f.guestIP, elsewhere, make([]byte, 8)), false},
		{"IPv6 packet", edit(buildTCP(f, elsewhere, 443, 2), func(e header.Ethernet, _ header.IPv4) {
			binary.BigEndian.PutUint16(e[12:], uint16(header.IPv6ProtocolNumber))
		}), false},
		{"VLAN tag", edit(buildTCP(f, elsewhere, 443, 2), func(e header.Ethernet, _ header.IPv4) { binary.BigEndian.PutUint16(e[12:], 0x8100) }), false},
		{"forged MAC", edit(buildTCP(f, elsewhere, 443, 2), func(e header.Ethernet, _ header.IPv4) { e[6] ^= 2 }), false},
		{"another guest's MAC", edit(buildTCP(f, elsewhere, 443, 2), func(e header.Ethernet, _ header.IPv4) { e[0] ^= 2 }), false},
		{"TCP in a broadcast", edit(buildTCP(f, elsewhere, 443, 2), func(e header.Ethernet, _ header.IPv4) { copy(e, header.EthernetBroadcastAddress) }), false},
		{"first fragment", edit(buildTCP(f, elsewhere, 443, 2), func(_ header.Ethernet, ip header.IPv4) { ip.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0) }), false},
		{"later fragment", edit(buildTCP(f, elsewhere, 443, 2), func(_ header.Ethernet, ip header.IPv4) { ip.SetFlagsFragmentOffset(0, 8) }), false},
		{"length beyond the frame", edit(buildTCP(f, elsewhere, 443, 2), func(_ header.Ethernet, ip header.IPv4) { ip.SetTotalLength(1500) }), false},
		{"IP options", edit(buildTCP(f, elsewhere, 443, 2), func(_ header.Ethernet, ip header.IPv4) { ip[0] = 0x46 }), false},
	} {
		t.Run(tt.what, func(t *testing.T) {
			if d := f.check(tt.frame); (d == nil) != tt.pass {
				t.Errorf("got %+v, want pass %v", d, tt.pass)
			}
		})
	}
}

func FuzzFrameFilter(f *testing.F) {
	filter := testFilter(f)
	f.Add(buildTCP(filter, publicAddr, 443, header.TCPFlagSyn))
	f.Add(buildUDP(filter, filter.guestIP, filter.gatewayIP, 53))
	f.Add(buildARP(filter, filter.guestMAC, filter.guestIP, filter.gatewayIP))
	f.Fuzz(func(t *testing.T, frame []byte) {
		if filter.check(frame) != nil {
			return
		}
		if eth := header.Ethernet(frame); eth.SourceAddress() != filter.guestMAC || eth.Type() == header.IPv6ProtocolNumber {
			t.Errorf("passed %x", frame)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 7})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, buf := bytes.NewReader(b), make([]byte, maxFrame)
		for {
			n, err := readFrame(r, buf)
			if err == nil {
				continue
			}
			if n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, errFrameSize) {
				t.Errorf("%d, %v", n, err)
			}
			return
		}
	})
}
