package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/console"
	"github.com/agentvm/agentvm/vm/probes"
	"golang.org/x/sys/unix"
)

var kvmDevice = "/dev/kvm" // tests have another

// A healthy KVM takes a kernel to its first panic in well under a second;
// what it may take on a busy or nested host is limited in two ways.
const (
	bootStall = 6 * time.Second  // without a byte on the console
	bootTotal = 40 * time.Second // in all
)

// AccelProbe asks whether hardware virtualization works.
type AccelProbe struct {
	Caps    Caps
	Kernel  string       // a Linux bzImage to try with; "": the host's own, where it can be read
	RunAs   *vm.Owner    // who will run QEMU
	Probes  probes.Store // keeps the verdict for this boot of the host
	Recheck bool         // do not believe the cache
}

// AccelVerdict is the accelerator to use and why, for the user to read.
type AccelVerdict struct {
	Accel  vm.Accel `json:"accel"`
	Reason string   `json:"reason"`
	Fix    string   `json:"fix,omitempty"` // what may help where the answer is no
	Cached bool     `json:"-"`
}

func emulate(format string, args ...any) AccelVerdict {
	return AccelVerdict{Accel: vm.AccelTCG, Reason: fmt.Sprintf(format, args...) + ": using emulation"}
}

// ProbeAccel decides between KVM and emulation. A /dev/kvm that opens is no
// proof, nor is firmware that runs: on some hosts (nested ones above all) a
// kernel hangs or QEMU aborts all the same. So it boots a kernel on the
// machine that a user would get, without disks, until it panics for want of a
// root file system.
func ProbeAccel(ctx context.Context, p AccelProbe) (AccelVerdict, error) {
	if v, ok := p.withoutBoot(); ok {
		return v, nil
	}
	var v AccelVerdict
	if !p.Recheck && p.Probes.Read("accel", p.key(), &v) && v.Accel != "" {
		v.Cached = true
		return v, nil
	}
	kernel := p.Kernel
	if kernel == "" {
		kernel = hostKernel()
	}
	if kernel == "" {
		return unproven(), nil
	}
	v, err := p.boot(ctx, kernel)
	if err != nil {
		return v, fmt.Errorf("try KVM: %w", err)
	}
	p.Probes.Write("accel", p.key(), v)
	return v, nil
}

// withoutBoot answers where nothing needs to be tried.
func (p AccelProbe) withoutBoot() (v AccelVerdict, ok bool) {
	if !p.Caps.hasAccel(vm.AccelKVM) {
		return emulate("kvm: %s was built without it", p.Caps.Binary), true
	}
	_, err := os.Stat(kvmDevice)
	if errors.Is(err, os.ErrNotExist) {
		v = emulate("kvm: there is no %s", kvmDevice)
		v.Fix = "turn on virtualization in the firmware setup (or nested virtualization in the hypervisor), then: sudo modprobe -a kvm_intel kvm_amd"
		return v, true
	}
	if p.RunAs == nil {
		f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
		if err != nil {
			v = emulate("kvm: %v", err)
			v.Fix = kvmFix()
			return v, true
		}
		f.Close()
	}
	return v, false
}

// kvmFix mends a /dev/kvm that does not let us in.
func kvmFix() string {
	if len(KVMGroups()) == 0 { // not as distributions ship it
		return "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm"
	}
	return `sudo usermod -aG kvm "$USER", then log in again`
}

// key names what a verdict depends on.
func (p AccelProbe) key() string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	// Each of root's machines runs as a user of its own, and all of them are
	// let in or kept out by the device's mode and group.
	who := fmt.Sprint(os.Geteuid(), os.Getegid())
	if p.RunAs != nil {
		who = fmt.Sprint("another, with groups ", KVMGroups())
	}
	mode := "no device"
	if info, err := os.Stat(kvmDevice); err == nil {
		mode = info.Mode().String()
	}
	return fmt.Sprintf("%s %s %s %s", bytes.TrimSpace(boot), p.Caps.Build, who, mode)
}

// hostKernel is the running kernel's image, or "" where it is not to be read.
func hostKernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	file := "/boot/vmlinuz-" + unix.ByteSliceToString(u.Release[:])
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	f.Close()
	return file
}

// unproven answers where there is no kernel to try with: by whether the CPU
// itself claims hardware virtualization.
func unproven() AccelVerdict {
	info, _ := os.ReadFile("/proc/cpuinfo")
	if hasVirtFlag(info) {
		return AccelVerdict{Accel: vm.AccelKVM, Reason: "kvm: not proven for want of a kernel to boot, but the CPU has it"}
	}
	return emulate("kvm: %s opens but the CPU claims no hardware virtualization", kvmDevice)
}

