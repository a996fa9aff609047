package qmp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"github.com/digitalocean/go-qemu/qmp/raw"
)

// Events that tell how a machine is doing.
const (
	EventShutdown      = "SHUTDOWN"
	EventPowerdown     = "POWERDOWN"
	EventReset         = "RESET"
	EventGuestPanicked = "GUEST_PANICKED"
	EventStop          = "STOP"
	EventResume        = "RESUME"
	EventDeviceDeleted = "DEVICE_DELETED"
	EventUnplugError   = "DEVICE_UNPLUG_GUEST_ERROR"
)

// LifecycleEvents are the ones a supervisor wants never to miss.
var LifecycleEvents = []string{EventShutdown, EventPowerdown, EventReset, EventGuestPanicked, EventStop, EventResume}

// RunState is what a machine is doing.
type RunState struct {
	Running bool   `json:"running"`
	State   string `json:"status"` // QEMU's word: running, paused, prelaunch, guest-panicked, ...
}

// Status asks what the machine is doing. (go-qemu's raw.QueryStatus fails on
// states newer than itself.)
func Status(ctx context.Context, mon qmp.Monitor) (RunState, error) {
	var s RunState
	err := Execute(ctx, mon, "query-status", nil, &s)
	return s, err
}

// QueryVersion asks for QEMU's version.
func QueryVersion(ctx context.Context, mon qmp.Monitor) (qmp.Version, error) {
	var v qmp.Version
	err := Execute(ctx, mon, "query-version", nil, &v)
	return v, err
}

// Powerdown presses the power button. The guest decides what follows.
func Powerdown(ctx context.Context, mon qmp.Monitor) error {
	return raw.NewMonitor(WithContext(ctx, mon)).SystemPowerdown()
}

// pressInterval is how often PowerdownUntil presses the power button: a guest that
// has not got far in its boot misses the first press.
const pressInterval = 3 * time.Second

// PowerdownUntil presses the guest's power button until gone is closed, which its
// caller does when the machine has ended, or ctx ends. It reports whether the
// guest shut down by itself.
func PowerdownUntil(ctx context.Context, mon qmp.Monitor, gone <-chan struct{}) bool {
	tick := time.NewTicker(pressInterval)
	defer tick.Stop()
	for {
		press, cancel := context.WithTimeout(ctx, pressInterval)
		_ = Powerdown(press, mon)
		cancel()
		select {
		case <-gone:
			return true
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// Reset presses the reset button.
func Reset(ctx context.Context, mon qmp.Monitor) error {
	return raw.NewMonitor(WithContext(ctx, mon)).SystemReset()
}

// Stop pauses the virtual CPUs.
func Stop(ctx context.Context, mon qmp.Monitor) error {
	return raw.NewMonitor(WithContext(ctx, mon)).Stop()
}

// Cont lets the virtual CPUs run.
func Cont(ctx context.Context, mon qmp.Monitor) error {
	return raw.NewMonitor(WithContext(ctx, mon)).Cont()
}

// Quit ends QEMU at once. QEMU may be gone before its reply is.
func Quit(ctx context.Context, mon qmp.Monitor) error {
	err := raw.NewMonitor(WithContext(ctx, mon)).Quit()
	if errors.Is(err, ErrClosed) {
		return nil
	}
	return err
}

// ChardevAddSocket adds a character device that is a client of a unix socket,
// for a vhost-user device to use.
func ChardevAddSocket(ctx context.Context, mon qmp.Monitor, id, path string) error {
	server := false
	_, err := raw.NewMonitor(WithContext(ctx, mon)).ChardevAdd(id, raw.ChardevBackendSocket{
		Addr:   raw.SocketAddressLegacyUnix{Path: path},
		Server: &server,
	})
	return err
}

// ChardevRemove removes a character device that nothing uses any more.
func ChardevRemove(ctx context.Context, mon qmp.Monitor, id string) error {
	return raw.NewMonitor(WithContext(ctx, mon)).ChardevRemove(id)
}

// DeviceAdd plugs a device in. Property values keep their JSON type.
func DeviceAdd(ctx context.Context, mon qmp.Monitor, driver, id string, properties map[string]any) error {
	args := maps.Clone(properties)
	if args == nil {
		args = make(map[string]any)
	}
	args["driver"], args["id"] = driver, id
	return Execute(ctx, mon, "device_add", args, nil)
}

// DeviceDel asks the guest to let go of a device and waits until it has. A
// guest may take as long as it likes: give ctx a deadline.
func DeviceDel(ctx context.Context, mon qmp.Monitor, id string) error {
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := mon.Events(wait)
	if err != nil {
		return fmt.Errorf("unplug %s: %w", id, err)
	}
	if err := raw.NewMonitor(WithContext(ctx, mon)).DeviceDel(id); err != nil {
		return fmt.Errorf("unplug %s: %w", id, err)
	}
	for {
		ev, err := next(ctx, events, EventDeviceDeleted, EventUnplugError)
		if err != nil {
			return fmt.Errorf("unplug %s: the guest has not released it: %w", id, err)
		}
		if ev.Data["device"] != id {
			continue
		}
		if ev.Event == EventUnplugError {
			return fmt.Errorf("unplug %s: the guest refused", id)
		}
		return nil
	}
}

// WaitEvent waits for the first of the named events.
func WaitEvent(ctx context.Context, mon qmp.Monitor, names ...string) (qmp.Event, error) {
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	events, err := mon.Events(wait)
	if err != nil {
		return qmp.Event{}, err
	}
	return next(ctx, events, names...)
}

func next(ctx context.Context, events <-chan qmp.Event, names ...string) (qmp.Event, error) {
	for {
		select {
		case ev, ok := <-events:
			switch {
			case !ok && ctx.Err() != nil:
				return ev, context.Cause(ctx)
			case !ok:
				return ev, fmt.Errorf("waiting for %v: %w", names, ErrClosed)
			case slices.Contains(names, ev.Event):
				return ev, nil
			}
		case <-ctx.Done():
			return qmp.Event{}, context.Cause(ctx)
		}
	}
}

// Shutdown is why a machine ended, from a SHUTDOWN event.
type Shutdown struct {
	Guest  bool   // the guest did it
	Reason string // guest-shutdown, guest-panic, host-qmp-quit, host-signal, ...
}

// ShutdownOf reads a SHUTDOWN event.
func ShutdownOf(ev qmp.Event) (s Shutdown, ok bool) {
	if ev.Event != EventShutdown {
		return s, false
	}
	s.Guest, _ = ev.Data["guest"].(bool)
	s.Reason, _ = ev.Data["reason"].(string)
	return s, true
}
