package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
)

// view is an instance as the commands show it.
type view struct {
	Name      string            `json:"name"`
	State     instance.State    `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	Since     time.Time         `json:"since,omitzero"`
	Workspace string            `json:"workspace,omitempty"`
	Mount     string            `json:"mount,omitempty"`
	Agent     string            `json:"agent,omitempty"`
	Image     string            `json:"image,omitempty"`
	ImageID   string            `json:"imageId,omitempty"`
	CPUs      int               `json:"cpus,omitempty"`
	Memory    int64             `json:"memory,omitempty"`
	Accel     string            `json:"accel,omitempty"`
	Backend   string            `json:"backend,omitempty"`  // libvirt; empty: agentvm itself
	URI       string            `json:"uri,omitempty"`      // of that libvirt
	Domain    string            `json:"domain,omitempty"`   // what libvirt calls the machine
	Host      string            `json:"host,omitempty"`     // where it is, if not here
	Copy      string            `json:"copy,omitempty"`     // of the workspace, on that host
	Restored  bool              `json:"restored,omitempty"` // this run went on from a saved memory
	Devices   []deviceView      `json:"devices,omitempty"`
	Shares    []instance.Share  `json:"shares,omitempty"`
	Network   *instance.Network `json:"network,omitempty"`
	Warnings  []string          `json:"warnings,omitempty"`
	Phases    []instance.Phase  `json:"phases,omitempty"`
	Processes map[string]int    `json:"processes,omitempty"`
	Console   []string          `json:"console,omitempty"`
	Panic     *instance.Panic   `json:"panic,omitempty"` // the guest started over by itself
	Created   time.Time         `json:"created,omitzero"`
	Cards     []string          `json:"guestCards,omitempty"` // the guest's own word on them
	Disk      int64             `json:"disk,omitempty"`       // bytes that the instance takes on the host
}

// deviceView is a function of a device of the host that the machine has, or
// would have again where it runs no more.
type deviceView struct {
	Address  string `json:"address,omitempty"`
	Mediated string `json:"mediated,omitempty"` // UUID of a mediated device, which has no address
	Name     string `json:"name"`
}

func devicesOf(m vm.Machine) (list []deviceView) {
	for _, s := range m.Slots {
		for _, f := range s.Functions {
			list = append(list, deviceView{Address: f.Address, Mediated: f.Mediated, Name: f.Title()})
		}
	}
	return list
}

func viewOf(spec instance.Spec, s instance.Status) view {
	v := view{
		Name: spec.Name, State: s.State, Reason: s.Reason, Since: s.Since, Workspace: spec.Workspace, Mount: spec.Guest.Directory,
		Agent: spec.Agent, Image: spec.Image, ImageID: spec.ImageID, CPUs: spec.Machine.CPUs, Memory: spec.Machine.Memory,
		Accel: string(spec.Machine.Accel), Devices: devicesOf(spec.Machine), Shares: spec.Shares, Network: &spec.Network, Warnings: s.Warnings, Phases: s.Phases,
		Console: s.Console, Created: spec.Created, Restored: s.Restored, Panic: s.Panic,
	}
	if spec.Backend == config.BackendLibvirt {
		v.Backend, v.URI, v.Domain = spec.Backend, spec.URI, libvirt.DomainName(spec.Machine)
	}
	if s.State.Live() {
		v.Processes = map[string]int{"supervisor": s.Supervisor.PID}
		for name, p := range s.Children {
			v.Processes[name] = p.PID
		}
	}
	return v
}

// unreadable is the state of an instance whose files cannot be used; the
// reason says why.
const unreadable instance.State = "unreadable"

// look reads an instance, however damaged.
func look(i *instance.Instance) view {
	spec, err := i.Spec()
	if errors.Is(err, fs.ErrNotExist) {
		return view{Name: i.Name, State: "new", Reason: "not made yet, or its making was cut short; agentvm down " + i.Name + " removes it"}
	}
	if err != nil {
		return view{Name: i.Name, State: unreadable, Reason: err.Error()}
	}
	status, err := i.Status()
	if err != nil {
		status.State, status.Reason = unreadable, err.Error()
	}
	v := viewOf(spec, status)
	v.Name = i.Name
	entries, _ := os.ReadDir(i.Dir)
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			v.Disk += allocated(fi)
		}
	}
	return v
}

func (a *app) lsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list", "ps"}, Short: "List the machines", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			store, err := a.store()
			if err != nil {
				return err
			}
			list, err := store.List()
			if err != nil {
				return err
			}
			views := []view{}
			for _, i := range list {
				views = append(views, look(i))
			}
			if a.side == nil {
				others, err := a.everywhere(cmd.Context())
				if err != nil {
					return err
				}
				views = append(views, others...)
			}
			if a.json {
				return json.NewEncoder(a.stdout).Encode(views)
			}
			if len(views) == 0 {
				a.noteLine("there are no machines; agentvm up makes one")
				return nil
			}
			w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tSTATE\tSINCE\tAGENT\tDISK\tWORKSPACE")
			for _, v := range views {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", v.Name, v.State, ago(v.Since), v.Agent, units.BytesSize(float64(v.Disk)), oneLine(placeOf(v)))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// placeOf is a machine's workspace, and its host if that is another one.
func placeOf(v view) string {
	if v.Host == "" {
		return v.Workspace
	}
	return v.Workspace + " (machine on " + v.Host + ")"
}

func (a *app) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "status [NAME]", Short: "Show how a machine is, and why", Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.elsewhere(cmd, args, way{name: firstName})
			if err != nil {
				return err
			}
			if e != nil {
				return e.status(cmd, args)
			}
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			v := look(inst)
			v.Cards = a.guestCards(cmd.Context(), inst, v)
			if a.json {
				err = json.NewEncoder(a.stdout).Encode(v)
			} else {
				err = a.showStatus(v)
			}
			if err == nil && v.State == unreadable {
				err = vm.WithHint(fmt.Errorf("the files of %q cannot be used", inst.Name), "agentvm down "+inst.Name+" deletes it (the workspace is kept)")
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

func (a *app) showStatus(v view) error {
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
	row := func(key, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", key, fmt.Sprintf(format, args...)) }
	row("name", "%s", v.Name)
	row("state", "%s", strings.TrimSuffix(fmt.Sprintf("%s (%s)", v.State, ago(v.Since)), " ()"))
	if v.Reason != "" {
		row("reason", "%s", v.Reason)
	}
	for _, warning := range v.Warnings {
		row("warning", "%s", warning)
	}
	if v.Panic != nil {
		row("panic", "%s (%s); the guest started over by itself", v.Panic.Said, ago(v.Panic.At))
	}
	if v.Workspace != "" {
		row("agent", "%s", v.Agent)
		row("image", "%s (%s)", v.Image, v.ImageID)
		row("machine", "%d CPUs, %s memory, %s", v.CPUs, units.BytesSize(float64(v.Memory)), v.Accel)
		if v.Backend != "" {
			row("run by", "%s, %s at %s", v.Backend, v.Domain, v.URI)
		}
		if v.Host != "" {
			row("host", "%s, where %s is a copy of %s", v.Host, oneLine(v.Copy), oneLine(v.Workspace))
		}
		if v.Restored {
			row("started", "from a saved memory")
		}
		for _, d := range v.Devices {
			row("device", "%s %s", d.Address+d.Mediated, d.Name)
		}
		for _, s := range v.Shares {
			access := "read-write"
			if s.ReadOnly {
				access = "read-only"
			}
			row("share", "%s at %s, %s", oneLine(s.Source), oneLine(s.Target), access)
		}
		row("may reach", "%s", reach(v.Network))
	}
	for _, line := range v.Cards {
		row("guest's cards", "%s", line)
	}
	for _, name := range []string{"supervisor", "qemu"} {
		if pid, ok := v.Processes[name]; ok {
			row("process", "%s %d", name, pid)
		}
	}
	for _, line := range v.Console {
		row("console", "%s", line)
	}
	return w.Flush()
}

// reach lists what the guest may connect to.
func reach(n *instance.Network) string {
	list := append([]string{}, n.Allow...)
	for _, s := range n.Services {
		list = append(list, fmt.Sprintf("%s:%d (this host's %s)", s.Name, s.Port, s.Target))
	}
	if len(list) == 0 {
		return "nothing"
	}
	return strings.Join(list, ", ")
}

func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

// oneLine keeps a path from breaking a table.
func oneLine(s string) string {
	if strings.ContainsAny(s, "\n\t\r\x1b") {
		return fmt.Sprintf("%q", s)
	}
	return s
}
