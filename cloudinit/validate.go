package cloudinit

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm"
)

// ErrInvalid marks a value that cannot be put into a seed.
var ErrInvalid = errors.New("invalid cloud-init configuration")

const (
	maxFiles    = 8 << 20 // bytes of all files; cloud-init holds several copies in memory
	maxHostname = 63      // sethostname(2) takes 64, a DNS label 63
)

var (
	labelRE    = vm.Pattern(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
	userRE     = vm.Pattern(`^[a-z_][a-z0-9_-]{0,31}$`) // useradd(8)
	timezoneRE = vm.Pattern(`^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$`)
	localeRE   = vm.Pattern(`^[A-Za-z]+(_[A-Za-z]+)?(\.[A-Za-z0-9-]+)?(@[A-Za-z0-9]+)?$`)
	tagRE      = vm.Pattern(`^[A-Za-z0-9_-]{1,36}$`) // virtio 1.2, 5.11.4: 36 bytes
	ownerRE    = vm.Pattern(`^[a-z_][a-z0-9_-]*:[a-z_][a-z0-9_-]*$`)
	modeRE     = vm.Pattern(`^[0-7]{3,4}$`)
	// Names that cloud-init's mounts module takes for devices of its own.
	deviceRE = vm.Pattern(`^(x?[shv]d[a-z][0-9]*|sr[0-9]+|ami|root|swap|ephemeral.*|ebs.*)$`)
)

// Validate reports every value that cloud-init or the guest would refuse or,
// worse, misread.
func (s *Seed) Validate() error {
	var p problems
	u := &s.UserData
	p.add("hostname", hostname(u.Hostname))
	p.add("instance name", hostname(s.LocalHostname))
	p.match("timezone", u.Timezone, timezoneRE())
	p.match("locale", u.Locale, localeRE())
	for _, user := range u.Users {
		p.user(user)
	}
	targets := map[string]bool{}
	for _, m := range u.Mounts {
		p.mount(m)
		if targets[m.File] {
			p.add("mount target", fmt.Errorf("%q is used twice", m.File))
		}
		targets[m.File] = true
	}
	size := 0
	for _, f := range u.WriteFiles {
		p.file(f)
		size += len(f.Content)
	}
	if size > maxFiles {
		p.add("files", fmt.Errorf("have %d bytes, more than %d", size, maxFiles))
	}
	if u.CACerts != nil {
		for i, pem := range u.CACerts.Trusted {
			if _, err := parseCertificate([]byte(pem)); err != nil {
				p.add(fmt.Sprintf("CA certificate %d", i+1), err)
			}
		}
	}
	for _, c := range append(append([]Command{}, u.BootCmd...), u.RunCmd...) {
		p.command(c)
	}
	if s.Network != nil {
		for name, e := range s.Network.Ethernets {
			p.ethernet(name, e)
		}
	}
	return p.err()
}

// problems gathers what is wrong, so that a user mends everything at once.
type problems []error

func (p *problems) add(field string, err error) {
	if err != nil {
		*p = append(*p, fmt.Errorf("%w: %s: %w", ErrInvalid, field, err))
	}
}

func (p *problems) match(field, value string, re *regexp.Regexp) {
	if value != "" && !re.MatchString(value) {
		p.add(field, fmt.Errorf("%q does not match %s", value, re))
	}
}

func (p *problems) err() error { return errors.Join(*p...) }

func (p *problems) user(u User) {
	if !userRE().MatchString(u.Name) {
		p.add("user name", fmt.Errorf("%q does not match %s", u.Name, userRE()))
	}
	if u.UID < 1 || u.UID > 1<<31-1 {
		p.add("user "+u.Name, fmt.Errorf("uid %d is out of range", u.UID))
	}
	p.add("user shell", absolute(u.Shell))
	for _, k := range u.SSHAuthorizedKeys {
		if err := noControl(k); err != nil {
			p.add("authorized key", err)
		} else if _, _, _, _, err := ssh.ParseAuthorizedKey([]byte(k)); err != nil {
			p.add("authorized key", fmt.Errorf("%.40q: %w", k, err))
		}
	}
}

func (p *problems) mount(m Mount) {
	if !tagRE().MatchString(m.Spec) {
		p.add("mount tag", fmt.Errorf("%q does not match %s", m.Spec, tagRE()))
	}
	if deviceRE().MatchString(m.Spec) {
		p.add("mount tag", fmt.Errorf("%q is a device name to cloud-init", m.Spec))
	}
	p.add("mount target", absolute(m.File))
	if strings.ContainsFunc(m.File, func(r rune) bool { return unicode.IsSpace(r) || r == '\\' || r == '#' }) {
		// cloud-init copies the target to fstab(5) without its escapes.
		p.add("mount target", fmt.Errorf("%q has a space, a backslash or a #", m.File))
	}
}

func (p *problems) file(f File) {
	p.add("file path", absolute(f.Path))
	if f.Owner != "" && !ownerRE().MatchString(f.Owner) {
		p.add("file "+f.Path, fmt.Errorf("owner %q does not match %s", f.Owner, ownerRE()))
	}
	if !modeRE().MatchString(f.Permissions) {
		p.add("file "+f.Path, fmt.Errorf("permissions %q are not octal", f.Permissions))
	}
	if f.Encoding != "" && f.Encoding != "b64" {
		p.add("file "+f.Path, fmt.Errorf("unknown encoding %q", f.Encoding))
	}
	p.add("file "+f.Path, text(f.Content))
}

func (p *problems) command(c Command) {
	if len(c) == 0 || c[0] == "" {
		p.add("command", errors.New("is empty"))
	}
	for _, arg := range c {
		p.add("command", text(arg))
	}
}

func (p *problems) ethernet(name string, e Ethernet) {
	if mac, err := net.ParseMAC(e.Match.MACAddress); err != nil || len(mac) != 6 {
		p.add("network "+name, fmt.Errorf("hardware address %q is not six bytes", e.Match.MACAddress))
	}
	if !e.DHCP4 && len(e.Addresses) == 0 {
		p.add("network "+name, errors.New("has neither DHCP nor an address"))
	}
	for _, a := range e.Addresses {
		_, err := netip.ParsePrefix(a)
		p.add("network address", err)
	}
	var hosts []string
	for _, r := range e.Routes {
		hosts = append(hosts, r.Via)
	}
	if e.Nameservers != nil {
		hosts = append(hosts, e.Nameservers.Addresses...)
	}
	for _, h := range hosts {
		_, err := netip.ParseAddr(h)
		p.add("network address", err)
	}
}

// hostname checks RFC 1123, section 2.1, for a single label or several.
func hostname(s string) error {
	if s == "" {
		return errors.New("is empty")
	}
	if len(s) > maxHostname {
		return fmt.Errorf("%.20q… has %d characters, more than %d", s, len(s), maxHostname)
	}
	for label := range strings.SplitSeq(s, ".") {
		if !labelRE().MatchString(label) {
			return fmt.Errorf("%q: use letters, digits and inner hyphens", s)
		}
	}
	return nil
}

func absolute(p string) error {
	switch {
	case !path.IsAbs(p):
		return fmt.Errorf("%q is not an absolute path", p)
	case p == "/" || path.Clean(p) != p:
		return fmt.Errorf("%q is not a plain path below the root", p)
	case len(p) > 4095: // PATH_MAX
		return fmt.Errorf("%.40q… is longer than 4095 bytes", p)
	}
	return noControl(p)
}

func noControl(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("is not UTF-8")
	}
	if i := strings.IndexFunc(s, unicode.IsControl); i >= 0 {
		return fmt.Errorf("%.60q has a control character", s)
	}
	return nil
}

// text allows everything that a YAML string and a process argument can hold.
func text(s string) error {
	if !utf8.ValidString(s) {
		return errors.New("is not UTF-8")
	}
	if strings.ContainsRune(s, 0) {
		return errors.New("has a zero byte")
	}
	return nil
}
