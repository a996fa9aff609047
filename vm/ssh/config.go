package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm"
)

// OpenSSHHost describes one guest to OpenSSH's client.
type OpenSSHHost struct {
	Alias      string   // what the user types after ssh
	User       string   // guest user
	Proxy      []string // command whose standard input and output reach the proxy
	KnownHosts string   // file with KnownHostsLine in it
}

// Config renders the Host block of ssh_config(5). There is no key in it: the
// proxy asks for none.
func (h OpenSSHHost) Config() (string, error) {
	if h.Alias == "" || strings.ContainsAny(h.Alias, " \t\r\n*?!,\"'#%\\") || strings.HasPrefix(h.Alias, "-") {
		return "", fmt.Errorf("%q cannot be a host name in an OpenSSH configuration", h.Alias)
	}
	proxy, err := proxyCommand(h.Proxy)
	if err != nil {
		return "", err
	}
	known, err := configPath(h.KnownHosts)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Host %s\n", h.Alias)
	for _, line := range [][2]string{
		{"HostName", h.Alias},
		{"User", h.User},
		{"ProxyCommand", proxy},
		{"HostKeyAlias", h.Alias},
		{"UserKnownHostsFile", known},
		{"GlobalKnownHostsFile", "/dev/null"},
		{"StrictHostKeyChecking", "yes"},
		{"UpdateHostKeys", "no"},
		{"CheckHostIP", "no"},
		{"IdentitiesOnly", "yes"},
		{"ForwardAgent", "no"},
		{"ForwardX11", "no"},
		{"Compression", "no"},
		{"ServerAliveInterval", "30"},
	} {
		fmt.Fprintf(&b, "  %s %s\n", line[0], line[1])
	}
	return b.String(), nil
}

// KnownHostsLine is the line of known_hosts(5) that pins the guest's key.
func (h OpenSSHHost) KnownHostsLine(key gossh.PublicKey) string {
	return h.Alias + " " + string(bytes.TrimSpace(gossh.MarshalAuthorizedKey(key))) + "\n"
}

// proxyCommand quotes for the user's shell, which runs the rest of the line,
// and for OpenSSH, which expands % in it first.
func proxyCommand(argv []string) (string, error) {
	if len(argv) == 0 {
		return "", errors.New("an OpenSSH configuration needs a proxy command")
	}
	words := make([]string, len(argv))
	for i, arg := range argv {
		if strings.ContainsAny(arg, "\r\n\x00") {
			return "", fmt.Errorf("%q cannot be part of an OpenSSH configuration", arg)
		}
		words[i] = proxyWord(arg)
	}
	return strings.Join(words, " "), nil
}

// proxyWord avoids what OpenSSH (from 8.7 on) would misread when it checks
// the line's own quotes: a backslash within single quotes escapes there.
func proxyWord(arg string) string {
	if vm.ShellQuote(arg) == arg {
		return strings.ReplaceAll(arg, "%", "%%")
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range []byte(arg) {
		switch r {
		case '"', '\\', '$', '`':
			b.WriteByte('\\')
		case '%':
			b.WriteByte('%')
		}
		b.WriteByte(r)
	}
	b.WriteByte('"')
	return b.String()
}

// configPath quotes a file name for ssh_config(5), which expands % and ${}
// in it; the latter has no escape.
func configPath(path string) (string, error) {
	if path == "" || strings.ContainsAny(path, "\r\n\x00") || strings.Contains(path, "${") || !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("%q cannot be a path in an OpenSSH configuration", path)
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`).Replace(path) + `"`, nil
}

// Pipe connects standard input and output to the proxy's socket: the proxy
// command of an OpenSSH configuration. It returns when the proxy closes.
func Pipe(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	nc, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrConnection, err)
	}
	defer nc.Close()
	defer context.AfterFunc(ctx, func() { nc.Close() })()
	from := newInput(in)
	defer from.stop()
	go func() {
		defer from.close()
		io.Copy(nc, from)
		nc.(*net.UnixConn).CloseWrite()
	}()
	if _, err := io.Copy(out, nc); err != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: %w", ErrConnection, err)
	}
	return nil
}
