package sshd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/ssh/wire"
)

// session is one program, RFC 4254 section 6.
type session struct {
	c  *connection
	ch gossh.Channel

	env      []string
	terminal *terminal
	cmd      *exec.Cmd   // nil until it runs
	ours     []io.Closer // our ends of what it reads and writes
	copying  sync.WaitGroup

	mu    sync.Mutex
	ended bool // the program has, and its process group may be another's
}

// serve answers requests until the client closes the channel, or the program
// has ended and nothing writes any more to the pipes that it had.
func (s *session) serve(requests <-chan *gossh.Request) {
	defer s.close()
	for r := range requests {
		err := s.request(r)
		if r.WantReply {
			r.Reply(err == nil, nil)
		}
		// The end must not overtake the reply.
		if err == nil && wire.Starts(r.Type) {
			go s.wait()
		}
	}
}

func (s *session) close() {
	s.ch.Close()
	for _, f := range s.ours {
		f.Close()
	}
	if s.terminal != nil {
		s.terminal.close()
	}
}

var (
	errUnknown    = errors.New("no such request")
	errRuns       = errors.New("the session's program runs")
	errNoTerminal = errors.New("the session has no terminal")
)

func (s *session) request(r *gossh.Request) error {
	switch r.Type {
	case "window-change":
		if s.terminal == nil {
			return errNoTerminal
		}
		return s.terminal.resize(r.Payload)
	case "signal":
		return s.signal(r.Payload)
	}
	if s.cmd != nil {
		return errRuns
	}
	switch r.Type {
	case "env":
		return s.setenv(r.Payload)
	case "pty-req":
		if s.terminal != nil {
			return errors.New("the session has a terminal")
		}
		var err error
		s.terminal, err = openTerminal(r.Payload)
		return err
	case "exec", "shell", "subsystem", wire.ProgramRequest:
		return s.start(r)
	}
	return errUnknown
}

func (s *session) setenv(payload []byte) error {
	var m struct{ Name, Value string }
	if err := gossh.Unmarshal(payload, &m); err != nil {
		return err
	}
	if m.Name == "" || strings.ContainsAny(m.Name, "=\x00") || strings.Contains(m.Value, "\x00") {
		return fmt.Errorf("%q cannot be a variable", m.Name)
	}
	s.env = append(s.env, m.Name+"="+m.Value)
	return nil
}

// start runs what the request names.
func (s *session) start(r *gossh.Request) error {
	command := s.command
	if r.Type == wire.ProgramRequest {
		command = s.program
	}
	cmd, err := command(r)
	if err != nil {
		return err
	}
	if s.terminal != nil {
		err = s.startOnTerminal(cmd)
	} else {
		err = s.startOnPipes(cmd)
	}
	if err == nil {
		s.cmd = cmd
	}
	return err
}

func (s *session) command(r *gossh.Request) (*exec.Cmd, error) {
	var m struct{ Text string }
	if r.Type != "shell" {
		if err := gossh.Unmarshal(r.Payload, &m); err != nil {
			return nil, err
		}
	}
	user := s.c.user
	name := filepath.Base(user.Shell)
	cmd := &exec.Cmd{Path: user.Shell, Dir: user.Home, Env: s.environ(), SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	switch {
	case r.Type == "exec":
		cmd.Args = []string{name, "-c", m.Text}
	case r.Type == "shell":
		cmd.Args = []string{"-" + name} // a login shell
	case m.Text == "sftp" && user.Sftp != "":
		cmd.Path, cmd.Args = user.Sftp, []string{user.Sftp}
	default:
		return nil, fmt.Errorf("there is no subsystem %q", m.Text)
	}
	if !isDirectory(cmd.Dir) {
		cmd.Dir = "/"
	}
	return cmd, nil
}

// startOnPipes gives the program a pipe for each of its streams. A process
// that it leaves behind may keep them, and the session, as with OpenSSH.
func (s *session) startOnPipes(cmd *exec.Cmd) error {
	var theirs []*os.File
	var ours [3]*os.File
	started := false
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
		for _, f := range ours {
			if f != nil && !started {
				f.Close()
			}
		}
	}()
	for i := range ours {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		if i == 0 {
			r, w = w, r
		}
		ours[i], theirs = r, append(theirs, w)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs[0], theirs[1], theirs[2]
	if err := cmd.Start(); err != nil {
		return err
	}
	started = true
	for _, f := range ours {
		s.ours = append(s.ours, f)
	}
	s.copying.Go(func() { io.Copy(s.ch, ours[1]) })
	s.copying.Go(func() { io.Copy(s.ch.Stderr(), ours[2]) })
	go s.feed(ours[0], true)
	return nil
}

// startOnTerminal gives the program the terminal for everything.
func (s *session) startOnTerminal(cmd *exec.Cmd) error {
	t := s.terminal
	cmd.Stdin, cmd.Stdout, cmd.Stderr = t.theirs, t.theirs, t.theirs
	cmd.SysProcAttr.Setctty = true
	if err := cmd.Start(); err != nil {
		return err
	}
	t.theirs.Close() // so that the last process to close it ends the output
	s.copying.Go(func() { io.Copy(s.ch, t.ours) })
	go s.feed(t.ours, false)
	return nil
}

// feed carries input, whose end closes a pipe and means nothing to a terminal.
func (s *session) feed(to *os.File, closes bool) {
	io.Copy(to, s.ch)
	if closes {
		to.Close()
	}
	io.Copy(io.Discard, s.ch) // of a program that has stopped reading
}

// wait tells how the program ended, and closes the session when its output has.
func (s *session) wait() {
	var err error
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Waitid(unix.P_PID, s.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.cmd.Wait() // its error is the exit status
	status, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		s.ch.SendRequest("exit-signal", false, gossh.Marshal(&struct {
			Name          string
			Core          bool
			Message, Lang string
		}{Name: strings.TrimPrefix(unix.SignalName(status.Signal()), "SIG"), Core: status.CoreDump()}))
	} else {
		s.ch.SendRequest("exit-status", false, gossh.Marshal(&struct{ Code uint32 }{uint32(s.cmd.ProcessState.ExitCode())}))
	}
	if s.terminal != nil {
		s.terminal.drain(s.ch, s.copying.Wait)
	}
	s.copying.Wait()
	s.ch.Close()
}

// signal sends one to the program's process group.
func (s *session) signal(payload []byte) error {
	var m struct{ Name string }
	if err := gossh.Unmarshal(payload, &m); err != nil {
		return err
	}
	number := unix.SignalNum("SIG" + m.Name)
	if number == 0 {
		return fmt.Errorf("there is no signal %q", m.Name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil || s.ended {
		return errors.New("no program runs")
	}
	return unix.Kill(-s.cmd.Process.Pid, number)
}
