package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/line"
	"github.com/agentvm/agentvm/vm/saved"
)

// mortal is a piece that ends when told to.
type mortal struct {
	once sync.Once
	done chan struct{}
	err  error
}

func newMortal() *mortal { return &mortal{done: make(chan struct{})} }

func (m *mortal) die(err error)         { m.once.Do(func() { m.err = err; close(m.done) }) }
func (m *mortal) Done() <-chan struct{} { return m.done }
func (m *mortal) Err() error            { <-m.done; return m.err }
func (m *mortal) Process() vm.ProcID    { return vm.ProcID{PID: 1 << 30} }

type fakeShare struct{ *mortal }

func (s fakeShare) Stop() error        { s.die(errors.New("stopped")); return nil }
func (s fakeShare) Warnings() []string { return nil }

type fakeMachine struct {
	*mortal
	deaf     bool // ignores the power button
	saveErr  error
	mortally bool // being saved is its end
	pauseErr error
	keeps    bool      // shares that are to be unplugged
	plugErr  error     // of a device of the host
	did      *[]string // what was asked of it, in order
}

func (m fakeMachine) Plug(_ context.Context, i int, s vm.Share) error {
	*m.did = append(*m.did, fmt.Sprintf("plug %d %s", i, s.Tag))
	return nil
}
func (m fakeMachine) PlugDevice(_ context.Context, i int, s vm.Slot) error {
	*m.did = append(*m.did, fmt.Sprintf("plug device %d %s", i, s.Functions[0].Address))
	return m.plugErr
}
func (m fakeMachine) Unplug(_ context.Context, i int) error {
	if m.keeps {
		return errors.New("the guest refused")
	}
	*m.did = append(*m.did, fmt.Sprintf("unplug %d", i))
	return nil
}
func (m fakeMachine) Pause(context.Context) error {
	*m.did = append(*m.did, "pause")
	return m.pauseErr
}
func (m fakeMachine) Resume(context.Context) error { *m.did = append(*m.did, "resume"); return nil }
func (m fakeMachine) Save(_ context.Context, dir string) (bool, error) {
	*m.did = append(*m.did, "save "+filepath.Base(dir))
	if m.saveErr != nil {
		return m.mortally, m.saveErr
	}
	if err := os.WriteFile(filepath.Join(dir, saved.ImageFile), []byte("all of it"), 0o600); err != nil {
		return false, err
	}
	return m.mortally, saved.SealImage(dir)
}

// fakeLine answers programs and calls with run; nil: calls log in, programs say nothing.
type fakeLine struct {
	run    func(ctx context.Context, script string, each func(string)) error
	closed func() // nil: nothing
}

func (l fakeLine) Ready(context.Context) error { return nil }
func (l fakeLine) Close() error {
	if l.closed != nil {
		l.closed()
	}
	return nil
}

func (l fakeLine) Run(ctx context.Context, script string, each func(string)) error {
	if l.run == nil {
		return nil
	}
	return l.run(ctx, script, each)
}

func (l fakeLine) Call(ctx context.Context, c line.Call, each func(string)) error {
	if l.run == nil {
		each("login")
		return nil
	}
	return l.run(ctx, c.Function+" "+string(c.Data), each)
}

func (m fakeMachine) Kill() error { m.die(errors.New("killed")); return nil }
func (m fakeMachine) Powerdown(ctx context.Context) error {
	if !m.deaf {
		m.die(nil)
	}
	return nil
}

type fakeGuest struct {
	*mortal
	run func(script string, out io.Writer) (int, error)
}

func (g fakeGuest) Run(ctx context.Context, script string, out io.Writer) (int, error) {
	if g.run == nil {
		return 0, nil
	}
	type result struct {
		code int
		err  error
	}
	c := make(chan result, 1)
	go func() { code, err := g.run(script, out); c <- result{code, err} }()
	select {
	case r := <-c:
		return r.code, r.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}
func (g fakeGuest) Watch(bool)                                 {}
func (g fakeGuest) Copy(context.Context, string, string) error { return nil }
func (g fakeGuest) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return nil
		}
		c.Close()
	}
}
func (g fakeGuest) Close() error { g.die(errors.New("closed")); return nil }

type fakeNetwork struct{}

func (fakeNetwork) Dial(context.Context, int) (net.Conn, error) { return nil, errors.New("no guest") }
func (fakeNetwork) Apply(instance.Spec, string) error           { return nil }
func (fakeNetwork) Close() error                                { return nil }

