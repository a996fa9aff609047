package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/libvirt"
)

// way is what a command does about a machine on another host.
type way struct {
	refuse string                // why it cannot be done there; empty: it is done there
	here   bool                  // it runs here, and talks to the guest there
	makes  bool                  // it may make the machine, so an image may be needed
	uses   bool                  // it needs the machine to run: one whose connection is lost may pause it
	mends  bool                  // it is what a conflict is mended with, and not kept from running by one
	before bool                  // what changed in the workspace here has to be there first
	after  bool                  // what changed there is brought back
	name   func([]string) string // the name among the arguments; nil: only --name
}

// firstName is the name that a command takes as its argument.
func firstName(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// copyName is the name in one of the paths of cp.
func copyName(args []string) (name string) {
	for _, arg := range args {
		if _, n, guest := splitGuestPath(arg); guest {
			name = n
		}
	}
	return name
}

const noTemplates = "libvirt cannot go on from a template"

// ways are the commands that are about the project's machine, wherever it is.
// Every other command is about this host.
var ways = map[string]way{
	"up":      {makes: true, uses: true, before: true, after: true},
	"run":     {makes: true, uses: true, before: true, after: true},
	"exec":    {uses: true, before: true, after: true},
	"shell":   {uses: true, mends: true, before: true, after: true, name: firstName},
	"start":   {uses: true, before: true, after: true, name: firstName},
	"restart": {uses: true, before: true, after: true, name: firstName},
	"stop":    {after: true, name: firstName},
	"logs":    {name: firstName},

	"cp":         {here: true, uses: true, name: copyName},
	"forward":    {here: true, uses: true},
	"ssh-config": {here: true, name: firstName},
	"ssh-proxy":  {here: true, uses: true, name: firstName},

	"snapshot create":  {uses: true, before: true},
	"snapshot ls":      {},
	"snapshot rm":      {},
	"snapshot restore": {uses: true, before: true, after: true},

	"suspend": {uses: true, after: true, name: firstName},
	"resume":  {uses: true, before: true, after: true, name: firstName},

	"fork":           {refuse: "libvirt saves a machine's memory only to end it"},
	"template build": {refuse: noTemplates},
	"pool fill":      {refuse: noTemplates},
}

// lookElsewhere has every command of ways find out where its machine is.
func (a *app) lookElsewhere(root *cobra.Command) {
	for path, w := range ways {
		cmd, _, err := root.Find(strings.Fields(path))
		if err != nil || cmd.RunE == nil {
			panic("there is no command " + path)
		}
		here := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			e, err := a.elsewhere(cmd, args, w)
			switch {
			case err != nil:
				return err
			case e == nil:
				return here(cmd, args)
			case w.refuse != "":
				return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("agentvm %s does not work with a machine on another host: %s", path, w.refuse)),
					"the machine is on "+e.host.Address())
			}
			e.way = w
			if w.here {
				a.through = e
				return here(cmd, args)
			}
			return e.pass(cmd, w)
		}
	}
}

// elsewhere finds out whether the command is about a machine on another host;
// nil: it is about one of this host.
func (a *app) elsewhere(cmd *cobra.Command, args []string, w way) (*elsewhere, error) {
	if a.side != nil {
		return nil, nil
	}
	name := a.name
	if w.name != nil {
		name = cmp.Or(w.name(args), name)
	}
	if name != "" && !w.makes {
		store, err := a.store()
		if err != nil {
			return nil, err
		}
		if _, err := store.Get(name); err == nil {
			return nil, nil
		}
		if e, err := a.elsewhereNamed(name); e != nil || err != nil {
			return e, err
		}
	}
	var up upFlags
	if f := cmd.Flags().Lookup("config"); f != nil {
		up.config = f.Value.String()
	}
	p, err := up.project(a)
	if err != nil {
		if name != "" && !w.makes {
			return nil, nil // whoever looks for the name has the better words
		}
		return nil, err
	}
	host, there, err := elsewhereURI(a.getenv, p.Config)
	if err == nil && !there && p.Config.OnDisconnect != "" {
		err = errNotElsewhere
	}
	if err != nil || !there {
		return nil, err
	}
	return a.elsewhereOf(p, host, w.makes)
}

// elsewhereURI is the libvirt on another host that the configuration means.
func elsewhereURI(getenv func(string) string, c config.Config) (libvirt.Elsewhere, bool, error) {
	if c.Backend != config.BackendLibvirt {
		return libvirt.Elsewhere{}, false, nil
	}
	return libvirt.ParseElsewhere(cmp.Or(c.URI, libvirt.DefaultURI(getenv, 0)))
}

var errNotElsewhere = vm.WithHint(vm.Classify(vm.ErrUsage, errors.New("agentvm.yaml: on_disconnect is about a machine on another host, and this one is not")),
	"uri: qemu+ssh://USER@HOST/system")

// errHere is for commands that make no sense with a machine of this host.
var errHere = vm.WithHint(vm.Classify(vm.ErrUsage, errors.New("the project's machine is one of this host and has the workspace itself: there is no copy to keep in step")),
	"docs/libvirt.md says how machines run on other hosts")
