package supervisor

import (
	"context"
	"errors"
	"io"
	"net"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/line"
)

// Parts starts the pieces of a machine. Wire gives the real ones; tests give
// pieces that die on command.
type Parts interface {
	// Network listens on socket for the guest's frames.
	Network(ctx context.Context, spec instance.Spec, socket, log string) (Network, error)
	// Share serves one directory on socket.
	Share(ctx context.Context, spec instance.Spec, s instance.Share, socket, log string) (Share, error)
	// Devices takes what the machine has in its slots from the host. All of it is
	// taken, or nothing.
	Devices(ctx context.Context, spec instance.Spec) (Devices, error)
	// Machine starts the machine's process, with its control channel open. One
	// with a saved state is paused, has it loaded, and lacks its shares. trace
	// is told of each part of the work.
	Machine(ctx context.Context, m vm.Machine, log string, trace Trace) (Machine, error)
	// Line opens the serial line into the guest.
	Line(ctx context.Context, m vm.Machine) (Line, error)
	// Guest logs in, trying again until ctx ends. A spare's connection is not
	// watched until it is told to be.
	Guest(ctx context.Context, inst *instance.Instance, spec instance.Spec, dial Dialer) (Guest, error)
}

// Trace records a stretch of work that began at a time and has ended now.
type Trace func(name string, began time.Time)

// Dialer connects to a TCP port of the guest.
type Dialer func(ctx context.Context, port int) (net.Conn, error)

// Network is the userland network of one machine.
type Network interface {
	Dial(ctx context.Context, port int) (net.Conn, error)
	// Apply puts the policy of spec in force, and goes on with another log.
	Apply(spec instance.Spec, log string) error
	Close() error
}

// ErrDisconnected is why a share has ended that the machine has let go of.
var ErrDisconnected = errors.New("the virtual machine disconnected")

// Share is one running virtiofs server.
type Share interface {
	Done() <-chan struct{}
	Err() error // why it ended; valid after Done
	Stop() error
	Process() vm.ProcID
	Warnings() []string // what was asked for and could not be had
}

// Devices are devices of the host that a machine has.
type Devices interface {
	// Release gives them back. It may be tried again after an error.
	Release(ctx context.Context) error
}

// Machine is one running virtual machine.
type Machine interface {
	Done() <-chan struct{}
	Err() error // why it ended; nil for a shutdown asked for by the guest or by us
	Powerdown(ctx context.Context) error
	Kill() error
	Process() vm.ProcID

	// Plug gives the machine, which runs or is paused, share i.
	Plug(ctx context.Context, i int, s vm.Share) error
	// PlugDevice gives the machine, which is paused, what is in its slot i.
	PlugDevice(ctx context.Context, i int, s vm.Slot) error
	// Unplug takes share i out, which the guest must not have mounted, and waits
	// until the guest has let go.
	Unplug(ctx context.Context, i int) error
	// Pause stops the machine where it is; Resume lets it run.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	// Save pauses the machine, which must have no shares, and writes it to dir.
	// ended says that this was its end: another one goes on from dir.
	Save(ctx context.Context, dir string) (ended bool, err error)
}

// Line runs programs as root in a guest that expects them; see package line.
type Line interface {
	Ready(ctx context.Context) error
	Run(ctx context.Context, program string, each func(text string)) error
	Call(ctx context.Context, c line.Call, each func(text string)) error
	Close() error
}

// Guest is the one open connection into the guest.
type Guest interface {
	Done() <-chan struct{}
	Err() error
	// Run runs a shell script and returns its exit code.
	Run(ctx context.Context, script string, out io.Writer) (int, error)
	// Watch says whether a guest that answers nothing is to be taken for gone;
	// one that is paused is not.
	Watch(on bool)
	// Copy puts a host file or directory into the guest.
	Copy(ctx context.Context, src, dst string) error
	// Serve proxies SSH clients of l onto the connection until the guest is gone or l is closed.
	Serve(l net.Listener) error
	Close() error
}
