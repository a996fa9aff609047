package libvirt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
)

// Waits of a domain's life.
const (
	createTimeout  = time.Minute            // until QEMU runs, as libvirt sees it
	restoreTimeout = 10 * time.Minute       // until it has its memory again, which is read from a disk
	destroyTimeout = 10 * time.Second       // for a libvirt that is away to come back and end what it has begun
	killTimeout    = 8 * time.Second        // for libvirt, before it is done by hand
	wordTimeout    = 3 * time.Second        // for libvirt to say why QEMU has ended
	retryInterval  = 500 * time.Millisecond // between attempts to reach a libvirt that restarts
)

// Domain is a running domain. It cannot outlive whoever started it.
type Domain struct {
	conn    *Conn
	log     *slog.Logger
	dom     golibvirt.Domain
	meta    Metadata
	id      vm.ProcID
	console *serialConsole
	guard   *guard

	quit context.CancelFunc // ends the watch of events

	mu   sync.Mutex
	how  golibvirt.DomainEventStoppedDetailType // libvirt's last word about the end
	last string                                 // the same for people; empty: none
	told chan struct{}                          // closed once there is one
	good bool                                   // the guest shut down

	saving sync.Mutex // held while libvirt saves the machine, which ends it
	saved  bool       // it did
	over   chan struct{}
	bury   func() // closes over: nobody waits for what was saved any more

	done  chan struct{} // closed when QEMU has ended
	known chan struct{} // closed after err is set
	err   error
}

// Start creates the domain of m as a transient one: libvirt forgets it when it
// ends. One with a saved state goes on from there, paused and without its shares.
// program is this program, for the guard. conn stays the caller's.
func Start(ctx context.Context, conn *Conn, m vm.Machine, c Config, program string, log *slog.Logger) (_ *Domain, err error) {
	text, err := XML(m, c)
	if err != nil {
		return nil, err
	}
	limit := createTimeout
	if m.Saved != "" {
		limit = restoreTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, vm.Classify(vm.ErrTimeout, fmt.Errorf("libvirt did not start the machine within %v", limit)))
	defer cancel()
	if err := RemoveLeftover(ctx, conn, c.Metadata); err != nil {
		return nil, err
	}
	d := &Domain{conn: conn, log: log, meta: c.Metadata, told: make(chan struct{}), over: make(chan struct{}), done: make(chan struct{}), known: make(chan struct{})}
	d.bury = sync.OnceFunc(func() { close(d.over) })
	if d.console, err = listenConsole(c.Console, m.Console, c.Owner); err != nil {
		return nil, err
	}
	defer d.console.l.Close() // nobody else is waited for
	watch, quit := context.WithCancel(context.WithoutCancel(ctx))
	d.quit = quit
	events, err := d.subscribe(ctx, watch)
	if err != nil {
		quit()
		d.console.file.Close()
		return nil, err
	}
	create := func() (golibvirt.Domain, error) {
		return call(ctx, d.conn, "start the machine", func(l *golibvirt.Libvirt) (golibvirt.Domain, error) {
			return l.DomainCreateXML(text, golibvirt.DomainStartValidate)
		})
	}
	if m.Saved != "" {
		create = func() (golibvirt.Domain, error) { return d.goOn(ctx, m.Saved) }
	}
	err = d.create(ctx, create, program)
	if err == nil && m.Line != "" {
		err = tighten(m.Line)
	}
	if err == nil {
		err = checkConfined("", d.id, c.Owner)
	}
	if err != nil {
		d.abandon()
		go drain(events)
		return nil, err
	}
	go d.follow(watch, events)
	go d.wait(watch)
	return d, nil
}

// create has libvirt start QEMU, by do, learns which process that is, and has it
// end when we do, from then on.
func (d *Domain) create(ctx context.Context, do func() (golibvirt.Domain, error), program string) error {
	waiting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type answer struct {
		dom golibvirt.Domain
		err error
	}
	created := make(chan answer, 1)
	go func() {
		dom, err := do()
		if err != nil {
			cancel(err)
		}
		created <- answer{dom, err}
	}()
	id, err := d.console.accept(waiting)
	d.id = id
	if err == nil { // restoring takes its time
		d.guard, err = startGuard(program, id)
	}
	a := <-created
	d.dom = a.dom
	if a.err != nil {
		return explainCreate(a.err)
	}
	return err
}

// explainCreate says what to do about a machine that libvirt does not start.
func explainCreate(err error) error {
	var said golibvirt.Error
	if !errors.As(err, &said) {
		return err
	}
	err = vm.Classify(vm.ErrHost, err)
	switch golibvirt.ErrorNumber(said.Code) {
	case golibvirt.ErrXMLInvalidSchema, golibvirt.ErrConfigUnsupported:
		return vm.WithHint(err, "this libvirt lacks something that the machine needs; a newer one, or backend: qemu, has it")
	case golibvirt.ErrAccessDenied, golibvirt.ErrAuthFailed:
		return vm.WithHint(err, joinLibvirt)
	}
	return vm.WithHint(err, "agentvm doctor looks at libvirt; its own log is /var/log/libvirt/qemu/ or ~/.cache/libvirt/qemu/log/")
}

