package main

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm"
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
		RunE: func(cmd *cobra.Command, args []string) error {
			id, key, proxy, known, err := a.proxied(cmd.Context(), args)
			if err != nil {
				return err
			}
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			proxy = append([]string{exe}, proxy...)
			if home := a.getenv("AGENTVM_HOME"); home != "" {
				proxy = append([]string{"env", "AGENTVM_HOME=" + home}, proxy...)
			}
			host := ssh.OpenSSHHost{Alias: id.Name, User: id.User, Proxy: proxy, KnownHosts: known}
			if err := vm.WriteFile(host.KnownHosts, []byte(host.KnownHostsLine(key)), 0o600); err != nil {
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

// proxied describes the guest that a command is about: its key, the arguments
// of this program that lead to its SSH proxy, and a file for its host key.
func (a *app) proxied(ctx context.Context, args []string) (id guestID, key gossh.PublicKey, proxy []string, known string, err error) {
	if e := a.through; e != nil {
		conn, err := e.dial(ctx, a.mayAsk())
		if err == nil {
			id, key, _, err = e.guest(ctx, conn, cmp.Or(firstName(args), a.name), false)
		}
		if err == nil && e.record.Machine == "" {
			e.record.Machine = id.Name
			err = e.write()
		}
		proxy = []string{"ssh-proxy", id.Name}
		if id.Name != e.record.Machine { // the project's second one, which its name alone does not lead to
			proxy = append([]string{"-C", e.record.Workspace}, proxy...)
		}
		return id, key, proxy, filepath.Join(e.dir, knownHostsFile), unreachable(err)
	}
	inst, err := a.target(args)
	if err == nil {
		id, err = idOf(inst)
	}
	if err == nil {
		key, err = id.check()
	}
	if err != nil {
		return id, nil, nil, "", err
	}
	return id, key, []string{"ssh-proxy", id.Name}, inst.Path(knownHostsFile), nil
}

// sshProxyCommand joins its input and output to a machine's SSH proxy. It is
// the ProxyCommand of ssh-config.
func (a *app) sshProxyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ssh-proxy NAME", Hidden: true, Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			conn, err := a.proxyTo(cmd.Context(), args)
			if err != nil {
				return err
			}
			return a.join(conn)
		},
	}
}

// proxyTo connects to the SSH proxy of the machine that a command names.
func (a *app) proxyTo(ctx context.Context, args []string) (net.Conn, error) {
	if e := a.through; e != nil {
		conn, _, err := e.dialGuest(ctx, args[0])
		return conn, err
	}
	inst, err := a.target(args)
	if err != nil {
		return nil, err
	}
	return a.dialGuest(ctx, inst)
}
