package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/ssh/wire"
)

// Command is one program to run in the guest.
type Command struct {
	// Argv is run as it is, without any expansion. Alternatively Shell is a
	// line for the guest user's login shell. With neither: a login shell.
	Argv  []string
	Shell string

	Dir string            // where it starts; relative to the home directory
	Env map[string]string // travels as SSH env requests

	// TTY gives it a terminal of kind Term and of Size. Stderr is not used
	// then: a terminal has one output.
	TTY    bool
	Term   string // empty: "xterm-256color"
	Size   WindowSize
	Resize <-chan WindowSize

	// Stdin nil is an empty input, and nothing is read. A Stdin that is an
	// *os.File is not read any more once the program has ended.
	Stdin          io.Reader
	Stdout, Stderr io.Writer // nil: thrown away

	// Signals are passed on to the program's process group.
	Signals <-chan os.Signal

	// Grace is the time between SIGTERM and SIGKILL when the context ends.
	// 0: 3 s.
	Grace time.Duration
}

// WindowSize is a terminal's, in characters.
type WindowSize struct{ Columns, Rows int }

// ExitStatus is how a remote program ended.
type ExitStatus struct {
	Code   int    // its exit code, if no signal ended it
	Signal string // without "SIG"; empty: none
}

// ExitCode is the code that a shell would show: 128+n for signal n.
func (e ExitStatus) ExitCode() int {
	if e.Signal == "" {
		return e.Code
	}
	return 128 + int(unix.SignalNum("SIG"+e.Signal))
}

// Wire formats of RFC 4254 section 6.
type (
	ptyMsg struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}
	windowMsg struct{ Columns, Rows, Width, Height uint32 }
	envMsg    struct{ Name, Value string }
	execMsg   struct{ Command string }
	signalMsg struct{ Signal string }
)

// terminalModes ask for a UTF-8 terminal (IUTF8, RFC 8160), so that erasing a
// character erases all its bytes, and name a line speed as OpenSSH does.
const terminalModes = "\x2a\x00\x00\x00\x01" + "\x80\x00\x00\x96\x00" + "\x81\x00\x00\x96\x00" + "\x00"

// Run runs cmd and returns how it ended. An error means that it could not be
// run or that its end is not known; it wraps [ErrConnection] when the
// connection is to blame. When ctx ends first, the program gets SIGTERM, then
// SIGKILL, and Run returns the context's cause.
func (c *Client) Run(ctx context.Context, cmd Command) (ExitStatus, error) {
	line, err := cmd.commandLine()
	if err != nil {
		return ExitStatus{}, err
	}
	ch, reqs, err := c.openChannel(ctx, sessionChannel, nil)
	if err != nil {
		return ExitStatus{}, err
	}
	s := &session{client: c, ch: ch, cmd: &cmd, ended: make(chan struct{})}
	go s.collect(reqs)
	defer s.ch.Close()
	if err := s.start(ctx, line); err != nil {
		return ExitStatus{}, err
	}
	return s.communicate(ctx)
}

// session is one running command.
type session struct {
	client *Client
	ch     gossh.Channel
	cmd    *Command

	ended  chan struct{} // closed when the channel is
	status *ExitStatus   // set before ended is closed, if it came
}

// collect keeps the exit status.
func (s *session) collect(reqs <-chan *gossh.Request) {
	defer close(s.ended)
	for r := range reqs {
		switch r.Type {
		case "exit-status":
			var m struct{ Code uint32 }
			if gossh.Unmarshal(r.Payload, &m) == nil {
				s.status = &ExitStatus{Code: int(m.Code)}
			}
		case "exit-signal":
			var m struct {
				Signal        string
				Core          bool
				Message, Lang string
			}
			if gossh.Unmarshal(r.Payload, &m) == nil {
				// A signal outside the RFC's list is "NAME@openssh.com".
				name, _, _ := strings.Cut(m.Signal, "@")
				s.status = &ExitStatus{Signal: name}
			}
		}
		if r.WantReply {
			r.Reply(false, nil)
		}
	}
}

