package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

const stopGrace = 20 * time.Second

func (a *app) stopCommand() *cobra.Command {
	var grace time.Duration
	var force bool
	cmd := &cobra.Command{
		Use: "stop [NAME]", Short: "Shut the machine down; its disk is kept",
		Long: `Shut the machine down: the guest is asked to, and after --timeout it is ended by
force. The machine's disk is kept, and agentvm start or up continues from it.`,
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if force {
				grace = 0
			}
			_, err := a.stop(cmd, args, grace)
			return err
		},
	}
	cmd.Flags().DurationVar(&grace, "timeout", stopGrace, "how long the guest has to shut down by itself")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "do not ask the guest")
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// stop ends the machine and says what was done.
func (a *app) stop(cmd *cobra.Command, args []string, grace time.Duration) (*instance.Instance, error) {
	inst, err := a.target(args)
	if err != nil {
		return nil, err
	}
	m, err := a.manager()
	if err != nil {
		return nil, err
	}
	stopped, err := m.Stop(cmd.Context(), inst, grace, a.waiting(inst))
	if err != nil {
		return nil, err
	}
	if a.json && cmd.Name() == "stop" {
		return inst, json.NewEncoder(a.stdout).Encode(map[string]any{"name": inst.Name, "stopped": stopped})
	}
	if a.json { // of a restart, whose start tells the rest
		return inst, nil
	}
	if stopped {
		a.noteLine("%q is stopped", inst.Name)
	} else {
		a.noteLine("%q was not running", inst.Name)
	}
	return inst, nil
}

func (a *app) waiting(inst *instance.Instance) func() {
	return func() { a.noteLine("another command works on %q; waiting for it", inst.Name) }
}

func (a *app) startCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "start [NAME]", Short: "Start a stopped machine again",
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			return a.start(cmd, inst)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

func (a *app) start(cmd *cobra.Command, inst *instance.Instance) error {
	m, err := a.manager()
	if err != nil {
		return err
	}
	begun := time.Now()
	report, done := a.newReport()
	res, err := m.Start(cmd.Context(), inst, report)
	done()
	if err != nil {
		return err
	}
	return a.showUp(res, time.Since(begun))
}

func (a *app) restartCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use: "restart [NAME]", Short: "Stop the machine and start it with the present configuration",
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			if inst.Suspended() {
				return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q is suspended, and a restart would lose what it would go on with", inst.Name)),
					"agentvm resume "+inst.Name+" comes first, or agentvm up --cold gives that up")
			}
			if inst, err = a.stop(cmd, args, grace); err != nil {
				return err
			}
			return a.start(cmd, inst)
		},
	}
	cmd.Flags().DurationVar(&grace, "timeout", stopGrace, "how long the guest has to shut down by itself")
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

func (a *app) downCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "down [NAME]", Short: "Delete the machine; the workspace is kept",
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !all {
				e, err := a.elsewhere(cmd, args, way{name: firstName})
				if err != nil {
					return err
				}
				if e != nil {
					return e.down(cmd)
				}
			} else if err := a.noteElsewhere(); err != nil {
				return err
			}
			m, err := a.manager()
			if err != nil {
				return err
			}
			var list []*instance.Instance
			if all {
				if list, err = m.Store.List(); err != nil {
					return err
				}
			} else {
				inst, err := a.target(args)
				if err != nil {
					return err
				}
				list = append(list, inst)
			}
			for _, inst := range list {
				if err := a.down(cmd, m, inst); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "delete every machine")
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) down(cmd *cobra.Command, m *lifecycle.Manager, inst *instance.Instance) error {
	if err := m.Delete(cmd.Context(), inst, a.waiting(inst)); err != nil {
		return err
	}
	if a.json {
		return json.NewEncoder(a.stdout).Encode(map[string]any{"name": inst.Name, "deleted": true})
	}
	a.noteLine("%q is deleted; the workspace is as it was", inst.Name)
	return nil
}