// abandon clears away a domain that did not get anywhere.
func (d *Domain) abandon() {
	d.quit()
	if err := d.id.Kill(); err != nil {
		d.log.Error("end QEMU", "error", err)
	}
	if d.guard != nil {
		d.guard.stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), destroyTimeout)
	defer cancel()
	if err := persist(ctx, func() error { return RemoveLeftover(ctx, d.conn, d.meta) }); err != nil {
		d.log.Error("clear away the domain", "error", err)
	}
}

// persist tries again while libvirt cannot be reached, until ctx ends.
func persist(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil || !errors.Is(err, ErrLost) && !absent(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryInterval):
		}
	}
}

// ErrForeign is a domain in the machine's place that is somebody else's.
var ErrForeign = errors.New("libvirt has a domain that is not agentvm's")

// RemoveLeftover ends a domain of this very machine that an earlier life has
// left. One with its id that is somebody else's is left alone, and an error.
func RemoveLeftover(ctx context.Context, conn *Conn, mine Metadata) error {
	dom, err := find(ctx, conn, mine.ID)
	if golibvirt.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	theirs, err := metadataOf(ctx, conn, dom)
	if golibvirt.IsNotFound(err) {
		return nil
	}
	if err != nil || theirs.ID != mine.ID {
		return vm.Classify(vm.ErrHost, fmt.Errorf("domain %q has the machine's UUID %s: %w", dom.Name, mine.ID, ErrForeign))
	}
	return destroy(ctx, conn, dom)
}

// find looks up the domain with a machine's id.
func find(ctx context.Context, conn *Conn, machine string) (golibvirt.Domain, error) {
	id, err := uuid.Parse(machine)
	if err != nil {
		return golibvirt.Domain{}, fmt.Errorf("look for the machine's domain: %w", err)
	}
	return call(ctx, conn, "look for the machine's domain", func(l *golibvirt.Libvirt) (golibvirt.Domain, error) {
		return l.DomainLookupByUUID(golibvirt.UUID(id))
	})
}

func metadataOf(ctx context.Context, conn *Conn, dom golibvirt.Domain) (Metadata, error) {
	text, err := call(ctx, conn, "read a domain's metadata", func(l *golibvirt.Libvirt) (string, error) {
		return l.DomainGetMetadata(dom, int32(golibvirt.DomainMetadataElement), golibvirt.OptString{Namespace}, 0)
	})
	if err != nil {
		return Metadata{}, err
	}
	return parseMetadata(text)
}

// destroy ends a domain at once; one that has ended is no error.
func destroy(ctx context.Context, conn *Conn, dom golibvirt.Domain) error {
	_, err := call(ctx, conn, "end the machine", func(l *golibvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainDestroyFlags(dom, 0)
	})
	var said golibvirt.Error
	if golibvirt.IsNotFound(err) || errors.As(err, &said) && golibvirt.ErrorNumber(said.Code) == golibvirt.ErrOperationInvalid {
		return nil
	}
	return err
}

// Process is QEMU's process.
func (d *Domain) Process() vm.ProcID { return d.id }

// Monitor is the domain's QMP monitor.
func (d *Domain) Monitor() Monitor { return Monitor{d.conn, d.dom} }

// Done is closed when QEMU has ended.
func (d *Domain) Done() <-chan struct{} { return d.done }

// Err waits for the end, and a moment more for libvirt to say why; nil is a
// guest's shutdown.
func (d *Domain) Err() error {
	<-d.known
	return d.err
}

// Powerdown asks the guest to shut down, and ends it when ctx does first.
func (d *Domain) Powerdown(ctx context.Context) error {
	if qmp.PowerdownUntil(ctx, d.Monitor(), d.done) {
		return nil
	}
	return vm.Classify(vm.ErrTimeout, errors.New("the guest did not shut down in time"))
}

// Kill ends the machine at once: by libvirt's hand, and where that cannot be
// reached, by our own. It may be called at any time.
func (d *Domain) Kill() error {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	d.bury()
	select {
	case <-d.done:
	default:
		if err := destroy(ctx, d.conn, d.dom); err != nil {
			d.log.Warn("libvirt does not end the machine", "error", err)
		}
	}
	// Nothing is done to a process that has ended.
	err := d.id.Kill()
	d.guard.stop()
	<-d.done
	<-d.console.done
	d.quit()
	<-d.known
	return err
}

// wait sees QEMU's end, whatever becomes of libvirt.
func (d *Domain) wait(ctx context.Context) {
	if fd, err := openProcess(d.id); err == nil {
		for {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, -1); err != unix.EINTR {
				break
			}
		}
		unix.Close(fd)
	}
	d.saving.Lock() // whoever saves it knows why it ends
	saved := d.saved
	d.saving.Unlock()
	if saved {
		<-d.over
	}
	close(d.done)
	select {
	case <-d.told:
	case <-ctx.Done():
	case <-time.After(wordTimeout):
	}
	d.mu.Lock()
	switch {
	case d.good, saved:
	case d.last != "":
		d.err = errors.New(d.last)
	default:
		d.err = errors.New("QEMU ended, and libvirt was not there to say why")
	}
	d.mu.Unlock()
	close(d.known)
}
