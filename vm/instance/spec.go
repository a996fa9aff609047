package instance

import (
	"time"

	"github.com/agentvm/agentvm/vm"
)

// Format is the version of the files that this program writes. A higher one
// on disk was written by a newer program and is left alone.
const Format = 1

// Files of an instance directory that its maker and its supervisor share.
const (
	ClientKeyFile = "client_key" // SSH key that opens the guest
	HostKeyFile   = "host_key"   // the guest's SSH host key
	CallFile      = "call.json"  // makes a guest that goes on from Machine.Saved this machine (a line.Call)
	SavedDir      = "saved"      // what a template's machine, or a suspended one, is saved in
	SnapshotsDir  = "snapshots"  // a directory for each
	WorkspaceDir  = "workspace"  // a snapshot's copy of the workspace
)

// SpareFiles go with a machine of the pool to the instance that it becomes,
// beside its console and its disks.
var SpareFiles = []string{ClientKeyFile, HostKeyFile, "qemu.log", "supervisor.log"}

// Spec is everything that a supervisor needs to run one instance. It is
// decided once, by whoever creates or changes the instance, and only read by
// the supervisor.
type Spec struct {
	Format    int       `json:"format"`
	Name      string    `json:"name"`
	ID        string    `json:"id"` // random UUID, also the SMBIOS UUID
	Created   time.Time `json:"created"`
	Workspace string    `json:"workspace"` // host directory
	// View marks a fork that only looks at another machine's workspace.
	View    bool   `json:"view,omitempty"`
	Config  string `json:"config"`  // agentvm.yaml that it was made from; empty: defaults
	Image   string `json:"image"`   // catalogue name or file
	ImageID string `json:"imageId"` // content address in the image cache; empty for a file
	Agent   string `json:"agent"`
	// AgentChosen is the agent that was asked for on the command line, which
	// outlasts what the configuration says; empty: none was.
	AgentChosen string `json:"agentChosen,omitempty"`
	Disk        int64  `json:"disk"` // bytes of the root disk as the guest sees it

	// BootTimeout bounds the time from QEMU's start to a usable guest.
	BootTimeout time.Duration `json:"bootTimeout"`

	// RestoreTimeout bounds the time from the start of a restore to a usable
	// guest. It is short, because booting is always left.
	RestoreTimeout time.Duration `json:"restoreTimeout,omitempty"`

	// Template marks a machine that is booted only to be saved, in SavedDir
	// of its directory, for others to go on from.
	Template bool `json:"template,omitempty"`

	// Spare is the key of the environment that a machine waits in reserve for,
	// paused and nobody's, until somebody claims it; empty: it is somebody's.
	Spare string `json:"spare,omitempty"`

	// Hardware names all that the guest can observe of what it was started on;
	// a saved state fits nothing else.
	Hardware string `json:"hardware,omitempty"`

	// GPU is what the configuration asked for of the host's devices, as JSON;
	// the machine has what was found.
	GPU string `json:"gpu,omitempty"`

	// Backend is who runs the machine: config.BackendLibvirt, at URI, or agentvm
	// itself.
	Backend string `json:"backend,omitempty"`
	URI     string `json:"uri,omitempty"`

	Machine vm.Machine `json:"machine"`
	Shares  []Share    `json:"shares"`
	Network Network    `json:"network"`
	Guest   Guest      `json:"guest"`
}

// Share is one host directory in the guest. Shares[0] is the workspace.
type Share struct {
	Tag      string   `json:"tag"`
	Source   string   `json:"source"`
	Target   string   `json:"target"`
	ReadOnly bool     `json:"readOnly,omitempty"`
	Protect  []string `json:"protect,omitempty"`
	Hide     []string `json:"hide,omitempty"`
	Owner    vm.Owner `json:"owner"` // of Source on the host
}

// Network is the egress policy.
type Network struct {
	Allow    []string  `json:"allow,omitempty"`
	Services []Service `json:"services,omitempty"`
}

// Service is one host port that the guest may reach under a name.
type Service struct {
	Name   string `json:"name"`
	Port   int    `json:"port"`
	Target string `json:"target"`
}

// Guest is what happens inside before the instance counts as ready, and how
// commands run.
type Guest struct {
	User      string            `json:"user"`
	Home      string            `json:"home"`
	Directory string            `json:"directory"` // where commands start
	Env       map[string]string `json:"env,omitempty"`
	Copies    []Copy            `json:"copies,omitempty"`
	Run       []string          `json:"run,omitempty"` // shell commands, once per instance
}

// Copy is one host file or directory to put into the guest after boot: over
// the connection, never in the seed, because it may hold a secret.
type Copy struct {
	Source string `json:"source"`
	Target string `json:"target"`
}
