package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"syscall"
	"time"
)

// Call is an operation under way on the other host: messages and streams go
// both ways until End.
type Call struct {
	In  io.WriteCloser
	Out io.Reader

	ctx  context.Context
	conn *Conn
	cmd  *exec.Cmd
	said *bounded
}

// Start begins an operation of this program there.
func (c *Conn) Start(ctx context.Context, words ...string) (*Call, error) {
	line, err := c.command(words...)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "ssh", c.args(shared, line)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	call := &Call{ctx: ctx, conn: c, cmd: cmd, said: &bounded{max: maxSaid}}
	cmd.Stderr = call.said
	if call.In, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if call.Out, err = cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start ssh: %w", err)
	}
	return call, nil
}

// End closes the input and waits. err is what went wrong so far: what ssh and
// the other side have to say explains it.
func (k *Call) End(err error) error {
	k.In.Close()
	if err == nil {
		_, err = io.Copy(io.Discard, k.Out)
	} else if k.ctx.Err() == nil {
		// What was in the way is told by its end, for which nothing has to be read.
		time.AfterFunc(time.Second, func() { _ = k.cmd.Process.Kill() })
	}
	end := k.cmd.Wait()
	if k.ctx.Err() != nil {
		return context.Cause(k.ctx)
	}
	var exit *exec.ExitError
	if errors.As(end, &exit) && exit.ExitCode() >= 0 {
		return k.conn.failed(k.ctx, end, k.said.Bytes())
	}
	return err
}

// Do sends one message and reads the answer.
func Do[T any](ctx context.Context, c *Conn, request any, words ...string) (T, error) {
	var reply Reply[T]
	call, err := c.Start(ctx, words...)
	if err != nil {
		return reply.Value, err
	}
	if err = WriteFrame(call.In, request); err == nil {
		err = ReadFrame(call.Out, &reply)
	}
	if err := call.End(err); err != nil {
		return reply.Value, err
	}
	return reply.Value, reply.Problem.Err()
}
