package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/sshd"
)

// serves is what a worker says when it does. It closes its output when it
// accepts no more connections.
const serves = "serves\n"

// serve is the worker. It runs as the user, who must not read the host key out
// of it.
func serve(user sshd.User) error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep the memory private: %w", err)
	}
	drain := make(chan os.Signal, 1)
	signal.Notify(drain, unix.SIGTERM)
	// What is ignored instead would be by all programs too.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT)

	port := os.NewFile(3, "port")
	l, err := net.FileListener(port)
	if err != nil {
		return fmt.Errorf("port: %w", err)
	}
	port.Close() // the listener has another descriptor
	if err := sshd.Rehearse(); err != nil {
		return fmt.Errorf("rehearse a login: %w", err)
	}
	pem, err := readAll(os.Stdin, drain)
	if err != nil || pem == nil {
		return err
	}
	key, err := gossh.ParsePrivateKey(pem)
	if err != nil {
		return fmt.Errorf("host key: %w", err)
	}
	server := &sshd.Server{User: user, HostKey: key}
	over := make(chan error, 1)
	go func() { over <- server.Serve(l) }()
	if _, err := os.Stdout.WriteString(serves); err != nil {
		return err
	}
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
