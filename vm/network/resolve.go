package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// A Resolver looks names up on the host. *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

const (
	lookupTimeout  = 10 * time.Second
	positiveTTL    = time.Minute
	negativeTTL    = 5 * time.Second
	maxCachedNames = 1024
)

// hostResolver is the host's resolver with a small cache, so that the
// connection that follows a query does not ask again.
type hostResolver struct {
	resolver Resolver
	now      func() time.Time
	group    singleflight.Group

	mu    sync.Mutex
	cache map[string]lookup
}

type lookup struct {
	addrs   []netip.Addr
	err     error
	expires time.Time
}

func newHostResolver(r Resolver) *hostResolver {
	return &hostResolver{resolver: r, now: time.Now, cache: make(map[string]lookup)}
}

// resolve returns the addresses of a name, IPv4 before IPv6.
func (h *hostResolver) resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	if l, ok := h.cached(name); ok {
		return l.addrs, l.err
	}
	v, err, _ := h.group.Do(name, func() (any, error) {
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		defer cancel()
		found, err := h.resolver.LookupNetIP(ctx, "ip", name)
		if err != nil {
			err = fmt.Errorf("resolve %s: %w", name, err)
		}
		l := lookup{addrs: sortAddrs(found), err: err, expires: h.now().Add(positiveTTL)}
		if err != nil {
			l.expires = h.now().Add(negativeTTL)
		}
		h.store(name, l)
		return l.addrs, err
	})
	if err != nil {
		return nil, err
	}
	return v.([]netip.Addr), nil
}

func (h *hostResolver) cached(name string) (lookup, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l, ok := h.cache[name]
	return l, ok && h.now().Before(l.expires)
}

func (h *hostResolver) store(name string, l lookup) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.cache) >= maxCachedNames {
		clear(h.cache)
	}
	h.cache[name] = l
}

// sortAddrs puts IPv4 first: hosts without IPv6 are more common than hosts
// without IPv4, and the addresses are tried in order.
func sortAddrs(in []netip.Addr) []netip.Addr {
	var v4, v6 []netip.Addr
	for _, a := range in {
		if a = a.Unmap(); a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	return append(v4, v6...)
}

func isNotFound(err error) bool {
	var dnsErr *net.DNSError
	return errors.As(err, &dnsErr) && dnsErr.IsNotFound
}
