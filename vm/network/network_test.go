package network

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func TestDNS(t *testing.T) {
	policy := mustPolicy(t, []Service{{Name: "model.internal", Port: 8080, Target: "127.0.0.1:43567"}},
		"registry.example.org", "*.pypi.example", "rebind.example.org", "mixed.example.org", "missing.example.org")
	g := newGuest(t, policy)
	g.host.addrs["a.pypi.example"] = []netip.Addr{publicAddr}
	for _, tt := range []struct {
		name    string
		qtype   uint16
		rcode   int
		answers int
	}{
		{"registry.example.org.", dns.TypeA, dns.RcodeSuccess, 1},
		{"REGISTRY.Example.ORG.", dns.TypeA, dns.RcodeSuccess, 1},
		{"a.pypi.example.", dns.TypeA, dns.RcodeSuccess, 1},
		{"model.internal.", dns.TypeA, dns.RcodeSuccess, 1},
		{"mixed.example.org.", dns.TypeA, dns.RcodeSuccess, 1},
		{"registry.example.org.", dns.TypeAAAA, dns.RcodeSuccess, 0},
		{"registry.example.org.", dns.TypeHTTPS, dns.RcodeSuccess, 0},
		{"registry.example.org.", dns.TypeTXT, dns.RcodeSuccess, 0},
		{"pypi.example.", dns.TypeA, dns.RcodeNameError, 0},
		{"evil.example.", dns.TypeA, dns.RcodeNameError, 0},
		{"evil.example.", dns.TypeTXT, dns.RcodeNameError, 0},
		{"secret.registry.example.org.", dns.TypeA, dns.RcodeNameError, 0},
		{"_dns.registry.example.org.", dns.TypeSRV, dns.RcodeNameError, 0},
		{".", dns.TypeNS, dns.RcodeNameError, 0},
		{"missing.example.org.", dns.TypeA, dns.RcodeNameError, 0},
		{"rebind.example.org.", dns.TypeA, dns.RcodeNameError, 0},
	} {
		for _, network := range []string{"udp", "tcp"} {
			t.Run(fmt.Sprint(tt.name, dns.TypeToString[tt.qtype], network), func(t *testing.T) {
				g := &testGuest{t: t, stack: g.stack}
				m := g.query(network, tt.name, tt.qtype)
				if m.Rcode != tt.rcode || len(m.Answer) != tt.answers {
					t.Errorf("got %s with %d answers, want %s with %d", dns.RcodeToString[m.Rcode], len(m.Answer), dns.RcodeToString[tt.rcode], tt.answers)
				}
				if tt.answers == 1 {
					a, _ := netip.AddrFromSlice(m.Answer[0].(*dns.A).A.To4())
					if !namePool.Contains(a) {
						t.Errorf("%s is not from the pool", a)
					}
				}
			})
		}
	}
	lookups, _ := g.host.asked()
	for _, l := range lookups {
		if strings.Contains(l, "evil") || strings.Contains(l, "secret") || l == "model.internal" {
			t.Errorf("the host was asked for %s", l)
		}
	}
	if a, b := g.resolve("registry.example.org"), g.resolve("mixed.example.org"); a == b {
		t.Errorf("two names share %s", a)
	}
}

func TestTCPByName(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "registry.example.org:22", "mixed.example.org:22"))
	if err := g.talk("registry.example.org", 22, "SSH-2.0-x\n", "hello\nSSH-2.0-x\n"); err != nil {
		t.Error(err)
	}
	d := g.log.find(t, "close line", func(d Decision) bool { return d.Verdict == VerdictClose })
	if d.Name != "registry.example.org" || d.Addr != publicAddr.String() || d.Port != 22 || d.Rule != "registry.example.org:22" ||
		d.Sent != 10 || d.Received != 16 || d.Reason != "" {
		t.Errorf("close line %+v", d)
	}
	// Of several addresses only the public one is dialled.
	if err := g.talk("mixed.example.org", 22, "", "hello\n"); err != nil {
		t.Error(err)
	}
	_, dials := g.host.asked()
	if want := "tcp 93.184.215.14:22"; len(dials) != 2 || dials[0] != want || dials[1] != want {
		t.Errorf("dialled %v", dials)
	}
}

