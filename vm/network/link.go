package network

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	frameHeaderSize = 4 // QEMU's stream netdev: 32-bit big-endian length
	// maxFrame is the longest frame that QEMU's socket backends pass
	// (NET_BUFSIZE in include/net/net.h).
	maxFrame = 4096 + 65536
	// stallTimeout is how long one write waits for a guest that does not
	// take its frames. After that they are dropped, as a card would.
	stallTimeout = 200 * time.Millisecond
)

// guestLink stands between QEMU's socket and the switch of gvisor-tap-vsock.
// The switch trusts its peers: it allocates what a length says, indexes into
// short frames and remembers every source MAC address. guestLink hands it
// whole frames that passed the filter only.
//
// Write never fails: the switch forgets a connection whose write fails while
// frames of it are still being read, and later trips over it.
type guestLink struct {
	net.Conn
	frames  *bufio.Reader
	filter  *frameFilter
	dropped func(*drop)
	stats   *counters

	pending []byte // rest of the frame that Read is handing out
	buf     []byte

	writeMu sync.Mutex
	unsent  []byte // rest of a frame that was cut by a timeout
	stalled bool
}

func newGuestLink(conn net.Conn, filter *frameFilter, stats *counters, dropped func(*drop)) *guestLink {
	return &guestLink{
		Conn:    conn,
		frames:  bufio.NewReaderSize(conn, 4*maxFrame),
		filter:  filter,
		dropped: dropped,
		stats:   stats,
		pending: introduction(filter),
		buf:     make([]byte, frameHeaderSize+maxFrame),
	}
}

// introduction returns a first frame in the guest's name, of a type that the
// stack ignores. The switch sends only to cards that it has heard, and a guest
// that was restored from a snapshot may wait for the host to speak first.
func introduction(f *frameFilter) []byte {
	const localExperimental = 0x88b5 // IEEE 802, EtherType for private use
	b := make([]byte, frameHeaderSize+60)
	binary.BigEndian.PutUint32(b, 60)
	header.Ethernet(b[frameHeaderSize:]).Encode(&header.EthernetFields{
		SrcAddr: f.guestMAC, DstAddr: f.gatewayMAC, Type: localExperimental,
	})
	return b
}

// Read hands out length and frame of the frames that pass.
func (l *guestLink) Read(p []byte) (int, error) {
	for len(l.pending) == 0 {
		n, err := readFrame(l.frames, l.buf[frameHeaderSize:])
		if err != nil {
			return 0, err
		}
		frame := l.buf[frameHeaderSize : frameHeaderSize+n]
		l.stats.framesIn.Add(1)
		if d := l.filter.check(frame); d != nil {
			l.stats.framesDropped.Add(1)
			l.dropped(d)
			continue
		}
		binary.BigEndian.PutUint32(l.buf, uint32(n))
		l.pending = l.buf[:frameHeaderSize+n]
	}
	n := copy(p, l.pending)
	l.pending = l.pending[n:]
	return n, nil
}

var errFrameSize = errors.New("frame longer than QEMU sends")

// readFrame reads one frame into buf and returns its size.
func readFrame(r io.Reader, buf []byte) (int, error) {
	var size [frameHeaderSize]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxFrame || int(n) > len(buf) {
		return 0, fmt.Errorf("%w: %d bytes", errFrameSize, n)
	}
	if _, err := io.ReadFull(r, buf[:n]); err != nil {
		return 0, fmt.Errorf("frame of %d bytes: %w", n, err)
	}
	return int(n), nil
}

// Write sends one frame with its length, or drops it.
func (l *guestLink) Write(p []byte) (int, error) {
	l.writeMu.Lock()
	defer l.writeMu.Unlock()
	timeout := stallTimeout
	if l.stalled {
		timeout = time.Millisecond
	}
	_ = l.Conn.SetWriteDeadline(time.Now().Add(timeout))
	if len(l.unsent) > 0 {
		n, err := l.Conn.Write(l.unsent)
		l.unsent = l.unsent[n:]
		if err != nil {
			l.fail(err)
			return len(p), nil
		}
	}
	n, err := l.Conn.Write(p)
	if err == nil {
		l.stalled = false
		return len(p), nil
	}
	if n > 0 {
		l.unsent = append(l.unsent[:0], p[n:]...)
	}
	l.fail(err)
	return len(p), nil
}

// fail ends the connection unless the guest is merely slow; the reader then
// sees the end.
func (l *guestLink) fail(err error) {
	l.stats.framesLost.Add(1)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		l.stalled = true
		return
	}
	_ = l.Conn.Close()
}

// counters are the figures behind Stats.
type counters struct {
	framesIn, framesDropped, framesLost  atomic.Uint64
	flowsAllowed, flowsDenied, flowsOpen atomic.Int64
	dnsQueries, dnsDenied                atomic.Uint64
	bytesSent, bytesReceived             atomic.Int64
}
