package main

import (
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/supervisor"
)

// superviseCommand is the process behind a running machine; lifecycle starts it.
func (a *app) superviseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "supervise NAME", Hidden: true, Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, err := a.store()
			if err != nil {
				return err
			}
			inst, err := store.Get(args[0])
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(a.stderr, nil))
			return supervisor.Run(cmd.Context(), inst, parts{cache: store.Dirs.Cache, log: log}, log)
		},
	}
}
