package lifecycle

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	vmnet "github.com/agentvm/agentvm/vm/network"
)

// The guest as every part of the program knows it.
const (
	GuestUser = "agent"
	GuestUID  = 1000
	GuestHome = "/home/agent"

	guestMAC    = "5a:94:ef:e4:0c:ee"
	mib         = 1 << 20
	bootKVM     = 2 * time.Minute
	bootTCG     = 6 * time.Minute
	restoreKVM  = 10 * time.Second
	restoreTCG  = time.Minute
	perGiB      = 5 * time.Second // zeroing, mapping and loading more memory takes longer
	workspaceFS = "workspace"     // virtiofs tag
	minPorts    = 4               // as few as machines with different shares have in common
)

// Inputs are everything that decides what an instance is.
type Inputs struct {
	Name, ID  string
	Created   time.Time
	Project   Project
	Workspace Directory
	View      bool        // whatever the project says, nothing that is shared can be written to
	Mounts    []Directory // as Project.Config.Mounts
	Profile   agent.Profile
	Image     *images.Image
	Host      Host
	Dir, Run  string // the instance's directories
}

// Resolve decides what to run. It reads nothing and changes nothing.
func Resolve(in Inputs) instance.Spec {
	c := in.Project.Config
	spec := instance.Spec{
		Name: in.Name, ID: in.ID, Created: in.Created,
		Workspace: in.Workspace.Path, View: in.View, Config: in.Project.ConfigPath,
		Image: c.Image, ImageID: in.Image.ID, Agent: in.Profile.Name,
		Disk:           int64(c.Resources.Disk),
		BootTimeout:    timeout(bootKVM, bootTCG, in.Host.Accel, int64(c.Resources.Memory)),
		RestoreTimeout: timeout(restoreKVM, restoreTCG, in.Host.Accel, int64(c.Resources.Memory)),
		Shares:         shares(in),
		Network:        network(in),
		Guest:          guest(in),
	}
	spec.Machine = vm.Machine{
		CPUs: int(c.Resources.CPUs), Memory: int64(c.Resources.Memory),
		Accel: in.Host.Accel,
		Boot:  boot(in),
		Disks: []vm.Disk{
			{ID: "root", Format: "qcow2", Serial: "root"},
			{ID: "seed", Format: "raw", Serial: "seed", ReadOnly: true},
		},
		NICs:  []vm.NIC{{MAC: guestMAC, MTU: vmnet.DefaultMTU}},
		Ports: max(minPorts, len(spec.Shares)),
	}
	if c.Backend == config.BackendLibvirt {
		spec.Backend, spec.URI = c.Backend, c.URI
	}
	for _, s := range spec.Shares {
		spec.Machine.Shares = append(spec.Machine.Shares, vm.Share{Tag: s.Tag})
	}
	return place(spec, in.Name, in.ID, in.Dir, in.Run, in.Host)
}

// place makes spec that of the instance with a name and an id, whose files lie
// in dir and whose sockets lie in run.
func place(spec instance.Spec, name, id, dir, run string, host Host) instance.Spec {
	socket := func(name string) string { return filepath.Join(run, "vm", name+".sock") }
	m := spec.Machine
	spec.Name, spec.ID = name, id
	m.Name, m.UUID, m.RunAs = name, id, host.runAs(id)
	m.Console, m.QMP, m.Line = filepath.Join(dir, ConsoleFile), socket("qmp"), socket("line")
	m.Disks, m.NICs, m.Shares = slices.Clone(m.Disks), slices.Clone(m.NICs), slices.Clone(m.Shares)
	m.Disks[0].Path, m.Disks[1].Path = filepath.Join(dir, OverlayFile), filepath.Join(dir, SeedFile)
	m.NICs[0].Socket = socket("net")
	for i, s := range m.Shares {
		m.Shares[i].Socket = socket(s.Tag)
	}
	spec.Machine = m
	return spec
}

// timeout is generous: its end is a failure, and a loaded host is no reason for one.
func timeout(kvm, tcg time.Duration, a vm.Accel, memory int64) time.Duration {
	t := kvm
	if a == vm.AccelTCG {
		t = tcg
	}
	return t + time.Duration(memory>>30)*perGiB
}

