package instance

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
)

// State is where an instance is in its life.
type State string

// The states. Every wait in one of the passing states (starting, booting,
// stopping) has a deadline and ends in one of the others, with a reason.
const (
	Starting State = "starting" // share, network and QEMU come up
	Booting  State = "booting"  // QEMU runs; the guest is not usable yet
	Spare    State = "spare"    // paused in the pool until somebody claims it
	Ready    State = "ready"    // the guest said so over SSH, for this boot
	Degraded State = "degraded" // usable, with something lost
	Saving   State = "saving"   // paused while it is written down
	Paused   State = "paused"   // until a command comes, since the connection of one was lost
	Stopping State = "stopping"
	Stopped  State = "stopped"
	// Suspended is stopped, with a memory to go on from.
	Suspended State = "suspended"
	Failed    State = "failed"
)

// next lists the states that may follow each state.
var next = map[State][]State{
	Starting:  {Booting, Stopping, Failed},
	Booting:   {Ready, Degraded, Spare, Stopping, Stopped, Failed},
	Spare:     {Booting, Stopping, Stopped, Failed},
	Ready:     {Booting, Degraded, Saving, Paused, Stopping, Stopped, Failed},
	Degraded:  {Booting, Ready, Degraded, Saving, Paused, Stopping, Stopped, Failed},
	Saving:    {Ready, Degraded, Stopping, Stopped, Suspended, Failed},
	Paused:    {Ready, Degraded, Stopping, Stopped, Failed},
	Stopping:  {Stopped, Failed},
	Stopped:   {Starting},
	Suspended: {Starting},
	Failed:    {Starting},
}

// Live reports whether a supervisor stands behind the state.
func (s State) Live() bool { return s != Stopped && s != Suspended && s != Failed && s != "" }

// Usable reports whether commands can run in the guest.
func (s State) Usable() bool { return s == Ready || s == Degraded }

// Status is what is known of an instance now. The supervisor writes it; the
// next command corrects it when the supervisor could not.
type Status struct {
	Format     int                  `json:"format"`
	State      State                `json:"state"`
	Reason     string               `json:"reason,omitempty"`
	Since      time.Time            `json:"since"`
	HostBoot   string               `json:"hostBoot"` // boot_id of the host
	Supervisor vm.ProcID            `json:"supervisor"`
	Children   map[string]vm.ProcID `json:"children,omitempty"`
	Warnings   []string             `json:"warnings,omitempty"`
	Phases     []Phase              `json:"phases,omitempty"`
	// Lost maps mount points of shares that are gone to why. Programs that
	// touch them hang in the guest.
	Lost map[string]string `json:"lost,omitempty"`
	// TimedOut is set when a failure was a wait that ended without an answer.
	TimedOut bool `json:"timedOut,omitempty"`
	// Console holds the guest's last console lines when a boot failed.
	Console []string `json:"console,omitempty"`
	// Panic is what the guest's kernel last failed of in this run. It started
	// over by itself.
	Panic *Panic `json:"panic,omitempty"`
	// Restored says that this run went on from a saved state; it did not boot.
	Restored bool `json:"restored,omitempty"`
	// Saved is set once a template's machine has been saved whole.
	Saved bool `json:"saved,omitempty"`
	// RestoreFailed is set when a failure was one to go on from a saved state,
	// so that booting instead may succeed.
	RestoreFailed bool `json:"restoreFailed,omitempty"`
	// RestoreCutShort is set when that was for want of time, or since the supervisor
	// was killed: the saved state may be sound.
	RestoreCutShort bool `json:"restoreCutShort,omitempty"`
	// Restoring is set from the beginning of a restore to its end.
	Restoring bool `json:"restoring,omitempty"`
	// PlugFailed is set when that was for a device of the host's, and no fault of
	// the saved state's.
	PlugFailed bool `json:"plugFailed,omitempty"`
	// Provisioned is set once the commands of provision.run have succeeded.
	Provisioned bool `json:"provisioned,omitempty"`
}

// Panic is the end of a guest's kernel.
type Panic struct {
	Said string    `json:"said"` // by the guest
	At   time.Time `json:"at"`
}

// Phase is one stretch of a start-up.
type Phase struct {
	Name  string        `json:"name"`
	Took  time.Duration `json:"took"` // nanoseconds
	Start time.Time     `json:"start"`
}

// To moves the status to another state. It returns an error when the state
// machine has no such step: that is a defect of the caller, not of the world.
func (s *Status) To(state State, reason string) error {
	if s.State != "" && !slices.Contains(next[s.State], state) {
		return fmt.Errorf("no step from state %s to %s", s.State, state)
	}
	s.State, s.Reason, s.Since = state, reason, time.Now()
	s.Restoring = s.Restoring && state.Live()
	return nil
}

// LostShare says why the share that a guest directory lies in is gone, or "".
func (s Status) LostShare(dir string) string {
	for target, why := range s.Lost {
		if dir == target || strings.HasPrefix(dir, target+"/") {
			return why
		}
	}
	return ""
}
