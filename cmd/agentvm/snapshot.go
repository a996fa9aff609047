package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

func (a *app) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot", Short: "Save what the machine is, and go back to it", Args: usageArgs(cobra.NoArgs),
		Long: `Save what the machine is under a name, and go back to it later: disk and, of a machine
that runs, memory with all programs. Programs that hold the workspace open keep the
memory from being saved; they are named. Of a stopped machine, and with --disk-only,
the disk is saved. The workspace is the host's: it is part of a snapshot that is made
with --workspace, and put back by a restore with --workspace.

The machine is the project's, or the one that --name names.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(a.snapshotCreateCommand(), a.snapshotLsCommand(), a.snapshotRestoreCommand(), a.snapshotRmCommand())
	return cmd
}

// snapshotView is a snapshot as the commands show it.
type snapshotView struct {
	Name          string    `json:"name"`
	Created       time.Time `json:"created"`
	Memory        bool      `json:"memory"`
	WithWorkspace bool      `json:"withWorkspace"`
	Disk          int64     `json:"disk"`
}

func viewSnapshot(s lifecycle.Snapshot) snapshotView {
	return snapshotView{Name: s.Name, Created: s.Created, Memory: s.Memory, WithWorkspace: s.Workspace, Disk: s.Bytes}
}

// onSnapshots runs act on the machine that the command line means.
func (a *app) onSnapshots(act func(m *lifecycle.Manager, inst *instance.Instance) error) error {
	inst, err := a.target(nil)
	if err != nil {
		return err
	}
	m, err := a.manager()
	if err != nil {
		return err
	}
	return act(m, inst)
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var opt lifecycle.SnapshotOptions
	cmd := &cobra.Command{
		Use: "create [SNAPSHOT]", Short: "Save what the machine is now (default name: by the time)", Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := time.Now().Format("s-20060102-150405")
			if len(args) > 0 {
				name = args[0]
			}
			return a.onSnapshots(func(m *lifecycle.Manager, inst *instance.Instance) error {
				s, err := m.CreateSnapshot(cmd.Context(), inst, name, opt, a.waiting(inst))
				if err != nil {
					return err
				}
				if a.json {
					return json.NewEncoder(a.stdout).Encode(viewSnapshot(s))
				}
				what := "disk"
				if s.Memory {
					what += " and memory"
				}
				if s.Workspace {
					what += " and workspace"
				}
				a.noteLine("snapshot %s of %q has its %s, and takes %s", s.Name, inst.Name, what, units.BytesSize(float64(s.Bytes)))
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&opt.DiskOnly, "disk-only", false, "save the disk alone, of a machine that runs as a power failure would leave it")
	cmd.Flags().BoolVar(&opt.Workspace, "workspace", false, "save the workspace too")
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) snapshotLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the machine's snapshots, the oldest first", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			return a.onSnapshots(func(m *lifecycle.Manager, inst *instance.Instance) error {
				list, err := m.Snapshots(inst)
				if err != nil {
					return err
				}
				views := []snapshotView{}
				for _, s := range list {
					views = append(views, viewSnapshot(s))
				}
				if a.json {
					return json.NewEncoder(a.stdout).Encode(views)
				}
				if len(views) == 0 {
					a.noteLine("%q has no snapshots; agentvm snapshot create makes one", inst.Name)
					return nil
				}
				w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
				yes := map[bool]string{true: "yes", false: "no"}
				fmt.Fprintln(w, "SNAPSHOT\tMADE\tMEMORY\tWORKSPACE\tDISK")
				for _, v := range views {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", v.Name, ago(v.Created), yes[v.Memory], yes[v.WithWorkspace], units.BytesSize(float64(v.Disk)))
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) snapshotRestoreCommand() *cobra.Command {
	var workspace bool
	cmd := &cobra.Command{
		Use: "restore SNAPSHOT", Short: "Make the machine what it was; what it is now is lost",
		Long: `Make the machine what it was when the snapshot was made. What it is now is lost, and
its programs end. The workspace stays as it is. With the snapshot's memory it goes on
at once; a snapshot of the disk alone leaves it stopped, for start to boot.

With --workspace that is put back too. What it is now, and the machine's disk, are kept
as the snapshot before-restore; that of an earlier restore is deleted when this one has
succeeded.`,
		Args: usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onSnapshots(func(m *lifecycle.Manager, inst *instance.Instance) error {
				begun := time.Now()
				report, done := a.newReport()
				res, err := m.RestoreSnapshot(cmd.Context(), inst, args[0], workspace, report, a.waiting(inst))
				done()
				if err != nil {
					return err
				}
				if res.Status.State.Live() || a.json {
					return a.showUp(res, time.Since(begun))
				}
				a.noteLine("%q has the disk of snapshot %s; agentvm start boots it", inst.Name, args[0])
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&workspace, "workspace", false, "put the workspace back too")
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

func (a *app) snapshotRmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm SNAPSHOT...", Short: "Delete snapshots", Args: usageArgs(cobra.MinimumNArgs(1)), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onSnapshots(func(m *lifecycle.Manager, inst *instance.Instance) error {
				for _, name := range args {
					if err := m.RemoveSnapshot(cmd.Context(), inst, name, a.waiting(inst)); err != nil {
						return err
					}
					if a.json {
						if err := json.NewEncoder(a.stdout).Encode(map[string]any{"name": name, "deleted": true}); err != nil {
							return err
						}
						continue
					}
					a.noteLine("snapshot %s is deleted", name)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) completeSnapshots(*cobra.Command, []string, string) (names []string, _ cobra.ShellCompDirective) {
	_ = a.onSnapshots(func(m *lifecycle.Manager, inst *instance.Instance) error {
		list, err := m.Snapshots(inst)
		for _, s := range list {
			names = append(names, s.Name)
		}
		return err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}
