package ssh

import (
	"sync"

	gossh "golang.org/x/crypto/ssh"
)

// downstream is one local client of the proxy.
type downstream struct {
	conn  gossh.Conn
	up    *Client
	upErr error // why there is no up
	allow func(kind string) error

	mu       sync.Mutex
	final    bool      // no-more-sessions was asked for
	agent    bool      // the guest's agent channels come here
	forwards []forward // listeners in the guest
	splices  sync.WaitGroup
}

func (d *downstream) run(opens <-chan gossh.NewChannel, reqs <-chan *gossh.Request) {
	var requests sync.WaitGroup
	requests.Go(func() {
		for r := range reqs {
			d.request(r)
		}
	})
	defer requests.Wait()

	var upGone <-chan struct{}
	if d.up != nil {
		upGone = d.up.Done()
	}
	for {
		select {
		case open, ok := <-opens:
			if !ok {
				requests.Wait()
				d.cleanUp()
				d.splices.Wait()
				return
			}
			d.splices.Go(func() { d.open(open) })
		case <-upGone:
			d.guestGone(opens)
			return
		}
	}
}

// guestGone ends this client after what the guest said last has reached it.
func (d *downstream) guestGone(opens <-chan gossh.NewChannel) {
	var refusals sync.WaitGroup
	refusals.Go(func() {
		for open := range opens {
			open.Reject(gossh.ConnectionFailed, "the guest is gone")
		}
	})
	waitAtMost(&d.splices, drainTime)
	d.conn.Close()
	d.splices.Wait()
	refusals.Wait()
}

// cleanUp gives back what this client had in the guest.
func (d *downstream) cleanUp() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.forwards {
		d.up.unlisten(f)
	}
	if d.agent {
		d.up.unroute(authAgent)
	}
}

// request answers a global request of the client.
func (d *downstream) request(r *gossh.Request) {
	ok, reply := d.handle(r)
	if r.WantReply {
		r.Reply(ok, reply)
	}
}

func (d *downstream) handle(r *gossh.Request) (ok bool, reply []byte) {
	if r.Type == noMoreSessions {
		// OpenSSH's client means its own connection, not the shared one.
		d.mu.Lock()
		d.final = true
		d.mu.Unlock()
		return true, nil
	}
	if d.up == nil {
		return false, nil
	}
	switch r.Type {
	case tcpipForward, streamlocalForward:
		return d.listen(r)
	case cancelTCPIPForward, cancelStreamlocalForward:
		return d.unlisten(r), nil
	case keepAliveRequest:
		ok, reply, _ = d.up.conn.SendRequest(r.Type, r.WantReply, r.Payload)
		return ok, reply
	}
	return false, nil
}

func (d *downstream) listen(r *gossh.Request) (ok bool, reply []byte) {
	if d.allow(r.Type) != nil {
		return false, nil
	}
	f, reply, err := d.up.listen(r.Type, r.Payload, d.openBack)
	if err != nil {
		return false, reply
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forwards = append(d.forwards, f)
	return true, reply
}

func (d *downstream) unlisten(r *gossh.Request) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, f := range d.forwards {
		if f.cancel == r.Type && string(f.msg) == string(r.Payload) {
			d.forwards = append(d.forwards[:i], d.forwards[i+1:]...)
			d.up.unlisten(f)
			return true
		}
	}
	return false
}

// open opens upstream what the client wants to open.
func (d *downstream) open(open gossh.NewChannel) {
	kind := open.ChannelType()
	if err := d.allow(kind); err != nil {
		open.Reject(gossh.Prohibited, err.Error())
		return
	}
	d.mu.Lock()
	refuse := d.final && kind == sessionChannel
	d.mu.Unlock()
	if refuse {
		open.Reject(gossh.Prohibited, "no more sessions were promised")
		return
	}
	if d.up == nil {
		open.Reject(gossh.ConnectionFailed, d.upErr.Error())
		return
	}
	s := &splice{session: kind == sessionChannel, filter: d.filter}
	if s.join(open, d.up.conn, false) {
		s.run()
	}
}

// openBack opens at the client what the guest wants to open.
func (d *downstream) openBack(open gossh.NewChannel) {
	s := &splice{filter: d.filter}
	if s.join(open, d.conn, true) {
		s.run()
	}
}

// filter decides about a channel request of the client: false refuses it.
func (d *downstream) filter(r *gossh.Request) bool {
	switch r.Type {
	case "x11-req":
		return false
	case "auth-agent-req@openssh.com":
		if d.allow(authAgent) != nil {
			return false
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.agent = true
		d.up.route(authAgent, d.openBack)
	}
	return true
}
