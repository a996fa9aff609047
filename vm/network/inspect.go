package network

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	// helloTimeout bounds the wait for the rest of a first message.
	helloTimeout = 10 * time.Second
	// idleTimeout bounds the wait for the first byte where one must come.
	idleTimeout = 60 * time.Second
	// maxHello bounds a ClientHello or the header of a first request.
	maxHello = 64 << 10
)

// What a guest says first on a flow to a name.
type speech int

const (
	speechRaw speech = iota
	speechTLS
	speechHTTP
	speechUnclear // too few bytes yet
)

var errContradiction = errors.New("the first bytes do not fit the name")

// inspect reads the first bytes of a flow to name:port and returns them when
// they do not contradict the name. On port 443 they must be a TLS ClientHello
// for that name, on port 80 an HTTP request for that host. On other ports
// what looks like TLS or HTTP must not name another host; anything else
// passes, since the address dialled is the name's anyway.
//
// A refusal is an error that wraps errContradiction.
func inspect(conn net.Conn, name string, port uint16) ([]byte, error) {
	rec := &recordingConn{Conn: conn}
	if port == 80 || port == 443 {
		_ = conn.SetReadDeadline(time.Now().Add(idleTimeout))
	}
	kind := speechUnclear
	for kind == speechUnclear {
		if err := rec.more(); err != nil {
			if rec.buf.Len() == 0 && errors.Is(err, io.EOF) {
				return nil, nil // nothing said, nothing to check
			}
			return nil, fmt.Errorf("reading the first bytes: %w", err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(helloTimeout))
		kind = classify(rec.buf.Bytes())
	}
	if err := checkSpeech(rec, kind, name, port); err != nil {
		return nil, fmt.Errorf("%w: %w", errContradiction, err)
	}
	return rec.buf.Bytes(), conn.SetReadDeadline(time.Time{})
}

func checkSpeech(rec *recordingConn, kind speech, name string, port uint16) error {
	switch {
	case port == 443 && kind != speechTLS:
		return errors.New("not TLS on port 443")
	case port == 80 && kind != speechHTTP:
		return errors.New("not HTTP on port 80")
	case kind == speechRaw:
		return nil
	}
	what, read := "TLS server name", serverName
	if kind == speechHTTP {
		what, read = "HTTP host", requestHost
	}
	said, err := read(rec)
	if err != nil {
		return fmt.Errorf("reading the %s: %w", what, err)
	}
	if said == "" && port != 80 && port != 443 {
		return nil
	}
	if got, ok := canonicalName(said); !ok || got != name {
		return fmt.Errorf("the %s %q is not %s", what, clip(said), name)
	}
	return nil
}

// methods are those of RFC 9110, RFC 5789 and HTTP/2's preface (PRI), which
// must be told apart from binary protocols, not from each other.
var methods = []string{"GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "CONNECT ", "OPTIONS ", "TRACE ", "PATCH ", "PRI "}

// classify tells what the first bytes of a flow are.
func classify(b []byte) speech {
	tlsHandshake := []byte{22, 3} // RFC 8446, 5.1: handshake record, version 3.x
	if len(b) < len(tlsHandshake) && bytes.HasPrefix(tlsHandshake, b) {
		return speechUnclear
	}
	if bytes.HasPrefix(b, tlsHandshake) {
		return speechTLS
	}
	b = bytes.TrimLeft(b, "\r\n") // RFC 9112, 2.2: servers ignore empty lines
	for _, m := range methods {
		if bytes.HasPrefix(b, []byte(m)) {
			return speechHTTP
		}
		if strings.HasPrefix(m, string(b)) {
			return speechUnclear
		}
	}
	return speechRaw
}

// serverName returns the server name of a ClientHello. crypto/tls reads it, up
// to the point where it would answer.
func serverName(rec *recordingConn) (string, error) {
	var name string
	seen := errors.New("seen")
	err := tls.Server(rec.replay(), &tls.Config{
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			name = hello.ServerName
			return nil, seen
		},
	}).HandshakeContext(context.Background())
	if !errors.Is(err, seen) {
		return "", err
	}
	return name, nil
}

// requestHost returns the host of an HTTP request, without its port.
func requestHost(rec *recordingConn) (string, error) {
	r := bufio.NewReader(rec.replay())
	for { // RFC 9112, 2.2
		b, err := r.Peek(1)
		if err != nil {
			return "", err
		}
		if b[0] != '\r' && b[0] != '\n' {
			break
		}
		_, _ = r.Discard(1)
	}
	req, err := http.ReadRequest(r)
	if err != nil {
		return "", err
	}
	hosts := hostHeaders(rec.buf.Bytes())
	switch {
	case req.Method == http.MethodConnect:
		return "", errors.New("CONNECT asks for a proxy")
	case req.Method == "PRI":
		return "", errors.New("HTTP/2 without TLS hides the host")
	case len(hosts) > 1:
		return "", errors.New("more than one Host header")
	case len(hosts) == 1 && stripPort(hosts[0]) != stripPort(req.Host):
		return "", errors.New("the request line and the Host header disagree")
	}
	return stripPort(req.Host), nil
}

// hostHeaders returns the values of the Host header of a request that
// ReadRequest accepted, which hides it behind an absolute request target.
func hostHeaders(b []byte) (hosts []string) {
	for line := range strings.Lines(strings.TrimLeft(string(b), "\r\n")) {
		if strings.TrimRight(line, "\r\n") == "" {
			break
		}
		if k, v, ok := strings.Cut(line, ":"); ok && strings.EqualFold(k, "Host") {
			hosts = append(hosts, strings.TrimSpace(v))
		}
	}
	return hosts
}

func stripPort(hostport string) string {
	if host, _, err := net.SplitHostPort(hostport); err == nil {
		return host
	}
	return hostport
}

func clip(s string) string { return s[:min(len(s), 80)] }

// recordingConn remembers what was read from Conn and never writes to it.
type recordingConn struct {
	net.Conn
	buf    bytes.Buffer
	offset int // where replay goes on
}

var errTooLong = fmt.Errorf("more than %d bytes", maxHello)

// more reads once.
func (c *recordingConn) more() error {
	if c.buf.Len() >= maxHello {
		return errTooLong
	}
	chunk := make([]byte, min(4096, maxHello-c.buf.Len()))
	n, err := c.Conn.Read(chunk)
	c.buf.Write(chunk[:n])
	if n > 0 {
		return nil
	}
	return err
}

// replay returns the connection from its first byte on.
func (c *recordingConn) replay() net.Conn { c.offset = 0; return c }

func (c *recordingConn) Read(p []byte) (int, error) {
	if c.offset == c.buf.Len() {
		if err := c.more(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.buf.Bytes()[c.offset:])
	c.offset += n
	return n, nil
}

func (c *recordingConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *recordingConn) Close() error                     { return nil }
func (c *recordingConn) SetDeadline(time.Time) error      { return nil }
func (c *recordingConn) SetReadDeadline(time.Time) error  { return nil }
func (c *recordingConn) SetWriteDeadline(time.Time) error { return nil }
