package main

import (
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/signal"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/sshd"
)

// drainSignal has a worker accept no more connections. SIGTERM, which all that
// is left gets when the guest is shut down, ends it.
const drainSignal = unix.SIGUSR1

// What a worker says, a line each. It closes its output when it accepts no more
// connections.
const (
	ready  = "ready for the host key"
	serves = "serves"
)

// serve is the worker. It runs as the user, who must not read the host key out
// of it.
func (u login) serve() error {
	if err := unix.CloseRange(4, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep descriptors: %w", err)
	}
	user, keys, err := u.user()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep the memory private: %w", err)
	}
	drain := make(chan os.Signal, 1)
	signal.Notify(drain, drainSignal)
	sshd.DefaultSignals()

	port := os.NewFile(3, "port")
	l, err := net.FileListener(port)
	if err != nil {
		return fmt.Errorf("port: %w", err)
	}
	port.Close() // the listener has another descriptor
	if err := sshd.Rehearse(); err != nil {
		fmt.Fprintln(os.Stderr, "rehearse a login:", err) // the first one takes longer
	}
	fmt.Println(ready)
	pem, err := readAll(os.Stdin, drain)
	if err != nil || pem == nil {
		return err
	}
	key, err := gossh.ParsePrivateKey(pem)
	if err != nil {
		return fmt.Errorf("host key: %w", err)
	}
	server := &sshd.Server{User: user, HostKey: key, AuthorizedKeys: func() ([]byte, error) { return os.ReadFile(keys) }}
	over := make(chan error, 1)
	go func() { over <- server.Serve(l) }()
	fmt.Println(serves)
	<-drain
	l.Close()
	err = <-over
	if err := sshd.Forget(os.Stdin, os.Stdout); err != nil {
		return err
	}
	server.Wait()
	return err
}

// readAll returns nothing when the worker is told to drain before all is there.
func readAll(r io.Reader, drain <-chan os.Signal) ([]byte, error) {
	type result struct {
		data []byte
		err  error
	}
	read := make(chan result, 1)
	go func() {
		data, err := io.ReadAll(r)
		read <- result{data, err}
	}()
	select {
	case r := <-read:
		return r.data, r.err
	case <-drain:
		return nil, nil
	}
}
