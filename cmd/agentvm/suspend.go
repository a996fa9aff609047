package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
)

func (a *app) suspendCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "suspend [NAME]", Short: "Write the running machine down and end it; resume goes on from there",
		Long: `Write the machine's memory down and end it, with all programs in it as they are.
agentvm resume, start or up goes on from there. Programs that hold the workspace or
another mount open keep a machine from being suspended: it runs on, and they are
named. Connections that it has to the outside are lost.`,
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			m, err := a.manager()
			if err != nil {
				return err
			}
			begun := time.Now()
			if err := m.Suspend(cmd.Context(), inst, a.waiting(inst)); err != nil {
				return err
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(map[string]any{"name": inst.Name, "suspended": true, "seconds": time.Since(begun).Seconds()})
			}
			a.noteLine("%q is suspended after %s; agentvm resume goes on from here", inst.Name, time.Since(begun).Round(10*time.Millisecond))
			return nil
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) resumeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "resume [NAME]", Short: "Go on with a suspended machine",
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			status, err := inst.Status()
			if err != nil {
				return err
			}
			if !inst.Suspended() && !status.State.Live() {
				return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q is %s, and has nothing to resume", inst.Name, status.State)), "agentvm start "+inst.Name+" boots it")
			}
			return a.start(cmd, inst)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}
