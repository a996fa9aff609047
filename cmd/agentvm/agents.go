package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/agent"
)

func (a *app) agentsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "agents [NAME]", Short: "List the agents that there are profiles for, or show one", Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			set, err := a.agents()
			if err != nil {
				return err
			}
			names := set.Names()
			if len(args) > 0 {
				names = args
			}
			var list []agent.Profile
			for _, name := range names {
				p, err := set.Get(name)
				if err != nil {
					return err
				}
				list = append(list, p)
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(list)
			}
			w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
			for _, p := range list {
				fmt.Fprintf(w, "%s\t%s\n", p.Name, p.Description)
				if len(args) == 0 {
					continue
				}
				fmt.Fprintf(w, "  command\t%s\n  documents\t%s\n", p.Command, p.Docs)
				for _, n := range p.Install.NPM {
					fmt.Fprintf(w, "  installs\t%s@%s (npm)\n", n.Name, n.Version)
				}
				for _, name := range p.Install.Packages {
					fmt.Fprintf(w, "  installs\t%s\n", name)
				}
				for _, c := range p.Config {
					when := "copied"
					if c.Secret {
						when = "copied with agent.config: credentials"
					}
					fmt.Fprintf(w, "  config\t%s, %s\n", c.Path, when)
				}
				for _, name := range p.Env {
					fmt.Fprintf(w, "  may get\t$%s\n", name)
				}
				for _, name := range p.Allow {
					fmt.Fprintf(w, "  must reach\t%s\n", name)
				}
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}
