package ssh

import (
	"errors"
	"io"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/ssh/wire"
)

// splice joins a channel of a local client (down) with one of the guest (up).
type splice struct {
	session bool // command or shell: see run
	filter  func(*gossh.Request) bool

	down, up         gossh.Channel
	downReqs, upReqs <-chan *gossh.Request

	// replyMu is held from sending a client's request upstream until its
	// reply is sent down: the channel must not be closed between the two.
	replyMu sync.Mutex

	started   chan struct{} // closed once upstream was told what to run
	startOnce sync.Once
	runs      bool // a program was started; guarded by replyMu
	exitMu    sync.Mutex
	exited    bool // its exit status passed by
}

// join opens on to what open asks for, and accepts open when that succeeded.
// back says that the guest is the one who asks.
func (s *splice) join(open gossh.NewChannel, to gossh.Conn, back bool) bool {
	far, farReqs, err := to.OpenChannel(open.ChannelType(), open.ExtraData())
	if err != nil {
		var refused *gossh.OpenChannelError
		if errors.As(err, &refused) {
			open.Reject(refused.Reason, refused.Message)
		} else {
			open.Reject(gossh.ConnectionFailed, "the other side is gone")
		}
		return false
	}
	near, nearReqs, err := open.Accept()
	if err != nil {
		go gossh.DiscardRequests(farReqs)
		far.Close()
		return false
	}
	s.down, s.downReqs, s.up, s.upReqs = near, nearReqs, far, farReqs
	if back {
		s.down, s.downReqs, s.up, s.upReqs = far, farReqs, near, nearReqs
	}
	s.started = make(chan struct{})
	if !s.session {
		s.startOnce.Do(func() { close(s.started) })
	}
	return true
}

// run carries data and requests both ways, and returns when both channels are
// closed. Each side's end of file, exit status and close keep their order.
func (s *splice) run() {
	upClosed, downClosed := make(chan struct{}), make(chan struct{})
	sent, received := make(chan struct{}), make(chan struct{})

	go func() {
		defer close(downClosed)
		s.requestsUp()
	}()
	go func() {
		defer close(upClosed)
		s.requestsDown()
	}()
	go func() {
		defer close(sent)
		s.pumpUp()
	}()
	go func() {
		defer close(received)
		s.pumpDown()
	}()

	select {
	case <-upClosed:
		// The guest is done. However slow the client reads, it gets all.
		<-received
		s.closeDown()
	case <-downClosed:
		select {
		case <-sent:
		case <-upClosed:
		case <-time.After(drainTime):
		}
		s.hangUp()
		s.up.Close()
	}
	// Each side answers a close with a close, or its connection ends.
	<-downClosed
	<-sent
	<-upClosed
	<-received
}

// requestsUp passes the client's requests on, in order, with their replies.
func (s *splice) requestsUp() {
	defer s.startOnce.Do(func() { close(s.started) })
	for r := range s.downReqs {
		s.requestUp(r)
	}
}

func (s *splice) requestUp(r *gossh.Request) {
	s.replyMu.Lock()
	defer s.replyMu.Unlock()
	ok := false
	if s.filter(r) {
		starts := wire.Starts(r.Type)
		// The outcome of a start matters here even if the client does not ask.
		ok, _ = s.up.SendRequest(r.Type, r.WantReply || starts, r.Payload)
		if starts && ok {
			s.runs = true
			s.startOnce.Do(func() { close(s.started) })
		}
	}
	if r.WantReply {
		r.Reply(ok, nil)
	}
}

// requestsDown passes the guest's requests on: exit status and exit signal.
func (s *splice) requestsDown() {
	for r := range s.upReqs {
		if r.Type == "exit-status" || r.Type == "exit-signal" {
			s.exitMu.Lock()
			s.exited = true
			s.exitMu.Unlock()
		}
		ok, _ := s.down.SendRequest(r.Type, r.WantReply, r.Payload)
		if r.WantReply {
			r.Reply(ok, nil)
		}
	}
}

// pumpUp waits for the start of a session's program, because sshd throws away
// what arrives before it.
func (s *splice) pumpUp() {
	<-s.started
	if _, err := io.Copy(s.up, s.down); err == nil {
		s.up.CloseWrite()
	}
}

func (s *splice) pumpDown() {
	var streams sync.WaitGroup
	if s.session {
		streams.Go(func() { io.Copy(s.down.Stderr(), s.up.Stderr()) })
	}
	_, err := io.Copy(s.down, s.up)
	streams.Wait()
	if err == nil {
		s.down.CloseWrite()
	}
}

// closeDown lets a reply that is on its way go first.
func (s *splice) closeDown() {
	s.replyMu.Lock()
	defer s.replyMu.Unlock()
	s.down.Close()
}

// hangUp tells a program that its user is gone. sshd itself does that only
// when the session has a terminal.
func (s *splice) hangUp() {
	s.replyMu.Lock()
	defer s.replyMu.Unlock()
	s.exitMu.Lock()
	defer s.exitMu.Unlock()
	if s.runs && !s.exited {
		s.up.SendRequest("signal", false, gossh.Marshal(&signalMsg{"HUP"}))
	}
}
