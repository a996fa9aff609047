package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/remote"
)

// record is what is kept here of a workspace whose machine is elsewhere.
type record struct {
	Format    int         `json:"format"`
	URI       string      `json:"uri"`
	Workspace string      `json:"workspace"` // absolute, without links
	Copy      remote.Copy `json:"copy"`
	Machine   string      `json:"machine,omitempty"` // its name there, once it is known
	Guarded   []string    `json:"guarded,omitempty"` // as guarded says, when the machine was last to run

	OnDisconnect string `json:"onDisconnect,omitempty"` // likewise
}

const recordFile = "record.json"

// elsewhere is a project whose machine is on another host.
type elsewhere struct {
	app     *app
	host    libvirt.Elsewhere
	record  record
	dir     string             // of the record
	project *lifecycle.Project // nil: found by the machine's name
	way     way                // of the command
}

// recordsDir holds a directory for each workspace whose machine is elsewhere.
func recordsDir(d instance.Dirs) string { return filepath.Join(d.State, "elsewhere") }

// elsewhereOf finds the record of a project's workspace, or makes one.
func (a *app) elsewhereOf(p lifecycle.Project, host libvirt.Elsewhere, makes bool) (*elsewhere, error) {
	dirs, err := a.dirs()
	if err != nil {
		return nil, err
	}
	ws, err := lifecycle.CheckDirectory(p.Workspace(), a.home(), false)
	if err != nil { // --allow-wide shares, it does not copy
		return nil, vm.WithHint(err, "a workspace that is copied to another host is a project's directory")
	}
	sum := sha256.Sum256([]byte(ws.Path))
	e := &elsewhere{app: a, host: host, project: &p, dir: filepath.Join(recordsDir(dirs), hex.EncodeToString(sum[:6]))}
	e.record, err = readRecord(e.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && makes:
		if err := e.possible(); err != nil {
			return nil, err
		}
		e.begin(ws.Path)
		return e, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("%s has no virtual machine on %s that was made from here", ws.Path, host.Address())), "agentvm up makes one")
	case err != nil:
		return nil, err
	case e.record.URI != host.Text:
		return nil, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("the workspace's machine is at %s, and agentvm.yaml names %s", e.record.URI, host.Text)),
			"with the former in agentvm.yaml, agentvm down deletes that machine first")
	}
	if makes {
		err = e.possible()
	}
	return e, err
}

// begin makes up the record of a workspace that has no copy yet. It is written
// when the host has answered.
func (e *elsewhere) begin(ws string) {
	id := make([]byte, 8)
	_, _ = rand.Read(id) // it does not fail
	e.record = record{Format: 1, URI: e.host.Text, Workspace: ws, Copy: remote.Copy{ID: hex.EncodeToString(id), Name: vm.NameFor(ws)}}
}

func (e *elsewhere) write() error {
	err := os.MkdirAll(e.dir, 0o700)
	var data []byte
	if err == nil {
		data, err = json.Marshal(e.record)
	}
	if err == nil {
		err = vm.WriteFile(filepath.Join(e.dir, recordFile), append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("make a record of the machine: %w", err)
	}
	return nil
}

func readRecord(dir string) (record, error) {
	var r record
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err == nil && r.Format != 1 {
		err = vm.Classify(vm.ErrHost, fmt.Errorf("format %d was written by another agentvm", r.Format))
	}
	if err != nil {
		return r, fmt.Errorf("read the record of a machine elsewhere: %s: %w", dir, err)
	}
	return r, nil
}

// allElsewhere lists the workspaces whose machines are elsewhere.
func (a *app) allElsewhere() ([]*elsewhere, error) {
	dirs, err := a.dirs()
	if err != nil {
		return nil, err
	}
	found, err := filepath.Glob(filepath.Join(recordsDir(dirs), "*", recordFile))
	if err != nil {
		return nil, err
	}
	var list []*elsewhere
	for _, path := range found {
		r, err := readRecord(filepath.Dir(path))
		var host libvirt.Elsewhere
		if err == nil {
			host, _, err = libvirt.ParseElsewhere(r.URI)
		}
		if err != nil { // of one, which is no reason to hide the others
			a.noteLine("%v", err)
			continue
		}
		list = append(list, &elsewhere{app: a, host: host, record: r, dir: filepath.Dir(path)})
	}
	return list, nil
}

// elsewhereNamed finds a machine elsewhere by its name; nil: there is none.
func (a *app) elsewhereNamed(name string) (*elsewhere, error) {
	list, err := a.allElsewhere()
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		if e.record.Machine == name {
			return e, nil
		}
	}
	return nil, nil
}

// possible refuses what of a configuration means this host.
func (e *elsewhere) possible() error {
	c := e.project.Config
	refuse := func(hint, format string, args ...any) error {
		return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf(format+", and the machine is on "+e.host.Address(), args...)), hint)
	}
	if len(c.Mounts) > 0 {
		return refuse("put it into the workspace", "mounts: %s is a directory of this host", c.Mounts[0].Source)
	}
	if images.IsPath(c.Image) {
		return refuse("use an image of the catalogue", "image: %s is a file of this host", c.Image)
	}
	for _, d := range c.GPU.Devices {
		if d.ROM != "" {
			return refuse("leave rom out", "gpu.devices[].rom: %s is a file of this host", d.ROM)
		}
	}
	for _, s := range c.Network.Services {
		if isLoopback(s.Target) {
			e.app.noteLine("%s is port %d of %s, and leads to %s as that host sees it", s.Name, s.Port, e.host.Address(), s.Target)
		}
	}
	return nil
}

// guarded are the paths in the workspace that no guest is to change.
func (e *elsewhere) guarded() []string {
	if e.project == nil {
		return e.record.Guarded
	}
	w := e.project.Config.Workspace
	return slices.Concat(w.Protect, w.Hide)
}

// config is the project's configuration for that host, with what of its user
// matters to the project.
func (e *elsewhere) config(ctx context.Context) ([]byte, error) {
	if e.project == nil {
		return nil, nil
	}
	c := e.project.Config
	if mine := cloudinit.HostProbe("").Facts(ctx).Git; mine.Name != "" && mine.Email != "" {
		c.Git.Name, c.Git.Email = cmp.Or(c.Git.Name, mine.Name), cmp.Or(c.Git.Email, mine.Email)
	}
	return configThere(c, e.host, e.record.Copy.Name)
}

// configThere turns a configuration into what it means there.
func configThere(c config.Config, host libvirt.Elsewhere, workspace string) ([]byte, error) {
	c.URI, c.OnDisconnect, c.Workspace.Path = host.Local, "", "./"+workspace
	data, err := config.Format(c)
	if err != nil {
		return nil, fmt.Errorf("describe the machine: %w", err)
	}
	return data, nil
}
