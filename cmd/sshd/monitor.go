package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// drainTimeout bounds how long a worker takes to stop accepting connections.
const drainTimeout = 30 * time.Second

// monitor is root's process.
type monitor struct {
	login   login
	listen  string
	hostKey string
	pidFile string
}

var (
	errStopped    = errors.New("stopped")
	errNotServing = errors.New("the worker does not serve")
)

func (m monitor) run() error {
	// Workers are told when the thread that started them ends.
	runtime.LockOSThread()
	defer os.Remove(m.pidFile)
	port, err := m.port()
	if err != nil {
		return err
	}
	again, stop := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGHUP)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	for {
		os.Remove(m.pidFile)
		w, err := m.start(port)
		if err != nil {
			return err
		}
		if err := m.give(w, stop); errors.Is(err, errStopped) {
			return w.drain()
		} else if err != nil {
			return errors.Join(err, w.drain())
		}
		select {
		case <-again:
			// Whoever connects from now on is shown the new host key.
			if err := w.drain(); err != nil {
				return err
			}
		case <-stop:
			return w.drain()
		case <-w.drained:
			return errors.New("the worker ended")
		}
	}
}

// port is where all workers listen, one after the other, so that none of them
// refuses a connection.
func (m monitor) port() (*os.File, error) {
	l, err := net.Listen("tcp", m.listen)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.(*net.TCPListener).File()
}

// worker is a process that serves, or waits for its host key.
type worker struct {
	cmd     *exec.Cmd
	key     io.WriteCloser
	ready   chan struct{} // closed when all that it lacks is the key
	serves  chan struct{} // closed when it does
	drained chan struct{} // closed when it accepts no more connections
}

// listen listens to what the worker says, and waits for its end.
func (w *worker) listen(says io.Reader) {
	for lines := bufio.NewScanner(says); lines.Scan(); {
		switch lines.Text() {
		case ready:
			close(w.ready)
		case serves:
			close(w.serves)
		}
	}
	close(w.drained)
	w.cmd.Wait()
}

// start starts a worker, so that it has all that it needs in memory while the
// host key is still to come.
func (m monitor) start(port *os.File) (*worker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-worker", "-shell", m.login.shell, "-authorized-keys", m.login.keys, m.login.name)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{port}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: drainSignal}
	if os.Getuid() == 0 {
		if cmd.SysProcAttr.Credential, err = m.login.credential(); err != nil {
			return nil, err
		}
	}
	w := &worker{cmd: cmd, ready: make(chan struct{}), serves: make(chan struct{}), drained: make(chan struct{})}
	if w.key, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	says, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go w.listen(says)
	return w, nil
}

// give waits for the host key, and for the worker to serve with it.
func (m monitor) give(w *worker, stop <-chan os.Signal) error {
	result := make(chan error, 1)
	go func() { result <- m.giveKey(w) }()
	select {
	case <-stop:
		return errStopped
	case <-w.drained:
		return errNotServing
	case err := <-result:
		if err != nil {
			return err
		}
	}
	return os.WriteFile(m.pidFile, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644)
}

func (m monitor) giveKey(w *worker) error {
	select {
	case <-w.ready:
	case <-w.drained:
		return errNotServing
	}
	key, err := os.ReadFile(m.hostKey)
	if err != nil {
		return err
	}
	if _, err := w.key.Write(key); err != nil {
		return err
	}
	w.key.Close()
	select {
	case <-w.serves:
		return nil
	case <-w.drained:
		return errNotServing
	}
}

// drain has a worker accept no more connections, and serve those it has to
// their end. It returns once that is so.
func (w *worker) drain() error {
	if err := w.cmd.Process.Signal(drainSignal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-w.drained:
		return nil
	case <-time.After(drainTimeout):
		return errors.New("the worker does not stop accepting connections")
	}
}
