package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
	"github.com/agentvm/agentvm/vm/qmp"
	goqemu "github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// Accel is vm.Accel, spelled shortly.
type Accel = vm.Accel

const probeTimeout = 15 * time.Second

const installQEMU = "sudo apt-get install qemu-system-x86 qemu-utils"

// Probe asks a QEMU binary, by name or path, what it can do. The answer is
// kept under the binary's build and asked for again when the file changes. It
// runs QEMU for about 0.2 s, without a guest and without touching the host.
func Probe(ctx context.Context, binary string, known probes.Store) (Caps, error) {
	path, build, err := identify(binary)
	if err != nil {
		return Caps{}, err
	}
	var caps Caps
	if !known.Read("qemu-caps", build, &caps) || caps.Build != build {
		if caps, err = ask(ctx, path); err != nil {
			return Caps{}, err
		}
		caps.Build = build
		known.Write("qemu-caps", build, caps)
	}
	caps.UEFI = FindUEFI(os.DirFS("/"), caps.Machine)
	return caps, nil
}

// identify finds a binary and names its build.
func identify(binary string) (path, build string, err error) {
	path, err = exec.LookPath(binary)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", "", vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("find QEMU: %w", err)), installQEMU)
	}
	if build, err = probes.Build(path); err != nil {
		return "", "", fmt.Errorf("find QEMU: %w", err)
	}
	return path, build, nil
}

// ask runs the binary with no machine and questions it over QMP.
func ask(ctx context.Context, binary string) (_ Caps, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			err = fmt.Errorf("ask %s what it can do: %w", binary, err)
		}
	}()
	ours, theirs, err := socketPair()
	if err != nil {
		return Caps{}, err
	}
	defer theirs.Close()
	p, err := Start(ctx, []string{binary,
		"-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", "tcg",
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
	}, Options{ExtraFiles: []*os.File{theirs}})
	if err != nil {
		ours.Close()
		return Caps{}, err
	}
	defer p.Kill()
	theirs.Close() // so that QEMU's death ends our half
	mon, err := qmp.NewClient(ctx, ours)
	if err != nil {
		return Caps{}, p.explain(err)
	}
	defer mon.Close()
	caps, err := question(ctx, mon)
	if err != nil {
		return Caps{}, p.explain(err)
	}
	caps.Binary, caps.Version = binary, mon.Version()
	return caps, nil
}

func socketPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "qmp")
	defer f.Close()
	theirs = os.NewFile(uintptr(fds[1]), "qmp")
	if ours, err = net.FileConn(f); err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return ours, theirs, nil
}

// question puts every question of a Caps to a QEMU without a machine.
func question(ctx context.Context, mon goqemu.Monitor) (Caps, error) {
	var (
		caps     Caps
		machines []struct{ Name, Alias string }
		options  []struct{ Option string }
		kvm      struct{ Present bool }
	)
	err := errors.Join(
		qmp.Execute(ctx, mon, "query-machines", nil, &machines),
		qmp.Execute(ctx, mon, "query-command-line-options", nil, &options),
		qmp.Execute(ctx, mon, "query-kvm", nil, &kvm),
		qomTypes(ctx, mon, "device", &caps.Devices),
		qomProperties(ctx, mon, "tcg-accel", &caps.TCGProps),
	)
	if err != nil {
		return caps, err
	}
	schema, err := querySchema(ctx, mon)
	if err != nil {
		return caps, err
	}
	caps.Objects = schema.cases("object-add")
	caps.Netdevs = schema.cases("netdev_add")
	caps.Accels = []Accel{vm.AccelTCG}
	if kvm.Present {
		caps.Accels = append(caps.Accels, vm.AccelKVM)
	}
	for _, o := range options {
		caps.Sandbox = caps.Sandbox || o.Option == "sandbox"
	}
	for _, m := range machines {
		if m.Alias == "q35" {
			caps.Machine = m.Name
		}
	}
	if caps.Machine == "" {
		return caps, vm.Classify(vm.ErrHost, errors.New("it has no machine type q35"))
	}
	return caps, qomProperties(ctx, mon, caps.Machine+"-machine", &caps.MachineProps)
}

type named struct{ Name string }

func qomTypes(ctx context.Context, mon goqemu.Monitor, base string, names *[]string) error {
	var types []named
	err := qmp.Execute(ctx, mon, "qom-list-types", map[string]any{"implements": base, "abstract": false}, &types)
	*names = sortedNames(types)
	return err
}

func qomProperties(ctx context.Context, mon goqemu.Monitor, typename string, names *[]string) error {
	var props []named
	err := qmp.Execute(ctx, mon, "qom-list-properties", map[string]any{"typename": typename}, &props)
	*names = sortedNames(props)
	return err
}

func sortedNames(list []named) []string {
	names := make([]string, len(list))
	for i, n := range list {
		names[i] = n.Name
	}
	slices.SortFunc(names, strings.Compare)
	return names
}

// schema is the reply to query-qmp-schema, by entity name. Types have
// meaningless names there; commands and variant cases keep theirs.
// https://www.qemu.org/docs/master/devel/qapi-code-gen.html#client-json-protocol-introspection
type schema map[string]entity

type entity struct {
	Name     string
	ArgType  string `json:"arg-type"`
	Variants []struct{ Case string }
}

func querySchema(ctx context.Context, mon goqemu.Monitor) (schema, error) {
	var list []entity
	if err := qmp.Execute(ctx, mon, "query-qmp-schema", nil, &list); err != nil {
		return nil, err
	}
	s := make(schema, len(list))
	for _, e := range list {
		s[e.Name] = e
	}
	return s, nil
}

// cases lists the variants of a command's argument.
func (s schema) cases(command string) []string {
	var names []string
	for _, v := range s[s[command].ArgType].Variants {
		names = append(names, v.Case)
	}
	slices.Sort(names)
	return names
}
