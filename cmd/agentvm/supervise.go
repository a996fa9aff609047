package main

import (
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/supervisor"
)

// partsOf chooses who runs the machine.
func partsOf(inst *instance.Instance, direct parts) (supervisor.Parts, error) {
	spec, err := inst.Spec()
	if err != nil || spec.Backend != config.BackendLibvirt {
		return direct, nil // the supervisor itself tells of a damaged instance
	}
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	return libvirtParts{parts: direct, spec: spec, program: program}, nil
}

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
			pieces, err := partsOf(inst, parts{cache: store.Dirs.Cache, log: log})
			if err != nil {
				return err
			}
			return supervisor.Run(cmd.Context(), inst, pieces, log)
		},
	}
}
