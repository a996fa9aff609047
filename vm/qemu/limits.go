package qemu

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// limits guards what this process lends a child while it starts it.
var limits sync.Mutex

// CheckLockable finds out whether a child of this process may lock that many
// bytes of memory. The error's hint has the lines that allow it.
func CheckLockable(bytes uint64) error {
	limits.Lock()
	defer limits.Unlock()
	giveBack, err := raiseLocked(bytes)
	if err == nil {
		err = giveBack()
	}
	return err
}

// raiseLocked lets this process, and the children that it starts until
// giveBack, lock memory.
func raiseLocked(bytes uint64) (giveBack func() error, err error) {
	var old unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_MEMLOCK, nil, &old); err != nil {
		return nil, fmt.Errorf("look at the limit of locked memory: %w", err)
	}
	if old.Cur >= bytes {
		return func() error { return nil }, nil
	}
	// Only a privileged process may raise the upper limit; lowering it again is free.
	err = unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: bytes, Max: max(bytes, old.Max)}, nil)
	if errors.Is(err, unix.EPERM) {
		mib := (bytes + 1<<20 - 1) >> 20
		return nil, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("the machine must lock %d MiB of memory, all of which its devices reach, and you may lock %d MiB", mib, old.Max>>20)), memlockHint(mib))
	} else if err != nil {
		return nil, fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	return func() error { return unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &old, nil) }, nil
}

// memlockHint has the lines for systemd.exec(5) and limits.conf(5), whose
// number is in KiB.
func memlockHint(mib uint64) string {
	return fmt.Sprintf("put the lines \"[Service]\" and \"LimitMEMLOCK=%dM\" in /etc/systemd/system/user@.service.d/memlock.conf, or without systemd the lines \"* soft memlock %[2]d\" and \"* hard memlock %[2]d\" in /etc/security/limits.conf; then log in again", mib, mib<<10)
}

// withLimits gives the calling goroutine's thread, and so its next child, what opts
// asks for. The goroutine must be locked to its thread. The kernel has both
// inherited at fork: there is no moment at which QEMU is without.
func withLimits(opts Options) (giveBack func() error, err error) {
	var undo []func() error
	giveBack = func() (err error) {
		for _, u := range undo {
			err = errors.Join(err, u())
		}
		return err
	}
	if opts.Lock > 0 {
		limits.Lock()
		undo = append(undo, func() error { limits.Unlock(); return nil })
		u, err := raiseLocked(opts.Lock)
		if err != nil {
			return nil, errors.Join(err, giveBack())
		}
		undo = append([]func() error{u}, undo...)
	}
	if len(opts.CPUs) > 0 {
		var old, wanted unix.CPUSet
		for _, cpu := range opts.CPUs {
			wanted.Set(cpu)
		}
		err := unix.SchedGetaffinity(0, &old)
		if err == nil {
			err = unix.SchedSetaffinity(0, &wanted)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("keep the machine on the CPUs %v: %w", opts.CPUs, err), giveBack())
		}
		undo = append(undo, func() error { return unix.SchedSetaffinity(0, &old) })
	}
	return giveBack, nil
}

// startLent starts the process with what it is lent.
func (p *Process) startLent(opts Options) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	giveBack, err := withLimits(opts)
	if err != nil {
		return err
	}
	err = p.cmd.Start()
	return errors.Join(err, giveBack())
}
