package remote

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"time"

	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
)

// Times of an attendance.
const (
	beatInterval  = 10 * time.Second
	beatSilence   = 45 * time.Second // without a beat: lost, as ssh's own ServerAlive has it
	attendAgain   = time.Second      // until one that was cut off is tried anew
	attendLook    = time.Second      // between two looks for machines that have come up
	attendGoodbye = 5 * time.Second
)

// Attend has the machines of a copy of a workspace know that a command of this
// host is connected, until leave is called. Unless lost, that is a goodbye:
// what ends without one, this process included, was lost, and pauses them. An
// attendance that is cut off is begun anew.
func (c *Conn) Attend(ctx context.Context, copy Copy) (leave func(lost bool), err error) {
	asked := ctx
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // a Ctrl-C is the command's
	unhook := context.AfterFunc(asked, cancel)                    // but for now
	call, err := c.attend(ctx, copy)
	if !unhook() && err == nil {
		err = call.End(context.Cause(asked))
	}
	if err != nil {
		cancel()
		return nil, err
	}
	bye, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for !call.beat(bye) {
			for call = nil; call == nil; call, _ = c.attend(ctx, copy) { // its command says what is wrong
				select {
				case <-bye:
					return
				case <-ctx.Done():
					return
				case <-time.After(attendAgain):
				}
			}
		}
	}()
	return func(lost bool) {
		if !lost {
			close(bye)
			select {
			case <-done:
			case <-time.After(attendGoodbye):
			}
		}
		cancel()
		<-done
	}, nil
}

// attend begins an attendance, and returns when the other side knows of it.
func (c *Conn) attend(ctx context.Context, copy Copy) (*Call, error) {
	call, err := c.Start(ctx, opAttend)
	if err != nil {
		return nil, err
	}
	var reply Reply[struct{}]
	if err = WriteFrame(call.In, copy); err == nil {
		err = ReadFrame(call.Out, &reply)
	}
	if err == nil {
		err = reply.Problem.Err()
	}
	if err != nil {
		return nil, call.End(err)
	}
	return call, nil
}

// beat keeps an attendance alive until bye, and reports whether it ended so.
func (k *Call) beat(bye <-chan struct{}) bool {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, k.Out)
	}()
	tick := time.NewTicker(beatInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if WriteFrame(k.In, beat{}) == nil {
				continue
			}
		case <-ended:
		case <-bye:
			err := WriteFrame(k.In, beat{Bye: true})
			<-ended // the other side's word that it was heard, or the end of ctx
			_ = k.End(err)
			return true
		}
		_ = k.End(errCut)
		return false
	}
}

// beat is a sign of life; Bye: the last one.
type beat struct {
	Bye bool `json:"bye,omitempty"`
}

var errCut = errors.New("the connection was lost")

// attend holds an attendance with each machine that has the copy. Where it ends
// without a goodbye, they learn so from the end of this process.
func (s Side) attend(ctx context.Context, in io.Reader, out io.Writer) error {
	var c Copy
	if err := ReadFrame(in, &c); err != nil {
		return err
	}
	dir, err := s.dir(c)
	if err != nil {
		return tell(out, struct{}{}, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a := attender{store: instance.Store{Dirs: s.Dirs}, workspace: filepath.Join(dir, c.Name), with: map[string]*control.Attendance{}}
	a.look(ctx)
	if err := tell(out, struct{}{}, nil); err != nil {
		return err
	}
	beats := make(chan beat)
	go func() {
		defer close(beats)
		for {
			var b beat
			if ReadFrame(in, &b) != nil {
				return
			}
			select {
			case beats <- b:
			case <-ctx.Done():
				return
			}
		}
	}()
	look := time.NewTicker(attendLook)
	defer look.Stop()
	silence := time.NewTimer(beatSilence)
	for {
		select {
		case b, ok := <-beats:
			if b.Bye {
				return a.leave(ctx)
			}
			if !ok {
				return errCut
			}
			silence.Reset(beatSilence)
		case <-silence.C:
			return errCut
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-look.C:
			a.look(ctx)
		}
	}
}

// attender attends the machines of a workspace.
type attender struct {
	store     instance.Store
	workspace string
	with      map[string]*control.Attendance // by the machine's id
}

// look attends those that have come up. One that does not answer is asked at
// the next look.
func (a attender) look(ctx context.Context) {
	for id, with := range a.with {
		select {
		case <-with.Done:
			delete(a.with, id)
		default:
		}
	}
	workspace, err := filepath.EvalSymlinks(a.workspace)
	if err != nil {
		return // nothing has been copied yet
	}
	machines, err := a.store.ForWorkspace(workspace)
	if err != nil {
		return
	}
	for _, inst := range machines {
		spec, err := inst.Spec()
		if err != nil || a.with[spec.ID] != nil {
			continue
		}
		with, err := control.NewClient(filepath.Join(inst.RunDir(spec.ID), control.Socket)).Attend(ctx)
		if err == nil {
			a.with[spec.ID] = with
		}
	}
}

func (a attender) leave(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, attendGoodbye)
	defer cancel()
	for _, with := range a.with {
		if leaveErr := with.Leave(ctx); !errors.Is(leaveErr, control.ErrGone) { // it ended with its command
			err = errors.Join(err, leaveErr)
		}
	}
	return err
}
