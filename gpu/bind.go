package gpu

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Manager takes devices from the host and gives them back.
type Manager struct {
	Host Host
	Wait time.Duration // for a driver to appear, or to take a device back; 0: 5 s

	// On behalf of whom: Release gives back only what this user may use.
	// 0, root, may do all.
	User int

	// Permit refuses functions and mediated devices, all that are about to be
	// taken, which whoever asks may not have. It sees what Bind then acts on. Nil
	// permits all.
	Permit func(functions []*Device, parts []*Mdev) error

	hook func() // a test's, after each journal entry and each write
}

// lockFile is the same whatever agentvm's own directories are: there is one
// set of devices.
const lockFile = "/run/agentvm-gpu.lock"

func (m *Manager) point() {
	if m.hook != nil {
		m.hook()
	}
}

// locked runs do while nobody else on this host binds or gives back.
func (m *Manager) locked(ctx context.Context, do func() error) error {
	if err := m.makeDir(); err != nil {
		return vm.Classify(vm.ErrHost, fmt.Errorf("create the directory for journals: %w", err))
	}
	l := flock.New(m.Host.at(lockFile), flock.SetPermissions(0o600))
	if _, err := l.TryLockContext(ctx, 100*time.Millisecond); err != nil {
		return vm.Classify(vm.ErrHost, fmt.Errorf("lock %s: %w", lockFile, err))
	}
	defer l.Close()
	return do()
}

// Bind is of [Taker].
func (m *Manager) Bind(ctx context.Context, r Request) (taken []*Journal, err error) {
	err = m.locked(ctx, func() error {
		inv, err := m.Host.Inventory()
		if err != nil {
			return err
		}
		plan, err := m.plan(ctx, inv, r)
		if err != nil {
			return err
		}
		taken, err = m.takeAll(ctx, plan)
		if err == nil {
			err = m.finish(taken, r)
		}
		if err == nil {
			return nil
		}
		// One that is blocked would block its undoing too, and keeps its
		// journal for recover.
		blocked := errors.Is(err, ErrBlocked)
		if blocked {
			taken = taken[:len(taken)-1]
		}
		err = errors.Join(err, m.undo(ctx, taken))
		if blocked {
			err = vm.WithHint(err, unblock)
		}
		taken = nil
		return vm.Classify(vm.ErrHost, err)
	})
	return taken, err
}

// takeAll binds each function to vfio-pci. The one that failed is the last of
// those that it returns.
func (m *Manager) takeAll(ctx context.Context, plan []*Journal) (taken []*Journal, err error) {
	for _, j := range plan {
		taken = append(taken, j)
		if err := m.take(ctx, j); err != nil {
			return taken, err
		}
	}
	return taken, nil
}

// finish hands over what has been bound. The first journal that says that it
// is kept says so of all that were bound with it: see [kept].
func (m *Manager) finish(taken []*Journal, r Request) error {
	if err := m.viable(taken); err != nil {
		return err
	}
	if r.User.UID != 0 {
		if err := m.grant(taken, r.User.UID); err != nil {
			return err
		}
	}
	if !r.Owner.Keep {
		return nil
	}
	for _, j := range taken {
		if err := m.record(j, StepKept); err != nil {
			return err
		}
	}
	return nil
}

// plan decides what is done, and refuses here, before anything is written.
func (m *Manager) plan(ctx context.Context, inv *Inventory, r Request) ([]*Journal, error) {
	boot := m.boot()
	if boot == "" {
		return nil, vm.Classify(vm.ErrHost, errors.New("the kernel does not say which boot this is"))
	}
	parts, err := inv.parts(r.Devices)
	if err != nil {
		return nil, err
	}
	var devices, functions []*Device
	for _, address := range r.Devices {
		if IsUUID(address) {
			continue
		}
		d := inv.Get(address)
		if d == nil {
			return nil, vm.Classify(vm.ErrNotFound, fmt.Errorf("there is no PCI device %s", address))
		}
		devices = append(devices, d)
		for _, f := range inv.Unit(d) {
			if !slices.Contains(functions, f) {
				functions = append(functions, f)
			}
		}
	}
	if m.Permit != nil {
		if err := m.Permit(functions, parts); err != nil {
			return nil, err
		}
	}
	if err := m.notTaken(functions, parts, boot); err != nil {
		return nil, err
	}
	blocked := slices.DeleteFunc(slices.Clone(functions), func(d *Device) bool { return !d.Blocked })
	if err := m.Host.readLocked(blocked, m.Host.patience()); err != nil { // a driver that starts is done by then
		return nil, err
	}
	for _, part := range parts {
		if err := part.free(inv); err != nil {
			return nil, err
		}
	}
	for _, d := range devices {
		for _, f := range Check(inv, d, nil, devices...) {
			if f.Severity != Problem || r.Force && f.Forcible {
				continue
			}
			return nil, refusal(d.Address, f)
		}
	}
	var plan []*Journal
	bind := rand.Text()
	for _, f := range functions {
		plan = append(plan, &Journal{Version: journalVersion, Boot: boot, Bind: bind, Owner: r.Owner, User: r.User.UID, Address: f.Address, Unit: inv.Unit(f)[0].Address, ID: f.ID(), Group: f.Group,
			Driver: f.Driver, Override: f.Override, VFIO: f.Driver, Prebound: isVFIO(f.Driver), Time: time.Now().UTC()})
		switch j := plan[len(plan)-1]; {
		case j.Prebound:
		case r.Plain:
			j.VFIO = vfioDriver
		default:
			j.VFIO = m.vfioFor(ctx, f)
		}
	}
	for _, part := range parts {
		j := &Journal{Version: journalVersion, Boot: boot, Bind: bind, Owner: r.Owner, User: r.User.UID, Address: part.UUID, Unit: part.UUID, Group: part.Group,
			Driver: part.Driver, VFIO: part.Driver, Prebound: true, Time: time.Now().UTC()}
		if part.Card != nil {
			j.ID = part.Card.ID()
		}
		plan = append(plan, j)
	}
	return plan, nil
}

