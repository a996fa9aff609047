package remote

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/console"
	"github.com/agentvm/agentvm/vm/libvirt"
)

// ErrConnection marks a host that cannot be reached, or was lost.
var ErrConnection = errors.New("the connection to the host failed")

// Times of a connection.
const (
	connectTimeout = 20 * time.Second
	persist        = time.Minute // how long a connection waits for the next command
	maxSaid        = 16 << 10    // bytes of what ssh and the other side say
)

// Conn is a way to run programs on another host.
type Conn struct {
	host    libvirt.Elsewhere
	control string // the socket of the one connection
	program string // this program there
}

// Dial connects, and puts this program on the host if it is not there. run is
// a private directory for a socket; ask lets ssh ask on the terminal.
func Dial(ctx context.Context, host libvirt.Elsewhere, run string, ask bool) (*Conn, error) {
	if _, err := exec.LookPath("ssh"); err != nil {
		return nil, vm.WithHint(vm.Classify(vm.ErrHost, err), "sudo apt-get install openssh-client")
	}
	sum := sha256.Sum256([]byte(host.Address()))
	c := &Conn{host: host, control: filepath.Join(run, "ssh-"+hex.EncodeToString(sum[:4]))}
	if err := c.connect(ctx, ask); err != nil {
		return nil, err
	}
	return c, c.install(ctx)
}

// Host is where it leads.
func (c *Conn) Host() libvirt.Elsewhere { return c.host }

// connect makes the connection that the others share, if there is none.
func (c *Conn) connect(ctx context.Context, ask bool) error {
	if c.alive(ctx) {
		return nil
	}
	// ssh goes on in the background with what it has of ours: a pipe to us
	// would never end.
	said, err := os.CreateTemp("", "agentvm-ssh")
	if err != nil {
		return err
	}
	defer os.Remove(said.Name())
	defer said.Close()
	args := []string{"-T", "-o", "ControlMaster=auto", "-o", fmt.Sprintf("ControlPersist=%d", persist/time.Second)}
	if !ask {
		args = append(args, "-o", "BatchMode=yes")
	}
	cmd := exec.CommandContext(ctx, "ssh", c.args(args, "true")...)
	cmd.Stderr = said
	err = cmd.Run()
	text := make([]byte, maxSaid)
	n, _ := said.ReadAt(text, 0)
	if err == nil {
		return nil
	}
	return c.failed(ctx, err, text[:n])
}

// args is ssh's command line for a command there, which its shell reads.
func (c *Conn) args(options []string, command string) []string {
	args := append([]string{
		"-S", c.control, "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3",
		"-o", fmt.Sprintf("ConnectTimeout=%d", connectTimeout/time.Second),
		"-o", "ForwardAgent=no", "-o", "ForwardX11=no", "-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=no",
		"-o", "RemoteCommand=none",
	}, options...)
	if c.host.Port != 0 {
		args = append(args, "-p", strconv.Itoa(c.host.Port))
	}
	if c.host.User != "" {
		args = append(args, "-l", c.host.User)
	}
	return append(args, "--", c.host.Host, command)
}

// shared are the options of a command that goes through the connection, and
// may not ask where it has to make one of its own.
var shared = []string{"-T", "-o", "ControlMaster=no", "-o", "BatchMode=yes"}

func (c *Conn) alive(ctx context.Context) bool {
	return exec.CommandContext(ctx, "ssh", c.args([]string{"-O", "check"}, "true")...).Run() == nil
}

// Close ends the connection that the next command would have used.
func (c *Conn) Close(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "ssh", c.args([]string{"-O", "exit"}, "true")...).CombinedOutput()
	if err != nil && c.alive(ctx) {
		return fmt.Errorf("end the connection to %s: %w: %s", c.host.Address(), err, out)
	}
	return nil
}

// failed explains the end of an ssh.
func (c *Conn) failed(ctx context.Context, err error, said []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	text := clean(said)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == lost {
		return vm.WithHint(fmt.Errorf("%w: %s: %s", ErrConnection, c.host.Address(), text), "try: ssh "+c.words()+" true")
	}
	return fmt.Errorf("on %s: %w: %s", c.host.Address(), err, text)
}

// lost is the exit code of an ssh that lost its connection or never had one.
const lost = 255

// words are ssh's arguments as a user would write them.
func (c *Conn) words() string {
	var words []string
	if c.host.Port != 0 {
		words = append(words, "-p", strconv.Itoa(c.host.Port))
	}
	if c.host.User != "" {
		words = append(words, "-l", c.host.User)
	}
	return strings.Join(append(words, c.host.Host), " ")
}

// clean makes what another host said fit for a terminal: its last lines.
func clean(said []byte) string {
	lines := strings.Split(strings.TrimSpace(string(said)), "\n")
	lines = lines[max(0, len(lines)-5):]
	for i, line := range lines {
		lines[i] = console.Printable([]byte(strings.TrimSpace(line)))
	}
	return strings.Join(lines, "; ")
}

// output runs a shell's line there, with an input, and returns what it prints.
func (c *Conn) output(ctx context.Context, script string, in io.Reader) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "ssh", c.args(shared, "sh -c "+vm.ShellQuote(script))...)
	out, said := &bounded{max: maxSaid}, &bounded{max: maxSaid}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, said
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's Ctrl-C is for us alone
	if err := cmd.Run(); err != nil {
		return nil, c.failed(ctx, err, said.Bytes())
	}
	return out.Bytes(), nil
}

// bounded keeps the beginning of what is written to it.
type bounded struct {
	bytes.Buffer
	max int
}

func (b *bounded) Write(p []byte) (int, error) {
	if room := b.max - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}
