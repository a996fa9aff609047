package libvirt

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Elsewhere is a libvirt on another host, reached over SSH.
type Elsewhere struct {
	Text  string
	User  string // empty: as ssh's configuration says
	Host  string // a name of ssh's configuration, of the DNS, or an address
	Port  int    // 0: as ssh's configuration says
	Local string // the same libvirt's URI on that host
}

// Lengths are not theirs: counting to 254 makes an expression that takes
// milliseconds to compile, at each start of the program.
var (
	hostRE = vm.Pattern(`^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$`)
	userRE = vm.Pattern(`^[A-Za-z0-9_][A-Za-z0-9._@+-]*$`)
)

// maxName is the longest name of a host or a user, in bytes.
const maxName = 254

// ParseElsewhere reads qemu+ssh://[USER@]HOST[:PORT]/system or /session.
// It reports false for what is no address of another host.
func ParseElsewhere(text string) (Elsewhere, bool, error) {
	fail := func(hint, format string, args ...any) (Elsewhere, bool, error) {
		return Elsewhere{}, true, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("libvirt URI %q: %w", text, fmt.Errorf(format, args...))), hint)
	}
	const form = "qemu+ssh://USER@HOST:PORT/system, or /session"
	if strings.HasPrefix(text, "qemu+tls:") {
		return fail("use "+form, "agentvm needs its own program on a machine's host, to decide what leaves the machine, and TLS to libvirt gives no way to put it there")
	}
	if !strings.HasPrefix(text, "qemu+ssh:") {
		return Elsewhere{}, false, nil
	}
	u, err := url.Parse(text)
	if err != nil {
		return fail("use "+form, "it is not a URI")
	}
	e := Elsewhere{Text: text, Host: u.Hostname(), User: u.User.Username()}
	_, password := u.User.Password()
	if addr, err := netip.ParseAddr(e.Host); (err != nil || addr.Zone() != "") && (len(e.Host) > maxName || !hostRE().MatchString(e.Host)) {
		return fail("use "+form, "%q is not a host's name", e.Host)
	}
	switch {
	case password:
		return fail("ssh asks for it, or uses a key", "a password does not belong into a URI")
	case u.User != nil && (len(e.User) > maxName || !userRE().MatchString(e.User)):
		return fail("use "+form, "%q is not a user's name", e.User)
	case u.Fragment != "":
		return fail("use "+form, "it has a fragment")
	}
	if port := u.Port(); port != "" {
		if e.Port, err = strconv.Atoi(port); err != nil || e.Port < 1 || e.Port > 65535 {
			return fail("use "+form, "port %q is not 1 to 65535", port)
		}
	}
	e.Local = "qemu://" + u.EscapedPath()
	if u.RawQuery != "" {
		e.Local += "?" + u.RawQuery
	}
	if _, err := ParseURI(e.Local); err != nil {
		return Elsewhere{}, true, err
	}
	return e, true, nil
}

// Address is the host as a reader would write it.
func (e Elsewhere) Address() string {
	s := e.Host
	if e.User != "" {
		s = e.User + "@" + s
	}
	if e.Port != 0 {
		if strings.Contains(e.Host, ":") {
			s = strings.Replace(s, e.Host, "["+e.Host+"]", 1)
		}
		s += ":" + strconv.Itoa(e.Port)
	}
	return s
}