// hasVirtFlag looks for Intel's and AMD's flag in /proc/cpuinfo.
func hasVirtFlag(cpuinfo []byte) bool {
	for line := range bytes.Lines(cpuinfo) {
		if name, flags, ok := bytes.Cut(line, []byte(":")); ok && string(bytes.TrimSpace(name)) == "flags" {
			for _, f := range bytes.Fields(flags) {
				if s := string(f); s == "vmx" || s == "svm" {
					return true
				}
			}
			return false
		}
	}
	return false
}

// boot tries a kernel under KVM. It fails only where the try itself does.
func (p AccelProbe) boot(ctx context.Context, kernel string) (AccelVerdict, error) {
	m := vm.Machine{
		Name: "probe", CPUs: 2, Memory: 256 << 20, Accel: vm.AccelKVM,
		Boot: vm.Boot{Kernel: kernel, Cmdline: "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"},
	}
	begin := time.Now()
	err := tryBoot(ctx, m, p.Caps, p.RunAs)
	var failed *bootError
	switch {
	case err == nil:
		return AccelVerdict{Accel: vm.AccelKVM, Reason: fmt.Sprintf("kvm: a kernel boots, in %.1f s", time.Since(begin).Seconds())}, nil
	case errors.As(err, &failed):
		v := emulate("kvm: %v", failed)
		if strings.Contains(failed.Error(), "Permission denied") {
			v.Fix = kvmFix()
		}
		return v, nil
	default:
		return AccelVerdict{}, err
	}
}

// bootError is the machine's failure, not ours.
type bootError struct{ text string }

func (e *bootError) Error() string { return e.text }

// tryBoot runs a machine without disks until its kernel panics and resets.
func tryBoot(ctx context.Context, m vm.Machine, caps Caps, runAs *vm.Owner, more ...string) error {
	dir, err := os.MkdirTemp("", "avm")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	m.Console, m.QMP = filepath.Join(dir, "console"), filepath.Join(dir, "qmp")
	opts := Options{RunAs: runAs}
	if runAs != nil {
		opts.Groups = KVMGroups()
		if m.Boot.Kernel, err = lend(m.Boot.Kernel, dir, *runAs); err != nil {
			return err
		}
	}
	argv, err := Argv(m, caps)
	if err != nil {
		return err
	}
	q, err := Start(ctx, append(append(argv, "-no-reboot"), more...), opts)
	if err != nil {
		return err
	}
	defer q.Kill()
	return watchBoot(ctx, q, m.Console)
}

// lend gives another user the directory and its own copy of a file.
func lend(file, dir string, to vm.Owner) (string, error) {
	src, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer src.Close()
	dst, err := os.Create(filepath.Join(dir, "kernel"))
	if err != nil {
		return "", err
	}
	_, err = io.Copy(dst, src)
	return dst.Name(), errors.Join(err, dst.Chown(to.UID, to.GID), dst.Close(), os.Chown(dir, to.UID, to.GID))
}

// watchBoot waits for the kernel's reset, which ends QEMU, as long as the
// console moves.
func watchBoot(ctx context.Context, q *Process, console string) error {
	total := time.NewTimer(bootTotal)
	defer total.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var size int64
	moved := time.Now()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-q.Done():
			text, _ := os.ReadFile(console)
			if err := q.Wait(ctx); err != nil {
				return &bootError{err.Error()}
			}
			if !bytes.Contains(text, []byte("Linux version")) {
				return &bootError{"QEMU ended before the kernel spoke"}
			}
			return nil
		case <-total.C:
			return &bootError{fmt.Sprintf("a kernel does not finish booting within %v%s", bootTotal, lastLine(console))}
		case <-tick.C:
		}
		if info, err := os.Stat(console); err == nil && info.Size() != size {
			size, moved = info.Size(), time.Now()
		}
		if time.Since(moved) > bootStall {
			return &bootError{fmt.Sprintf("%s opens but a kernel hangs%s", kvmDevice, lastLine(console))}
		}
	}
}

// lastLine quotes the end of a console for a message.
func lastLine(file string) string {
	last := console.Tail(file, 1)
	if len(last) == 0 {
		return " before it says anything"
	}
	return fmt.Sprintf(" after %.100q", last[0])
}
