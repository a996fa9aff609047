package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/saved"
)

// Devices are devices of the host that a machine can have.
type Devices struct {
	Slots   []vm.Slot
	IOMMUFD bool     // as vm.Machine's
	Near    *vm.Node // where memory and CPUs come from; nil: anywhere
	Notes   []string // what the user should know
}

// Waits that devices make longer.
const (
	bootPerMappedGiB = time.Second      // mapping a large card's memory takes a guest long
	bootPerDevice    = 2 * time.Minute  // its driver starts while a restored guest is waited for
	deviceSlack      = 90 * time.Second // until the host's driver has its card again
)

// devices finds the devices that a machine is to have. One that runs has its own.
func (m *Manager) devices(ctx context.Context, p Project, inst *instance.Instance, old instance.Spec, runAs *vm.Owner) (Devices, error) {
	want := p.Config.GPU
	if len(want.Devices) == 0 {
		return Devices{}, nil
	}
	if status, err := inst.Status(); err == nil && status.State.Live() {
		return Devices{Slots: old.Machine.Slots, IOMMUFD: old.Machine.IOMMUFD, Near: old.Machine.Near}, nil
	}
	want.Devices = slices.Clone(want.Devices)
	for i, d := range want.Devices {
		if d.ROM == "" {
			continue
		}
		want.Devices[i].ROM = absolute(p.Dir, m.Home, d.ROM)
		if fi, err := os.Stat(want.Devices[i].ROM); err != nil || !fi.Mode().IsRegular() {
			return Devices{}, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("gpu.devices[%d].rom: %s is no file that can be read", i, want.Devices[i].ROM)), "name a file with the card's option ROM, or leave rom out")
		}
	}
	return m.ChooseDevices(ctx, want, int64(p.Config.Resources.Memory), runAs)
}

// withDevices gives a decided machine its devices. ROMs are copied into its
// directory, where the user that it runs as can read them.
func withDevices(spec *instance.Spec, want config.GPU, d Devices, path func(name string) string) (roms map[string]string, err error) {
	if len(want.Devices) == 0 {
		return nil, nil
	}
	wish, err := json.Marshal(want)
	if err != nil {
		return nil, err
	}
	roms = map[string]string{}
	spec.GPU = string(wish)
	spec.Machine.IOMMUFD, spec.Machine.Near, spec.Machine.HugePages = d.IOMMUFD, d.Near, int64(want.HugePages)
	for i, s := range d.Slots {
		s.Functions = slices.Clone(s.Functions)
		for j, f := range s.Functions {
			if f.ROM == "" {
				continue
			}
			s.Functions[j].ROM = path(romFile(i))
			if f.ROM != s.Functions[j].ROM {
				roms[romFile(i)] = f.ROM
			}
		}
		spec.Machine.Slots = append(spec.Machine.Slots, s)
	}
	mapping := time.Duration(spec.Machine.Mapped()>>30) * bootPerMappedGiB
	spec.BootTimeout += mapping
	spec.RestoreTimeout += mapping + bootPerDevice
	return roms, nil
}

// romFile is the copy of the option ROM of a slot.
func romFile(slot int) string { return fmt.Sprintf("rom-%d", slot) }

// copyROMs copies files with option ROMs into the machine's directory.
func copyROMs(inst *instance.Instance, roms map[string]string) error {
	for name, src := range roms {
		if err := os.Remove(inst.Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("copy %s: %w", src, err)
		}
		if err := saved.Copy(inst.Path(name), src); err != nil {
			return err
		}
	}
	return nil
}

// tidyDevices gives the host the devices back that a killed supervisor has left.
// A device that cannot be given back now keeps no machine from being used.
func (m *Manager) tidyDevices(ctx context.Context, report Report) {
	if m.RecoverDevices == nil {
		return
	}
	notes, err := m.RecoverDevices(ctx)
	if report == nil {
		return // the next command tells
	}
	for _, n := range notes {
		report.Note("%s", n)
	}
	if err != nil {
		report.Note("a device of the host was left behind and is not back: %v", err)
	}
}

// noMemorySaved refuses what needs the memory of a machine with devices.
func noMemorySaved(inst *instance.Instance, spec instance.Spec) error {
	if !spec.Machine.HasDevices() {
		return nil
	}
	return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q has %s of the host, whose state cannot be saved", inst.Name, spec.Machine.Slots[0].Functions[0].Title())),
		"agentvm snapshot create --disk-only saves its disk")
}

// noTemplate says why a machine with devices has to boot; empty: it need not.
func noTemplate(m vm.Machine) string {
	switch {
	case m.HugePages > 0:
		return "a template's memory is not in huge pages"
	case m.Near != nil:
		return fmt.Sprintf("a template's memory does not come from NUMA node %d", m.Near.ID)
	}
	return ""
}

// slack is how long a machine may take to be taken down, beyond its grace time.
func slack(spec instance.Spec) time.Duration {
	if len(spec.Machine.Slots) > 0 {
		return stopSlack + deviceSlack
	}
	return stopSlack
}
