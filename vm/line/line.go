// Package line runs programs as root in a guest over a serial line of
// its machine: the way in before there is SSH, when a guest has just gone on
// from a saved state and still is nobody in particular.
//
// The guest's end, Listener, runs only while such a conversation is expected.
// What comes from the guest is bounded and never trusted.
package line

import (
	"bufio"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"strconv"
	"strings"
	"time"
)

// Port is the name of the serial port in the guest.
const Port = "org.agentvm.line"

// Listener is the guest's end, a Python program for root. It says that it is
// ready, sets the clock and the kernel's random numbers right with everything
// that comes, does it, and ends when the host hangs up. A process that is there
// already, with what it needs in memory, has a restored guest in order in half
// the time that starting date(1), mount(8) and their like would take.
var Listener = strings.Replace(listen, "# PROGRAMS\n", programs, 1)

var (
	//go:embed listen.py
	listen string
	//go:embed programs.py
	programs string
)

// Functions that the guest's end has. What they are told is package cloudinit's.
const (
	Clone  = "clone"  // makes the guest a machine of its own
	Claim  = "claim"  // gives a clone its name and its shares
	Resume = "resume" // gives the guest its shares again
)

// Call is a function and what it is told.
type Call struct {
	Function string          `json:"function"`
	Texts    []string        `json:"texts,omitempty"` // what it gets without having to parse Data; none is empty
	Data     json.RawMessage `json:"data"`
}

// Words of the guest's end.
const (
	ready = "agentvm-ready"
	done  = "agentvm-done "
)

// What a guest may say before it is taken for hostile, in bytes.
const (
	maxLine   = 4 << 10
	maxOutput = 256 << 10
)

// ErrProtocol is a guest that does not keep to the conversation.
var ErrProtocol = errors.New("the guest's end of the line misbehaves")

// ProgramError is a program that failed.
type ProgramError struct {
	Output string // its last lines
}

func (e *ProgramError) Error() string { return "the guest's program failed: " + e.Output }

// Shell returns a program that runs a shell script, with arguments, and says what
// it writes.
func Shell(script string, args ...string) string {
	words := []string{}
	for _, s := range append([]string{script}, args...) {
		words = append(words, quote(s))
	}
	return "run(" + strings.Join(words, ", ") + ")"
}

// AuthorizedKeys is the file, in a home directory, that says who may log in.
func AuthorizedKeys(home string) string { return path.Join(home, ".ssh/authorized_keys") }

// MeetServer returns a program for a guest whose SSH server waits for its host
// key, and who may log in is still to be written to a file. Clone then finds both open.
func MeetServer(authorizedKeysFile string) string {
	return "meet_sshd(" + quote(authorizedKeysFile) + ")"
}

func quote(s string) string { return strconv.QuoteToASCII(s) } // its escapes are Python's too

// Line is an open line. Its methods must not be called at the same time.
type Line struct {
	conn net.Conn
	in   *bufio.Reader
}

// Dial connects to the machine's end of the line. The machine must be there;
// the guest need not run.
func Dial(ctx context.Context, socket string) (*Line, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("serial line: %w", err)
	}
	return &Line{conn: conn, in: bufio.NewReaderSize(conn, maxLine)}, nil
}

// Close hangs up.
func (l *Line) Close() error { return l.conn.Close() }

// Ready waits until the guest listens.
func (l *Line) Ready(ctx context.Context) error {
	return l.within(ctx, "wait for the guest", func() error {
		for {
			text, err := l.read()
			if err != nil || text == ready {
				return err
			}
		}
	})
}

// Run runs a program, in Python, and calls each, unless it is nil, with every
// line that it says as it comes. A program that fails is a *ProgramError. The
// guest gets the host's time and 256 random bits along with it.
func (l *Line) Run(ctx context.Context, program string, each func(text string)) error {
	return l.send(ctx, "", program, each)
}

// Call is Run for a function that the guest's end has.
func (l *Line) Call(ctx context.Context, c Call, each func(text string)) error {
	function := " " + c.Function
	for _, text := range c.Texts {
		function += fmt.Sprintf(" %x", text)
	}
	return l.send(ctx, function, string(c.Data), each)
}

func (l *Line) send(ctx context.Context, function, text string, each func(text string)) error {
	return l.within(ctx, "serial line", func() error {
		entropy := make([]byte, 32)
		_, _ = rand.Read(entropy) // never fails
		now := time.Now()
		if _, err := fmt.Fprintf(l.conn, "%d %d.%09d %x%s\n%s", len(text), now.Unix(), now.Nanosecond(), entropy, function, text); err != nil {
			return err
		}
		var last []string
		for total := 0; total < maxOutput; {
			text, err := l.read()
			if err != nil {
				return err
			}
			if code, ok := strings.CutPrefix(text, done); ok {
				switch code {
				case "0":
					return nil
				case "1":
					return &ProgramError{strings.Join(last, "; ")}
				}
				return ErrProtocol
			}
			if each != nil {
				each(text)
			}
			last = append(last[max(0, len(last)-4):], text)
			total += len(text) + 1
		}
		return ErrProtocol
	})
}

// read reads one line of printable text.
func (l *Line) read() (string, error) {
	raw, err := l.in.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return "", ErrProtocol
	case errors.Is(err, io.EOF):
		return "", fmt.Errorf("%w: it hung up", ErrProtocol)
	case err != nil:
		return "", err
	}
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return -1
	}, string(raw)), nil
}

// within runs act, which uses the connection, until ctx ends.
func (l *Line) within(ctx context.Context, what string, act func() error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	struck := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(struck)
		_ = l.conn.SetDeadline(time.Unix(1, 0))
	})
	err := act()
	if !stop() {
		<-struck
		_ = l.conn.SetDeadline(time.Time{})
		if err != nil {
			err = context.Cause(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
