package qemu

import (
	"context"
	"fmt"

	goqemu "github.com/digitalocean/go-qemu/qmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
)

// How share i is called, whether it is there from the start or plugged in.
const (
	shareDriver    = "vhost-user-fs-pci"
	shareQueueSize = 1024
)

func shareIDs(i int) (chardev, device string) {
	return fmt.Sprintf("fs%d", i), fmt.Sprintf("share-fs%d", i)
}

func port(i int) string { return fmt.Sprintf("rp%d", i) }

// PlugShare plugs share i into its port. Its server must listen.
func PlugShare(ctx context.Context, mon goqemu.Monitor, i int, s vm.Share) error {
	chardev, device := shareIDs(i)
	if err := qmp.ChardevAddSocket(ctx, mon, chardev, s.Socket); err != nil {
		return fmt.Errorf("plug share %s: %w", s.Tag, err)
	}
	props := map[string]any{"chardev": chardev, "bus": port(i), "tag": s.Tag, "queue-size": shareQueueSize}
	if s.Queues != 0 {
		props["num-request-queues"] = s.Queues
	}
	if err := qmp.DeviceAdd(ctx, mon, shareDriver, device, props); err != nil {
		return fmt.Errorf("plug share %s: %w", s.Tag, err)
	}
	return nil
}

// UnplugShare takes share i out again and waits until the guest has let go.
// The guest must have unmounted it: a mounted one would hang its processes.
func UnplugShare(ctx context.Context, mon goqemu.Monitor, i int) error {
	chardev, device := shareIDs(i)
	if err := qmp.DeviceDel(ctx, mon, device); err != nil {
		return err
	}
	return qmp.ChardevRemove(ctx, mon, chardev)
}
