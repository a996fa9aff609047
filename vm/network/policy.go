package network

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
)

// A Service is one port of the host, or of something that the host reaches,
// that the guest sees as Name:Port. It is the only way to the host itself.
type Service struct {
	Name   string // the name that the guest resolves, such as model.internal
	Port   uint16 // the port that the guest dials
	Target string // host:port, or unix:/path, dialled on the host
}

// A Policy is what the guest may reach. It is immutable and safe for
// concurrent use; the zero Policy lets nothing out.
type Policy struct {
	rules    []Rule
	services []Service
}

// NewPolicy builds a policy, checking the services.
func NewPolicy(rules []Rule, services []Service) (*Policy, error) {
	p := &Policy{rules: append([]Rule(nil), rules...)}
	for _, s := range services {
		name, err := asciiName(s.Name)
		if err != nil {
			return nil, fmt.Errorf("network service %q: %w", s.Name, err)
		}
		s.Name = name
		if s.Port == 0 {
			return nil, fmt.Errorf("network service %q: port must be 1 to 65535", s.Name)
		}
		if _, ok := p.service(s.Name, s.Port); ok {
			return nil, fmt.Errorf("network service %s:%d is there twice", s.Name, s.Port)
		}
		if _, _, err := s.dialTarget(); err != nil {
			return nil, fmt.Errorf("network service %s:%d: %w", s.Name, s.Port, err)
		}
		p.services = append(p.services, s)
	}
	return p, nil
}

// Rules returns a copy of the policy's rules.
func (p *Policy) Rules() []Rule { return append([]Rule(nil), p.rules...) }

// Services returns a copy of the policy's services.
func (p *Policy) Services() []Service { return append([]Service(nil), p.services...) }

// dialTarget returns the arguments for a dialer.
func (s Service) dialTarget() (network, address string, err error) {
	if path, ok := strings.CutPrefix(s.Target, "unix:"); ok {
		if !filepath.IsAbs(path) {
			return "", "", fmt.Errorf("target %q: the socket's path must be absolute", s.Target)
		}
		return "unix", path, nil
	}
	host, port, err := net.SplitHostPort(s.Target)
	if err != nil {
		return "", "", fmt.Errorf("target %q: %w", s.Target, err)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return "", "", fmt.Errorf("target %q: want host:port", s.Target)
	}
	return "tcp", s.Target, nil
}

func (s Service) rule() string { return fmt.Sprintf("service %s:%d", s.Name, s.Port) }

func (p *Policy) service(name string, port uint16) (Service, bool) {
	for _, s := range p.services {
		if s.Name == name && s.Port == port {
			return s, true
		}
	}
	return Service{}, false
}

// knows tells whether the name may be resolved at all, and whether it is only
// a service, which has no address outside.
func (p *Policy) knows(name string) (known, serviceOnly bool) {
	for _, r := range p.rules {
		if r.matchesName(name) {
			return true, false
		}
	}
	for _, s := range p.services {
		if s.Name == name {
			return true, true
		}
	}
	return false, false
}

// allowsName returns the rule that opens name:port.
func (p *Policy) allowsName(name string, port uint16) (Rule, bool) {
	for _, r := range p.rules {
		if r.matchesName(name) && r.matchesPort(port) {
			return r, true
		}
	}
	return Rule{}, false
}

// allowsAddr returns the rule that opens addr:port to a guest that dials the
// address itself. own are the host's own addresses.
func (p *Policy) allowsAddr(addr netip.Addr, port uint16, own []netip.Addr) (Rule, error) {
	reason := error(errNotAllowed)
	for _, r := range p.rules {
		if !r.matchesAddr(addr) || !r.matchesPort(port) {
			continue
		}
		if err := p.reachable(addr, port, own); err != nil {
			reason = err
			continue
		}
		return r, nil
	}
	return Rule{}, reason
}

// reachable refuses addresses that are not public and that no address rule
// names for this port: an allowed name that resolves to one is an attack
// (DNS rebinding) or needs a second rule that says so.
func (p *Policy) reachable(addr netip.Addr, port uint16, own []netip.Addr) error {
	addr = embedded4(addr)
	for _, o := range own {
		if o == addr && !p.namesExactly(addr, port) {
			return fmt.Errorf("%s is an address of the host itself", addr)
		}
	}
	class, openable := protection(addr)
	if class == "" {
		return nil
	}
	if openable {
		for _, r := range p.rules {
			if r.matchesAddr(addr) && r.matchesPort(port) && opens(r.prefix, addr) {
				return nil
			}
		}
	}
	return fmt.Errorf("%s is protected (%s)", addr, class)
}

func (p *Policy) namesExactly(addr netip.Addr, port uint16) bool {
	for _, r := range p.rules {
		if r.prefix.IsValid() && r.prefix.IsSingleIP() && r.matchesAddr(addr) && r.matchesPort(port) {
			return true
		}
	}
	return false
}

// portsOf returns the ports that rules open for a name.
func (p *Policy) portsOf(name string) (ports []uint16) {
	for _, r := range p.rules {
		if r.matchesName(name) {
			ports = append(ports, r.ports...)
		}
	}
	return ports
}