func boot(in Inputs) vm.Boot {
	if k := in.Image.Kernel(); k != "" {
		return vm.Boot{Kernel: k, Initrd: in.Image.Initrd(), Cmdline: in.Image.Manifest.Cmdline}
	}
	fw := in.Project.Config.Firmware
	if fw == "" {
		fw = vm.FirmwareBIOS
	}
	b := vm.Boot{Firmware: fw}
	if fw == vm.FirmwareUEFI {
		b.VarsFile = filepath.Join(in.Dir, VarsFile)
	}
	return b
}

func shares(in Inputs) []instance.Share {
	w := in.Project.Config.Workspace
	list := []instance.Share{{
		Tag: workspaceFS, Source: in.Workspace.Path, Target: guestPath(w.Mount),
		ReadOnly: w.ReadOnly || in.View, Protect: w.Protect, Hide: w.Hide, Owner: in.Workspace.Owner,
	}}
	for i, m := range in.Project.Config.Mounts {
		list = append(list, instance.Share{
			Tag: fmt.Sprintf("mount%d", i), Source: in.Mounts[i].Path, Target: guestPath(m.Target),
			ReadOnly: m.ReadOnly || in.View, Owner: in.Mounts[i].Owner,
		})
	}
	return list
}

// network opens what the project names and what its agent cannot do without.
func network(in Inputs) instance.Network {
	c := in.Project.Config.Network
	n := instance.Network{Allow: slices.Clone(c.Allow)}
	for _, name := range in.Profile.Allow {
		if !slices.Contains(n.Allow, name) {
			n.Allow = append(n.Allow, name)
		}
	}
	for _, s := range c.Services {
		n.Services = append(n.Services, instance.Service{Name: s.Name, Port: int(s.Port), Target: s.Target})
	}
	return n
}

func guest(in Inputs) instance.Guest {
	c := in.Project.Config
	g := instance.Guest{
		User: GuestUser, Home: GuestHome, Directory: guestPath(c.Workspace.Mount),
		Env: map[string]string{}, Run: c.Provision.Run,
	}
	for k, v := range in.Profile.SetEnv {
		g.Env[k] = v
	}
	for k, v := range c.Env {
		g.Env[k] = v
	}
	if c.Agent.Config != "none" {
		for _, p := range in.Host.AgentConfig {
			g.Copies = append(g.Copies, instance.Copy{Source: absolute("/", in.Host.Home, p), Target: guestPath(p)})
		}
	}
	return g
}

// guestPath expands ~ to the agent's home in the guest.
func guestPath(p string) string {
	if rest, ok := strings.CutPrefix(p, "~/"); ok {
		return path.Join(GuestHome, rest)
	}
	return strings.TrimSuffix(p, "/")
}

// distributionNode is the Node.js that comes with each image's distribution
// (https://packages.debian.org/nodejs).
var distributionNode = map[string]string{"debian-13": "20.19.2", "debian-12": "18.20.4"}

// ImageSpec says which image a project and its agent need.
func ImageSpec(p Project, home string, profile agent.Profile) images.Spec {
	c := p.Config
	if strings.ContainsRune(c.Image, '/') || strings.HasPrefix(c.Image, "~") {
		c.Image = absolute(p.Dir, home, c.Image)
	}
	spec := images.Spec{Image: c.Image, Packages: slices.Clone(c.Provision.Packages), Driver: c.Provision.Driver, Accept: c.Provision.Accept}
	spec.Packages = append(spec.Packages, profile.Install.Packages...)
	for _, pkg := range profile.Install.NPM {
		spec.NPM = append(spec.NPM, images.NPMPackage{Name: pkg.Name, Version: pkg.Version, Scripts: pkg.Scripts})
	}
	for _, pkg := range c.Provision.NPM {
		i := strings.LastIndexByte(pkg, '@')
		spec.NPM = append(spec.NPM, images.NPMPackage{Name: pkg[:i], Version: pkg[i+1:]})
	}
	spec.Node = profile.Install.NodeFor(distributionNode[c.Image])
	spec.Run = profile.Install.Run
	return spec
}
