package supervisor

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"strings"
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

// errPlug is a device that could not be plugged in.
var errPlug = errors.New("plug in a device of the host")

// takeDevices takes from the host what the machine is to have to itself.
func (s *Supervisor) takeDevices(ctx context.Context) (err error) {
	if !s.spec.Machine.HasDevices() {
		return nil
	}
	defer s.trace("devices", time.Now())
	if s.devices, err = s.parts.Devices(ctx, s.spec); err != nil {
		return fmt.Errorf("take devices of the host: %w", err)
	}
	return nil
}

// plugDevices gives a machine that goes on from a template what it has in its slots.
func (s *Supervisor) plugDevices(ctx context.Context) error {
	if !s.spec.Machine.HasDevices() {
		return nil
	}
	defer s.trace("plug", time.Now())
	for i, slot := range s.spec.Machine.Slots {
		if err := s.machine.PlugDevice(ctx, i, slot); err != nil {
			return fmt.Errorf("%w: %w", errPlug, err)
		}
	}
	return nil
}

//go:embed meet.py
var meetProgram string

// meetDevices waits until the guest has met what was plugged in, and returns what
// it did not meet.
func (s *Supervisor) meetDevices(ctx context.Context, l Line) (warnings []string, err error) {
	if !s.spec.Machine.HasDevices() {
		return nil, nil
	}
	defer s.trace("meet", time.Now())
	told := [][2]any{}
	var titles []string
	for _, slot := range s.spec.Machine.Slots {
		for _, f := range slot.Functions {
			if f.ID == "" {
				continue // a mediated device's is its driver's to choose
			}
			sizes := []int64{}
			for _, r := range f.Regions {
				if r.Bits64 && r.Prefetchable { // what slots make room for
					sizes = append(sizes, r.Size)
				}
			}
			told, titles = append(told, [2]any{f.ID, sizes}), append(titles, f.Title())
		}
	}
	program, err := telling(told, meetProgram)
	if err != nil {
		return nil, err
	}
	err = l.Run(ctx, program, func(text string) {
		number, found := strings.CutPrefix(text, "missing ")
		if n, err := strconv.Atoi(number); found && err == nil && n >= 0 && n < len(titles) && titles[n] != "" {
			warnings = append(warnings, fmt.Sprintf("the guest has no room for %s, which was plugged in, or does not see it; agentvm up --recreate --cold boots with it", titles[n]))
			titles[n] = "" // said
		}
	})
	return warnings, err
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
