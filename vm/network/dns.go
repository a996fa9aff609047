package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
)

const (
	dnsPort       = 53
	answerTTL     = 60 // seconds
	maxDNSConns   = 32
	maxDNSQueries = 64 // answered at once
	queriesPerSec = 100
	queriesBurst  = 500
)

// dnsServer is the guest's only resolver. It answers questions about names
// that the policy knows, with the address that stands for the name, and never
// forwards one.
type dnsServer struct {
	policy func() *Policy
	names  *nameTable
	// exists returns nil when the host could connect to the name.
	exists func(ctx context.Context, p *Policy, name string) error
	record func(Decision)
	stats  *counters

	running *semaphore.Weighted
	pace    *rate.Limiter
}

// serve answers on both sockets until ctx ends.
func (s *dnsServer) serve(ctx context.Context, pc net.PacketConn, ln net.Listener) error {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
		_ = w.WriteMsg(s.handle(ctx, query)) // a guest that has gone away needs no answer
	})
	servers := []*dns.Server{
		{PacketConn: pc, Handler: handler},
		{Listener: netutil.LimitListener(ln, maxDNSConns), Handler: handler},
	}
	ended := make(chan error, len(servers))
	for _, server := range servers {
		go func() { ended <- server.ActivateAndServe() }()
	}
	var err error
	left := len(servers)
	select {
	case <-ctx.Done():
	case err = <-ended:
		left--
	}
	for _, server := range servers {
		_ = server.Shutdown() // fails for one that has not started; closing its socket ends that
	}
	_, _ = pc.Close(), ln.Close()
	for range left {
		<-ended
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("the guest's DNS server: %w", err)
}

// handle returns the reply to a query.
func (s *dnsServer) handle(ctx context.Context, query *dns.Msg) *dns.Msg {
	s.stats.dnsQueries.Add(1)
	reply := new(dns.Msg).SetReply(query)
	reply.RecursionAvailable = true
	if !s.pace.Allow() || !s.running.TryAcquire(1) {
		reply.Rcode = dns.RcodeRefused
		s.deny("", "too many DNS queries")
		return reply
	}
	defer s.running.Release(1)
	s.answer(ctx, query, reply)
	return reply
}

// answer fills in the reply to a query.
func (s *dnsServer) answer(ctx context.Context, query, reply *dns.Msg) {
	if query.Opcode != dns.OpcodeQuery || len(query.Question) != 1 {
		reply.Rcode = dns.RcodeNotImplemented
		return
	}
	q := query.Question[0]
	name, ok := canonicalName(q.Name)
	policy := s.policy()
	known, service := false, false
	if ok && q.Qclass == dns.ClassINET {
		known, service = policy.knows(name)
	}
	switch {
	case !known:
		reply.Rcode = dns.RcodeNameError
		s.deny(clip(q.Name), errNotAllowed.Error())
		return
	case q.Qtype != dns.TypeA:
		return // the name exists, with nothing of that type
	}
	if !service {
		if err := s.exists(ctx, policy, name); err != nil {
			reply.Rcode = dns.RcodeServerFailure
			if isNotFound(err) || errors.Is(err, errUnreachable) {
				reply.Rcode = dns.RcodeNameError
			}
			s.deny(name, err.Error())
			return
		}
	}
	addr, isNew := s.names.addr(name)
	if isNew {
		s.record(Decision{Protocol: "dns", Verdict: VerdictAllow, Name: name, Addr: addr.String()})
	}
	reply.Answer = []dns.RR{addressRecord(q.Name, addr)}
}

func (s *dnsServer) deny(name, reason string) {
	s.stats.dnsDenied.Add(1)
	s.record(Decision{Protocol: "dns", Verdict: VerdictDeny, Name: name, Reason: reason})
}

func addressRecord(name string, addr netip.Addr) dns.RR {
	return &dns.A{
		Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: answerTTL},
		A:   addr.AsSlice(),
	}
}
