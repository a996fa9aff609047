package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/lifecycle"
)

func (a *app) poolCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pool", Short: "Manage the machines that wait to be claimed", Args: usageArgs(cobra.NoArgs),
		Long: `Manage the pool: machines that were restored from a template ahead of their use and
wait, paused and nobody's. The next up of that environment claims one, which is quicker
still than going on from the template. Each takes memory while it waits, so there are
none unless your config.yaml says how many:

  pool: 2

Each up then fills the pool again, with machines of the environment that it used.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(a.poolLsCommand(), a.poolFillCommand(), a.poolDrainCommand())
	return cmd
}

// spareView is a machine of the pool as the commands show it.
type spareView struct {
	ID       string    `json:"id"`
	Since    time.Time `json:"since"`
	Template string    `json:"template"` // beginning of its key
	ImageID  string    `json:"imageId"`
	CPUs     int       `json:"cpus"`
	Memory   int64     `json:"memory"`   // bytes that the guest has
	Resident int64     `json:"resident"` // bytes of the host's memory that it takes
	Disk     int64     `json:"disk"`
}

func viewSpare(s lifecycle.Spare) spareView {
	v := look(s.Instance)
	view := spareView{
		ID: s.Instance.Name, Since: s.Status.Since, Template: s.Spec.Spare[:min(12, len(s.Spec.Spare))], ImageID: s.Spec.ImageID,
		CPUs: s.Spec.Machine.CPUs, Memory: s.Spec.Machine.Memory, Disk: v.Disk,
	}
	for _, pid := range v.Processes {
		view.Resident += proportionalMemory(pid)
	}
	return view
}

func (a *app) poolLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the machines that wait, and the memory that they take", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			m, err := a.manager()
			if err != nil {
				return err
			}
			size, err := m.Pool()
			if err != nil {
				return err
			}
			list, err := m.Spares()
			if err != nil {
				return err
			}
			views := []spareView{}
			var total int64
			for _, s := range list {
				v := viewSpare(s)
				views = append(views, v)
				total += v.Resident
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(views)
			}
			if len(views) == 0 {
				a.noteLine("no machine waits; %s", poolHint(size))
				return nil
			}
			w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tTEMPLATE\tIMAGE\tCPUS\tMEMORY\tTAKES\tDISK\tWAITS SINCE")
			for _, v := range views {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", v.ID, v.Template, v.ImageID, v.CPUs,
					units.BytesSize(float64(v.Memory)), units.BytesSize(float64(v.Resident)), units.BytesSize(float64(v.Disk)), ago(v.Since))
			}
			if err := w.Flush(); err != nil {
				return err
			}
			a.noteLine("%d of %d; together they take %s of the host's memory", len(views), size, units.BytesSize(float64(total)))
			return nil
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func poolHint(size int) string {
	if size == 0 {
		return "pool: 2 in your config.yaml keeps two"
	}
	return "agentvm up fills the pool, and so does agentvm pool fill"
}

func (a *app) poolFillCommand() *cobra.Command {
	var f upFlags
	var after time.Duration
	cmd := &cobra.Command{
		Use: "fill", Short: "Fill the pool with machines of the project's environment, and end those of others", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := f.project(a)
			if err != nil {
				return err
			}
			m, err := a.manager()
			if err != nil {
				return err
			}
			size, err := m.Pool()
			if err != nil {
				return err
			}
			if size == 0 {
				a.noteLine("the pool is to hold no machines; %s", poolHint(0))
			}
			report, done := a.newReport()
			made, err := m.FillPool(cmd.Context(), p, f.opt, after, report)
			done()
			if err != nil {
				return err
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(map[string]int{"made": made, "pool": size})
			}
			a.noteLine("%d made; %d wait to be claimed", made, size)
			return nil
		},
	}
	f.registerEnvironment(cmd)
	cmd.Flags().DurationVar(&after, "after", 0, "wait this long first")
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

func (a *app) poolDrainCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "drain", Short: "End the machines that wait", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := a.manager()
			if err != nil {
				return err
			}
			ended, err := m.DrainPool(cmd.Context(), func() { a.noteLine("another command fills the pool; waiting for it") })
			if err != nil {
				return err
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(map[string]int{"ended": ended})
			}
			a.noteLine("%d ended", ended)
			return nil
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// proportionalMemory is the memory that a process takes, in bytes, what it
// shares with others being divided among them; 0 where that cannot be read
// (Pss in proc_pid_smaps(5)).
func proportionalMemory(pid int) (n int64) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "Pss:"); ok {
			_, _ = fmt.Sscan(value, &n)
			return n << 10
		}
	}
	return 0
}
