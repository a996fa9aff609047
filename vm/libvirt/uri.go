package libvirt

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// URIs of a host's own libvirts.
const (
	SystemURI  = "qemu:///system"  // the host's, for all its users
	SessionURI = "qemu:///session" // a user's own
)

// URI names a libvirt on this host.
type URI struct {
	Text    string
	Session bool   // the user's own, not the system's
	Socket  string // where it listens; empty: where libvirt's client would look
}

// ParseURI reads the address of a libvirt on this host
// (https://libvirt.org/uri.html). It refuses what is elsewhere.
func ParseURI(text string) (URI, error) {
	fail := func(hint, format string, args ...any) (URI, error) {
		return URI{}, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("libvirt URI %q: %w", text, fmt.Errorf(format, args...))), hint)
	}
	const local = "use " + SystemURI + " or " + SessionURI
	u, err := url.Parse(text)
	if err != nil {
		var parse *url.Error
		if errors.As(err, &parse) {
			err = parse.Err
		}
		return fail(local, "%w", err)
	}
	driver, transport, _ := strings.Cut(u.Scheme, "+")
	switch {
	case driver != "qemu":
		return fail(local, "agentvm runs QEMU machines only")
	case u.Host != "" || transport != "" && transport != "unix":
		return fail(local+", or qemu+ssh:// for a machine on another host", "machines on other hosts are not supported like this")
	case u.Path != "/system" && u.Path != "/session":
		return fail(local, "there is no such QEMU libvirt")
	case u.User != nil || u.Fragment != "":
		return fail(local, "a local libvirt has neither user nor fragment")
	}
	for key := range u.Query() {
		if key != "socket" {
			return fail("the one parameter that agentvm knows is socket", "unknown parameter %q", key)
		}
	}
	socket := u.Query().Get("socket")
	if u.Query().Has("socket") && !filepath.IsAbs(socket) {
		return fail(local, "socket %q is not an absolute path", socket)
	}
	return URI{Text: text, Session: u.Path == "/session", Socket: socket}, nil
}

// DefaultURI is the libvirt that is meant where none is named: the one of
// LIBVIRT_DEFAULT_URI, else the user's own, and for root the system's.
func DefaultURI(getenv func(string) string, uid int) string {
	if uri := getenv("LIBVIRT_DEFAULT_URI"); uri != "" {
		return uri
	}
	if uid == 0 {
		return SystemURI
	}
	return SessionURI
}

// driver is what the daemon itself calls the URI.
func (u URI) driver() string {
	if u.Session {
		return SessionURI
	}
	return SystemURI
}
