package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// maxFlows bounds the connections of a guest, and with them the host's
// sockets and buffers.
const maxFlows = 512

// handshakeTimeout bounds half-open connections.
const handshakeTimeout = 10 * time.Second

var (
	errTooManyFlows  = fmt.Errorf("more than %d connections at once", maxFlows)
	errPolicyChanged = errors.New("the policy no longer allows it")
	errClosed        = errors.New("the network has been closed")
)

// A flow is one TCP connection that the guest asked for.
type flow struct {
	id     uint64
	dst    netip.AddrPort // as the guest dialled it
	cancel context.CancelCauseFunc
}

// flowTable holds the flows that exist, so that a new policy can end them.
type flowTable struct {
	mu    sync.Mutex
	flows map[*flow]struct{}
	wg    sync.WaitGroup
	ended bool
}

func (t *flowTable) add(f *flow) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.ended:
		return errClosed
	case len(t.flows) >= maxFlows:
		return errTooManyFlows
	}
	t.flows[f] = struct{}{}
	t.wg.Add(1)
	return nil
}

func (t *flowTable) remove(f *flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.flows, f)
	t.wg.Done()
}

// cancel ends the flows that keep does not keep.
func (t *flowTable) cancel(cause error, keep func(*flow) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for f := range t.flows {
		if !keep(f) {
			f.cancel(cause)
		}
	}
}

// close ends all flows, refuses new ones and waits.
func (t *flowTable) close() {
	t.mu.Lock()
	t.ended = true
	t.mu.Unlock()
	t.cancel(errClosed, func(*flow) bool { return false })
	t.wg.Wait()
}

// A destination is what a flow's address turned out to mean.
type destination struct {
	name    string // "" when the guest dialled a real address
	service *Service
	rule    string
}

// decide says whether the policy allows a connection to dst. Apart from the
// tables that it reads it is pure.
func (n *Network) decide(p *Policy, dst netip.AddrPort) (destination, error) {
	addr, port := dst.Addr(), dst.Port()
	if name, ok := n.names.name(addr); ok {
		d := destination{name: name}
		if s, ok := p.service(name, port); ok {
			d.service, d.rule = &s, s.rule()
			return d, nil
		}
		rule, ok := p.allowsName(name, port)
		if !ok {
			return d, errNotAllowed
		}
		d.rule = rule.String()
		return d, nil
	}
	switch {
	case namePool.Contains(addr):
		return destination{}, errors.New("no name has this address")
	case n.subnet.Contains(addr):
		return destination{}, errors.New("there is nothing else in the guest's network")
	}
	rule, err := p.allowsAddr(addr, port, n.out.own())
	return destination{rule: rule.String()}, err
}

// handleFlow answers one connection request: with a reset, or with the
// connection once the host has made its own side of it.
func (n *Network) handleFlow(ctx context.Context, r *tcp.ForwarderRequest) {
	id := r.ID()
	dst := netip.AddrPortFrom(addr4(id.LocalAddress.AsSlice()), id.LocalPort)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f := &flow{id: n.rec.nextFlow(), dst: dst, cancel: cancel}

	line := Decision{Flow: f.id, Protocol: "tcp", Addr: dst.Addr().String(), Port: dst.Port()}
	deny := func(err error) {
		r.Complete(true)
		n.stats.flowsDenied.Add(1)
		line.Flow, line.Verdict, line.Reason = 0, VerdictDeny, err.Error()
		n.rec.record(line)
	}
	if err := n.flows.add(f); err != nil {
		deny(err)
		return
	}
	defer n.flows.remove(f)

	// The policy is read after the flow is in the table: SetPolicy either is
	// seen here or finds the flow there.
	policy := n.policy.Load()
	d, err := n.decide(policy, dst)
	line.Name, line.Rule = d.name, d.rule
	if err != nil {
		deny(err)
		return
	}
	way, err := n.route(ctx, policy, d, dst)
	if err != nil {
		deny(err)
		return
	}
	line.Addr, line.Verdict = way.String(), VerdictAllow
	n.stats.flowsAllowed.Add(1)
	n.rec.record(line)

	start := time.Now()
	line.Sent, line.Received, err = n.connect(ctx, r, way, d, dst)
	line.Verdict, line.Duration = VerdictClose, time.Since(start)
	if err != nil {
		line.Reason = err.Error()
	}
	if errors.Is(err, errContradiction) {
		line.Verdict = VerdictDeny
		n.stats.flowsDenied.Add(1)
	}
	n.rec.record(line)
}

func (n *Network) route(ctx context.Context, p *Policy, d destination, dst netip.AddrPort) (route, error) {
	switch {
	case d.service != nil:
		return route{service: d.service}, nil
	case d.name != "":
		return n.out.routeName(ctx, p, d.name, dst.Port())
	}
	if u, err := n.out.proxyFor(dst.Addr().String(), dst.Port()); err != nil || u != nil {
		return route{proxy: u}, err
	}
	return route{addrs: []netip.AddrPort{dst}}, nil
}

// connect dials the host's side, accepts the guest's, and relays until both
// have ended.
func (n *Network) connect(ctx context.Context, r *tcp.ForwarderRequest, way route, d destination, dst netip.AddrPort) (sent, received int64, err error) {
	host := d.name
	if host == "" {
		host = dst.Addr().String()
	}
	upstream, err := n.out.dial(ctx, way, host, dst.Port())
	if err != nil {
		r.Complete(true)
		return 0, 0, fmt.Errorf("dial: %w", err)
	}
	defer upstream.Close()

	guest, err := accept(ctx, r)
	if err != nil {
		return 0, 0, err
	}
	defer guest.Close()

	n.stats.flowsOpen.Add(1)
	defer n.stats.flowsOpen.Add(-1)
	var check checkFunc
	if d.service == nil && d.name != "" {
		check = func() ([]byte, error) { return inspect(guest, d.name, dst.Port()) }
	}
	sent, received, err = relay(ctx, guest, upstream, check)
	n.stats.bytesSent.Add(sent)
	n.stats.bytesReceived.Add(received)
	return sent, received, err
}

// accept finishes the guest's handshake.
func accept(ctx context.Context, r *tcp.ForwarderRequest) (*guestConn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var wq waiter.Queue
	// CreateEndpoint waits for the guest, and looks at the state of the
	// handshake when woken: a spurious event makes it give up.
	defer context.AfterFunc(ctx, func() { wq.Notify(waiter.WritableEvents) })()
	ep, err := r.CreateEndpoint(&wq)
	r.Complete(false)
	if err != nil {
		return nil, fmt.Errorf("the guest did not finish the handshake: %s", err)
	}
	ep.SocketOptions().SetKeepAlive(true)
	return &guestConn{TCPConn: gonet.NewTCPConn(&wq, ep), ep: ep}, nil
}
