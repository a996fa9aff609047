package main

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
)

//go:embed init.yaml.tmpl
var initTemplate string

func (a *app) initCommand() *cobra.Command {
	var agentName, image string
	var force bool
	cmd := &cobra.Command{
		Use: "init", Short: "Write a commented agentvm.yaml for this project", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			set, err := a.agents()
			if err != nil {
				return err
			}
			if _, err := set.Get(agentName); err != nil {
				return err
			}
			if !strings.Contains(image, "/") {
				if _, err := images.Known(image); err != nil {
					return err
				}
			}
			dir, err := a.workingDirectory()
			if err != nil {
				return err
			}
			var text strings.Builder
			t := template.Must(template.New("").Parse(initTemplate))
			if err := t.Execute(&text, map[string]any{"Agent": agentName, "Agents": strings.Join(set.Names(), ", "), "Image": image}); err != nil {
				return fmt.Errorf("write the configuration: %w", err)
			}
			path := filepath.Join(dir, config.FileName)
			flags := os.O_CREATE | os.O_WRONLY | os.O_EXCL
			if force {
				flags = os.O_CREATE | os.O_WRONLY | os.O_TRUNC
			}
			f, err := os.OpenFile(path, flags, 0o644)
			if errors.Is(err, fs.ErrExist) {
				return vm.WithHint(fmt.Errorf("%s is there already", path), "--force replaces it")
			}
			if err != nil {
				return fmt.Errorf("write the configuration: %w", err)
			}
			if _, err = f.WriteString(text.String()); err == nil {
				err = f.Close()
			}
			if err != nil {
				return fmt.Errorf("write the configuration: %w", err)
			}
			a.noteLine("wrote %s; agentvm up starts the machine", path)
			return nil
		},
	}
	cmd.Flags().StringVar(&agentName, "agent", config.DefaultAgent, "the agent to use")
	cmd.Flags().StringVar(&image, "image", config.DefaultImage, "the image to use")
	cmd.Flags().BoolVar(&force, "force", false, "replace a file that is there")
	return cmd
}
