package main

import (
	"fmt"
	"log/slog"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/supervisor"
)

// superviseCommand is the process behind a running machine; lifecycle starts it.
func (a *app) superviseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "supervise DIRECTORY", Hidden: true, Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, err := a.store()
			if err != nil {
				return err
			}
			inst := store.Open(args[0])
			// Core files would hold keys and what the guest sent; children inherit it.
			if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
				return fmt.Errorf("forbid core files: %w", err)
			}
			// QEMU makes its monitor's socket by itself, with what the umask leaves.
			syscall.Umask(0o077)
			log := slog.New(slog.NewTextHandler(a.stderr, nil))
			return supervisor.Run(cmd.Context(), inst, parts{cache: store.Dirs.Cache, log: log}, log)
		},
	}
}