// world is a set of pieces whose fate the test decides.
type world struct {
	share        fakeShare
	machine      fakeMachine
	guests       chan fakeGuest // handed out one a login; empty: the login hangs
	line         fakeLine
	shareErr     error     // of the machine's own
	rehearsal    fakeShare // what a machine of the pool has while it rehearses
	rehearsalErr error
	qemuErr      error
	again        []fakeMachine // what is started after the first, where that is another; none: it fails
	started      int
	starting     func() // as the machine is started again
	anew         bool   // each start of a share gives another one

	devices    *fakeDevices
	devicesErr error
}

func newWorld() *world {
	w := &world{share: fakeShare{newMortal()}, rehearsal: fakeShare{newMortal()}, machine: fakeMachine{mortal: newMortal(), did: new([]string)}, guests: make(chan fakeGuest, 4)}
	w.guests <- fakeGuest{mortal: newMortal()}
	return w
}

func (w *world) Network(context.Context, instance.Spec, string, string) (Network, error) {
	return fakeNetwork{}, nil
}
func (w *world) Share(_ context.Context, _ instance.Spec, sh instance.Share, _, _ string) (Share, error) {
	if sh.Tag == rehearsal.Tag {
		return w.rehearsal, w.rehearsalErr
	}
	if w.anew {
		return fakeShare{newMortal()}, w.shareErr
	}
	return w.share, w.shareErr
}
func (w *world) Machine(ctx context.Context, m vm.Machine, _ string, trace Trace) (Machine, error) {
	trace("qemu", time.Now())
	w.started++
	switch n := w.started - 2; {
	case n < 0 || !w.machine.mortally:
		return w.machine, w.qemuErr
	case w.starting != nil:
		w.starting()
		<-ctx.Done()
		return nil, context.Cause(ctx)
	case n < len(w.again):
		*w.machine.did = append(*w.machine.did, "start from "+filepath.Base(m.Saved))
		return w.again[n], nil
	}
	return nil, errors.New("no more memory")
}
func (w *world) Devices(context.Context, instance.Spec) (Devices, error) {
	if w.devicesErr != nil {
		return nil, w.devicesErr
	}
	return w.devices, nil
}
func (w *world) Line(context.Context, vm.Machine) (Line, error) { return w.line, nil }
func (w *world) Guest(ctx context.Context, _ *instance.Instance, _ instance.Spec, _ Dialer) (Guest, error) {
	select {
	case g := <-w.guests:
		return g, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// life is a supervisor under test.
type life struct {
	t      *testing.T
	inst   *instance.Instance
	client *control.Client
	cancel context.CancelFunc
	result chan error
	run    string
}

func begin(t *testing.T, w *world, alter func(*instance.Spec)) *life {
	t.Helper()
	home := t.TempDir()
	run, err := os.MkdirTemp("", "avm") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	store := instance.Store{Dirs: instance.Dirs{State: home, Cache: home, Run: run}}
	inst, err := store.Create("test")
	if err != nil {
		t.Fatal(err)
	}
	id := "01234567-89ab-cdef-0123-456789abcdef"
	spec := instance.Spec{Name: "test", ID: id, BootTimeout: time.Minute,
		Shares: []instance.Share{{Tag: "workspace", Target: "/workspace"}},
		Guest:  instance.Guest{Directory: "/workspace"},
		Machine: vm.Machine{Console: inst.Path("console.log"),
			NICs: []vm.NIC{{Socket: "net.sock"}}, Shares: []vm.Share{{Tag: "workspace", Socket: "workspace.sock"}}},
	}
	if alter != nil {
		alter(&spec)
	}
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(spec.Machine.Console, []byte("booting\nKernel panic - \x1b[31mnot syncing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &life{t: t, inst: inst, cancel: cancel, result: make(chan error, 1), run: inst.RunDir(id)}
	l.client = control.NewClient(filepath.Join(l.run, control.Socket))
	go func() { l.result <- Run(ctx, inst, w, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { cancel(); l.end() })
	return l
}

// until waits for a state.
func (l *life) until(want instance.State) instance.Status {
	l.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		s, err := l.inst.Status()
		if err != nil {
			l.t.Fatal(err)
		}
		if s.State == want {
			return s
		}
		time.Sleep(5 * time.Millisecond)
	}
	s, _ := l.inst.Status()
	l.t.Fatalf("state is %s (%s), want %s", s.State, s.Reason, want)
	return s
}

// end waits for the supervisor's end and checks that nothing is left.
func (l *life) end() error {
	l.t.Helper()
	select {
	case err := <-l.result:
		l.result <- err
		if _, statErr := os.Stat(l.run); !os.IsNotExist(statErr) {
			l.t.Errorf("the run directory is left: %v", statErr)
		}
		return err
	case <-time.After(time.Minute):
		l.t.Fatal("the supervisor does not end")
		return nil
	}
}
