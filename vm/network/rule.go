package network

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/idna"
	"golang.org/x/net/publicsuffix"
)

// DefaultPorts are the TCP ports that a rule without ports opens.
var DefaultPorts = []uint16{80, 443}

// A Rule names destinations that the guest may reach over TCP:
//
//	registry.example.org          the name itself, on ports 80 and 443
//	*.pypi.example                every name below it, not the name itself
//	example.org:443,8443          only these ports
//	10.1.2.3:5432  10.0.0.0/8:22  addresses; the guest dials them directly
//	[fd00:1::/32]:443             names may resolve into this IPv6 range
//
// Names are case-insensitive; non-ASCII names are converted by IDNA.
// The zero Rule matches nothing.
type Rule struct {
	name     string // canonical; "" for an address rule
	wildcard bool
	prefix   netip.Prefix
	ports    []uint16
}

// A SyntaxError says what is wrong with a rule and where.
type SyntaxError struct {
	Input  string
	Offset int // in bytes, from the start of Input
	Reason string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("network rule %q, at character %d: %s", e.Input, e.Offset+1, e.Reason)
}

// ParseRule reads one entry of the allow list. Its error is a *SyntaxError.
func ParseRule(s string) (Rule, error) {
	fail := func(at int, format string, args ...any) (Rule, error) {
		return Rule{}, &SyntaxError{Input: s, Offset: at, Reason: fmt.Sprintf(format, args...)}
	}
	if s == "" {
		return fail(0, "empty")
	}
	if i := strings.Index(s, "://"); i >= 0 {
		return fail(i, "a rule is a name or an address, not a URL")
	}
	host, ports, portsAt, err := splitPorts(s)
	if err != nil {
		return fail(portsAt, "%v", err)
	}
	r := Rule{ports: ports}
	if len(ports) == 0 {
		r.ports = DefaultPorts
	}
	if prefix, ok := parsePrefix(host); ok {
		if prefix != prefix.Masked() {
			return fail(0, "%s has bits beyond its mask; write %s", prefix, prefix.Masked())
		}
		if class, openable := protection(prefix.Addr()); !openable && prefix.Bits() > 0 {
			return fail(0, "%s is %s and cannot be opened; use a service for a port of the host", prefix, class)
		}
		r.prefix = prefix
		return r, nil
	}
	if i := strings.IndexByte(host, '/'); i >= 0 {
		return fail(i, "neither a CIDR range nor a name; paths cannot be allowed")
	}
	name := host
	at := 0
	if rest, ok := strings.CutPrefix(host, "*."); ok {
		r.wildcard, name, at = true, rest, 2
	}
	if i := strings.IndexByte(name, '*'); i >= 0 {
		return fail(at+i, "a wildcard stands for whole labels at the start, as in *.example.org")
	}
	r.name, err = asciiName(name)
	if err != nil {
		return fail(at, "%v", err)
	}
	if suffix, icann := publicsuffix.PublicSuffix(r.name); r.wildcard && icann && suffix == r.name {
		return fail(at, "%s is a public suffix: the rule would open all of it", r.name)
	}
	return r, nil
}

// String returns the rule in its canonical form, which ParseRule accepts.
func (r Rule) String() string {
	var b strings.Builder
	switch {
	case r.prefix.IsValid():
		host := r.prefix.String()
		if r.prefix.IsSingleIP() {
			host = r.prefix.Addr().String()
		}
		if r.prefix.Addr().Is6() {
			host = "[" + host + "]"
		}
		b.WriteString(host)
	case r.wildcard:
		b.WriteString("*." + r.name)
	default:
		b.WriteString(r.name)
	}
	if !slices.Equal(r.ports, DefaultPorts) {
		for i, p := range r.ports {
			b.WriteByte(":,"[min(i, 1)])
			b.WriteString(strconv.Itoa(int(p)))
		}
	}
	return b.String()
}

func (r Rule) matchesName(name string) bool {
	if r.name == "" {
		return false
	}
	if !r.wildcard {
		return name == r.name
	}
	rest, ok := strings.CutSuffix(name, "."+r.name)
	return ok && rest != ""
}

func (r Rule) matchesAddr(addr netip.Addr) bool {
	return r.prefix.IsValid() && r.prefix.Contains(addr)
}

func (r Rule) matchesPort(port uint16) bool { return slices.Contains(r.ports, port) }

// splitPorts separates host and ":443,80". The offset says where in s the
// error is.
func splitPorts(s string) (host string, ports []uint16, offset int, err error) {
	host, list := s, ""
	switch {
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", nil, 0, fmt.Errorf("missing ]")
		}
		host, list, offset = s[1:end], s[end+1:], end+1
		if list == "" {
			return host, nil, 0, nil
		}
		if list[0] != ':' {
			return "", nil, offset, fmt.Errorf("only :PORT may follow ]")
		}
		list, offset = list[1:], offset+1
	case strings.Count(s, ":") > 1: // an IPv6 address without brackets
		return s, nil, 0, nil
	default:
		var found bool
		if host, list, found = strings.Cut(s, ":"); !found {
			return host, nil, 0, nil
		}
		offset = len(host) + 1
	}
	for field := range strings.SplitSeq(list, ",") {
		p, err := strconv.ParseUint(field, 10, 16)
		if err != nil || p == 0 || field[0] == '+' {
			return "", nil, offset, fmt.Errorf("bad port %q; want 1 to 65535", field)
		}
		if !slices.Contains(ports, uint16(p)) {
			ports = append(ports, uint16(p))
		}
		offset += len(field) + 1
	}
	return host, ports, offset, nil
}

func parsePrefix(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p, !p.Addr().Is4In6()
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	return netip.Prefix{}, false
}

// asciiName converts a name written by a user to its canonical form.
func asciiName(s string) (string, error) {
	ascii := s
	if strings.IndexFunc(s, func(r rune) bool { return r > 0x7f }) >= 0 {
		var err error
		if ascii, err = idna.Lookup.ToASCII(s); err != nil {
			return "", fmt.Errorf("not a valid name: %w", err)
		}
	}
	name, ok := canonicalName(ascii)
	if !ok {
		return "", fmt.Errorf("not a valid host name")
	}
	return name, nil
}

// canonicalName returns a host name in lower case without its trailing dot.
// It refuses what is not a host name (RFC 952, RFC 1123) and what could be
// read as an IP address.
func canonicalName(s string) (string, bool) {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if s == "" || len(s) > 253 {
		return "", false
	}
	label := ""
	for label = range strings.SplitSeq(s, ".") {
		if !validLabel(label) {
			return "", false
		}
	}
	// No top-level domain starts with a digit; addresses in any of inet_aton's
	// notations (1.2.3.4, 0x7f.1, 2130706433) do.
	if label[0] >= '0' && label[0] <= '9' {
		return "", false
	}
	return s, true
}

func validLabel(l string) bool {
	if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
		return false
	}
	for i := range len(l) {
		c := l[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
