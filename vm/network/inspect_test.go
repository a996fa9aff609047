package network

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/miekg/dns"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

// readerConn is a connection that only reads.
type readerConn struct {
	net.Conn
	io.Reader
}

func (c readerConn) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func inspectBytes(r io.Reader, port uint16) ([]byte, error) {
	rec := &recordingConn{Conn: readerConn{Reader: r}}
	kind := speechUnclear
	for kind == speechUnclear {
		if err := rec.more(); err != nil {
			return nil, err
		}
		kind = classify(rec.buf.Bytes())
	}
	return rec.buf.Bytes(), checkSpeech(rec, kind, "registry.example.org", port)
}

func TestInspectInSmallPieces(t *testing.T) {
	for _, tt := range []struct {
		text string
		port uint16
	}{
		{clientHello(t, "registry.example.org"), 443},
		{"\r\n\r\nGET / HTTP/1.1\r\nHost: registry.example.org\r\n\r\n", 80},
		{"GET / HTTP/1.1\r\nHost: registry.example.org\r\n\r\n", 8080},
	} {
		if _, err := inspectBytes(iotest.OneByteReader(strings.NewReader(tt.text)), tt.port); err != nil {
			t.Errorf("port %d: %v", tt.port, err)
		}
	}
}

func TestInspectBounded(t *testing.T) {
	long := "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 2*maxHello)
	if _, err := inspectBytes(strings.NewReader(long), 80); err == nil {
		t.Error("accepted a header without end")
	}
	for what, text := range map[string]string{
		"two hosts":       "GET / HTTP/1.1\r\nHost: registry.example.org\r\nHost: evil.example\r\n\r\n",
		"host list":       "GET / HTTP/1.1\r\nHost: registry.example.org,evil.example\r\n\r\n",
		"HTTP/2":          "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"cut hello":       clientHello(t, "registry.example.org")[:60],
		"space in header": "GET / HTTP/1.1\r\nHost : registry.example.org\r\n\r\n",
	} {
		if _, err := inspectBytes(strings.NewReader(text), 80); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

func FuzzInspect(f *testing.F) {
	f.Add([]byte(clientHello(f, "registry.example.org")), uint16(443))
	f.Add([]byte(clientHello(f, "")), uint16(8443))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: registry.example.org\r\n\r\n"), uint16(80))
	f.Add([]byte("GET http://evil.example/ HTTP/1.1\r\nHost: registry.example.org\r\n\r\n"), uint16(80))
	f.Fuzz(func(t *testing.T, b []byte, port uint16) {
		first, err := inspectBytes(strings.NewReader(string(b)), port)
		if err != nil {
			return
		}
		if !strings.HasPrefix(string(b), string(first)) {
			t.Error("the bytes changed")
		}
		if (port == 80 || port == 443) && !strings.Contains(strings.ToLower(string(b)), "registry.example.org") {
			t.Errorf("passed without the name: %q", b)
		}
	})
}

func FuzzDNS(f *testing.F) {
	policy := mustPolicy(f, nil, "*.example.org")
	s := &dnsServer{
		policy: func() *Policy { return policy }, names: newNameTable(), record: func(Decision) {}, stats: &counters{},
		exists: func(_ context.Context, _ *Policy, name string) error {
			if !strings.HasSuffix(name, ".example.org") {
				f.Errorf("the host was asked for %q", name)
			}
			return nil
		},
		running: semaphore.NewWeighted(1), pace: rate.NewLimiter(rate.Inf, 1),
	}
	for _, name := range []string{"a.example.org.", "evil.example.", "\\000.example.org.", "."} {
		b, _ := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		reply := s.handle(context.Background(), m)
		if _, err := reply.Pack(); err != nil && len(reply.Answer) > 0 {
			t.Errorf("cannot pack %v: %v", reply, err)
		}
	})
}
