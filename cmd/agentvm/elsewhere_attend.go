package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/remote"
)

// onDisconnect is what the machine does when a command's connection is lost.
func (e *elsewhere) onDisconnect() string {
	if e.project == nil {
		return e.record.OnDisconnect
	}
	return e.project.Config.OnDisconnect
}

// pauses reports whether the machine pauses when the connection of this
// command is lost.
func (e *elsewhere) pauses() bool { return e.way.uses && e.onDisconnect() == config.Pause }

// attend has the machine know that this command is connected, if it is to
// pause when that is lost.
func (e *elsewhere) attend(ctx context.Context, conn *remote.Conn) (leave func(lost bool), err error) {
	if !e.pauses() {
		return func(bool) {}, nil
	}
	return conn.Attend(ctx, e.record.Copy)
}

// whatNow adds to a connection that was lost what becomes of the machine.
func (e *elsewhere) whatNow(err error) error {
	switch {
	case !errors.Is(err, remote.ErrLost):
		return err
	case e.pauses():
		return vm.WithHint(fmt.Errorf("%w; the machine there pauses, unless another command is connected to it", err),
			"agentvm status finds the machine again, and agentvm up lets it go on")
	}
	return vm.WithHint(fmt.Errorf("%w; the machine there goes on", err), "agentvm status finds the machine again, agentvm sync what it has done")
}
