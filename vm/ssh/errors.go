package ssh

import "errors"

var (
	// ErrHostKey means that the server is not the guest: it holds another
	// host key than the pinned one. It is never retried.
	ErrHostKey = errors.New("host key differs from the pinned one")

	// ErrAuth means that the guest is the right one and refuses the user's
	// key.
	ErrAuth = errors.New("the guest refuses the key")

	// ErrHung means that the guest left a keepalive unanswered.
	ErrHung = errors.New("no answer to a keepalive")

	// ErrConnection means that the connection failed or ended before the
	// remote command told its exit status.
	ErrConnection = errors.New("connection to the guest failed")

	// ErrClosed is the reason of a connection that this side closed.
	ErrClosed = errors.New("connection closed")

	// ErrEnvRefused means that the guest's sshd does not accept an
	// environment variable (AcceptEnv).
	ErrEnvRefused = errors.New("the guest refuses the environment variable")
)