// notTaken refuses what has a journal.
func (m *Manager) notTaken(functions []*Device, parts []*Mdev, boot string) error {
	journals, err := m.Journals()
	if err != nil {
		return err
	}
	var names []string
	for _, f := range functions {
		names = append(names, f.Address)
	}
	for _, part := range parts {
		names = append(names, part.UUID)
	}
	for _, name := range names {
		i := slices.IndexFunc(journals, func(j *Journal) bool { return j.Address == name })
		if i < 0 {
			continue
		}
		return takenAlready(name, claimOf(journals, journals[i], boot))
	}
	return nil
}

// take binds one function to vfio-pci, each step recorded before it is done.
func (m *Manager) take(ctx context.Context, j *Journal) error {
	if j.Prebound {
		return m.record(j, StepBound)
	}
	steps := []struct {
		step Step
		do   func() error
	}{
		{StepOverride, func() error { return m.override(ctx, j.Address, j.VFIO) }},
		{StepUnbind, func() error { return m.unbind(ctx, j.Address, j.Driver) }},
		{StepProbe, func() error {
			if err := m.write(ctx, "/sys/bus/pci/drivers_probe", j.Address); err != nil {
				return err
			}
			return m.await(ctx, j.Address, j.VFIO)
		}},
		{StepBound, func() error { return nil }},
	}
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.record(j, s.step); err != nil {
			return err
		}
		if err := s.do(); err != nil {
			return fmt.Errorf("bind %s to %s: %w", j.Address, j.VFIO, err)
		}
	}
	return nil
}

// undo gives back what was taken, the last first, even when ctx has ended.
func (m *Manager) undo(ctx context.Context, taken []*Journal) error {
	ctx = context.WithoutCancel(ctx)
	var problems []error
	for _, j := range slices.Backward(taken) {
		if _, err := m.restore(ctx, j); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// viable asks of each group whether it can be used.
func (m *Manager) viable(taken []*Journal) error {
	check := m.Host.Viable
	if check == nil {
		check = m.Host.groupViable
	}
	var asked []string
	for _, j := range taken {
		if slices.Contains(asked, j.Group) {
			continue
		}
		asked = append(asked, j.Group)
		if err := check(j.Group); err != nil {
			return fmt.Errorf("IOMMU group %s cannot be used: %w", j.Group, err)
		}
	}
	return nil
}

// groupViable asks VFIO, as include/uapi/linux/vfio.h has it.
func (h Host) groupViable(group string) error {
	const (
		getStatus  = ';'<<8 | 100 + 3 // VFIO_GROUP_GET_STATUS
		flagViable = 1
	)
	f, err := os.OpenFile(h.at("/dev/vfio", group), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) && h.exists("/dev/vfio/devices") {
		return nil // a kernel that has only iommufd; it looks when the device is opened
	} else if err != nil {
		return err
	}
	defer f.Close()
	status := struct{ argsz, flags uint32 }{argsz: 8}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getStatus, uintptr(unsafe.Pointer(&status))); errno != 0 {
		return fmt.Errorf("VFIO_GROUP_GET_STATUS: %w", errno)
	}
	if status.flags&flagViable == 0 {
		return errors.New("a driver of the host still has a device of it")
	}
	return nil
}

// The steps. Each leaves alone what is as it should be.

func (m *Manager) write(ctx context.Context, path, data string) error {
	err := m.Host.write(ctx, path, data)
	m.point()
	return err
}

// override sets driver_override; "" unsets it, which an empty line does.
func (m *Manager) override(ctx context.Context, address, driver string) error {
	if is, err := m.Host.override(ctx, address); err != nil || is == driver {
		return err
	}
	if driver == "" {
		driver = "\n"
	}
	return m.write(ctx, filepath.Join(pciDevices, address, "driver_override"), driver)
}

func (m *Manager) driver(address string) string { return m.Host.link(pciDevices, address, "driver") }

// unbind takes a function from a driver, where it has it.
func (m *Manager) unbind(ctx context.Context, address, driver string) error {
	if driver == "" || m.driver(address) != driver {
		return nil
	}
	err := m.write(ctx, filepath.Join(pciDrivers, driver, "unbind"), address)
	if err != nil && !errors.Is(err, ErrBlocked) && m.driver(address) == "" {
		return nil // it went by itself
	}
	return err
}

// await waits until a function has the driver.
func (m *Manager) await(ctx context.Context, address, driver string) error {
	wait := m.wait()
	for deadline := time.Now().Add(wait); m.driver(address) != driver; {
		if time.Now().After(deadline) {
			return fmt.Errorf("its driver is %q after %v, not %q; dmesg may say why", m.driver(address), wait, driver)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(wait/10, 20*time.Millisecond)):
		}
	}
	return nil
}

func (m *Manager) wait() time.Duration { return cmp.Or(m.Wait, 5*time.Second) }

func (m *Manager) boot() string {
	return strings.TrimSpace(m.Host.text("/proc/sys/kernel/random/boot_id"))
}
