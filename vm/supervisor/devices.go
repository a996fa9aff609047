package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
)

// Waits for giving devices back. What ended a moment ago may still have them
// open; drivers of large cards take seconds to let go.
const (
	releasePatience = 20 * time.Second
	releaseInterval = 500 * time.Millisecond
	giveBackTimeout = 2 * time.Minute
)

// errDevices refuses what a machine with devices of the host cannot do.
var errDevices = errors.New("it has a device of the host, whose state cannot be saved; agentvm snapshot create --disk-only saves its disk")

// takeDevices takes from the host what the machine is to have to itself.
func (s *Supervisor) takeDevices(ctx context.Context) (err error) {
	if len(s.spec.Machine.Slots) == 0 {
		return nil
	}
	defer s.trace("devices", time.Now())
	if s.devices, err = s.parts.Devices(ctx, s.spec); err != nil {
		return fmt.Errorf("take devices of the host: %w", err)
	}
	return nil
}

// giveBackDevices gives the host its devices back. The machine has ended. What
// cannot be given back is told of, and left to the next command: this process
// will not stand behind it any more then.
func (s *Supervisor) giveBackDevices() {
	if s.devices == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), giveBackTimeout)
	defer cancel()
	began := time.Now()
	for {
		err := s.devices.Release(ctx)
		if err == nil {
			s.log.Info("devices are back with the host", "took", time.Since(began))
			return
		}
		if time.Since(began) > releasePatience || ctx.Err() != nil {
			warning := plain(fmt.Sprintf("a device of the host is not back yet: %v; agentvm gpu recover tries again", err))
			s.log.Error(warning)
			s.change(func(st *instance.Status) { st.Warnings = append(st.Warnings, warning) })
			return
		}
		time.Sleep(releaseInterval)
	}
}
