package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/remote"
	"github.com/agentvm/agentvm/vm/ssh"
)

// guestOp asks for a machine's guest: who it is, and for a connection to its
// SSH proxy. The message is a guestRequest, the answer a guestID; after that,
// input and output are the connection's.
const guestOp = "guest"

type guestRequest struct {
	Copy    remote.Copy `json:"copy"`
	Name    string      `json:"name"` // empty: the machine of the copy
	Connect bool        `json:"connect"`
}

// guestID is what an SSH client has to know of a guest.
type guestID struct {
	Name string `json:"name"`
	User string `json:"user"`
	Key  []byte `json:"key"` // its host key, as SSH sends it
}

// check refuses what could be read as something else in a configuration.
func (g guestID) check() (gossh.PublicKey, error) {
	key, err := gossh.ParsePublicKey(g.Key)
	if err = errors.Join(err, vm.ValidName(g.Name), vm.ValidName(g.User)); err != nil {
		return nil, fmt.Errorf("what it says of the guest: %w", err)
	}
	return key, nil
}

// idOf describes the guest of a machine of this host.
func idOf(inst *instance.Instance) (guestID, error) {
	spec, err := inst.Spec()
	if err != nil {
		return guestID{}, err
	}
	key, err := readKey(inst, lifecycle.HostKeyFile)
	if err != nil {
		return guestID{}, err
	}
	return guestID{Name: inst.Name, User: spec.Guest.User, Key: key.PublicKey().Marshal()}, nil
}

// dialGuest connects to the SSH proxy of a machine of this host.
func (a *app) dialGuest(ctx context.Context, inst *instance.Instance) (net.Conn, error) {
	spec, _, err := usableNow(ctx, inst)
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(inst.RunDir(spec.ID), control.SSHSocket))
	if err != nil {
		return nil, connectionError{fmt.Errorf("reach %q: %w", inst.Name, err)}
	}
	return conn, nil
}

// join copies this program's input and output to a connection and back, until
// that ends.
func (a *app) join(conn io.ReadWriteCloser) error {
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, a.stdin)
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	}()
	_, err := io.Copy(a.stdout, conn)
	return err
}

// guestThere answers guestOp.
func (a *app) guestThere(ctx context.Context, s remote.Side) error {
	var r guestRequest
	if err := remote.ReadFrame(a.stdin, &r); err != nil {
		return err
	}
	id, conn, err := a.openGuest(ctx, s, r)
	if conn != nil {
		defer conn.Close()
	}
	if tellErr := remote.WriteFrame(a.stdout, remote.Reply[guestID]{Problem: remote.ProblemOf(err), Value: id}); tellErr != nil || conn == nil {
		return tellErr
	}
	return a.join(conn)
}

func (a *app) openGuest(ctx context.Context, s remote.Side, r guestRequest) (id guestID, conn net.Conn, err error) {
	workspace, configFile, err := s.Workspace(r.Copy)
	if err == nil {
		err = os.Chdir(workspace)
	}
	if err != nil {
		return id, nil, vm.Classify(vm.ErrNotFound, fmt.Errorf("the copy of the workspace: %w", err))
	}
	a.side, a.name = &side{configFile: configFile}, r.Name
	inst, err := a.target(nil)
	if err == nil {
		id, err = idOf(inst)
	}
	if err == nil && r.Connect {
		conn, err = a.dialGuest(ctx, inst)
	}
	return id, conn, err
}

// guest asks the machine's host for the guest, and connects to it if connect
// says so: then the call's streams are that connection's.
func (e *elsewhere) guest(ctx context.Context, conn *remote.Conn, name string, connect bool) (guestID, gossh.PublicKey, *remote.Call, error) {
	call, err := conn.Start(ctx, guestOp)
	if err != nil {
		return guestID{}, nil, nil, err
	}
	var reply remote.Reply[guestID]
	if err = remote.WriteFrame(call.In, guestRequest{e.record.Copy, name, connect}); err == nil {
		err = remote.ReadFrame(call.Out, &reply)
	}
	if err == nil {
		err = reply.Problem.Err()
	}
	var key gossh.PublicKey
	if err == nil {
		key, err = reply.Value.check()
	}
	if err != nil || !connect {
		return reply.Value, key, nil, call.End(err)
	}
	return reply.Value, key, call, nil
}

// stream is a connection to the guest of a machine on another host.
type stream struct {
	net.Conn
	leave func(lost bool)
	once  sync.Once
	err   error
}

// Close also says goodbye, unless the connection between the hosts was lost.
func (s *stream) Close() error {
	s.once.Do(func() {
		s.err = s.Conn.Close()
		s.leave(errors.Is(s.err, remote.ErrConnection))
	})
	return s.err
}

// CloseWrite passes the end of the input on.
func (s *stream) CloseWrite() error { return s.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// dialGuest connects to the SSH proxy of a machine of another host.
func (e *elsewhere) dialGuest(ctx context.Context, name string) (net.Conn, gossh.PublicKey, error) {
	conn, err := e.dial(ctx, e.app.mayAsk())
	if err != nil {
		return nil, nil, err
	}
	leave, err := e.attend(ctx, conn)
	if err != nil {
		return nil, nil, unreachable(err)
	}
	_, key, call, err := e.guest(ctx, conn, name, true)
	if err != nil {
		leave(errors.Is(err, remote.ErrConnection))
		return nil, nil, unreachable(err)
	}
	return &stream{Conn: call.Conn(), leave: leave}, key, nil
}

// reached is a guest that this program has logged in to, wherever it is.
type reached struct {
	*ssh.Client
	why func(error) error // adds what became of the machine, or of the way to it, to a lost connection
}

// lost is a connection to the guest that has ended before its time.
func (r reached) lost(err error) error { return connectionError{r.why(err)} }

// reach logs in to the guest that a command is about.
func (a *app) reach(ctx context.Context, args []string) (reached, error) {
	if e := a.through; e != nil {
		name := a.name
		if len(args) > 0 {
			name = args[0]
		}
		conn, key, err := e.dialGuest(ctx, name)
		if err != nil {
			return reached{}, err
		}
		client, err := ssh.OverProxy(ctx, conn, key)
		if err != nil {
			return reached{}, connectionError{err}
		}
		return reached{client, func(err error) error {
			if end := conn.Close(); errors.Is(end, remote.ErrConnection) {
				return e.whatNow(fmt.Errorf("%w: %w: %w", err, remote.ErrLost, end))
			}
			return err
		}}, nil
	}
	inst, err := a.target(args)
	if err != nil {
		return reached{}, err
	}
	client, _, _, err := a.connect(ctx, inst)
	return reached{client, func(err error) error { return a.why(inst, err) }}, err
}
