package qmp

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

// ignoreShared leaves memory that is a shared mapping out of a machine's
// state: whoever saves or restores the state handles the memory's file. Both
// sides must agree on it. (QEMU marks it experimental with the x; from 7.2 to
// 10.0 it has not changed.)
const ignoreShared = "x-ignore-shared"

// SaveState writes the state of a stopped machine's devices to a stream, at a
// URI such as unix:/path where somebody listens. Its memory must be shared.
func SaveState(ctx context.Context, mon qmp.Monitor, uri string) error {
	if err := setIgnoreShared(ctx, mon); err != nil {
		return err
	}
	if err := Execute(ctx, mon, "migrate", map[string]any{"uri": uri}, nil); err != nil {
		return err
	}
	return Migrated(ctx, mon)
}

// LoadState reads what SaveState wrote, into a machine that was started with
// -incoming defer and has its memory already. QEMU listens at the URI; send is
// called when it does.
func LoadState(ctx context.Context, mon qmp.Monitor, uri string, send func() error) error {
	if err := setIgnoreShared(ctx, mon); err != nil {
		return err
	}
	// The guest tells the network that it has moved, which nobody needs to hear.
	// Once is the least: with none, QEMU 7.2 dies when the guest reboots, of a
	// timer that it did not make (virtio_net_reset in hw/net/virtio-net.c).
	if err := Execute(ctx, mon, "migrate-set-parameters", map[string]any{"announce-rounds": 1}, nil); err != nil {
		return err
	}
	if err := Execute(ctx, mon, "migrate-incoming", map[string]any{"uri": uri}, nil); err != nil {
		return err
	}
	if err := send(); err != nil {
		return err
	}
	return Migrated(ctx, mon)
}

func setIgnoreShared(ctx context.Context, mon qmp.Monitor) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	return Execute(ctx, mon, "migrate-set-capabilities", map[string]any{"capabilities": []capability{{ignoreShared, true}}}, nil)
}

// migrationPoll is shorter than anybody would notice, and far longer than the
// question takes.
const migrationPoll = 2 * time.Millisecond

// Migrated waits for the end of the migration under way.
func Migrated(ctx context.Context, mon qmp.Monitor) error {
	tick := time.NewTicker(migrationPoll)
	defer tick.Stop()
	for {
		var m struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := Execute(ctx, mon, "query-migrate", nil, &m); err != nil {
			return err
		}
		switch m.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			if m.Error == "" {
				m.Error = "QEMU does not say why"
			}
			return fmt.Errorf("the machine's state: %s: %w", m.Status, errors.New(m.Error))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the machine's state: %w", context.Cause(ctx))
		}
	}
}
