// Package sshd is the SSH server of guests of our own making. It does what
// OpenSSH's does for one user who logs in by public key: programs with and
// without a terminal, sftp, forwarded ports and sockets, but no agents, which the
// host forwards to no guest. A connection is served by the process that accepted
// it, so that a guest that has just gone on from a saved state has all that a
// login needs in memory, where OpenSSH starts programs and links them first.
//
// It runs as the user, and so does all that it starts: it can do nothing that
// the user could not do.
package sshd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

const (
	version = "SSH-2.0-agentvm"

	// loginGrace is how long a login may take; an emulated guest may be slow.
	loginGrace = 2 * time.Minute

	// maxLogins is how many may be under way at once.
	maxLogins = 100

	// dialTimeout is how long what a port is forwarded to may take to answer.
	dialTimeout = time.Minute

	// flushTimeout is how long it may take what a client has left behind.
	flushTimeout = time.Minute
)

// User is who logs in, and what programs are started for.
type User struct {
	Name, Home, Shell string
	Sftp              string // the program that serves the sftp subsystem
}

// Server serves one user.
type Server struct {
	User    User
	HostKey gossh.Signer

	// AuthorizedKeys is called at each login, and returns what sshd(8) has in
	// the file of that name. A key with options is not let in: none is known here.
	AuthorizedKeys func() ([]byte, error)

	conns sync.WaitGroup
}

// Serve accepts connections until l is closed. Connections go on after it.
func (s *Server) Serve(l net.Listener) error {
	logins := make(chan struct{}, maxLogins)
	for {
		nc, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // too many files open, say: that passes
			fmt.Fprintln(os.Stderr, "accept:", err)
			time.Sleep(time.Second)
			continue
		}
		select {
		case logins <- struct{}{}:
			s.conns.Go(func() {
				s.ServeConn(nc, func() { <-logins })
			})
		default: // nobody may keep others, or the end, waiting
			nc.Close()
		}
	}
}

// Wait waits until no connection is left.
func (s *Server) Wait() { s.conns.Wait() }

// ServeConn serves one connection to its end. It calls loggedIn, unless that
// is nil, when the login is over, whether it succeeded or not.
func (s *Server) ServeConn(nc net.Conn, loggedIn func()) {
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(loginGrace))
	conn, channels, requests, err := gossh.NewServerConn(nc, s.config())
	if loggedIn != nil {
		loggedIn()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "login from %s: %v\n", nc.RemoteAddr(), err)
		return
	}
	nc.SetDeadline(time.Time{})
	c := &connection{user: s.User, conn: conn, listeners: map[string]func(){}}
	c.serve(channels, requests)
}

func (s *Server) config() *gossh.ServerConfig {
	cfg := &gossh.ServerConfig{ServerVersion: version, PublicKeyCallback: s.authorize}
	cfg.AddHostKey(s.HostKey)
	return cfg
}

func (s *Server) authorize(conn gossh.ConnMetadata, key gossh.PublicKey) (*gossh.Permissions, error) {
	if conn.User() != s.User.Name {
		return nil, fmt.Errorf("%q may not log in", conn.User())
	}
	file, err := s.AuthorizedKeys()
	if err != nil {
		return nil, err
	}
	if !authorized(file, key) {
		return nil, errors.New("the key is not authorized")
	}
	return nil, nil
}

// authorized looks for a key in a file of authorized keys.
func authorized(file []byte, key gossh.PublicKey) bool {
	want := string(key.Marshal())
	for len(file) > 0 {
		known, _, options, rest, err := gossh.ParseAuthorizedKey(file)
		if err != nil { // no key is left
			return false
		}
		if len(options) == 0 && string(known.Marshal()) == want {
			return true
		}
		file = rest
	}
	return false
}

// connection is one that is logged in.
type connection struct {
	user User
	conn *gossh.ServerConn

	mu        sync.Mutex
	closed    bool
	listeners map[string]func() // by listened.key
	noMore    bool              // sessions
}

func (c *connection) serve(channels <-chan gossh.NewChannel, requests <-chan *gossh.Request) {
	var all sync.WaitGroup
	all.Go(func() { c.serveRequests(requests) })
	for open := range channels {
		all.Go(func() { c.serveChannel(open) })
	}
	c.close()
	all.Wait()
}

func (c *connection) serveChannel(open gossh.NewChannel) {
	switch open.ChannelType() {
	case "session":
		if c.sessionsOver() {
			open.Reject(gossh.Prohibited, "no more sessions were wanted")
			return
		}
		if ch, requests, err := open.Accept(); err == nil {
			(&session{c: c, ch: ch}).serve(requests)
		}
	case "direct-tcpip", "direct-streamlocal@openssh.com":
		c.forward(open)
	default:
		open.Reject(gossh.UnknownChannelType, "there are no channels of type "+open.ChannelType())
	}
}

// serveRequests answers those of the whole connection. Each is answered, as
// clients ask things that no server knows to learn whether it lives.
func (c *connection) serveRequests(requests <-chan *gossh.Request) {
	for r := range requests {
		var ok bool
		var answer []byte
		switch r.Type {
		case "tcpip-forward", "streamlocal-forward@openssh.com":
			ok, answer = c.listen(r)
		case "cancel-tcpip-forward", "cancel-streamlocal-forward@openssh.com":
			ok = c.unlisten(r)
		case "no-more-sessions@openssh.com":
			c.mu.Lock()
			c.noMore = true
			c.mu.Unlock()
			ok = true
		}
		if r.WantReply {
			r.Reply(ok, answer)
		}
	}
}

func (c *connection) sessionsOver() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.noMore
}

// close ends what listens for the connection.
func (c *connection) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, stop := range c.listeners {
		stop()
	}
}

// DefaultSignals has programs start with the signals' default actions, also
// where somebody has this process ignore one, as nohup(1) does. It is not to end
// of them itself.
func DefaultSignals() {
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
}

// Forget has standard streams lead nowhere. Closing them would let their
// descriptors be another file's, and a failed write to descriptor 1 ends a
// process (see package os/signal).
func Forget(streams ...*os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, f := range streams {
		if err := unix.Dup3(int(null.Fd()), int(f.Fd()), 0); err != nil {
			return fmt.Errorf("close %s: %w", f.Name(), err)
		}
	}
	return nil
}
