package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm/template"
)

// templatesMax bounds the room that templates take, in bytes.
const templatesMax = 5 << 30

func (a *app) templateCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "template", Short: "Manage the saved machines that new ones start from", Args: usageArgs(cobra.NoArgs),
		Long: `Manage templates: machines that were booted once, saved, and belong to nobody. The
first up of an environment makes its template, and every new machine of the same
environment goes on from it. Machines that have started do not need it any more.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(a.templateLsCommand(), a.templateBuildCommand(), a.templateRmCommand(), a.templatePruneCommand())
	return cmd
}

// templateView is a template as the commands show it.
type templateView struct {
	ID      string    `json:"id"`
	Image   string    `json:"image"`
	ImageID string    `json:"imageId"`
	CPUs    int       `json:"cpus"`
	Memory  int64     `json:"memory"`
	Created time.Time `json:"created"`
	Used    time.Time `json:"used"`
	Disk    int64     `json:"disk"`
}

func viewTemplate(t *template.Template) templateView {
	return templateView{ID: t.ID, Image: t.Name, ImageID: t.Image, CPUs: t.CPUs, Memory: t.Memory, Created: t.Created, Used: t.Used, Disk: t.Disk()}
}

func (a *app) templateLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the templates, the last used first", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			m, err := a.manager()
			if err != nil {
				return err
			}
			list, err := m.Templates.List()
			if err != nil {
				return err
			}
			views := []templateView{}
			var total int64
			for _, t := range list {
				v := viewTemplate(t)
				views = append(views, v)
				total += v.Disk
			}
			faulty, err := m.Templates.Faulty()
			if err != nil {
				return err
			}
			for _, t := range faulty {
				a.noteLine("%s takes %s and is %s; agentvm template prune --all deletes it", t.ID, units.BytesSize(float64(t.Disk())), t.Fault)
				total += t.Disk()
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(views)
			}
			if len(views) == 0 {
				a.noteLine("there are no templates; agentvm up makes one")
				return nil
			}
			w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tIMAGE\tCPUS\tMEMORY\tMADE\tUSED\tDISK")
			for _, v := range views {
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\n", v.ID, v.ImageID, v.CPUs, units.BytesSize(float64(v.Memory)), ago(v.Created), ago(v.Used), units.BytesSize(float64(v.Disk)))
			}
			if err := w.Flush(); err != nil {
				return err
			}
			a.noteLine("%s of %s", units.BytesSize(float64(total)), units.BytesSize(templatesMax))
			return nil
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) templateBuildCommand() *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use: "build", Short: "Make the template of the project's environment, so that up finds it",
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
			report, done := a.newReport()
			t, err := m.BuildTemplate(cmd.Context(), p, f.opt, report)
			done()
			if err != nil {
				return err
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(viewTemplate(t))
			}
			a.noteLine("template %s is ready; it takes %s", t.ID, units.BytesSize(float64(t.Disk())))
			return nil
		},
	}
	f.registerEnvironment(cmd)
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

func (a *app) templateRmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm ID...", Short: "Delete templates; machines that started from them do not mind", Args: usageArgs(cobra.MinimumNArgs(1)),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var ids []string
			if m, err := a.manager(); err == nil {
				list, _ := m.Templates.List()
				for _, t := range list {
					ids = append(ids, t.ID)
				}
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			m, err := a.manager()
			if err != nil {
				return err
			}
			var list []*template.Template
			for _, id := range args { // all are there, or none is deleted
				t, err := m.Templates.Get(id)
				if err != nil {
					return err
				}
				list = append(list, t)
			}
			return a.removeTemplates(m.Templates, list)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) templatePruneCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "prune", Short: "Delete the least recently used templates beyond the bound, and what was left half made",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			m, err := a.manager()
			if err != nil {
				return err
			}
			if err := m.SweepTemplates(cmd.Context()); err != nil {
				return err
			}
			removed, err := m.Templates.Prune(nil)
			if err != nil {
				return err
			}
			for _, t := range removed {
				a.noteLine("deleted template %s", t.ID)
			}
			if !all {
				return nil
			}
			return a.removeAllTemplates(m.Templates)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "delete every template")
	return cmd
}

// removeAllTemplates deletes what it can; what is in use is for another time.
func (a *app) removeAllTemplates(store template.Store) error {
	list, err := store.List()
	faulty, faultyErr := store.Faulty()
	if err := errors.Join(err, faultyErr); err != nil {
		return err
	}
	for _, t := range append(list, faulty...) {
		switch err := store.Remove(t); {
		case err == nil:
			a.noteLine("deleted template %s", t.ID)
		case errors.Is(err, template.ErrInUse):
			a.noteLine("%v", err)
		case !errors.Is(err, fs.ErrNotExist): // else another command was quicker
			return err
		}
	}
	return nil
}

func (a *app) removeTemplates(store template.Store, list []*template.Template) error {
	views := []templateView{}
	for _, t := range list {
		views = append(views, viewTemplate(t))
		if err := store.Remove(t); err != nil {
			return err
		}
		if !a.json {
			a.noteLine("deleted template %s", t.ID)
		}
	}
	if a.json {
		return json.NewEncoder(a.stdout).Encode(views)
	}
	return nil
}