// start sends what comes before the program runs.
func (s *session) start(ctx context.Context, line string) error {
	for _, name := range slices.Sorted(maps.Keys(s.cmd.Env)) {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return fmt.Errorf("%q is no name for an environment variable", name)
		}
		ok, err := s.client.request(ctx, s.ch, "env", gossh.Marshal(&envMsg{name, s.cmd.Env[name]}))
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w %s", ErrEnvRefused, name)
		}
	}
	if s.cmd.TTY {
		term := s.cmd.Term
		if term == "" {
			term = "xterm-256color"
		}
		size := s.cmd.Size
		ok, err := s.client.request(ctx, s.ch, "pty-req", gossh.Marshal(&ptyMsg{
			Term: term, Columns: uint32(size.Columns), Rows: uint32(size.Rows), Modes: terminalModes,
		}))
		if err != nil {
			return err
		}
		if !ok {
			return errors.New("the guest gives no terminal")
		}
	}
	if len(s.cmd.Argv) > 0 {
		p := wire.Program{Argv: s.cmd.Argv, Dir: s.cmd.Dir}
		if ok, err := s.client.request(ctx, s.ch, wire.ProgramRequest, p.Marshal()); ok || err != nil {
			return err
		}
		// It takes a shell, there or in general.
	}
	request, payload := "exec", gossh.Marshal(&execMsg{line})
	if line == "" {
		request, payload = "shell", nil
	}
	ok, err := s.client.request(ctx, s.ch, request, payload)
	if err == nil && !ok {
		err = fmt.Errorf("the guest refuses the %s request", request)
	}
	return err
}

// communicate carries input, output and events until the program has ended
// and its output is written.
func (s *session) communicate(ctx context.Context) (ExitStatus, error) {
	// Nothing waits for the feeder: it may be blocked in a Read that cannot
	// be interrupted, or by a guest that hangs. It ends with either.
	input := newInput(s.cmd.Stdin)
	go s.feed(input)
	defer input.stop()

	events, stopEvents := context.WithCancel(ctx)
	var passing sync.WaitGroup
	passing.Go(func() { s.passEvents(events) })
	defer passing.Wait()
	defer stopEvents()

	outputs := make(chan error, 2)
	go func() { outputs <- copyOut(s.cmd.Stdout, s.ch, "output") }()
	go func() { outputs <- copyOut(s.cmd.Stderr, s.ch.Stderr(), "error output") }()
	for pending := 2; pending > 0; pending-- {
		select {
		case err := <-outputs:
			if err != nil {
				s.signal("HUP")
				return ExitStatus{}, err
			}
		case <-ctx.Done():
			s.terminate(outputs, pending)
			return ExitStatus{}, context.Cause(ctx)
		}
	}
	select {
	case <-s.ended:
	case <-ctx.Done():
		s.terminate(nil, 0)
		return ExitStatus{}, context.Cause(ctx)
	}
	if s.status == nil {
		return ExitStatus{}, s.client.connectionError(errors.New("the session ended without an exit status"))
	}
	return *s.status, nil
}

func copyOut(to io.Writer, from io.Reader, what string) error {
	if to == nil {
		to = io.Discard
	}
	if _, err := io.Copy(to, from); err != nil {
		return fmt.Errorf("write the command's %s: %w", what, err)
	}
	return nil
}

func (s *session) feed(input *input) {
	defer input.close()
	io.Copy(s.ch, input)
	// A terminal has no end of input, and sshd would take this one for the
	// end of window changes too.
	if !s.cmd.TTY {
		s.ch.CloseWrite()
	}
}

// passEvents passes on signals and window sizes until the program has ended.
func (s *session) passEvents(ctx context.Context) {
	signals, resize := s.cmd.Signals, s.cmd.Resize
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.ended:
			return
		case sig, ok := <-signals:
			if !ok {
				signals = nil
			} else if name := signalName(sig); name != "" {
				s.signal(name)
			}
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			s.ch.SendRequest("window-change", false, gossh.Marshal(&windowMsg{
				Columns: uint32(size.Columns), Rows: uint32(size.Rows),
			}))
		}
	}
}

func (s *session) signal(name string) {
	s.ch.SendRequest("signal", false, gossh.Marshal(&signalMsg{name}))
}

// terminate ends the program, politely first, and waits for what is still to
// come from the given number of outputs. It does not wait for ever.
func (s *session) terminate(outputs <-chan error, pending int) {
	grace := s.cmd.Grace
	if grace == 0 {
		grace = 3 * time.Second
	}
	s.signal("TERM")
	select {
	case <-s.ended:
	case <-time.After(grace):
		s.signal("KILL")
	}
	limit := time.After(time.Second)
	for range pending {
		select {
		case <-outputs:
		case <-limit:
			return
		}
	}
}

// signalName is the name that RFC 4254 section 6.10 knows sig by, or "".
func signalName(sig os.Signal) string {
	n, ok := sig.(syscall.Signal)
	if !ok {
		return ""
	}
	switch n {
	case unix.SIGABRT, unix.SIGALRM, unix.SIGFPE, unix.SIGHUP, unix.SIGILL, unix.SIGINT, unix.SIGKILL,
		unix.SIGPIPE, unix.SIGQUIT, unix.SIGSEGV, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2:
		return strings.TrimPrefix(unix.SignalName(n), "SIG")
	}
	return ""
}