func TestTCPDenied(t *testing.T) {
	policy := mustPolicy(t, nil, "registry.example.org", "0.0.0.0/0:443", "10.1.0.0/16:5432", "192.168.0.0/16:22")
	g := newGuest(t, policy)
	name := g.resolve("registry.example.org")
	for what, dst := range map[string]string{
		"name, other port":         name.String() + ":8443",
		"address of no name":       "198.18.77.77:443",
		"loopback":                 "127.0.0.1:443",
		"metadata":                 "169.254.169.254:443",
		"private, broad rule":      "10.9.9.9:443",
		"private, other port":      "10.1.2.3:80",
		"carrier-grade NAT":        "100.64.0.1:443",
		"public address, port":     "93.184.215.14:80",
		"gateway":                  "192.168.127.1:22",
		"other guest":              "192.168.127.77:22",
		"zero address":             "0.0.0.1:443",
		"reserved":                 "240.0.0.1:443",
		"DNS server elsewhere":     "8.8.8.8:53",
		"DNS over TLS elsewhere":   "8.8.8.8:853",
		"benchmark network itself": "198.18.0.0:443",
	} {
		t.Run(what, func(t *testing.T) {
			if what == "other guest" || what == "loopback" {
				t.Skip("the guest's own stack does not send it to the gateway; TestFrameFilter and TestDecide cover it")
			}
			start := time.Now()
			conn, err := g.dial(netip.MustParseAddrPort(dst).Addr(), netip.MustParseAddrPort(dst).Port())
			if err == nil {
				conn.Close()
				t.Fatal("connected")
			}
			if d := time.Since(start); d > 20*time.Second || !strings.Contains(err.Error(), "refused") {
				t.Errorf("not reset at once: %v after %v", err, d)
			}
		})
	}
	if _, dials := g.host.asked(); len(dials) != 0 {
		t.Errorf("the host dialled %v", dials)
	}
	if s := g.net.Stats(); s.FlowsDenied == 0 || s.FlowsAllowed != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestDecide(t *testing.T) {
	g := newGuest(t, nil)
	own := netip.MustParseAddr("93.184.215.99")
	g.net.out.own = func() []netip.Addr { return []netip.Addr{own} }
	for dst, want := range map[string]string{
		"127.0.0.1:443":      "protected (loopback)",
		"192.168.127.77:443": "nothing else in the guest's network",
		"93.184.215.99:443":  "address of the host itself",
		"93.184.215.14:443":  "",
		"93.184.215.14:444":  "no rule",
		"10.0.0.1:443":       "protected (private)",
		"169.254.169.254:80": "",
	} {
		_, err := g.net.decide(mustPolicy(t, nil, "0.0.0.0/0:443", "169.254.169.254"), netip.MustParseAddrPort(dst))
		if got := fmt.Sprint(err); want == "" && err != nil || !strings.Contains(got, want) {
			t.Errorf("%s: %v, want %q", dst, err, want)
		}
	}
}

func TestTCPByAddress(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "10.1.0.0/16:5432", "93.184.215.14:443"))
	for _, dst := range []string{"10.1.2.3:5432", "93.184.215.14:443"} {
		a := netip.MustParseAddrPort(dst)
		conn, err := g.dial(a.Addr(), a.Port())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 6)); err != nil {
			t.Error(err)
		}
	}
	if _, dials := g.host.asked(); strings.Join(dials, " ") != "tcp 10.1.2.3:5432 tcp 93.184.215.14:443" {
		t.Errorf("dialled %v", dials)
	}
}

func TestRebinding(t *testing.T) {
	// A name that resolves to a private address needs a second rule for it.
	g := newGuest(t, mustPolicy(t, nil, "internal.example.org:443"))
	if m := g.query("udp", "internal.example.org.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("resolved: %v", m)
	}
	g.net.SetPolicy(mustPolicy(t, nil, "internal.example.org:8443", "10.0.0.0/8:8443"))
	if err := g.talk("internal.example.org", 8443, "", "hello\n"); err != nil {
		t.Error(err)
	}
	// The name moves after it was resolved: the flow is refused.
	g.host.mu.Lock()
	g.host.addrs["internal.example.org"] = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	g.host.mu.Unlock()
	clear(g.net.out.resolver.cache)
	addr, _ := g.net.names.addr("internal.example.org")
	if _, err := g.dial(addr, 8443); err == nil {
		t.Error("connected to a name that moved to loopback")
	}
}

