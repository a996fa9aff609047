package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Build and manage guest images", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(a.imageLsCommand(), a.imageBuildCommand(), a.imageInspectCommand(), a.imageRmCommand())
	return cmd
}

// imageCache opens the cache of images.
func (a *app) imageCache() (*images.Cache, *lifecycle.Manager, error) {
	m, err := a.manager()
	if err != nil {
		return nil, nil, err
	}
	cache, err := m.Images()
	return cache, m, err
}

// poolUser stands for machines that have no name yet.
const poolUser = "the pool"

// usedBy maps the ids of images to the machines whose disks, or those of
// whose snapshots, lie on them.
func usedBy(m *lifecycle.Manager) (map[string][]string, error) {
	list, err := m.Store.List()
	if err != nil {
		return nil, err
	}
	users := map[string][]string{}
	spares, err := m.Spares()
	if err != nil {
		return nil, err
	}
	for _, s := range spares {
		if !slices.Contains(users[s.Spec.ImageID], poolUser) {
			users[s.Spec.ImageID] = append(users[s.Spec.ImageID], poolUser)
		}
	}
	for _, i := range list {
		if spec, err := i.Spec(); err == nil && spec.ImageID != "" {
			users[spec.ImageID] = append(users[spec.ImageID], i.Name)
		}
		snapshots, err := m.Snapshots(i)
		if err != nil {
			return nil, err
		}
		for _, s := range snapshots {
			if id := s.Spec.ImageID; id != "" && !slices.Contains(users[id], i.Name) {
				users[id] = append(users[id], i.Name)
			}
		}
	}
	return users, nil
}

