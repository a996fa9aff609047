package gpu

import (
	"context"
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
	Dir  string        // of the journals
	Wait time.Duration // for a driver to appear; 0: 5 s

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
	if err := os.MkdirAll(m.Dir, 0o700); err != nil {
		return vm.Classify(vm.ErrHost, fmt.Errorf("create the directory for journals: %w", err))
	}
	// The names of what was just made must survive too, or the journals would not.
	for _, dir := range []string{m.Dir, filepath.Dir(m.Dir)} {
		if err := syncDir(dir); err != nil {
			return fmt.Errorf("create the directory for journals: %w", err)
		}
	}
	l := flock.New(m.Host.at(lockFile), flock.SetPermissions(0o600))
	if _, err := l.TryLockContext(ctx, 100*time.Millisecond); err != nil {
		return vm.Classify(vm.ErrHost, fmt.Errorf("lock %s: %w", lockFile, err))
	}
	defer l.Close()
	return do()
}

// Bind gives the devices at these addresses, with all functions of their
// slots, to vfio-pci, and returns their journals. With force it does so
// against findings that can be overruled. It does all of it or nothing.
func (m *Manager) Bind(ctx context.Context, owner Owner, force bool, addresses ...string) (taken []*Journal, err error) {
	err = m.locked(ctx, func() error {
		inv, err := m.Host.Inventory()
		if err != nil {
			return err
		}
		plan, err := m.plan(inv, owner, force, addresses)
		if err != nil {
			return err
		}
		for _, j := range plan {
			if err := m.take(ctx, j); err != nil {
				// The one that failed is put back first. One that is blocked
				// would block that too, and keeps its journal for recover.
				undo := taken
				blocked := errors.Is(err, ErrBlocked)
				if !blocked {
					undo = append(undo, j)
				}
				err = errors.Join(err, m.undo(ctx, undo))
				if blocked {
					err = vm.WithHint(err, "end what has the device open, then: agentvm gpu recover")
				}
				taken = nil
				return vm.Classify(vm.ErrHost, err)
			}
			taken = append(taken, j)
		}
		if err := m.viable(taken); err != nil {
			err = errors.Join(err, m.undo(ctx, taken))
			taken = nil
			return vm.Classify(vm.ErrHost, err)
		}
		return nil
	})
	return taken, err
}

// plan decides what is done, and refuses here, before anything is written.
func (m *Manager) plan(inv *Inventory, owner Owner, force bool, addresses []string) ([]*Journal, error) {
	boot := m.boot()
	if boot == "" {
		return nil, vm.Classify(vm.ErrHost, errors.New("the kernel does not say which boot this is"))
	}
	var devices, functions []*Device
	for _, address := range addresses {
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
	for _, f := range functions {
		j, err := m.Journal(f.Address)
		if err != nil {
			return nil, err
		}
		if j != nil {
			hint := "agentvm gpu release " + f.Address
			if j.stale(boot) {
				hint = "agentvm gpu recover"
			}
			return nil, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s is taken already, by %s", f.Address, j.Owner.Name)), hint)
		}
	}
	for _, d := range devices {
		for _, f := range Check(inv, d, devices...) {
			if f.Severity != Problem || force && f.Forcible {
				continue
			}
			at := d.Address
			if f.Device != "" {
				at = f.Device
			}
			return nil, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s cannot be taken: %s", at, f.Detail)), f.Fix)
		}
	}
	var plan []*Journal
	for _, f := range functions {
		plan = append(plan, &Journal{Version: journalVersion, Boot: boot, Owner: owner, Address: f.Address, ID: f.ID(), Group: f.Group,
			Driver: f.Driver, Override: f.Override, Prebound: f.Driver == vfioDriver, Time: time.Now().UTC()})
	}
	return plan, nil
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
		{StepOverride, func() error { return m.override(ctx, j.Address, vfioDriver) }},
		{StepUnbind, func() error { return m.unbind(ctx, j.Address, j.Driver) }},
		{StepProbe, func() error {
			if err := m.write(ctx, "/sys/bus/pci/drivers_probe", j.Address); err != nil {
				return err
			}
			return m.await(ctx, j.Address, vfioDriver)
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
			return fmt.Errorf("bind %s to vfio-pci: %w", j.Address, err)
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
	if m.Host.override(address) == driver {
		return nil
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
	wait := m.Wait
	if wait == 0 {
		wait = 5 * time.Second
	}
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

func (m *Manager) boot() string {
	return strings.TrimSpace(m.Host.text("/proc/sys/kernel/random/boot_id"))
}

// stale reports whether nobody stands behind a journal any more.
func (j *Journal) stale(boot string) bool {
	if j.Boot != boot {
		return true
	}
	return !(j.Owner.Keep && j.Step == StepBound) && !j.Owner.Process.Alive()
}
