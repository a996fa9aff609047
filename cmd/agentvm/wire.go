package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"
	"gopkg.in/natefinch/lumberjack.v2"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/line"
	"github.com/agentvm/agentvm/vm/network"
	"github.com/agentvm/agentvm/vm/probes"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/share"
	"github.com/agentvm/agentvm/vm/ssh"
	"github.com/agentvm/agentvm/vm/supervisor"
)

// qemuBinary is the emulator for the one architecture that guests have.
const qemuBinary = "qemu-system-x86_64"

// memoryFile is the guest's memory, which QEMU inherits from its supervisor.
const memoryFile = "/proc/self/fd/3"

// probesIn is where the answers of the host's programs are kept.
func probesIn(cache string) probes.Store { return probes.Store(filepath.Join(cache, "probes")) }

// probeQEMU asks QEMU what it can do, or says how to get one.
func probeQEMU(ctx context.Context, cache string) (qemu.Caps, error) {
	caps, err := qemu.Probe(ctx, qemuBinary, probesIn(cache))
	if err != nil {
		return caps, vm.WithHint(vm.Classify(vm.ErrHost, err), "agentvm doctor says what is missing and how to get it")
	}
	return caps, nil
}

// chooseAccel decides how guests run here and says why.
func chooseAccel(ctx context.Context, cache string, img *images.Image, runAs *vm.Owner) (vm.Accel, string, error) {
	caps, err := probeQEMU(ctx, cache)
	if err != nil {
		return "", "", err
	}
	v, err := qemu.ProbeAccel(ctx, qemu.AccelProbe{Caps: caps, Kernel: img.Kernel(), RunAs: runAs, Probes: probesIn(cache)})
	return v.Accel, v.Reason, err
}

// hardware names what a guest can observe of a machine.
func hardware(ctx context.Context, cache string, m vm.Machine) (string, error) {
	caps, err := probeQEMU(ctx, cache)
	if err != nil {
		return "", err
	}
	return qemu.Fingerprint(m, caps)
}

// parts starts the real pieces of a machine.
type parts struct {
	cache string // probes are remembered here
	log   *slog.Logger
}

// boundedLog appends to a file that a guest can make grow: when it is full it
// is put aside under a dated name, and the oldest of those goes.
func boundedLog(path string) io.WriteCloser {
	return &lumberjack.Logger{Filename: path, MaxSize: 32 /* MiB */, MaxBackups: 3}
}

