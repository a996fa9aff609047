package network

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// plug connects to a network as QEMU does, without a guest behind it.
func plug(t *testing.T, socket string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return conn
}

// TestCableOut: what is sent while no guest is connected is lost, and the next
// connection is like the first: the guest need not speak before it is reached.
func TestCableOut(t *testing.T) {
	checkLeaks(t)
	n, socket := serveNetwork(t, Config{})
	buf := make([]byte, maxFrame)
	for range 2 {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if _, err := n.DialGuest(ctx, 22); err == nil {
			t.Fatal("reached a guest that is not there")
		}
		cancel()
		conn := plug(t, socket)
		for n.card.guest.Load() == nil {
			time.Sleep(time.Millisecond)
		}
		ctx, cancel = context.WithCancel(context.Background())
		dialled := make(chan struct{})
		go func() {
			defer close(dialled)
			_, _ = n.DialGuest(ctx, 23)
		}()
		for port := uint16(0); port != 23; { // what was sent before may be sent again
			size, err := readFrame(conn, buf)
			if err != nil {
				t.Fatal(err)
			}
			eth := header.Ethernet(buf[:size])
			if eth.DestinationAddress() != n.filter.guestMAC || eth.SourceAddress() != n.filter.gatewayMAC || eth.Type() != header.IPv4ProtocolNumber {
				t.Fatalf("frame from %s to %s of type %#x", eth.SourceAddress(), eth.DestinationAddress(), eth.Type())
			}
			port = header.TCP(header.IPv4(buf[header.EthernetMinimumSize:size]).Payload()).DestinationPort()
		}
		cancel()
		<-dialled
		_, _ = conn.Write([]byte{0, 0, 0, 100, 1, 2, 3}) // QEMU dies in the middle of a frame
		_ = conn.Close()
		for !n.serving.TryLock() { // until the network has noticed
			time.Sleep(time.Millisecond)
		}
		n.serving.Unlock()
	}
	if s := n.Stats(); s.FramesIn != 0 || s.FramesLost != 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestCardAddresses: the stack gets what is sent to the gateway or to all.
func TestCardAddresses(t *testing.T) {
	checkLeaks(t)
	n, socket := serveNetwork(t, Config{})
	conn := plug(t, socket)
	f := n.filter
	for _, dst := range []tcpip.LinkAddress{"\x02\x00\x00\x00\x00\x09", "\x01\x00\x5e\x00\x00\x01", f.guestMAC, f.gatewayMAC, header.EthernetBroadcastAddress} {
		arp := buildARP(f, f.guestMAC, f.guestIP, f.gatewayIP)
		copy(arp, dst)
		if _, err := conn.Write(framed(arp)); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, maxFrame)
	for range 2 {
		size, err := readFrame(conn, buf)
		if err != nil {
			t.Fatal(err)
		}
		if a := header.ARP(buf[header.EthernetMinimumSize:size]); !a.IsValid() || a.Op() != header.ARPReply || addr4(a.ProtocolAddressSender()) != f.gatewayIP {
			t.Errorf("answered %x", buf[:size])
		}
	}
	_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if size, err := readFrame(conn, buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a third answer: %x, %v", buf[:size], err)
	}
	if s := n.Stats(); s.FramesIn != 5 || s.FramesDropped != 3 {
		t.Errorf("stats %+v", s)
	}
}

// streamConn is a connection on which the guest has sent all that it will.
type streamConn struct {
	net.Conn
	*bytes.Reader
}

func (c streamConn) Read(p []byte) (int, error)     { return c.Reader.Read(p) }
func (streamConn) Write(p []byte) (int, error)      { return len(p), nil }
func (streamConn) SetWriteDeadline(time.Time) error { return nil }
func (streamConn) Close() error                     { return nil }

// FuzzGuest sends streams of bytes all the way into the stack.
func FuzzGuest(f *testing.F) {
	n, err := New(Config{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = n.Close() })
	filter := n.filter
	f.Add(framed(buildTCP(filter, publicAddr, 443, header.TCPFlagSyn), buildTCP(filter, filter.gatewayIP, 53, header.TCPFlagSyn)))
	f.Add(framed(buildUDP(filter, filter.guestIP, filter.gatewayIP, 53), buildUDP(filter, netip.IPv4Unspecified(), broadcast4, 67)))
	f.Add(framed(buildICMP(filter, filter.gatewayIP, header.ICMPv4Echo), buildARP(filter, filter.guestMAC, filter.guestIP, filter.gatewayIP)))
	f.Add(framed(nil, []byte{1}, make([]byte, 14)))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, stream []byte) {
		link := newGuestLink(streamConn{Reader: bytes.NewReader(stream)}, filter, &n.stats, n.recordDrop)
		if err := n.card.connect(link); err == nil {
			t.Error("an end without a reason")
		}
	})
}
