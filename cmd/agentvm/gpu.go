package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/gpu/helper"
	"github.com/agentvm/agentvm/vm"
)

func (a *app) gpuCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "gpu", Short: "Look at this host's cards, take them from its drivers and give them back", Args: usageArgs(cobra.NoArgs),
		Long: `Look at this host's graphics cards and accelerators, take them from the host's
drivers and give them back. A machine takes those that agentvm.yaml names by itself.

DEVICE is a PCI address (01:00.0), vendor:device (10de:2330), a part or a pattern of
the name, auto: the best card that is free, or the UUID of a mediated device, which
is a part of a card.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(a.gpuLsCommand(), a.gpuCheckCommand(), a.gpuBindCommand(), a.gpuReleaseCommand(), a.gpuRecoverCommand(), a.gpuHelperSetupCommand())
	return cmd
}

// gpus finds the host's devices, and who takes them.
func (a *app) gpus() (*gpu.Manager, *gpu.Inventory, error) {
	m := &gpu.Manager{Host: a.gpuHost()}
	inv, err := m.Host.Inventory()
	return m, inv, err
}

// takenGPUs tells what agentvm has taken, as far as it can be read: where that is
// not all, taking one fails.
func (a *app) takenGPUs(m *gpu.Manager) map[string]gpu.Claim {
	taken, err := m.Taken()
	if err != nil && !errors.Is(err, os.ErrPermission) {
		a.noteLine("%v", err)
	}
	return taken
}

func (a *app) gpuHost() gpu.Host { return gpu.Host{Root: cmp.Or(a.gpuRoot, "/")} }

// gpuCheckView is what gpu check says about one card.
type gpuCheckView struct {
	Address  string        `json:"address"` // or the UUID of a mediated device
	ID       string        `json:"id"`
	Name     string        `json:"name"`
	With     []string      `json:"with"` // what would be taken
	Free     bool          `json:"free"` // nothing speaks against it
	Findings []gpu.Finding `json:"findings"`
}

func (a *app) gpuCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "check [DEVICE]", Short: "Say whether a card can be taken, and what is in the way",
		Long: `Say whether a card can be taken from the host, what is in the way and what to do about
it; without DEVICE of every card and mediated device, and of every card where auto finds
none that is free. It changes nothing. The exit code is 3 when something is in the way of
one, and 4 when auto finds none.`,
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeGPUs,
		RunE: func(_ *cobra.Command, args []string) error {
			m, inv, err := a.gpus()
			if err != nil {
				return err
			}
			views, err := checkGPUs(inv, a.takenGPUs(m), args)
			noneFree := errors.Is(err, gpu.ErrNoneFree)
			if err != nil && !noneFree {
				return err
			}
			if err := a.showGPUChecks(views); err != nil {
				return err
			}
			if noneFree { // for reasons that are said
				return vm.Classify(vm.ErrNotFound, gpu.ErrNoneFree)
			}
			bad := 0
			for _, v := range views {
				if !v.Free {
					bad++
				}
			}
			if bad > 0 {
				return vm.Classify(vm.ErrHost, fmt.Errorf("%d of %d cards cannot be taken", bad, len(views)))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// checkGPUs checks what the first of args, if any, names, else every card and
// every mediated device. Where auto is named and none is free it fails with
// gpu.ErrNoneFree, and has checked every card.
func checkGPUs(inv *gpu.Inventory, taken map[string]gpu.Claim, args []string) (views []gpuCheckView, err error) {
	devices, parts := inv.GPUs(), inv.Mediated
	if len(args) > 0 {
		devices, parts = nil, nil
		if uuid := strings.ToLower(args[0]); gpu.IsUUID(uuid) {
			m, err := inv.FindMediated(uuid)
			if err != nil {
				return nil, err
			}
			parts = append(parts, m)
		} else if devices, err = gpu.Select(inv, args[0], taken); errors.Is(err, gpu.ErrNoneFree) {
			devices = inv.Cards()
		} else if err != nil {
			return nil, err
		}
	}
	views = []gpuCheckView{}
	for _, d := range devices {
		v := gpuCheckView{Address: d.Address, ID: d.ID(), Name: d.Title(), Findings: gpu.Check(inv, d, taken)}
		for _, f := range inv.Unit(d) {
			v.With = append(v.With, f.Address)
		}
		views = append(views, v)
	}
	for _, m := range parts {
		v := gpuCheckView{Address: m.UUID, Name: m.Type, With: []string{m.UUID}, Findings: gpu.CheckMediated(inv, m, taken)}
		if m.Card != nil {
			v.ID = m.Card.ID()
		}
		views = append(views, v)
	}
	for i, v := range views {
		views[i].Free = !slices.ContainsFunc(v.Findings, func(f gpu.Finding) bool { return f.Severity == gpu.Problem })
	}
	return views, err
}

func (a *app) showGPUChecks(views []gpuCheckView) error {
	if a.json {
		return json.NewEncoder(a.stdout).Encode(views)
	}
	if len(views) == 0 {
		a.noteLine(noGPU)
		return nil
	}
	for _, v := range views {
		verdict := "can be taken"
		if !v.Free {
			verdict = "cannot be taken"
		}
		if err := a.printf("%s %s: %s, with %s\n", v.Address, v.Name, verdict, strings.Join(v.With, ", ")); err != nil {
			return err
		}
		for _, f := range v.Findings {
			at := ""
			if f.Device != "" && f.Device != v.Address {
				at = f.Device + ": "
			}
			if err := a.printf("  %s  %s%s\n", f.Severity, at, f.Detail); err != nil {
				return err
			}
			if f.Fix != "" {
				if err := a.printf("           fix: %s\n", f.Fix); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (a *app) gpuBindCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "bind DEVICE...", Short: "Take cards from the host's drivers, for vfio-pci, until they are released",
		Long: `Take cards, each with every function of its slot, from the host's drivers and give
