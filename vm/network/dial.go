package network

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"golang.org/x/net/http/httpproxy"
	"golang.org/x/net/proxy"
)

// A Dialer connects on the host. *net.Dialer is one.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

const (
	dialTimeout    = 30 * time.Second // for a flow, over all addresses
	addressTimeout = 10 * time.Second // for one of several
)

var (
	errNotAllowed  = errors.New("no rule allows it")
	errUnreachable = errors.New("no address that may be reached")
)

// ProxyFromEnvironment chooses the host's proxy as HTTPS_PROXY, HTTP_PROXY and
// NO_PROXY say, read once.
func ProxyFromEnvironment() func(*url.URL) (*url.URL, error) {
	return httpproxy.FromEnvironment().ProxyFunc()
}

// outbound makes the host's side of allowed flows.
type outbound struct {
	resolver *hostResolver
	dialer   Dialer
	proxy    func(*url.URL) (*url.URL, error) // nil: none
	own      func() []netip.Addr              // the host's own addresses
}

// A route is where a flow will be dialled. One of its fields is set.
type route struct {
	addrs   []netip.AddrPort
	proxy   *url.URL
	service *Service
}

func (r route) String() string {
	switch {
	case r.service != nil:
		return r.service.Target
	case r.proxy != nil:
		return "proxy " + r.proxy.Host
	case len(r.addrs) > 0:
		return r.addrs[0].Addr().String()
	}
	return ""
}

// exists returns nil if a query for the name may be answered: the host can
// resolve it to something that may be reached, or a proxy will.
func (o *outbound) exists(ctx context.Context, p *Policy, name string) error {
	err := error(errUnreachable)
	for _, port := range p.portsOf(name) {
		if _, err = o.routeName(ctx, p, name, port); !errors.Is(err, errUnreachable) {
			break
		}
	}
	return err
}

// routeName finds the way to a name: by a proxy, which then resolves it, or
// to those of its addresses that the policy lets it have.
func (o *outbound) routeName(ctx context.Context, p *Policy, name string, port uint16) (route, error) {
	if u, err := o.proxyFor(name, port); err != nil || u != nil {
		return route{proxy: u}, err
	}
	found, err := o.resolver.resolve(ctx, name)
	if err != nil {
		return route{}, err
	}
	var r route
	own := o.own()
	refused := error(errNotAllowed)
	for _, a := range found {
		if err := p.reachable(a, port, own); err != nil {
			refused = err
			continue
		}
		r.addrs = append(r.addrs, netip.AddrPortFrom(a, port))
	}
	if len(r.addrs) == 0 {
		return route{}, fmt.Errorf("%s: %w: %w", name, errUnreachable, refused)
	}
	return r, nil
}

func (o *outbound) proxyFor(host string, port uint16) (*url.URL, error) {
	if o.proxy == nil {
		return nil, nil
	}
	scheme := "https"
	if port == 80 {
		scheme = "http"
	}
	u, err := o.proxy(&url.URL{Scheme: scheme, Host: net.JoinHostPort(host, strconv.Itoa(int(port)))})
	if err != nil {
		return nil, fmt.Errorf("choose a proxy for %s: %w", host, err)
	}
	return u, nil
}

// dial connects along a route. host and port are what a proxy is asked for.
func (o *outbound) dial(ctx context.Context, r route, host string, port uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	switch {
	case r.service != nil:
		network, address, err := r.service.dialTarget()
		if err != nil {
			return nil, err
		}
		return o.dialer.DialContext(ctx, network, address)
	case r.proxy != nil:
		conn, err := o.dialProxy(ctx, r.proxy, net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err != nil {
			return nil, fmt.Errorf("through proxy %s: %w", r.proxy.Host, err)
		}
		return conn, nil
	}
	err := error(errUnreachable)
	for _, a := range r.addrs {
		var conn net.Conn
		if conn, err = o.dialAddr(ctx, a); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

func (o *outbound) dialAddr(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, addressTimeout)
	defer cancel()
	return o.dialer.DialContext(ctx, "tcp", a.String())
}

// dialProxy asks a proxy for a connection to address.
func (o *outbound) dialProxy(ctx context.Context, u *url.URL, address string) (net.Conn, error) {
	switch u.Scheme {
	case "socks5", "socks5h":
		d, err := proxy.FromURL(u, contextDialer{ctx, o.dialer})
		if err != nil {
			return nil, err
		}
		return d.(proxy.ContextDialer).DialContext(ctx, "tcp", address)
	case "http", "https":
	default:
		return nil, fmt.Errorf("proxy scheme %q is not supported", u.Scheme)
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	conn, err := o.dialer.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return nil, err
	}
	if u.Scheme == "https" {
		conn = tls.Client(conn, &tls.Config{ServerName: u.Hostname()})
	}
	tunnel, err := connect(ctx, conn, u.User, address)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return tunnel, nil
}

// connect opens a tunnel by HTTP CONNECT (RFC 9110, 9.3.6).
func connect(ctx context.Context, conn net.Conn, user *url.Userinfo, address string) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
	if user != nil {
		password, _ := user.Password()
		credentials := base64.StdEncoding.EncodeToString([]byte(user.Username() + ":" + password))
		req.Header.Set("Proxy-Authorization", "Basic "+credentials)
	}
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("CONNECT %s: %s", address, resp.Status)
	}
	return &bufferedConn{Conn: conn, r: r}, nil
}

// bufferedConn is a connection whose first bytes were read ahead.
type bufferedConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.r.Read(p) }

func (c *bufferedConn) CloseWrite() error { return closeWrite(c.Conn) }

// contextDialer gives x/net/proxy our dialer.
type contextDialer struct {
	ctx context.Context
	Dialer
}

func (d contextDialer) Dial(network, address string) (net.Conn, error) {
	return d.DialContext(d.ctx, network, address)
}

// hostAddrs returns the addresses of the host's interfaces.
func hostAddrs() []netip.Addr {
	found, _ := net.InterfaceAddrs() // none: the protected ranges still hold
	var own []netip.Addr
	for _, a := range found {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr().Unmap().WithZone(""))
		}
	}
	return own
}
