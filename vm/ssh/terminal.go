package ssh

import (
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Terminal is the local terminal in raw mode: every key goes to the guest,
// which echoes and interprets it.
type Terminal struct {
	Resize <-chan WindowSize // the newest size, after each change

	file    *os.File
	state   *term.State
	changes chan os.Signal
	stopped sync.WaitGroup
	once    sync.Once
	err     error
}

// IsTerminal says whether f is one.
func IsTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// OpenTerminal puts the terminal f into raw mode. Restore must be called.
func OpenTerminal(f *os.File) (*Terminal, error) {
	state, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("raw mode of %s: %w", f.Name(), err)
	}
	sizes := make(chan WindowSize, 1)
	t := &Terminal{Resize: sizes, file: f, state: state, changes: make(chan os.Signal, 1)}
	signal.Notify(t.changes, unix.SIGWINCH)
	t.stopped.Go(func() { t.watch(sizes) })
	return t, nil
}

// Size is the terminal's, or zero where it has none.
func (t *Terminal) Size() WindowSize {
	columns, rows, err := term.GetSize(int(t.file.Fd()))
	if err != nil {
		return WindowSize{}
	}
	return WindowSize{columns, rows}
}

// watch keeps only the newest size: nobody wants the ones between.
func (t *Terminal) watch(sizes chan WindowSize) {
	for range t.changes {
		select {
		case <-sizes:
		default:
		}
		sizes <- t.Size()
	}
}

// Restore gives the terminal back as it was. It may be called twice.
func (t *Terminal) Restore() error {
	t.once.Do(func() {
		signal.Stop(t.changes)
		close(t.changes)
		t.stopped.Wait()
		t.err = term.Restore(int(t.file.Fd()), t.state)
	})
	return t.err
}

// NotifySignals delivers the signals that a command line passes on to a
// remote command, until stop is called. They no longer end this process.
func NotifySignals() (signals <-chan os.Signal, stop func()) {
	ch := make(chan os.Signal, 16)
	signal.Notify(ch, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM)
	return ch, func() { signal.Stop(ch) }
}
