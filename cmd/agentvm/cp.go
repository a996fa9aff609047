package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/ssh"
)

func (a *app) cpCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "cp SOURCE TARGET",
		Short: "Copy files between this host and the machine",
		Long: `Copy a file or a directory between this host and the machine. The guest's side
starts with a colon, or with the machine's name and a colon. A path of the guest
that is not absolute starts in the agent's home.`,
		Example: `  agentvm cp notes.txt :notes.txt        # into the project's machine
  agentvm cp web:/var/log/app.log .      # out of machine "web"`,
		Args: usageArgs(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, srcName, fromGuest := splitGuestPath(args[0])
			dst, dstName, toGuest := splitGuestPath(args[1])
			if fromGuest == toGuest {
				return vm.WithHint(vm.Classify(vm.ErrUsage, errors.New("one of the two paths must be the guest's, and only one")), "write the guest's as :PATH or NAME:PATH")
			}
			var names []string
			if name := srcName + dstName; name != "" {
				names = []string{name}
			}
			client, err := a.reach(cmd.Context(), names)
			if err != nil {
				return err
			}
			defer client.Close()
			var last ssh.CopyProgress
			live, tty := a.copyProgress(quiet)
			opt := ssh.CopyOptions{Progress: func(p ssh.CopyProgress) { last = p; live(p) }}
			if toGuest {
				err = client.Upload(cmd.Context(), src, dst, opt)
			} else {
				err = client.Download(cmd.Context(), src, dst, opt)
			}
			if tty {
				fmt.Fprint(a.stderr, "\r\x1b[K")
			}
			if errors.Is(err, ssh.ErrConnection) {
				err = client.lost(err)
			}
			if err == nil && !quiet {
				a.noteLine("copied %d files, %s", last.Files, units.BytesSize(float64(last.Bytes)))
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "say nothing but errors")
	return cmd
}

// copyProgress shows a copy's progress on a terminal.
func (a *app) copyProgress(quiet bool) (show func(ssh.CopyProgress), live bool) {
	if _, tty := terminal(a.stderr); quiet || !tty {
		return func(ssh.CopyProgress) {}, false
	}
	return func(p ssh.CopyProgress) {
		fmt.Fprintf(a.stderr, "\r\x1b[K%s, %d files: %s", units.BytesSize(float64(p.Bytes)), p.Files, oneLine(path.Base(p.Path)))
	}, true
}

// splitGuestPath tells :PATH and NAME:PATH from a path of the host. A host
// path with a colon can be written with a directory before it: ./a:b.
func splitGuestPath(s string) (path, name string, guest bool) {
	name, path, ok := strings.Cut(s, ":")
	if !ok || strings.Contains(name, "/") || name != "" && vm.ValidName(name) != nil {
		return s, "", false
	}
	if _, err := os.Lstat(s); err == nil && name != "" {
		return s, "", false // such a file is here
	}
	if path == "" {
		path = "."
	}
	return path, name, true
}
