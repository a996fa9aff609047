package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"
)

// Streams are a command's input and output, and whether they are a terminal.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	Terminal bool
}

// opRun runs a request that was prepared; its input and output are the
// command's.
const opRun = "run"

// ErrLost marks a connection that was lost while a command ran.
var ErrLost = errors.New("it was lost")

// IsRun reports whether the words after Arg run a request, and which.
func IsRun(words []string) (token string, ok bool) {
	if len(words) == 2 && words[0] == opRun {
		return words[1], true
	}
	return "", false
}

// Run runs a request there, passes signals on, and returns its exit code. When
// the connection is lost on the way, the error wraps ErrConnection and ErrLost;
// what runs there may go on.
func (c *Conn) Run(ctx context.Context, r Request, s Streams) (int, error) {
	token, err := Do[string](ctx, c, r, opPrepare)
	if err != nil {
		return 0, err
	}
	line, err := c.command(opRun, token)
	if err != nil {
		return 0, err
	}
	// From here on the signals are that command's.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	running, leave := context.WithCancelCause(context.WithoutCancel(ctx))
	defer leave(nil)
	go c.passSignals(running, signals, token, leave)
	code, err := c.ssh(running, line, s)
	if err != nil || code != lost {
		return code, err
	}
	result, err := Do[*int](running, c, token, opResult)
	if err == nil && result != nil {
		return *result, nil
	}
	return 0, fmt.Errorf("%w: %w while %s ran the command", ErrConnection, ErrLost, c.host.Address())
}

// ssh runs a shell's line there with the given input and output.
func (c *Conn) ssh(ctx context.Context, line string, s Streams) (int, error) {
	options := append([]string{"-q"}, shared...)
	if s.Terminal {
		options = append([]string{"-q", "-tt"}, shared[1:]...)
	}
	cmd := exec.CommandContext(ctx, "ssh", c.args(options, line)...)
	cmd.Stdout, cmd.Stderr = s.Out, s.Err
	cmd.WaitDelay = 5 * time.Second
	if s.Terminal {
		cmd.Stdin = s.In
		return ended(ctx, cmd.Run())
	}
	// A terminal's Ctrl-C is for us: the command gets it from us. And an input
	// that nobody closes must not keep us when the command has ended.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start ssh: %w", err)
	}
	go func() {
		_, _ = io.Copy(in, s.In)
		_ = in.Close()
	}()
	return ended(ctx, cmd.Wait())
}

func ended(ctx context.Context, err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), nil
	case errors.As(err, &exit):
		return lost, nil // ssh itself was killed
	}
	return 0, fmt.Errorf("run ssh: %w", err)
}

// Signals that the command does not end by end ssh all the same, once this
// many came within this time.
const (
	leaveSignals = 3
	leaveWithin  = 3 * time.Second
	signalWait   = 10 * time.Second
)

var errLeft = fmt.Errorf("left the command running: %w", context.Canceled)

func (c *Conn) passSignals(ctx context.Context, in <-chan os.Signal, token string, leave context.CancelCauseFunc) {
	var came []time.Time
	for {
		var sig syscall.Signal
		select {
		case <-ctx.Done():
			return
		case s := <-in:
			sig = s.(syscall.Signal)
		}
		came = append(came, time.Now())
		came = came[max(0, len(came)-leaveSignals):]
		if len(came) == leaveSignals && time.Since(came[0]) <= leaveWithin && sig != syscall.SIGUSR1 && sig != syscall.SIGUSR2 {
			leave(errLeft)
			return
		}
		go func() {
			bounded, cancel := context.WithTimeout(ctx, signalWait)
			defer cancel()
			_, _ = Do[struct{}](bounded, c, signalRequest{token, sig}, opSignal) // ssh tells what is wrong with the connection
		}()
	}
}

// Forget deletes a copy of a workspace.
func (c *Conn) Forget(ctx context.Context, copy Copy) error {
	_, err := Do[struct{}](ctx, c, copy, opForget)
	return err
}