// policyOf is what an instance may reach.
func policyOf(spec instance.Spec) (*network.Policy, error) {
	var rules []network.Rule
	for _, s := range spec.Network.Allow {
		r, err := network.ParseRule(s)
		if err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	var services []network.Service
	for _, s := range spec.Network.Services {
		services = append(services, network.Service{Name: s.Name, Port: uint16(s.Port), Target: s.Target})
	}
	return network.NewPolicy(rules, services)
}

func (p parts) Network(ctx context.Context, spec instance.Spec, socket, log string) (supervisor.Network, error) {
	policy, err := policyOf(spec)
	if err != nil {
		return nil, err
	}
	out := &decisionLog{out: boundedLog(log), log: p.log}
	n, err := network.New(network.Config{Policy: policy, Proxy: network.ProxyFromEnvironment(), Logger: p.log, Log: out.write})
	if err != nil {
		out.Close()
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err == nil {
		err = os.Chmod(socket, 0o600)
	}
	if o := spec.Machine.RunAs; err == nil && o != nil {
		err = os.Chown(socket, o.UID, o.GID)
	}
	if err != nil {
		n.Close()
		out.Close()
		return nil, fmt.Errorf("listen for the guest's frames: %w", err)
	}
	r := &runningNetwork{Network: n, log: out}
	r.served.Add(1)
	go func() {
		defer r.served.Done()
		if err := n.Serve(context.WithoutCancel(ctx), l); err != nil && !errors.Is(err, net.ErrClosed) {
			p.log.Error("network", "error", err)
		}
	}()
	return r, nil
}

type runningNetwork struct {
	*network.Network
	log    *decisionLog
	served sync.WaitGroup
}

// decisionLog is the file that decisions go to, which another one can follow.
type decisionLog struct {
	mu  sync.Mutex
	out io.WriteCloser
	log *slog.Logger
}

func (l *decisionLog) write(d network.Decision) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := json.NewEncoder(l.out).Encode(d); err != nil {
		l.log.Error("write the network log", "error", err)
	}
}

func (l *decisionLog) goOn(path string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.out.Close()
	l.out = boundedLog(path)
	return err
}

func (l *decisionLog) Close() error { return l.out.Close() }

func (n *runningNetwork) Apply(spec instance.Spec, log string) error {
	policy, err := policyOf(spec)
	if err != nil {
		return err
	}
	if err := n.log.goOn(log); err != nil {
		return err
	}
	n.SetPolicy(policy)
	return nil
}

func (n *runningNetwork) Dial(ctx context.Context, port int) (net.Conn, error) {
	return n.DialGuest(ctx, uint16(port))
}

func (n *runningNetwork) Close() error {
	err := n.Network.Close()
	n.served.Wait()
	return errors.Join(err, n.log.Close())
}

func (p parts) Share(ctx context.Context, spec instance.Spec, s instance.Share, socket, log string) (supervisor.Share, error) {
	caps, err := share.Probe(ctx, probesIn(p.cache))
	if err != nil {
		return nil, err
	}
	out := boundedLog(log)
	srv, err := share.Start(ctx, caps, share.Spec{
		Tag: s.Tag, Source: s.Source, Socket: socket, ReadOnly: s.ReadOnly, Protect: s.Protect, Hide: s.Hide,
		Guest: vm.Owner{UID: lifecycle.GuestUID, GID: lifecycle.GuestUID}, RunAs: spec.Machine.RunAs, Log: out,
	})
	if err != nil {
		out.Close()
		return nil, err
	}
	return runningShare{srv, s.Tag, out}, nil
}

type runningShare struct {
	*share.Server
	tag string
	log io.Closer
}

func (s runningShare) Err() error {
	err := s.Server.Err()
	if errors.Is(err, share.ErrDisconnected) {
		return fmt.Errorf("share %q: %w", s.tag, supervisor.ErrDisconnected)
	}
	return err
}

func (s runningShare) Process() vm.ProcID {
	id, _ := vm.ProcessID(s.PID())
	return id
}

func (s runningShare) Warnings() (list []string) {
	for _, u := range s.Unprotected() {
		list = append(list, fmt.Sprintf("%s is not protected: %s", u.Path, u.Reason))
	}
	return list
}

func (s runningShare) Stop() error {
	s.Server.Stop()
	return s.log.Close()
}

func (p parts) Machine(ctx context.Context, m vm.Machine, log string, trace supervisor.Trace) (supervisor.Machine, error) {
	caps, err := probeQEMU(ctx, p.cache)
	if err != nil {
		return nil, err
	}
	if err := makeVars(m, caps); err != nil {
		return nil, err
	}
	opts := qemu.Options{RunAs: m.RunAs, LogFile: log, Lock: qemu.LockLimit(m), Groups: qemu.Groups(m)}
	if m.Near != nil {
		opts.CPUs = m.Near.CPUs
	}
	memory, err := newMemory(&m)
	if err != nil {
		return nil, err
	}
	if memory != nil {
		opts.ExtraFiles = []*os.File{memory}
	}
	argv, err := qemu.Argv(m, caps)
	if err != nil {
		return nil, errors.Join(err, closeMemory(memory))
	}
	p.log.Info("start", "command", vm.ShellCommand(argv...))
	began := time.Now()
	process, err := qemu.Start(ctx, argv, opts)
	if err != nil {
		return nil, errors.Join(err, closeMemory(memory))
	}
	r := runningMachine{qemu: process, memory: memory, spec: m}
	// QEMU gets ready while its memory is filled.
	var load errgroup.Group
	var state []byte
	if m.Saved != "" {
		load.Go(func() (err error) {
			defer trace("memory", time.Now())
			state, err = loadMemory(m.Saved, memory)
			return err
		})
	}
	r.monitor, err = process.Connect(ctx, m.QMP)
	trace("qemu", began)
	if err = errors.Join(err, load.Wait()); err == nil && m.Saved != "" {
		began = time.Now()
		err = qemu.Restore(ctx, r.monitor, filepath.Join(filepath.Dir(m.QMP), "state.sock"), state)
		trace("state", began)
	}
	if err != nil {
		r.Kill()
		return nil, err
	}
	return r, nil
}

// newMemory makes a machine's memory, which QEMU opens by its number, as the user
// that it runs as. One that boots with devices of the host has QEMU's own: nil.
func newMemory(m *vm.Machine) (*os.File, error) {
	if m.HasDevices() && m.Saved == "" {
		return nil, nil
	}
	m.MemoryFile = memoryFile
	memory, err := saved.NewMemory(m.Memory)
	if err == nil && m.RunAs != nil {
		err = memory.Chown(m.RunAs.UID, m.RunAs.GID)
	}
	return memory, err
}

func closeMemory(memory *os.File) error {
	if memory == nil {
		return nil
	}
	return memory.Close()
}

func loadMemory(dir string, memory *os.File) (state []byte, err error) {
	s, err := saved.Open(dir)
	if err != nil {
		return nil, err
	}
	if state, err = s.State(); err != nil {
		return nil, err
	}
	return state, s.LoadMemory(memory)
}

func (p parts) Line(ctx context.Context, m vm.Machine) (supervisor.Line, error) {
	return line.Dial(ctx, m.Line)
}

// makeVars gives a machine with UEFI its own copy of the firmware's variables.
func makeVars(m vm.Machine, caps qemu.Caps) error {
	if m.Boot.VarsFile == "" {
		return nil
	}
	if _, err := os.Stat(m.Boot.VarsFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if caps.UEFI == nil {
		return vm.WithHint(vm.Classify(vm.ErrHost, errors.New("there is no UEFI firmware for guests")), "sudo apt-get install ovmf")
	}
	if err := caps.UEFI.NewVars(m.Boot.VarsFile); err != nil {
		return err
	}
	if m.RunAs != nil {
		return os.Chown(m.Boot.VarsFile, m.RunAs.UID, m.RunAs.GID)
	}
	return nil
}

type runningMachine struct {
	qemu    *qemu.Process
	monitor *qmp.Client // nil until it is connected
	memory  *os.File    // nil: QEMU's own
	spec    vm.Machine
}

func (m runningMachine) Process() vm.ProcID    { return m.qemu.ID() }
func (m runningMachine) Done() <-chan struct{} { return m.qemu.Done() }
func (m runningMachine) Err() error            { return m.qemu.Wait(context.Background()) }

func (m runningMachine) Powerdown(ctx context.Context) error {
	if !m.qemu.Shutdown(ctx, m.monitor) {
		return vm.Classify(vm.ErrTimeout, errors.New("the guest did not shut down in time"))
	}
	return nil
}

func (m runningMachine) Kill() error {
	m.qemu.Kill()
	if m.monitor != nil {
		_ = m.monitor.Close() // it ended with the process
	}
	return closeMemory(m.memory)
}

func (m runningMachine) Plug(ctx context.Context, i int, s vm.Share) error {
	return qemu.PlugShare(ctx, m.monitor, i, s)
}

func (m runningMachine) Unplug(ctx context.Context, i int) error {
	return qemu.UnplugShare(ctx, m.monitor, i)
}

func (m runningMachine) PlugDevice(ctx context.Context, i int, s vm.Slot) error {
	return qemu.PlugDevice(ctx, m.monitor, i, s, m.spec.IOMMUFD)
}

func (m runningMachine) Pause(ctx context.Context) error  { return qmp.Stop(ctx, m.monitor) }
func (m runningMachine) Resume(ctx context.Context) error { return qmp.Cont(ctx, m.monitor) }

func (m runningMachine) Save(ctx context.Context, dir string) (ended bool, err error) {
	state, err := qemu.Save(ctx, m.monitor, filepath.Join(filepath.Dir(m.spec.QMP), "state.sock"), m.spec.RunAs)
	if err != nil {
		return false, err
	}
	return false, saved.Write(dir, m.memory, bytes.NewReader(state))
}

func (p parts) Guest(ctx context.Context, inst *instance.Instance, spec instance.Spec, dial supervisor.Dialer) (supervisor.Guest, error) {
	key, err := readKey(inst, lifecycle.ClientKeyFile)
	if err != nil {
		return nil, err
	}
	hostKey, err := readKey(inst, lifecycle.HostKeyFile)
	if err != nil {
		return nil, err
	}
	cfg := ssh.Config{
		User: spec.Guest.User, Key: key, HostKey: hostKey.PublicKey(),
		Emulated: spec.Machine.Accel != vm.AccelKVM,
	}
	client, err := ssh.Connect(ctx, func(ctx context.Context) (net.Conn, error) { return dial(ctx, 22) }, cfg)
	if err != nil {
		return nil, err
	}
	client.Watch(spec.Spare == "") // a spare is paused, and answers nothing
	return &runningGuest{Client: client, hostKey: hostKey, log: p.log}, nil
}

// readKey reads one of the instance's private keys.
func readKey(inst *instance.Instance, file string) (gossh.Signer, error) {
	pem, err := os.ReadFile(inst.Path(file))
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	key, err := gossh.ParsePrivateKey(pem)
	if err != nil {
		return nil, fmt.Errorf("read key %s: %w", inst.Path(file), err)
	}
	return key, nil
}

type runningGuest struct {
	*ssh.Client
	hostKey gossh.Signer
	log     *slog.Logger
}

func (g *runningGuest) Run(ctx context.Context, script string, out io.Writer) (int, error) {
	status, err := g.Client.Run(ctx, ssh.Command{Argv: []string{"sh", "-c", script}, Stdout: out, Stderr: out})
	return status.ExitCode(), err
}

// Copy merges a host file or directory into the guest, below its target's parent.
func (g *runningGuest) Copy(ctx context.Context, src, dst string) error {
	parent := path.Dir(dst)
	if code, err := g.Run(ctx, "mkdir -p "+vm.ShellQuote(parent), io.Discard); err != nil || code != 0 {
		return fmt.Errorf("make %s: exit code %d: %w", parent, code, err)
	}
	return g.Upload(ctx, src, parent, ssh.CopyOptions{})
}

func (g *runningGuest) Serve(l net.Listener) error {
	proxy := &ssh.Proxy{HostKey: g.hostKey, Log: g.log, Upstream: func(context.Context) (*ssh.Client, error) { return g.Client, nil }}
	return proxy.Serve(context.Background(), l)
}
