package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/mirror"
	"github.com/agentvm/agentvm/vm/remote"
)

// unknown is the state of a machine whose host does not answer.
const unknown = "unknown"

func (a *app) syncCommand() *cobra.Command {
	var keep string
	cmd := &cobra.Command{
		Use: "sync", Short: "Bring the workspace and its copy on the machine's host in step",
		Long: `Bring the workspace and its copy in step, for a project whose machine is on another
host. Other commands do so by themselves. What changed on both sides is left as it
is and listed; --keep takes one side's version of that, and of nothing else.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch mirror.Keep(keep) {
			case mirror.KeepBoth, mirror.KeepHere, mirror.KeepThere:
			default:
				return vm.Classify(vm.ErrUsage, fmt.Errorf("--keep %q: it takes here or there", keep))
			}
			e, err := a.elsewhere(cmd, args, way{})
			if err != nil {
				return err
			}
			if e == nil {
				return errHere
			}
			conn, err := e.dial(cmd.Context(), a.mayAsk())
			if err == nil {
				err = e.sync(cmd.Context(), conn, mirror.Keep(keep), true)
			}
			return unreachable(err)
		},
	}
	cmd.Flags().StringVar(&keep, "keep", "", "where both sides changed, take the version of this side: here or there")
	return cmd
}

// status shows a machine of another host.
func (e *elsewhere) status(cmd *cobra.Command, args []string) error {
	e.app.name = cmp.Or(firstName(args), e.app.name)
	conn, err := e.dial(cmd.Context(), e.app.mayAsk())
	if err != nil {
		return err
	}
	v, _, err := e.look(cmd.Context(), conn)
	if err != nil {
		return unreachable(err)
	}
	if e.app.json {
		return json.NewEncoder(e.app.stdout).Encode(v)
	}
	return e.app.showStatus(v)
}

// down deletes a machine of another host, and its copy of the workspace once
// all that is in it is here.
func (e *elsewhere) down(cmd *cobra.Command) error {
	ctx := cmd.Context()
	conn, err := e.dial(ctx, e.app.mayAsk())
	if errors.Is(err, remote.ErrConnection) {
		return vm.WithHint(err, vm.Hint(err)+"; if that host is gone for good, rm -r "+e.dir+" forgets the machine")
	}
	if err != nil {
		return err
	}
	request, err := e.request(cmd)
	if err != nil {
		return err
	}
	code, err := conn.Run(ctx, request, e.app.streams(cmd))
	if err != nil {
		return unreachable(err)
	}
	if code != exitOK && code != exitNotFound {
		return remoteExit(code)
	}
	ctx, stop := again(ctx)
	defer stop()
	if err := e.locked(ctx, func() error { return e.bringHome(ctx, conn) }); err != nil {
		return unreachable(err)
	}
	if code != exitOK {
		return remoteExit(code)
	}
	return nil
}

// bringHome forgets the copy of the workspace, unless another machine has it or
// something in it is not here.
func (e *elsewhere) bringHome(ctx context.Context, conn *remote.Conn) error {
	left, err := e.inStep(ctx, conn, mirror.KeepBoth, false)
	if err == nil && len(left.Changed) > 0 { // meanwhile
		left, err = e.inStep(ctx, conn, mirror.KeepBoth, false)
	}
	if err != nil {
		return err
	}
	e.app.name = "" // is there another that shares the copy?
	if _, _, err := e.look(ctx, conn); err == nil {
		return nil
	} else if !errors.Is(err, vm.ErrNotFound) {
		return fmt.Errorf("the copy of the workspace stays on %s: %w", e.host.Address(), err)
	}
	if only := slices.Concat(left.Changed, left.There); len(only) > 0 {
		return vm.WithHint(fmt.Errorf("the copy of the workspace stays on %s, because this of it is not here: %s", e.host.Address(), remote.List(only)),
			"save it from STATE/remote/"+e.record.Copy.ID+" there (docs/internals.md says where STATE is) and delete it; then agentvm down deletes the rest")
	}
	if err := e.forget(ctx, conn); err != nil {
		return err
	}
	e.app.noteLine("the copy of the workspace on %s is deleted", e.host.Address())
	return nil
}

// noteElsewhere says which machines are not among all of this host's.
func (a *app) noteElsewhere() error {
	if a.side != nil {
		return nil
	}
	list, err := a.allElsewhere()
	for _, e := range list {
		a.noteLine("the machine of %s on %s is left as it is", e.record.Workspace, e.host.Address())
	}
	return err
}