func (a *app) imageLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the images that are built, and those that can be", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			cache, m, err := a.imageCache()
			if err != nil {
				return err
			}
			list, err := cache.List()
			if err != nil && !errors.Is(err, images.ErrCorrupt) {
				return err
			}
			users, err := usedBy(m)
			if err != nil {
				return err
			}
			type row struct {
				ID      string    `json:"id"`
				Name    string    `json:"name"`
				Base    string    `json:"base,omitempty"`
				Content string    `json:"content"`
				Created time.Time `json:"created,omitzero"`
				Disk    int64     `json:"disk"`
				UsedBy  []string  `json:"usedBy,omitempty"`
				Damaged bool      `json:"damaged,omitempty"`
			}
			rows := []row{}
			built := map[string]bool{}
			for _, img := range list {
				n, _ := img.DiskUsage()
				man := img.Manifest
				rows = append(rows, row{ID: img.ID, Name: man.Name, Base: man.Base, Content: contentOf(img), Created: man.Created, Disk: n, UsedBy: users[img.ID], Damaged: man.ID == ""})
				built[man.Name] = true
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(rows)
			}
			w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "ID\tNAME\tCONTENT\tBUILT\tDISK\tUSED BY")
			for _, r := range rows {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.ID, r.Name, r.Content, ago(r.Created), units.BytesSize(float64(r.Disk)), strings.Join(r.UsedBy, " "))
			}
			for _, e := range images.Catalogue() {
				if !built[e.Name] {
					fmt.Fprintf(w, "-\t%s\t%s\tnot built\t\t\n", e.Name, e.Title)
				}
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// contentOf says in a few words what is in an image.
func contentOf(img *images.Image) string {
	m := img.Manifest
	if m.ID == "" {
		return "damaged; agentvm image rm deletes it"
	}
	if !img.IsLayer() {
		return fmt.Sprintf("base, %d packages", len(m.Packages))
	}
	var parts []string
	if m.Spec.Driver != "" {
		parts = append(parts, "driver "+m.Spec.Driver)
	}
	parts = append(parts, m.Spec.Packages...)
	for _, p := range m.NPM {
		parts = append(parts, p.Name+"@"+p.Version)
	}
	return "+ " + strings.Join(parts, " ")
}

func (a *app) imageBuildCommand() *cobra.Command {
	var agentName string
	var spec images.Spec
	cmd := &cobra.Command{
		Use: "build [NAME]", Short: "Build an image: by name, or the one that the project needs",
		Long: `Build an image. With a name of the catalogue, that base image; otherwise what the
project in the current directory needs, so that up finds it ready. An image that
is there already is not built again.`,
		Example: `  agentvm image build debian-13
  agentvm image build debian-13 --package ripgrep --agent pi`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, e := range images.Catalogue() {
				names = append(names, e.Name)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cache, m, err := a.imageCache()
			if err != nil {
				return err
			}
			p := lifecycle.Project{}
			if len(args) > 0 {
				p.Config.Image = args[0]
			} else if p, err = a.project(); err != nil {
				return err
			}
			if agentName == "" {
				agentName = "shell"
				if len(args) == 0 {
					agentName = p.Config.Agent.Use
				}
			}
			profile, err := m.Agents.Get(agentName)
			if err != nil {
				return err
			}
			want := lifecycle.ImageSpec(p, m.Home, profile)
			want.Packages = append(want.Packages, spec.Packages...)
			want.Driver = cmp.Or(spec.Driver, want.Driver)
			want.Accept = append(want.Accept, spec.Accept...)
			begun := time.Now()
			report, done := a.newReport()
			img, err := cache.Ensure(cmd.Context(), want, report)
			done()
			if err != nil {
				return err
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(map[string]any{"id": img.ID, "dir": img.Dir, "seconds": time.Since(begun).Seconds()})
			}
			a.noteLine("image %s (%s) is ready after %s", img.ID, contentOf(img), time.Since(begun).Round(100*time.Millisecond))
			return nil
		},
	}
	cmd.Flags().StringVar(&agentName, "agent", "", "bake in this agent")
	cmd.Flags().StringSliceVar(&spec.Packages, "package", nil, "bake in this package of the distribution")
	cmd.Flags().StringVar(&spec.Driver, "driver", "", "bake in this driver for cards: nvidia, amd or intel")
	cmd.Flags().StringSliceVar(&spec.Accept, "accept", nil, "agree to the licence of this driver, which you have read")
	cmd.Flags().BoolVar(&a.json, "json", false, "print events and the result as JSON")
	return cmd
}

func (a *app) imageInspectCommand() *cobra.Command {
	var verify bool
	cmd := &cobra.Command{
		Use: "inspect ID|NAME", Short: "Show an image's manifest: packages, digests, recipe", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			cache, _, err := a.imageCache()
			if err != nil {
				return err
			}
			img, err := cache.Get(args[0])
			if err != nil {
				return err
			}
			if verify {
				if err := img.Verify(cmd.Context()); err != nil {
					return vm.WithHint(err, "agentvm image rm "+img.ID+" deletes it; the next up builds it again")
				}
				a.noteLine("every file of %s has the digest that its manifest says", img.ID)
			}
			out := json.NewEncoder(a.stdout)
			out.SetIndent("", "  ")
			return out.Encode(img.Manifest)
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "read every file and compare its digest")
	return cmd
}

func (a *app) imageRmCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "rm ID|NAME...", Short: "Delete images", Args: usageArgs(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, args []string) error {
			cache, m, err := a.imageCache()
			if err != nil {
				return err
			}
			users, err := usedBy(m)
			if err != nil {
				return err
			}
			var inUse []string
			for id := range users {
				inUse = append(inUse, id)
			}
			ids, err := a.imagesToRemove(cache, args, all, users)
			if err != nil {
				return err
			}
			for _, id := range ids {
				if err := cache.Remove(cmd.Context(), id, inUse); err != nil {
					if names := users[id]; len(names) > 0 {
						hint := "agentvm down " + names[0] + " deletes the machine first"
						if names[0] == poolUser {
							hint = "agentvm pool drain ends the machines that wait"
						}
						err = vm.WithHint(err, hint)
					}
					return err
				}
				a.noteLine("image %s is deleted", id)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "delete every image that no machine uses")
	return cmd
}

// imagesToRemove finds the ids; layers come before what they are built on.
func (a *app) imagesToRemove(cache *images.Cache, args []string, all bool, users map[string][]string) ([]string, error) {
	if all == (len(args) > 0) {
		return nil, vm.Classify(vm.ErrUsage, errors.New("name the images, or use --all"))
	}
	list, err := cache.List()
	if err != nil && !errors.Is(err, images.ErrCorrupt) {
		return nil, err
	}
	var layers, bases []string
	if all {
		kept := map[string]bool{}
		for _, img := range list {
			if len(users[img.ID]) > 0 {
				kept[img.ID], kept[img.Manifest.Base] = true, true
			}
		}
		for _, img := range list {
			switch {
			case kept[img.ID]:
			case img.IsLayer():
				layers = append(layers, img.ID)
			default:
				bases = append(bases, img.ID)
			}
		}
		return append(layers, bases...), nil
	}
	for _, arg := range args {
		img, err := cache.Get(arg)
		if err == nil {
			bases = append(bases, img.ID)
			continue
		}
		found := false
		for _, d := range list { // a damaged one cannot be got, but deleted
			if strings.HasPrefix(d.ID, arg) && errors.Is(err, images.ErrCorrupt) {
				bases, found = append(bases, d.ID), true
			}
		}
		if !found {
			return nil, err
		}
	}
	return bases, nil
}

// allocated is what a file takes on disk, which for a sparse one is less than its size.
func allocated(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}
