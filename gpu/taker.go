package gpu

import (
	"context"

	"github.com/agentvm/agentvm/vm"
)

// Request asks for devices.
type Request struct {
	Devices []string // full addresses, each of which brings every function of its slot, or UUIDs of mediated devices
	Owner   Owner    // who stands behind it
	Force   bool     // against findings that can be overruled
	Plain   bool     // to vfio-pci, also where the kernel has a VFIO driver made for the device

	// User is who opens the devices, of whom only the uid counts: the nodes
	// below /dev/vfio become theirs. As root, that is the user that QEMU runs
	// as; 0 leaves the nodes root's.
	User vm.Owner
}

// Taker takes devices from the host's drivers and gives them back: a [Manager]
// where this process is root, else a client of the helper that root runs for
// it, whose requests are made for the user who asks. NewTaker in package helper
// returns the right one.
//
// How the supervisor of a machine uses one:
//
//  1. When it starts, before anything else: Recover, if [Manager.Stale] names
//     any of its devices. A supervisor that was killed left them behind.
//  2. Before QEMU: Bind, with the supervisor itself as Owner.Process and Keep
//     unset, and the user that QEMU will run as in User. All devices are taken,
//     or none and the error says why. QEMU, as that user, may now open
//     /dev/vfio/GROUP of each [Journal.Group] that Bind returned (and
//     /dev/vfio/vfio, which is everybody's); the supervisor opens nothing.
//  3. When QEMU was reaped, however it ended, also after a boot that failed:
//     Release with the same addresses and a context that a stop does not
//     cancel. While a process has a device open it is refused, and is to be
//     tried again. Giving back takes seconds for large cards.
//
// Should the supervisor be killed, nobody is behind its journals any more, and
// the next Recover of whoever, which `agentvm gpu recover` is too, gives the
// devices back. QEMU dies with its supervisor, so that they are free by then.
type Taker interface {
	// Bind gives devices, with all functions of their slots, to VFIO, and
	// returns their journals. Of mediated devices, which their driver keeps, only
	// the nodes change hands. It does all of it or nothing.
	Bind(ctx context.Context, r Request) ([]*Journal, error)

	// Release gives back the devices at these addresses, with the other
	// functions of their slots.
	Release(ctx context.Context, addresses ...string) ([]Outcome, error)

	// Recover gives back what nobody stands behind any more: what a killed
	// process had, or had begun to take or to give back. The rest it leaves.
	Recover(ctx context.Context) ([]Outcome, error)
}
