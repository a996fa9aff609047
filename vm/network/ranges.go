package network

import "net/netip"

// protectedRanges are the addresses that are not the public Internet. Broader
// ranges come after the narrower ones inside them. After the IANA IPv4 and
// IPv6 Special-Purpose Address Registries:
// https://www.iana.org/assignments/iana-ipv4-special-registry
// https://www.iana.org/assignments/iana-ipv6-special-registry
var protectedRanges = []struct {
	prefix   netip.Prefix
	class    string
	openable bool // by an address rule that lies inside
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network", false},
	{netip.MustParsePrefix("10.0.0.0/8"), "private", true},
	{netip.MustParsePrefix("100.64.0.0/10"), "carrier-grade NAT", true},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback", false},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local or metadata", true},
	{netip.MustParsePrefix("172.16.0.0/12"), "private", true},
	{netip.MustParsePrefix("192.0.0.0/24"), "protocol assignments", true},
	{netip.MustParsePrefix("192.0.2.0/24"), "documentation", true},
	{netip.MustParsePrefix("192.88.99.0/24"), "6to4 relay", true},
	{netip.MustParsePrefix("192.168.0.0/16"), "private", true},
	{netip.MustParsePrefix("198.18.0.0/15"), "the guest's own name addresses", false},
	{netip.MustParsePrefix("198.51.100.0/24"), "documentation", true},
	{netip.MustParsePrefix("203.0.113.0/24"), "documentation", true},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast", false},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved", false},

	{netip.MustParsePrefix("::/127"), "loopback", false},
	{netip.MustParsePrefix("2001:db8::/32"), "documentation", true},
	{netip.MustParsePrefix("2001::/23"), "protocol assignments", true},
	{netip.MustParsePrefix("2002::/16"), "6to4", false},
	{netip.MustParsePrefix("fc00::/7"), "unique local", true},
	{netip.MustParsePrefix("fe80::/10"), "link-local", false},
	{netip.MustParsePrefix("ff00::/8"), "multicast", false},
}

var (
	globalUnicast6 = netip.MustParsePrefix("2000::/3")
	nat64          = netip.MustParsePrefix("64:ff9b::/96") // RFC 6052
)

// protection returns the class of an address that may be reached only when
// named, and "" for a public one. openable tells whether an address rule can
// name it at all.
func protection(a netip.Addr) (class string, openable bool) {
	a = embedded4(a)
	for _, r := range protectedRanges {
		if r.prefix.Contains(a) {
			return r.class, r.openable
		}
	}
	if a.Is6() && !globalUnicast6.Contains(a) {
		return "not global unicast", false
	}
	return "", true
}

// opens tells whether an address rule was written for the protected range
// that a lies in. A rule as broad as 0.0.0.0/0 was not.
func opens(rule netip.Prefix, a netip.Addr) bool {
	a = embedded4(a)
	for _, r := range protectedRanges {
		if r.prefix.Contains(a) {
			return r.openable && rule.Contains(a) && rule.Bits() >= r.prefix.Bits()
		}
	}
	return false
}

// embedded4 returns the IPv4 address that an IPv6 address stands for, if any.
func embedded4(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) {
		b := a.As16()
		return netip.AddrFrom4([4]byte(b[12:]))
	}
	return a
}
