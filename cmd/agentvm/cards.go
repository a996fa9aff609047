package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/gpu/helper"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/supervisor"
)

// chooseDevices finds devices for a machine, and sees that it could have them.
func chooseDevices(ctx context.Context, host gpu.Host, cache string, want config.GPU, memory int64, runAs *vm.Owner) (d lifecycle.Devices, err error) {
	inv, err := host.Inventory()
	if err != nil {
		return d, err
	}
	taken, err := takenBy(host)
	if err != nil {
		return d, err
	}
	node := gpu.NoNode
	if n, err := strconv.Atoi(want.NUMA); err == nil {
		if node = n; host.Node(n) == nil {
			return d, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("gpu.numa: this host has no NUMA node %d", n)), "lscpu lists them; auto takes that of the device")
		}
	}
	var wants []gpu.Want
	for _, w := range want.Devices {
		wants = append(wants, gpu.Want{Use: w.Use, Count: int(w.Count), ROM: w.ROM})
	}
	if d.Slots, err = gpu.Choose(inv, wants, node, taken); err != nil {
		return d, err
	}
	nearNode(&d, host, inv, want, memory)
	if err := enoughPages(host, d.Near, int64(want.HugePages), memory); err != nil {
		return d, err
	}
	caps, err := probeQEMU(ctx, cache)
	if err != nil {
		return d, err
	}
	d.IOMMUFD = qemu.CanIOMMUFD(caps, len(d.Slots), runAs)
	return d, qemu.CheckLockable(qemu.LockedMemory(vm.Machine{Memory: memory, Slots: d.Slots, IOMMUFD: d.IOMMUFD}))
}

// takenBy tells who has which function, of those who still stand behind it.
func takenBy(host gpu.Host) (map[string]gpu.Claim, error) {
	m := gpu.Manager{Host: host}
	taken, err := m.Taken()
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(taken, func(_ string, c gpu.Claim) bool { return c.Left })
	return taken, nil
}

// nearNode decides where memory and CPUs come from: from the node that the
// configuration names, or that of all devices, if its memory is enough.
func nearNode(d *lifecycle.Devices, host gpu.Host, inv *gpu.Inventory, want config.GPU, memory int64) {
	if want.NUMA == config.NUMAOff {
		return
	}
	n, err := strconv.Atoi(want.NUMA)
	if named := err == nil; !named {
		if host.Nodes() < 2 {
			return
		}
		n = commonNode(inv, d.Slots)
		if n == gpu.NoNode {
			d.Notes = append(d.Notes, "the devices do not lie at one NUMA node, so that memory and CPUs come from anywhere")
			return
		}
		if want.HugePages == 0 && host.FreeMemory(n) < memory {
			d.Notes = append(d.Notes, fmt.Sprintf("NUMA node %d, where the devices are, has too little memory free, so that memory and CPUs come from anywhere", n))
			return
		}
	}
	d.Near = host.Node(n)
}

// commonNode is the node of all PCI devices in slots.
func commonNode(inv *gpu.Inventory, slots []vm.Slot) int {
	node := gpu.NoNode
	for i, s := range slots {
		f := inv.Get(s.Functions[0].Address)
		if f == nil || i > 0 && f.NUMANode != node {
			return gpu.NoNode
		}
		node = f.NUMANode
	}
	return node
}

// enoughPages refuses a machine for which too few huge pages are set aside.
func enoughPages(host gpu.Host, near *vm.Node, size, memory int64) error {
	if size == 0 {
		return nil
	}
	node, where, file := gpu.NoNode, "", fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages", size>>10)
	if near != nil {
		node, where = near.ID, fmt.Sprintf(" on NUMA node %d", near.ID)
		file = fmt.Sprintf("/sys/devices/system/node/node%d/hugepages/hugepages-%dkB/nr_hugepages", near.ID, size>>10)
	}
	free, need := host.FreePages(size, node), memory/size
	if free >= need {
		return nil
	}
	return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("the machine needs %d huge pages of %v and %d are free%s", need, config.Size(size), free, where)),
		fmt.Sprintf("echo %d | sudo tee %s", need-free+host.Pages(size, node), file))
}

