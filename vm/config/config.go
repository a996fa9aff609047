// Package config reads agentvm.yaml. It promises that nothing a project wrote
// is ignored: an unknown key, a wrong type or an impossible value is an error
// that names the file, the line, the column and what to write instead.
package config

import "github.com/agentvm/agentvm/vm"

// FileName is the file that describes a project's environment. It is
// checked into the project, so that a team shares one environment.
const FileName = "agentvm.yaml"

// Defaults of the configuration, in one place.
const (
	DefaultImage  = "debian-13"
	DefaultCPUs   = 2
	DefaultMemory = Size(2 << 30)
	DefaultDisk   = Size(20 << 30)
	DefaultMount  = "/workspace"
	DefaultAgent  = "shell"

	minMemory = Size(256 << 20)
	minDisk   = Size(2 << 30)
	maxCPUs   = 256
)

// Config is agentvm.yaml: what a project asks for. docs/configuration.md is
// its reference. A value is never ignored: an unknown key is an error.
type Config struct {
	Version   Count             `yaml:"version"`
	Name      string            `yaml:"name,omitempty"`
	Image     string            `yaml:"image,omitempty"`
	Firmware  vm.Firmware       `yaml:"firmware,omitempty"`
	Resources Resources         `yaml:"resources,omitempty"`
	Agent     Agent             `yaml:"agent,omitempty"`
	Workspace Workspace         `yaml:"workspace,omitempty"`
	Mounts    []Mount           `yaml:"mounts,omitempty"`
	Provision Provision         `yaml:"provision,omitempty"`
	Network   Network           `yaml:"network,omitempty"`
	GPU       GPU               `yaml:"gpu,omitempty"`
	Git       Git               `yaml:"git,omitempty"`
	Env       map[string]string `yaml:"env,omitempty"`
	Backend   string            `yaml:"backend,omitempty"` // BackendQEMU (default) or BackendLibvirt
	URI       string            `yaml:"uri,omitempty"`     // which libvirt; default: the user's own, root's the system's

	// OnDisconnect is what a machine on another host does when the connection of
	// a command is lost: Continue (default) or Pause.
	OnDisconnect string `yaml:"on_disconnect,omitempty"`
}

// Who runs the machine.
const (
	BackendQEMU    = "qemu"    // agentvm itself
	BackendLibvirt = "libvirt" // the host's libvirt
)

// What becomes of a machine whose connection is lost.
const (
	Continue = "continue"
	Pause    = "pause"
)

// Resources are what the machine takes of the host.
type Resources struct {
	CPUs   Count `yaml:"cpus,omitempty"`
	Memory Size  `yaml:"memory,omitempty"`
	Disk   Size  `yaml:"disk,omitempty"` // size of the root disk as the guest sees it
}

// Agent names the agent and what of the host it may have.
type Agent struct {
	Use    string   `yaml:"use,omitempty"`    // an agent profile
	Args   []string `yaml:"args,omitempty"`   // put before the arguments of `agentvm run`
	Env    []string `yaml:"env,omitempty"`    // host variables that it may get, beyond the profile's
	Config string   `yaml:"config,omitempty"` // copy (default), credentials (copies those too), none
}

// Workspace says which host directory is shared, and how.
type Workspace struct {
	Path     string   `yaml:"path,omitempty"`     // relative to the file's directory; default "."
	Mount    string   `yaml:"mount,omitempty"`    // where the guest sees it
	ReadOnly bool     `yaml:"readonly,omitempty"` // enforced on the host
	Protect  []string `yaml:"protect,omitempty"`  // paths inside that stay read-only
	Hide     []string `yaml:"hide,omitempty"`     // paths inside that the guest sees empty
}

// Mount is one more host directory to share.
type Mount struct {
	Source   string `yaml:"source"`
	Target   string `yaml:"target"`
	ReadOnly bool   `yaml:"readonly,omitempty"`
}

// Provision is what the project needs in its machine.
type Provision struct {
	Packages []string `yaml:"packages,omitempty"` // distribution packages, baked into an image layer
	NPM      []string `yaml:"npm,omitempty"`      // npm packages as name@version, baked likewise
	Run      []string `yaml:"run,omitempty"`      // shell commands, run once as the agent in the workspace
	Driver   string   `yaml:"driver,omitempty"`   // of a card, baked likewise; see images.Drivers
	Accept   []string `yaml:"accept,omitempty"`   // drivers whose licences the project's owner agrees to
}

// Network is the egress policy. Nothing else leaves.
type Network struct {
	Allow    []string  `yaml:"allow,omitempty"`
	Services []Service `yaml:"services,omitempty"`
}

// Service lets the guest reach one port of the host under a name.
type Service struct {
	Name   string `yaml:"name"`
	Port   Count  `yaml:"port"`
	Target string `yaml:"target"` // host:port, dialled by the host
}

// Git is the identity of commits made in the machine.
type Git struct {
	Name  string `yaml:"name,omitempty"`
	Email string `yaml:"email,omitempty"`
}

// withDefaults returns c with every default filled in.
func (c Config) withDefaults() Config {
	set := func(s *string, def string) {
		if *s == "" {
			*s = def
		}
	}
	set(&c.Backend, BackendQEMU)
	set(&c.Image, DefaultImage)
	set(&c.Agent.Use, DefaultAgent)
	set(&c.Agent.Config, "copy")
	set(&c.Workspace.Path, ".")
	set(&c.Workspace.Mount, DefaultMount)
	if c.Resources.CPUs == 0 {
		c.Resources.CPUs = DefaultCPUs
	}
	if c.Resources.Memory == 0 {
		c.Resources.Memory = DefaultMemory
	}
	if c.Resources.Disk == 0 {
		c.Resources.Disk = DefaultDisk
	}
	return c
}
