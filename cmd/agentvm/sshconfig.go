package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/ssh"
)

const knownHostsFile = "known_hosts"

func (a *app) sshConfigCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ssh-config [NAME]", Short: "Print the OpenSSH configuration that reaches the machine",
		Long: `Print the OpenSSH configuration that reaches the machine. With it, ssh, scp, rsync,
git, editors and Ansible work with the machine by its name:

  agentvm ssh-config >>~/.ssh/config`,
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(_ *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			spec, err := inst.Spec()
			if err != nil {
				return err
			}
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			proxy := []string{exe, "ssh-proxy", inst.Name}
			if home := a.getenv("AGENTVM_HOME"); home != "" {
				proxy = append([]string{"env", "AGENTVM_HOME=" + home}, proxy...)
			}
			host := ssh.OpenSSHHost{Alias: inst.Name, User: spec.Guest.User, Proxy: proxy, KnownHosts: inst.Path(knownHostsFile)}
			key, err := readKey(inst, lifecycle.HostKeyFile)
			if err != nil {
				return err
			}
			if err := renameio.WriteFile(host.KnownHosts, []byte(host.KnownHostsLine(key.PublicKey())), 0o600); err != nil {
				return fmt.Errorf("write %s: %w", host.KnownHosts, err)
			}
			text, err := host.Config()
			if err != nil {
				return err
			}
			return a.printf("%s", text)
		},
	}
}

// sshProxyCommand joins its input and output to a machine's SSH proxy. It is
// the ProxyCommand of ssh-config.
func (a *app) sshProxyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ssh-proxy NAME", Hidden: true, Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			status, err := inst.Status()
			if err != nil {
				return err
			}
			spec, err := inst.Spec()
			if err != nil {
				return err
			}
			if status, err = awake(cmd.Context(), inst, spec, status); err != nil {
				return err
			}
			if !status.State.Usable() {
				return notUsable(inst, status)
			}
			conn, err := net.Dial("unix", filepath.Join(inst.RunDir(spec.ID), control.SSHSocket))
			if err != nil {
				return connectionError{fmt.Errorf("reach %q: %w", inst.Name, err)}
			}
			defer conn.Close()
			go func() {
				_, _ = io.Copy(conn, a.stdin)
				if u, ok := conn.(*net.UnixConn); ok {
					_ = u.CloseWrite()
				}
			}()
			_, err = io.Copy(a.stdout, conn)
			return err
		},
	}
}