// What died with a killed supervisor may still have a device open for a moment.
const (
	recoverPatience = 5 * time.Second
	recoverInterval = 500 * time.Millisecond
)

// recoverDevices gives the host back what killed processes have left.
func recoverDevices(ctx context.Context, host gpu.Host) (notes []string, err error) {
	if ours, err := leftBehind(host); err != nil || !ours {
		return nil, err
	}
	taker, err := helper.NewTaker(host)
	if err != nil {
		return nil, err
	}
	for began := time.Now(); ; time.Sleep(recoverInterval) {
		outcomes, err := taker.Recover(ctx)
		for _, o := range outcomes {
			if o.Action == gpu.Restored || o.Action == gpu.Dropped {
				notes = append(notes, fmt.Sprintf("%s was left behind: %s", o.Address, o.Detail))
			}
		}
		if err == nil || ctx.Err() != nil || time.Since(began) > recoverPatience {
			return notes, err
		}
	}
}

// leftBehind reports whether anything was left behind that this user may give
// back: root anything, others what is theirs.
func leftBehind(host gpu.Host) (bool, error) {
	m := gpu.Manager{Host: host}
	stale, err := m.Stale()
	if err != nil || len(stale) == 0 {
		return false, err
	}
	journals, err := m.Journals()
	return slices.ContainsFunc(journals, func(j *gpu.Journal) bool {
		return slices.Contains(stale, j.Address) && (os.Geteuid() == 0 || j.User == os.Geteuid())
	}), err
}

// leftDevices gives back, as far as this user may, what was left behind, and
// tells of it.
func leftDevices(ctx context.Context, host gpu.Host) (findings []vm.Finding) {
	notes, err := recoverDevices(ctx, host)
	for _, n := range notes {
		findings = append(findings, vm.Finding{Name: "cards", Status: vm.FindingOK, Detail: n})
	}
	if err != nil {
		findings = append(findings, vm.Finding{Name: "cards", Status: vm.FindingWarn, Detail: err.Error(), Fix: cmp.Or(vm.Hint(err), "sudo agentvm gpu recover")})
	}
	return findings
}

// takenDevices are devices that a machine has.
type takenDevices struct {
	taker     gpu.Taker
	addresses []string // or UUIDs of mediated devices
}

// Devices implements supervisor.Parts.
func (p parts) Devices(ctx context.Context, spec instance.Spec) (supervisor.Devices, error) {
	host := gpu.Host{Root: "/"}
	notes, err := recoverDevices(ctx, host)
	for _, n := range notes {
		p.log.Info(n)
	}
	if err != nil {
		p.log.Warn("recover devices", "error", err) // taking them says what is in the way
	}
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		return nil, err
	}
	taker, err := helper.NewTaker(host)
	if err != nil {
		return nil, err
	}
	req := cardRequest(spec, self)
	if _, err := taker.Bind(ctx, req); err != nil {
		return nil, err
	}
	return takenDevices{taker, req.Devices}, nil
}

// cardRequest asks for the devices of a machine, whose supervisor is self.
func cardRequest(spec instance.Spec, self vm.ProcID) gpu.Request {
	req := gpu.Request{
		Owner: gpu.Owner{Name: spec.Name, Process: self}, User: vm.Owner{UID: os.Getuid(), GID: os.Getgid()},
		// libvirt 9.0 knows no VFIO driver but vfio-pci, and puts the card there by itself.
		Plain: spec.Backend == config.BackendLibvirt,
	}
	if o := spec.Machine.RunAs; o != nil {
		req.User = *o
	}
	for _, s := range spec.Machine.Slots {
		req.Devices = append(req.Devices, cmp.Or(s.Functions[0].Mediated, s.Functions[0].Address))
	}
	return req
}

// Release implements supervisor.Devices.
func (d takenDevices) Release(ctx context.Context) error {
	_, err := d.taker.Release(ctx, d.addresses...)
	if errors.Is(err, vm.ErrNotFound) { // another command has given them back
		return nil
	}
	return err
}
