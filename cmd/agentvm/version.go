package main

import (
	"encoding/json"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/instance"
)

// version is set by the linker in release builds.
var version = "0.1.0-dev"

func (a *app) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "version", Short: "Print the version", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			revision, goVersion := "", ""
			if info, ok := debug.ReadBuildInfo(); ok {
				goVersion = info.GoVersion
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						revision = s.Value
					}
				}
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(map[string]any{"version": version, "revision": revision, "go": goVersion, "format": instance.Format})
			}
			return a.printf("agentvm %s\n", version)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}
