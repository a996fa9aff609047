package ssh

import "context"

// Link is the one connection to a guest that may go away and come back: a
// reboot inside the guest ends it, the next user of it connects anew.
type Link struct {
	dial   DialFunc
	cfg    Config
	turn   chan struct{} // holds a token while somebody uses client
	client *Client
	closed bool
}

// NewLink connects lazily.
func NewLink(dial DialFunc, cfg Config) *Link {
	return &Link{dial: dial, cfg: cfg, turn: make(chan struct{}, 1)}
}

// Client returns the live connection. Without one it connects, until ctx
// ends; concurrent callers wait for the same attempt.
func (l *Link) Client(ctx context.Context) (*Client, error) {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if l.closed {
		return nil, ErrClosed
	}
	if l.client != nil && l.client.Err() == nil {
		return l.client, nil
	}
	client, err := Connect(ctx, l.dial, l.cfg)
	if err != nil {
		return nil, err
	}
	l.client = client
	return client, nil
}

// Close ends the connection for good. It waits for an attempt under way,
// which the caller's context ends.
func (l *Link) Close() error {
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	l.closed = true
	if l.client == nil {
		return nil
	}
	return l.client.Close()
}
