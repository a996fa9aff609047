package network

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
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

// guestLink carries frames over one connection of QEMU's. It lets through what
// passes the filter, one way, and what the guest takes in time, the other.
type guestLink struct {
	conn    net.Conn
	filter  *frameFilter
	dropped func(*drop)
	stats   *counters

	writeMu sync.Mutex
	unsent  []byte // rest of a frame that was cut by a timeout
	stalled bool
}

func newGuestLink(conn net.Conn, filter *frameFilter, stats *counters, dropped func(*drop)) *guestLink {
	return &guestLink{conn: conn, filter: filter, dropped: dropped, stats: stats}
}

// receive hands the guest's frames to deliver, which must not keep them, until
// the connection ends.
func (l *guestLink) receive(deliver func(frame []byte)) error {
	frames, buf := bufio.NewReaderSize(l.conn, 4*maxFrame), make([]byte, maxFrame)
	for {
		n, err := readFrame(frames, buf)
		if err != nil {
			return err
		}
		l.stats.framesIn.Add(1)
		if d := l.filter.check(buf[:n]); d != nil {
			l.stats.framesDropped.Add(1)
			l.dropped(d)
			continue
		}
		deliver(buf[:n])
	}
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

// send sends one frame, which comes in pieces, or drops it.
func (l *guestLink) send(pieces [][]byte) {
	l.writeMu.Lock()
	defer l.writeMu.Unlock()
	timeout := stallTimeout
	if l.stalled {
		timeout = time.Millisecond
	}
	_ = l.conn.SetWriteDeadline(time.Now().Add(timeout))
	if len(l.unsent) > 0 {
		n, err := l.conn.Write(l.unsent)
		l.unsent = l.unsent[n:]
		if err != nil {
			l.fail(err)
			return
		}
	}
	rest := withLength(pieces)
	n, err := rest.WriteTo(l.conn) // takes what it wrote off rest
	if err == nil {
		l.stalled = false
		return
	}
	if n > 0 {
		l.unsent = bytes.Join(rest, nil)
	}
	l.fail(err)
}

// withLength puts a frame's length before its pieces.
func withLength(pieces [][]byte) net.Buffers {
	size := 0
	for _, p := range pieces {
		size += len(p)
	}
	return append(net.Buffers{binary.BigEndian.AppendUint32(nil, uint32(size))}, pieces...)
}

// fail ends the connection unless the guest is merely slow; the reader then
// sees the end.
func (l *guestLink) fail(err error) {
	l.stats.framesLost.Add(1)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		l.stalled = true
		return
	}
	_ = l.conn.Close()
}

// counters are the figures behind Stats.
type counters struct {
	framesIn, framesDropped, framesLost  atomic.Uint64
	flowsAllowed, flowsDenied, flowsOpen atomic.Int64
	dnsQueries, dnsDenied                atomic.Uint64
	bytesSent, bytesReceived             atomic.Int64
}
