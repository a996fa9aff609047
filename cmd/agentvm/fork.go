package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

// maxForks is more than a host would want.
const maxForks = 64

func (a *app) forkCommand() *cobra.Command {
	var view bool
	cmd := &cobra.Command{
		Use: "fork [N]", Short: "Let N machines go on from where this one is, each with a copy of the workspace",
		Long: `Let N machines (default 1) go on from where the project's machine is, with everything
that runs in it. Each is named NAME-fork-1 and so on, works in a copy of the workspace
beside it, DIRECTORY-fork-1 and so on, and has keys, names and ids of its own. The
machine pauses while it is copied, and goes on. Programs that hold the workspace open
keep it from being forked; they are named. agentvm down deletes a fork and keeps its
copy of the workspace.

With --readonly nothing is copied: the forks see the workspace itself, as it changes,
and cannot write to it. Such a fork is meant by its name alone (--name).`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			n := 1
			if len(args) > 0 {
				var err error
				if n, err = strconv.Atoi(args[0]); err != nil || n < 1 || n > maxForks {
					return vm.Classify(vm.ErrUsage, fmt.Errorf("%q is not a number of forks from 1 to %d", args[0], maxForks))
				}
			}
			inst, err := a.target(nil)
			if err != nil {
				return err
			}
			m, err := a.manager()
			if err != nil {
				return err
			}
			begun := time.Now()
			report, done := a.newReport()
			forks, err := m.Fork(cmd.Context(), inst, n, view, report, a.waiting(inst))
			done()
			return a.showForks(forks, time.Since(begun), err)
		},
	}
	cmd.Flags().BoolVar(&view, "readonly", false, "let the forks see the workspace itself, read-only, instead of copies")
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

// showForks tells of the forks that were made, also where others failed.
func (a *app) showForks(forks []lifecycle.Result, took time.Duration, err error) error {
	if a.json {
		list := []map[string]string{}
		for _, f := range forks {
			list = append(list, map[string]string{"name": f.Instance.Name, "workspace": f.Spec.Workspace})
		}
		if err != nil && len(list) == 0 {
			return err
		}
		if jsonErr := json.NewEncoder(a.stdout).Encode(list); jsonErr != nil {
			return jsonErr
		}
		return err
	}
	for _, f := range forks {
		a.noteLine("%q runs in %s", f.Instance.Name, f.Spec.Workspace)
	}
	if err == nil {
		a.noteLine("%d made after %s", len(forks), took.Round(10*time.Millisecond))
	}
	return err
}
