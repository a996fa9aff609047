package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/share"
)

func (a *app) doctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check that this host has what agentvm needs, and say how to mend it",
		Long: `Check that this host has what agentvm needs. Each finding comes with the command
that mends it. The exit code is 3 when something that up needs is missing.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings, err := a.examine(cmd.Context())
			if err != nil {
				return err
			}
			failed := 0
			for _, f := range findings {
				if f.Status == vm.FindingFail {
					failed++
				}
			}
			if a.json {
				if err := json.NewEncoder(a.stdout).Encode(findings); err != nil {
					return err
				}
			} else if err := a.showFindings(findings); err != nil {
				return err
			}
			if failed > 0 {
				return vm.Classify(vm.ErrHost, fmt.Errorf("%d of %d checks failed", failed, len(findings)))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) showFindings(findings []vm.Finding) error {
	marks := map[vm.FindingStatus]string{vm.FindingOK: "ok  ", vm.FindingWarn: "warn", vm.FindingFail: "FAIL"}
	for _, f := range findings {
		if err := a.printf("%s  %s: %s\n", marks[f.Status], f.Name, f.Detail); err != nil {
			return err
		}
		if f.Fix != "" && f.Status != vm.FindingOK {
			if err := a.printf("      fix: %s\n", f.Fix); err != nil {
				return err
			}
		}
	}
	return nil
}

// examine gathers every check's findings. It changes nothing but the status
// of instances whose supervisor was killed, and gives the host the devices back
// that those had.
func (a *app) examine(ctx context.Context) ([]vm.Finding, error) {
	dirs, err := a.dirs()
	if err != nil {
		return nil, err
	}
	machines := instances(instance.Store{Dirs: dirs}) // ends what is left of those
	lists := [][]vm.Finding{
		{platform(), runDirectory(dirs)},
		qemu.Check(ctx, qemuBinary, qemu.AccelProbe{Probes: probesIn(dirs.Cache)}),
		share.Check(ctx),
		images.Check(dirs.Images()),
		machines,
		leftDevices(ctx, a.gpuHost()),
		gpuJournals(a.gpuHost()),
	}
	// A service that nothing here uses is not asked for, let alone started.
	if p, err := a.project(); err == nil && p.Config.Backend == config.BackendLibvirt {
		if host, there, err := elsewhereURI(a.getenv, p.Config); there && err == nil {
			lists = append(lists, a.checkElsewhere(ctx, p, &elsewhere{app: a, host: host}))
		} else {
			lists = append(lists, a.checkLibvirt(ctx, p.Config.URI, dirs))
		}
	}
	return distinct(lists...), nil
}

// distinct joins lists of findings. What two parts need of the host, such as
// user namespaces, both have looked at.
func distinct(lists ...[]vm.Finding) (all []vm.Finding) {
	for _, f := range slices.Concat(lists...) {
		if !slices.Contains(all, f) {
			all = append(all, f)
		}
	}
	return all
}

func platform() vm.Finding {
	f := vm.Finding{Name: "platform", Status: vm.FindingOK, Detail: runtime.GOOS + "/" + runtime.GOARCH}
	if f.Detail != "linux/amd64" {
		f.Status, f.Detail = vm.FindingFail, f.Detail+"; guests run on linux/amd64 hosts only"
	}
	return f
}

func runDirectory(dirs instance.Dirs) vm.Finding {
	f := vm.Finding{Name: "directories", Status: vm.FindingOK, Detail: fmt.Sprintf("state in %s, images in %s, sockets in %s", dirs.State, dirs.Images(), dirs.Run)}
	if err := dirs.Make(); err != nil {
		f.Status, f.Detail, f.Fix = vm.FindingFail, err.Error(), vm.Hint(err)
	}
	return f
}

// instances looks at every machine; looking also cleans up after crashes.
func instances(store instance.Store) (findings []vm.Finding) {
	list, err := store.List()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return []vm.Finding{{Name: "machines", Status: vm.FindingFail, Detail: err.Error()}}
	}
	for _, i := range list {
		v := look(i)
		switch v.State {
		case unreadable, "new":
			findings = append(findings, vm.Finding{Name: "machine " + i.Name, Status: vm.FindingWarn, Detail: v.Reason, Fix: "agentvm down " + i.Name})
		case instance.Failed:
			findings = append(findings, vm.Finding{Name: "machine " + i.Name, Status: vm.FindingWarn, Detail: "failed: " + v.Reason, Fix: "agentvm start " + i.Name})
		case instance.Degraded:
			findings = append(findings, vm.Finding{Name: "machine " + i.Name, Status: vm.FindingWarn, Detail: "degraded: " + v.Reason, Fix: "agentvm restart " + i.Name})
		}
	}
	return findings
}