them to vfio-pci. All are taken, or none. They stay so until they are released or the
host boots.`,
		Args: usageArgs(cobra.MinimumNArgs(1)), ValidArgsFunction: a.completeGPUs,
		RunE: func(cmd *cobra.Command, args []string) error {
			m, inv, err := a.gpus()
			if err != nil {
				return err
			}
			addresses, err := selectGPUs(inv, a.takenGPUs(m), args)
			if err != nil {
				return err
			}
			taker, err := helper.NewTaker(a.gpuHost())
			if err != nil {
				return err
			}
			self, err := vm.ProcessID(os.Getpid())
			if err != nil {
				return err
			}
			taken, err := taker.Bind(cmd.Context(), gpu.Request{Owner: gpu.Owner{Name: "gpu bind", Process: self, Keep: true}, Force: force, Devices: addresses})
			if err != nil {
				return err
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(taken)
			}
			for _, j := range taken {
				switch {
				case gpu.IsUUID(j.Address):
					a.noteLine("%s is taken; its driver, %s, keeps it", j.Address, j.VFIO)
				case j.Prebound:
					a.noteLine("%s was on %s already", j.Address, j.VFIO)
				case j.Driver == "":
					a.noteLine("%s is on %s; it had no driver", j.Address, j.VFIO)
				default:
					a.noteLine("%s is on %s; it was on %s", j.Address, j.VFIO, j.Driver)
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "take it from under the host's display, its console and its processes")
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) gpuReleaseCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "release DEVICE...", Short: "Give cards back to the drivers that they had", Args: usageArgs(cobra.MinimumNArgs(1)),
		ValidArgsFunction: a.completeGPUs,
		RunE: func(cmd *cobra.Command, args []string) error {
			m, inv, err := a.gpus()
			if err != nil {
				return err
			}
			var addresses []string
			for _, arg := range args {
				// A card that was unplugged still has its journal.
				if j, err := m.Journal(arg); err == nil && j != nil {
					addresses = append(addresses, arg)
					continue
				}
				found, err := selectGPUs(inv, nil, []string{arg})
				if err != nil {
					return err
				}
				addresses = append(addresses, found...)
			}
			taker, err := helper.NewTaker(a.gpuHost())
			if err != nil {
				return err
			}
			outcomes, err := taker.Release(cmd.Context(), addresses...)
			return errors.Join(a.showOutcomes(outcomes), err)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) gpuRecoverCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "recover", Short: "Give back the cards that killed processes have left behind", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, _, err := a.gpus()
			if err != nil {
				return err
			}
			list, err := m.Journals()
			if len(list) == 0 && err == nil {
				if a.json {
					return a.showOutcomes(nil)
				}
				a.noteLine("no card is taken, so there is nothing to recover")
				return nil
			}
			taker, err := helper.NewTaker(a.gpuHost())
			if err != nil {
				return err
			}
			outcomes, err := taker.Recover(cmd.Context())
			return errors.Join(a.showOutcomes(outcomes), err)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) gpuHelperSetupCommand() *cobra.Command {
	return &cobra.Command{
		Use: "helper-setup [DEVICE...]", Short: "Print what root does once so that you can take cards without being root",
		Long: `Print a script that root runs once. It lets you, who call this, take the cards named
