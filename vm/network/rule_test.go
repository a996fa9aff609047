package network

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestParseRule(t *testing.T) {
	for in, want := range map[string]string{
		"registry.example.org":         "registry.example.org",
		"Registry.Example.ORG.":        "registry.example.org",
		"*.pypi.example":               "*.pypi.example",
		"example.org:443":              "example.org:443",
		"example.org:443,80,443":       "example.org:443,80",
		"example.org:80,443":           "example.org",
		"buildhost:22":                 "buildhost:22",
		"bücher.example":               "xn--bcher-kva.example",
		"*.bücher.example:8443":        "*.xn--bcher-kva.example:8443",
		"r3---sn-abc.example.com":      "r3---sn-abc.example.com",
		"1password.com":                "1password.com",
		"10.0.0.0/8:5432":              "10.0.0.0/8:5432",
		"10.1.2.3:22":                  "10.1.2.3:22",
		"10.1.2.3/32":                  "10.1.2.3",
		"0.0.0.0/0:443":                "0.0.0.0/0:443",
		"169.254.169.254:80":           "169.254.169.254:80",
		"[fd00:1::/32]:443":            "[fd00:1::/32]:443",
		"fd00:1::/32":                  "[fd00:1::/32]",
		"2606:2800:220:1::1":           "[2606:2800:220:1::1]",
		"*.internal":                   "*.internal",
		"*.a.b.c.example.org:1,65535":  "*.a.b.c.example.org:1,65535",
		"xn--bcher-kva.example:443,22": "xn--bcher-kva.example:443,22",
	} {
		r, err := ParseRule(in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if got := r.String(); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

func TestParseRuleErrors(t *testing.T) {
	for in, want := range map[string]struct {
		offset int
		text   string
	}{
		"":                         {0, "empty"},
		"https://example.org":      {5, "not a URL"},
		"example.org/path":         {11, "paths"},
		"example.org:":             {12, "bad port"},
		"example.org:0":            {12, "bad port"},
		"example.org:80,65536":     {15, "bad port"},
		"example.org:+80":          {12, "bad port"},
		"example.org:https":        {12, "bad port"},
		"*":                        {0, "wildcard"},
		"*:443":                    {0, "wildcard"},
		"a.*.example.org":          {2, "wildcard"},
		"*.*.example.org":          {2, "wildcard"},
		"*a.example.org":           {0, "wildcard"},
		"*.com":                    {2, "public suffix"},
		"*.co.uk":                  {2, "public suffix"},
		"exa mple.org":             {0, "not a valid host name"},
		"-a.example.org":           {0, "not a valid host name"},
		"a..example.org":           {0, "not a valid host name"},
		"_x.example.org":           {0, "not a valid host name"},
		"300.1.1.1":                {0, "not a valid host name"},
		"127.1":                    {0, "not a valid host name"},
		"0x7f.1":                   {0, "not a valid host name"},
		"10.0.0.1/8":               {0, "bits beyond its mask"},
		"127.0.0.1:5432":           {0, "loopback"},
		"224.0.0.1":                {0, "multicast"},
		"198.18.0.0/16":            {0, "name addresses"},
		"[::1]:443":                {0, "loopback"},
		"[fd00::1":                 {0, "missing ]"},
		"[fd00::1]443":             {9, "only :PORT"},
		strings.Repeat("a", 64):    {0, "not a valid host name"},
		strings.Repeat("a.", 130):  {0, "not a valid host name"},
		"example.org:443\n":        {12, "bad port"},
		"fe80::1%eth0":             {0, "not a valid host name"},
		"::ffff:10.0.0.0/104":      {15, "CIDR"},
		"example.org:443, 80":      {16, "bad port"},
		"user@registry.example.or": {0, "not a valid host name"},
	} {
		_, err := ParseRule(in)
		var syntax *SyntaxError
		if !errors.As(err, &syntax) {
			t.Errorf("%q: got %v", in, err)
			continue
		}
		if syntax.Offset != want.offset || !strings.Contains(syntax.Reason, want.text) {
			t.Errorf("%q: offset %d, %q; want %d, %q", in, syntax.Offset, syntax.Reason, want.offset, want.text)
		}
	}
}

func TestRuleMatchesName(t *testing.T) {
	for _, tt := range []struct {
		rule, name string
		want       bool
	}{
		{"pypi.example", "pypi.example", true},
		{"pypi.example", "a.pypi.example", false},
		{"*.pypi.example", "a.pypi.example", true},
		{"*.pypi.example", "a.b.pypi.example", true},
		{"*.pypi.example", "pypi.example", false},
		{"*.pypi.example", "evilpypi.example", false},
		{"*.pypi.example", "a.pypi.example.evil.org", false},
		{"10.0.0.0/8", "10.0.0.1", false},
	} {
		if got := mustPolicy(t, nil, tt.rule).Rules()[0].matchesName(tt.name); got != tt.want {
			t.Errorf("%s matches %s: %v", tt.rule, tt.name, got)
		}
	}
}

func TestReachable(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("93.184.215.99"), netip.MustParseAddr("10.0.0.9")}
	for _, tt := range []struct {
		addr  string
		rules string
		want  bool
	}{
		{"93.184.215.14", "", true},
		{"2606:2800:220:1::1", "", true},
		{"93.184.215.99", "", false}, // the host itself
		{"93.184.215.99", "93.184.215.0/24", false},
		{"93.184.215.99", "93.184.215.99", true},
		{"10.0.0.9", "10.0.0.0/8", false},
		{"10.0.0.9", "10.0.0.9", true},
		{"10.0.0.1", "", false},
		{"10.0.0.1", "0.0.0.0/0", false},
		{"10.0.0.1", "10.0.0.0/8", true},
		{"10.0.0.1", "10.0.0.0/8:22", false}, // another port
		{"127.0.0.1", "0.0.0.0/0", false},
		{"127.0.0.53", "", false},
		{"0.0.0.0", "", false},
		{"169.254.169.254", "", false},
		{"169.254.169.254", "169.254.169.254", true},
		{"172.31.255.255", "", false},
		{"192.168.1.1", "", false},
		{"100.100.100.200", "", false},
		{"198.18.0.1", "0.0.0.0/0", false},
		{"224.0.0.1", "", false},
		{"255.255.255.255", "", false},
		{"::", "", false},
		{"::1", "", false},
		{"::ffff:127.0.0.1", "", false},
		{"::ffff:10.0.0.1", "10.0.0.0/8", true},
		{"::127.0.0.1", "", false},
		{"64:ff9b::7f00:1", "", false},   // NAT64 of 127.0.0.1
		{"64:ff9b::5db8:d70e", "", true}, // NAT64 of a public address
		{"64:ff9b:1::1", "", false},
		{"2002:7f00:1::", "", false},
		{"2001:0:1::1", "", false},
		{"fd00:ec2::254", "", false},
		{"fd00:ec2::254", "[fd00:ec2::254]", true},
		{"fd00::1", "::/0", false},
		{"fe80::1", "", false},
		{"ff02::1", "", false},
		{"5f00::1", "", false},
	} {
		var rules []string
		if tt.rules != "" {
			rules = append(rules, tt.rules)
		}
		err := mustPolicy(t, nil, rules...).reachable(netip.MustParseAddr(tt.addr).Unmap(), 443, own)
		if (err == nil) != tt.want {
			t.Errorf("%s with %v: %v", tt.addr, rules, err)
		}
	}
}

func TestNewPolicyErrors(t *testing.T) {
	for what, s := range map[string][]Service{
		"name":      {{Name: "a b", Port: 1, Target: "x:1"}},
		"port":      {{Name: "a", Target: "x:1"}},
		"no target": {{Name: "a", Port: 1}},
		"target":    {{Name: "a", Port: 1, Target: "x:http"}},
		"relative":  {{Name: "a", Port: 1, Target: "unix:x"}},
		"twice":     {{Name: "a", Port: 1, Target: "x:1"}, {Name: "A.", Port: 1, Target: "y:1"}},
	} {
		if _, err := NewPolicy(nil, s); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"registry.example.org", "*.pypi.example:443,80", "10.0.0.0/8:22", "[fd00::/8]:1", "bücher.example", ":", "[", "*."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			var syntax *SyntaxError
			if !errors.As(err, &syntax) || syntax.Offset < 0 || syntax.Offset > len(s) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		again, err := ParseRule(r.String())
		if err != nil || again.String() != r.String() {
			t.Fatalf("%q becomes %q, then %q, %v", s, r, again, err)
		}
	})
}

func TestNameTable(t *testing.T) {
	n := newNameTable()
	first, isNew := n.addr("first.example")
	if !isNew {
		t.Error("first is not new")
	}
	for i := range maxNames {
		n.addr(strings.Repeat("x", i%50+1) + "." + strings.Repeat("y", i/50+1))
	}
	if _, ok := n.name(first); ok {
		t.Error("the oldest name is still there")
	}
	if n.recent.Len() != maxNames || len(n.byName) != maxNames || len(n.byAddr) != maxNames {
		t.Errorf("%d, %d, %d entries", n.recent.Len(), len(n.byName), len(n.byAddr))
	}
	if again, _ := n.addr("first.example"); again == first {
		t.Error("an address was used again")
	}
	// Around the end of the pool no address is handed out twice.
	n.next = netip.MustParseAddr("198.19.255.254")
	for range 10 {
		a, _ := n.addr("z" + n.next.String())
		if !namePool.Contains(a) || a == namePool.Addr() {
			t.Errorf("handed out %s", a)
		}
	}
}
