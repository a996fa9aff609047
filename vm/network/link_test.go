package network

import (
	"bytes"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// TestStalledGuest: a guest that takes no frames blocks nobody for long, and
// finds whole frames when it goes on.
func TestStalledGuest(t *testing.T) {
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	guest, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stats := &counters{}
	link := newGuestLink(conn, testFilter(t), stats, func(*drop) {})
	write := func(fill byte) {
		t.Helper()
		frame := bytes.Repeat([]byte{fill}, 60000)
		start := time.Now()
		link.send([][]byte{frame[:54], frame[54:]})
		if d := time.Since(start); d > 5*stallTimeout {
			t.Fatalf("write took %v", d)
		}
	}
	for stats.framesLost.Load() < 20 {
		write('a')
	}
	done := make(chan error, 1)
	go func() {
		buf := make([]byte, maxFrame)
		for {
			n, err := readFrame(guest, buf)
			if err != nil {
				done <- err
				return
			}
			if n != 60000 || bytes.Count(buf[:n], buf[:1]) != n {
				t.Errorf("a frame of %d bytes with mixed contents", n)
			}
			if buf[0] == 'z' {
				done <- nil
				return
			}
		}
	}()
	for {
		write('z')
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
	}
}
