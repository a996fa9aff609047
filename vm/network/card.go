package network

import (
	"net"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// card is the stack's network card, with the one guest at the other end of
// its cable. It outlives the guest's connections: while there is none the
// cable is out, and what the stack sends is lost. Its frames have their
// Ethernet headers, which an ethernet.Endpoint adds and takes off.
type card struct {
	// Address, MTU and the way into the stack. Nothing goes through the
	// channel itself, which loses frames as soon as the guest is slower than
	// the stack: WritePackets waits for the guest instead.
	*channel.Endpoint

	guest atomic.Pointer[guestLink] // nil: the cable is out
}

func newCard(mtu int) *card {
	mac, _ := net.ParseMAC(gatewayMAC)
	c := &card{Endpoint: channel.New(0, uint32(mtu+header.EthernetMinimumSize), tcpip.LinkAddress(mac))}
	// The way from the guest is a socket; nothing on it flips bits.
	c.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	return c
}

// connect puts the cable in and hands the stack what the guest sends, until
// the connection ends.
func (c *card) connect(link *guestLink) error {
	c.guest.Store(link)
	defer c.guest.Store(nil)
	return link.receive(c.deliver)
}

// deliver hands a copy of the frame to the stack.
func (c *card) deliver(frame []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	defer pkt.DecRef()
	c.InjectInbound(0, pkt) // the frame's header says which protocol
}

// WritePackets implements [stack.LinkWriter]. A frame that the guest does not
// take is lost, as on any cable, and no error to the stack.
func (c *card) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	if link := c.guest.Load(); link != nil {
		for _, pkt := range pkts.AsSlice() {
			link.send(pkt.AsSlices())
		}
	}
	return pkts.Len(), nil
}
