package main

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/agentvm/agentvm/vm"
)

func (a *app) forwardCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "forward [ADDRESS:]PORT[:GUESTPORT]...",
		Short: "Make a guest's port reachable on this host, until Ctrl-C",
		Long: `Make ports of the guest reachable on this host, until Ctrl-C. Only this host can
connect, unless an address says otherwise.`,
		Example: `  agentvm forward 8080            # http://127.0.0.1:8080 is the guest's port 8080
  agentvm forward 9000:8080       # port 9000 here
  agentvm forward 0:8080          # any free port here; it is printed`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var pairs [][2]string
			for _, arg := range args {
				local, remote, err := parseForward(arg)
				if err != nil {
					return err
				}
				pairs = append(pairs, [2]string{local, remote})
			}
			client, err := a.reach(cmd.Context(), nil)
			if err != nil {
				return err
			}
			defer client.Close()
			group, ctx := errgroup.WithContext(cmd.Context())
			for _, p := range pairs {
				l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", p[0])
				if err != nil {
					return vm.Classify(vm.ErrHost, fmt.Errorf("listen on %s: %w", p[0], err))
				}
				a.noteLine("%s is the guest's %s", l.Addr(), p[1])
				group.Go(func() error {
					return client.ForwardLocal(ctx, l, "tcp", p[1], func(err error) { a.noteLine("%v", err) })
				})
			}
			group.Go(func() error {
				select {
				case <-client.Done():
					return client.lost(client.Err())
				case <-ctx.Done():
					return nil
				}
			})
			if err := group.Wait(); err != nil && cmd.Context().Err() == nil {
				return err
			}
			return nil // ended by the user
		},
	}
	return cmd
}

// parseForward reads [ADDRESS:]PORT[:GUESTPORT].
func parseForward(s string) (local, remote string, err error) {
	bad := func() (string, string, error) {
		return "", "", vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q does not say what to forward", s)), "write [ADDRESS:]PORT[:GUESTPORT], for example 9000:8080")
	}
	address, rest := "127.0.0.1", s
	if strings.HasPrefix(s, "[") {
		end := strings.Index(s, "]:")
		if end < 0 {
			return bad()
		}
		address, rest = s[1:end], s[end+2:]
	} else if first, after, ok := strings.Cut(s, ":"); ok && net.ParseIP(first) != nil {
		address, rest = first, after
	}
	here, there, ok := strings.Cut(rest, ":")
	if !ok {
		there = here
	}
	for i, p := range []string{here, there} {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || i == 1 && n == 0 {
			return bad()
		}
	}
	return net.JoinHostPort(address, here), net.JoinHostPort("127.0.0.1", there), nil
}
