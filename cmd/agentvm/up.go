package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/qemu"
)

// upFlags are the flags of every command that may start a machine.
type upFlags struct {
	config string
	opt    lifecycle.UpOptions
}

func (f *upFlags) register(cmd *cobra.Command) {
	f.registerEnvironment(cmd)
	cmd.Flags().BoolVar(&f.opt.Cold, "cold", false, "boot, even where the machine could go on from a template or from where it was suspended")
	cmd.Flags().BoolVar(&f.opt.AllowWide, "allow-wide", false, "share / or the home directory all the same")
}

// registerEnvironment adds the flags that say which environment is meant.
func (f *upFlags) registerEnvironment(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "read this configuration instead of the project's agentvm.yaml")
	cmd.Flags().StringVar(&f.opt.Agent, "agent", "", "use this agent instead of the configured one")
	cmd.Flags().DurationVar(&f.opt.BootTimeout, "timeout", 0, "how long the guest may take to become ready (default: 2 minutes, emulated 6)")
}

// project reads the configuration that the flags name.
func (f *upFlags) project(a *app) (p lifecycle.Project, err error) {
	if f.config != "" && a.side == nil {
		p, err = lifecycle.LoadProject(f.config)
	} else {
		p, err = a.project()
	}
	return p, err
}

func (a *app) upCommand() *cobra.Command {
	var f upFlags
	var trace bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Make and start the project's machine, and wait until it is ready",
		Long: `Make and start the project's machine, and wait until it is ready.

What is lacking is made on the way: the image, the machine's disk and keys. A
machine that runs already is left as it is. Without agentvm.yaml the current
directory is shared, with the defaults.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := f.project(a)
			if err != nil {
				return err
			}
			m, err := a.manager()
			if err != nil {
				return err
			}
			f.opt.Name = a.name
			begun := time.Now()
			report, done := a.newReport()
			res, err := m.Up(cmd.Context(), p, f.opt, report)
			done()
			if err != nil {
				return err
			}
			if f.opt.DryRun {
				return a.showCommand(cmd, m, res)
			}
			took := time.Since(begun)
			if err := a.showUp(res, took); err != nil || !trace || a.json {
				return err
			}
			return a.showTrace(res, begun, took)
		},
	}
	f.register(cmd)
	cmd.Flags().BoolVar(&f.opt.Recreate, "recreate", false, "give the machine a new disk (the workspace is kept)")
	cmd.Flags().BoolVar(&f.opt.DryRun, "dry-run", false, "print QEMU's command line, or libvirt's domain, instead of starting anything")
	cmd.Flags().BoolVar(&trace, "trace", false, "show where the time went, phase by phase")
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

// showTrace prints the phases of a start. They overlap where that saves time.
func (a *app) showTrace(res lifecycle.Result, begun time.Time, took time.Duration) error {
	if len(res.Status.Phases) == 0 || res.Already {
		return nil
	}
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }
	fmt.Fprintln(w, "begins after\ttakes\t  phase")
	fmt.Fprintf(w, "%s\t%s\t  before the supervisor's work\n", ms(0), ms(res.Status.Phases[0].Start.Sub(begun)))
	for _, p := range res.Status.Phases {
		fmt.Fprintf(w, "%s\t%s\t  %s\n", ms(p.Start.Sub(begun)), ms(p.Took), phaseName(p.Name))
	}
	fmt.Fprintf(w, "\t%s\t  in all\n", ms(took))
	return w.Flush()
}

// showUp says what `up` came to.
func (a *app) showUp(res lifecycle.Result, took time.Duration) error {
	if a.json {
		return json.NewEncoder(a.stdout).Encode(map[string]any{
			"name": res.Instance.Name, "workspace": res.Spec.Workspace, "already": res.Already, "created": res.Created,
			"restored": res.Status.Restored,
			"seconds":  took.Seconds(), "status": viewOf(res.Spec, res.Status),
		})
	}
	switch {
	case res.Status.State == instance.Degraded:
		a.noteLine("%q runs, with something lost: %s", res.Instance.Name, res.Status.Reason)
		for _, w := range res.Status.Warnings[min(1, len(res.Status.Warnings)):] {
			a.noteLine("  %s", w)
		}
	case res.Already:
		a.noteLine("%q is already running", res.Instance.Name)
	default:
		how := "ready"
		if res.Status.Restored {
			how = "restored"
		}
		a.noteLine("%q is %s after %s; %s is at %s in it", res.Instance.Name, how, took.Round(10*time.Millisecond), res.Spec.Workspace, res.Spec.Guest.Directory)
	}
	return nil
}

// showCommand prints the command line that QEMU would be started with.
func (a *app) showCommand(cmd *cobra.Command, m *lifecycle.Manager, res lifecycle.Result) error {
	caps, err := probeQEMU(cmd.Context(), m.Store.Dirs.Cache)
	if err != nil {
		return err
	}
	if res.Spec.Backend == config.BackendLibvirt {
		return a.showDomain(res.Spec, caps)
	}
	machine := res.Spec.Machine
	if !machine.HasDevices() {
		machine.MemoryFile = memoryFile
	}
	argv, err := qemu.Argv(machine, caps)
	if err != nil {
		return err
	}
	if a.json {
		return json.NewEncoder(a.stdout).Encode(argv)
	}
	return a.printf("%s\n", vm.ShellCommand(argv...))
}

// showDomain prints the domain that libvirt would be given.
func (a *app) showDomain(spec instance.Spec, caps qemu.Caps) error {
	uri, err := libvirt.ParseURI(spec.URI)
	if err != nil {
		return err
	}
	c, err := libvirtConfig(uri, spec, spec.Machine, caps)
	if err != nil {
		return err
	}
	text, err := libvirt.XML(spec.Machine, c)
	if err != nil {
		return err
	}
	if a.json {
		return json.NewEncoder(a.stdout).Encode(map[string]string{"domain": text})
	}
	return a.printf("%s\n", text)
}

// usable brings the project's machine up when it is not running.
func (a *app) usable(cmd *cobra.Command, f *upFlags) (*instance.Instance, instance.Spec, error) {
	fail := func(err error) (*instance.Instance, instance.Spec, error) { return nil, instance.Spec{}, err }
	p, err := f.project(a)
	if err != nil {
		return fail(err)
	}
	m, err := a.manager()
	if err != nil {
		return fail(err)
	}
	f.opt.Name = a.name
	report, done := a.newReport()
	res, err := m.Up(cmd.Context(), p, f.opt, report)
	done()
	if err != nil {
		return fail(err)
	}
	if f.opt.Agent != "" && res.Spec.Agent != f.opt.Agent {
		return fail(vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("machine %q was made for agent %q, not %q", res.Instance.Name, res.Spec.Agent, f.opt.Agent)),
			fmt.Sprintf("agentvm stop && agentvm up --recreate --agent %s", f.opt.Agent)))
	}
	return res.Instance, res.Spec, nil
}
