package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/supervisor"
)

// libvirtURI names the libvirt that is meant, and with connect makes sure that
// it can run machines.
func libvirtURI(ctx context.Context, uri string, connect bool) (string, error) {
	if uri == "" {
		uri = libvirt.DefaultURI(os.Getenv, os.Getuid())
	}
	if !connect {
		_, err := libvirt.ParseURI(uri)
		return uri, err
	}
	_, conn, err := openLibvirt(ctx, uri)
	if err != nil {
		return "", err
	}
	return uri, conn.Close()
}

// checkLibvirt is what doctor says of the project's libvirt.
func (a *app) checkLibvirt(ctx context.Context, uri string, dirs instance.Dirs) []vm.Finding {
	if uri == "" {
		uri = libvirt.DefaultURI(a.getenv, os.Getuid())
	}
	u, err := libvirt.ParseURI(uri)
	if err != nil {
		return []vm.Finding{{Name: "libvirt", Status: vm.FindingFail, Detail: err.Error(), Fix: vm.Hint(err)}}
	}
	store := instance.Store{Dirs: dirs}
	return libvirt.Check(ctx, u, libvirt.Host{Run: dirs.Run, User: os.Getuid(), Lives: func(id string) bool {
		list, err := store.List()
		if err != nil {
			return true // nothing is known
		}
		for _, i := range list {
			spec, err := i.Spec()
			status, statusErr := i.Status()
			if err == nil && statusErr == nil && spec.ID == id && status.State.Live() {
				return true
			}
		}
		return false
	}})
}

func openLibvirt(ctx context.Context, uri string) (libvirt.URI, *libvirt.Conn, error) {
	u, err := libvirt.ParseURI(uri)
	if err != nil {
		return u, nil, err
	}
	if u.Session && os.Getuid() == 0 {
		return u, nil, vm.WithHint(vm.Classify(vm.ErrUsage, errors.New("root has no libvirt session of its own")), "uri: "+libvirt.SystemURI)
	}
	conn, err := libvirt.Open(ctx, u)
	return u, conn, err
}

// libvirtLeftover ends what the machine may have left in libvirt. One that
// cannot be reached keeps nobody from deleting the machine: QEMU itself has
// been ended by its process.
func libvirtLeftover(ctx context.Context, spec instance.Spec) error {
	ctx, cancel := context.WithTimeout(ctx, leftoverTimeout)
	defer cancel()
	_, conn, err := openLibvirt(ctx, spec.URI)
	if err != nil {
		return nil
	}
	defer conn.Close()
	err = libvirt.RemoveLeftover(ctx, conn, libvirt.Metadata{ID: spec.ID})
	if errors.Is(err, libvirt.ErrForeign) {
		return nil
	}
	return err
}

// leftoverTimeout is enough for a libvirt that is not busy.
const leftoverTimeout = 10 * time.Second

// libvirtLog says where the log is that libvirt keeps of its QEMU.
func libvirtLog(spec instance.Spec) error {
	dir := "/var/log/libvirt/qemu/"
	if u, err := libvirt.ParseURI(spec.URI); err == nil && u.Session {
		dir = "~/.cache/libvirt/qemu/log/"
	}
	return vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("libvirt keeps what QEMU printed for %q", spec.Name)), "see "+dir+libvirt.DomainName(spec.Machine)+".log")
}

// libvirtParts are the same parts with a machine that libvirt runs.
type libvirtParts struct {
	parts
	spec    instance.Spec
	program string // this one, to be started again as a guard
}

func (p libvirtParts) Machine(ctx context.Context, m vm.Machine, _ string, trace supervisor.Trace) (supervisor.Machine, error) {
	defer trace("qemu", time.Now())
	caps, err := probeQEMU(ctx, p.cache)
	if err != nil {
		return nil, err
	}
	if err := makeVars(m, caps); err != nil {
		return nil, err
	}
	uri, conn, err := openLibvirt(ctx, p.spec.URI)
	if err != nil {
		return nil, err
	}
	c, err := libvirtConfig(uri, p.spec, m, caps)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	p.log.Info("start", "libvirt", uri.Text, "domain", libvirt.DomainName(m))
	d, err := libvirt.Start(ctx, conn, m, c, p.program, p.log)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return libvirtMachine{d, conn}, nil
}

// libvirtConfig is what a domain needs beside its machine.
func libvirtConfig(uri libvirt.URI, spec instance.Spec, m vm.Machine, caps qemu.Caps) (libvirt.Config, error) {
	description, err := json.Marshal(m)
	if err != nil {
		return libvirt.Config{}, fmt.Errorf("describe the machine: %w", err)
	}
	sum := sha256.Sum256(description)
	return libvirt.Config{
		Caps: caps, Owner: libvirtOwner(uri, m),
		Console:  filepath.Join(filepath.Dir(m.QMP), "console.sock"),
		Metadata: libvirt.Metadata{ID: spec.ID, Name: spec.Name, Workspace: spec.Workspace, User: os.Getuid(), Config: hex.EncodeToString(sum[:])},
	}, nil
}

// libvirtOwner is whom the host's libvirt is to run QEMU as: the user whose
// files they are. A user's own libvirt knows no other.
func libvirtOwner(u libvirt.URI, m vm.Machine) *vm.Owner {
	if u.Session {
		return nil
	}
	o := vm.Owner{UID: os.Getuid(), GID: os.Getgid()}
	if m.RunAs != nil {
		o = *m.RunAs
		// An unprivileged user of no account is in no group: what opens /dev/kvm
		// has to be its own.
		if groups := qemu.KVMGroups(); m.Accel == vm.AccelKVM && len(groups) > 0 {
			o.GID = groups[0]
		}
	}
	return &o
}

type libvirtMachine struct {
	*libvirt.Domain
	conn *libvirt.Conn
}

func (m libvirtMachine) Kill() error {
	return errors.Join(m.Domain.Kill(), m.conn.Close())
}

func (m libvirtMachine) Pause(ctx context.Context) error  { return qmp.Stop(ctx, m.Monitor()) }
func (m libvirtMachine) Resume(ctx context.Context) error { return qmp.Cont(ctx, m.Monitor()) }

// PlugDevice is for a template's machine, and libvirt's never are.
func (m libvirtMachine) PlugDevice(context.Context, int, vm.Slot) error {
	return vm.Classify(vm.ErrHost, errors.New("a device cannot be plugged into a machine that libvirt runs"))
}