func TestNamedHost(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "registry.example.org:80,443,8080"))
	get := func(host string) string { return "GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }
	for _, tt := range []struct {
		what  string
		port  uint16
		text  string
		allow bool
	}{
		{"HTTP", 80, get("registry.example.org"), true},
		{"HTTP with port", 80, get("Registry.Example.org:80"), true},
		{"HTTP to another host", 80, get("evil.example"), false},
		{"HTTP without host", 80, "GET / HTTP/1.0\r\n\r\n", false},
		{"absolute target to another host", 80, "GET http://evil.example/ HTTP/1.1\r\nHost: registry.example.org\r\n\r\n", false},
		{"target and another Host", 80, "GET http://registry.example.org/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", false},
		{"CONNECT", 80, "CONNECT registry.example.org:443 HTTP/1.1\r\nHost: registry.example.org\r\n\r\n", false},
		{"not HTTP", 80, "SSH-2.0-OpenSSH\r\n", false},
		{"TLS", 443, clientHello(t, "registry.example.org"), true},
		{"TLS to another host", 443, clientHello(t, "evil.example"), false},
		{"TLS without name", 443, clientHello(t, ""), false},
		{"HTTP where TLS belongs", 443, get("registry.example.org"), false},
		{"HTTP elsewhere", 8080, get("registry.example.org:8080"), true},
		{"HTTP elsewhere to another host", 8080, get("evil.example"), false},
		{"TLS elsewhere to another host", 8080, clientHello(t, "evil.example"), false},
		{"TLS elsewhere without name", 8080, clientHello(t, ""), true},
		{"anything elsewhere", 8080, "\x00\x01binary", true},
	} {
		t.Run(tt.what, func(t *testing.T) {
			err := g.talk("registry.example.org", tt.port, tt.text, "hello\n"+tt.text)
			if tt.allow && err != nil {
				t.Error(err)
			}
			if !tt.allow && err == nil {
				t.Error("went through")
			}
			if !tt.allow {
				g.log.find(t, "denial after the first bytes", func(d Decision) bool {
					return d.Verdict == VerdictDeny && d.Flow != 0 && d.Port == tt.port && d.Sent == 0
				})
			}
		})
	}
}

// clientHello returns the first flight of a TLS client.
func clientHello(t testing.TB, name string) string {
	t.Helper()
	c, s := net.Pipe()
	defer s.Close()
	go func() {
		_ = tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	}()
	defer c.Close()
	buf := make([]byte, 4096)
	n, err := s.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestService(t *testing.T) {
	g := newGuest(t, mustPolicy(t, []Service{
		{Name: "model.internal", Port: 8080, Target: "127.0.0.1:43567"},
		{Name: "model.internal", Port: 81, Target: "unix:/run/model.sock"},
	}))
	if err := g.talk("model.internal", 8080, "", "hello\n"); err != nil {
		t.Error(err)
	}
	if err := g.talk("model.internal", 81, "", "hello\n"); err != nil {
		t.Error(err)
	}
	if err := g.talk("model.internal", 80, "", "hello\n"); err == nil {
		t.Error("another port of the service's name went through")
	}
	if _, dials := g.host.asked(); strings.Join(dials, " ") != "tcp 127.0.0.1:43567 unix /run/model.sock" {
		t.Errorf("dialled %v", dials)
	}
}

func TestEmptyPolicy(t *testing.T) {
	g := newGuest(t, nil)
	if m := g.query("udp", "registry.example.org.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("resolved: %v", m)
	}
	if _, err := g.dial(publicAddr, 443); err == nil {
		t.Error("connected")
	}
	if lookups, dials := g.host.asked(); len(lookups)+len(dials) != 0 {
		t.Errorf("the host looked up %v and dialled %v", lookups, dials)
	}
}

func TestUpstreamRefuses(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "registry.example.org"))
	g.host.refuse = true
	if _, err := g.dial(g.resolve("registry.example.org"), 443); err == nil {
		t.Error("connected")
	}
	d := g.log.find(t, "close line", func(d Decision) bool { return d.Verdict == VerdictClose })
	if !strings.Contains(d.Reason, "refused") {
		t.Errorf("reason %q", d.Reason)
	}
}

func TestSetPolicy(t *testing.T) {
	g := newGuest(t, mustPolicy(t, nil, "registry.example.org:22", "other.example.org:22"))
	open := func(name string) net.Conn {
		conn, err := g.dial(g.resolve(name), 22)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	ends, stays := open("registry.example.org"), open("other.example.org")
	addr := g.resolve("registry.example.org")
	g.net.SetPolicy(mustPolicy(t, nil, "other.example.org:22"))
	if n, err := ends.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read %d, %v from a flow that is not allowed any more, want a reset", n, err)
	}
	if _, err := io.WriteString(stays, "x"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(stays, make([]byte, 1)); err != nil {
		t.Errorf("a flow that is still allowed: %v", err)
	}
	if _, err := g.dial(addr, 22); err == nil {
		t.Error("connected to a name that is not allowed any more")
	}
	g.log.find(t, "policy change", func(d Decision) bool { return d.Reason == errPolicyChanged.Error() })
}
