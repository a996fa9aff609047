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

// PlugDevice plugs what is in slot i of the machine into its port. The guest is
// told of the whole with function 0, which comes last (QEMU, docs/pcie.txt).
// iommufd is the machine's.
func PlugDevice(ctx context.Context, mon goqemu.Monitor, i int, s vm.Slot, iommufd bool) error {
	for n := len(s.Functions) - 1; n >= 0; n-- {
		props := map[string]any{}
		pairs := function(i, n, s, iommufd)
		for p := 0; p+1 < len(pairs); p += 2 {
			if pairs[p+1] != nil {
				props[pairs[p].(string)] = pairs[p+1]
			}
		}
		id := props["id"].(string)
		delete(props, "id")
		if err := qmp.DeviceAdd(ctx, mon, functionDriver, id, props); err != nil {
			return fmt.Errorf("%s: %w", s.Functions[n].Title(), err)
		}
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