(default: every card) without being root: by a helper that root runs for one request.`,
		Example: `  agentvm gpu helper-setup            # read it first
  agentvm gpu helper-setup | sudo sh -eu`,
		Args: cobra.ArbitraryArgs, ValidArgsFunction: a.completeGPUs,
		RunE: func(_ *cobra.Command, args []string) error {
			_, inv, err := a.gpus()
			if err != nil {
				return err
			}
			addresses, err := selectGPUs(inv, nil, args)
			if err != nil {
				return err
			}
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			name, err := helper.Self()
			if err != nil {
				return err
			}
			script, err := helper.Setup(exe, name, addresses)
			if err != nil {
				return err
			}
			return a.printf("%s", script)
		},
	}
}

func (a *app) showOutcomes(outcomes []gpu.Outcome) error {
	if a.json {
		if outcomes == nil {
			outcomes = []gpu.Outcome{}
		}
		return json.NewEncoder(a.stdout).Encode(outcomes)
	}
	for _, o := range outcomes {
		if o.Action != gpu.Failed { // the error says it
			a.noteLine("%s: %s", o.Address, o.Detail)
		}
	}
	return nil
}

func selectGPUs(inv *gpu.Inventory, taken map[string]gpu.Claim, args []string) (addresses []string, err error) {
	for _, arg := range args {
		if uuid := strings.ToLower(arg); gpu.IsUUID(uuid) {
			if !slices.Contains(addresses, uuid) {
				addresses = append(addresses, uuid)
			}
			continue
		}
		devices, err := gpu.Select(inv, arg, taken)
		if err != nil {
			return nil, err
		}
		for _, d := range devices {
			if !slices.Contains(addresses, d.Address) {
				addresses = append(addresses, d.Address)
			}
		}
	}
	return addresses, nil
}

// completeGPUs offers the cards' addresses, explained by their names.
func (a *app) completeGPUs(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	_, inv, err := a.gpus()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var list []string
	for _, d := range inv.GPUs() {
		if !slices.Contains(args, d.Address) {
			list = append(list, d.Address+"\t"+d.Title())
		}
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

// gpuJournals tells of cards that are taken from the host; nothing when none is.
func gpuJournals(host gpu.Host) (findings []vm.Finding) {
	m := gpu.Manager{Host: host}
	journals, err := m.Journals()
	if err == nil && len(journals) == 0 {
		return nil
	}
	stale, err := m.Stale()
	switch {
	case err != nil:
		findings = append(findings, vm.Finding{Name: "cards", Status: vm.FindingWarn, Detail: err.Error(), Fix: vm.Hint(err)})
	case len(stale) > 0:
		findings = append(findings, vm.Finding{Name: "cards", Status: vm.FindingWarn, Detail: "taken from the host by processes that have ended: " + strings.Join(stale, ", "), Fix: "sudo agentvm gpu recover"})
	default:
		findings = append(findings, vm.Finding{Name: "cards", Status: vm.FindingOK, Detail: fmt.Sprintf("%d PCI functions or mediated devices are taken from the host; agentvm gpu release gives them back", len(journals))})
	}
	return findings
}
