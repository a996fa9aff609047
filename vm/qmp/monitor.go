package qmp

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/digitalocean/go-qemu/qmp"
)

// ContextRunner is the ability of a monitor to give up on a command.
type ContextRunner interface {
	RunContext(ctx context.Context, command []byte) ([]byte, error)
}

// WithContext binds a monitor to ctx, so that code which knows only
// qmp.Monitor (go-qemu's raw.Monitor and qemu.Domain) obeys ctx's deadline.
// Use the result for the length of one call, as one would use ctx.
func WithContext(ctx context.Context, mon qmp.Monitor) qmp.Monitor {
	return boundMonitor{mon, ctx}
}

type boundMonitor struct {
	qmp.Monitor
	ctx context.Context
}

func (b boundMonitor) Run(command []byte) ([]byte, error) {
	return run(b.ctx, b.Monitor, command)
}

func run(ctx context.Context, mon qmp.Monitor, command []byte) ([]byte, error) {
	if r, ok := mon.(ContextRunner); ok {
		return r.RunContext(ctx, command)
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	type result struct {
		out []byte
		err error
	}
	// A monitor without contexts cannot be interrupted: its call is left to
	// end by itself, at the latest with its connection.
	ended := make(chan result, 1)
	go func() {
		out, err := mon.Run(command)
		ended <- result{out, err}
	}()
	select {
	case r := <-ended:
		return r.out, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Execute runs one command and decodes what it returns into result, which may
// be nil. args is anything that encodes to a JSON object, or nil.
func Execute(ctx context.Context, mon qmp.Monitor, command string, args, result any) error {
	b, err := json.Marshal(qmp.Command{Execute: command, Args: args})
	if err != nil {
		return fmt.Errorf("encode arguments of %s: %w", command, err)
	}
	out, err := run(ctx, mon, b)
	if err != nil {
		return err
	}
	if result == nil {
		return nil
	}
	reply := struct {
		Return any `json:"return"`
	}{result}
	if err := json.Unmarshal(out, &reply); err != nil {
		return fmt.Errorf("decode the reply to %s: %w", command, err)
	}
	return nil
}
