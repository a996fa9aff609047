package helper

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

// NewTaker returns who takes devices from this host for this process: itself
// where it is root, else the helper, by the rights that root has given.
func NewTaker(host gpu.Host) (gpu.Taker, error) {
	if os.Geteuid() == 0 {
		return &gpu.Manager{Host: host}, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	return &client{exe: exe, run: runWith}, nil
}

// client asks the helper. The nodes of what it binds become the caller's.
type client struct {
	exe string
	run func(ctx context.Context, argv []string, in []byte) (out []byte, said string, err error)
}

// Bind is of [gpu.Taker]. Force is refused: the user cannot overrule root.
func (c *client) Bind(ctx context.Context, r gpu.Request) ([]*gpu.Journal, error) {
	if r.Force {
		return nil, vm.WithHint(vm.Classify(vm.ErrPolicy, errors.New("only root may take a card against what speaks against it")), "sudo agentvm gpu bind --force "+strings.Join(r.Devices, " "))
	}
	req := request{Do: bind, Devices: r.Devices, Name: r.Owner.Name, Plain: r.Plain}
	if !r.Owner.Keep {
		req.Process = r.Owner.Process
	}
	a, err := c.ask(ctx, req)
	return a.Journals, err
}

// Release is of [gpu.Taker].
func (c *client) Release(ctx context.Context, addresses ...string) ([]gpu.Outcome, error) {
	a, err := c.ask(ctx, request{Do: release, Devices: addresses})
	return a.Outcomes, err
}

// Recover is of [gpu.Taker].
func (c *client) Recover(ctx context.Context) ([]gpu.Outcome, error) {
	a, err := c.ask(ctx, request{Do: recoverStale})
	return a.Outcomes, err
}

// ask sends a request to the helper: through sudo where that asks for no
// password, else through pkexec, which may ask at the desktop.
func (c *client) ask(ctx context.Context, req request) (response, error) {
	req.Version = requestVersion
	data, err := json.Marshal(req)
	if err != nil {
		return response{}, err
	}
	var said []string
	sudo := true
	for _, argv := range [][]string{{"sudo", "-n", "--", c.exe, Arg}, {"pkexec", c.exe, Arg}} {
		out, stderr, err := c.run(ctx, argv, data)
		if len(out) > 0 { // it ran, and so it is what counts
			return read(out)
		}
		if text, ok := strings.CutPrefix(stderr, complaint); ok {
			return response{}, vm.Classify(vm.ErrHost, fmt.Errorf("the helper for cards: %s", strings.TrimSpace(text)))
		}
		if errors.Is(err, exec.ErrNotFound) {
			sudo = sudo && argv[0] != "sudo"
		} else {
			said = append(said, fmt.Sprintf("%s: %s", argv[0], lastLine(stderr, err)))
		}
		if ctx.Err() != nil {
			break
		}
	}
	if len(said) == 0 {
		said = []string{"neither sudo nor pkexec is there"}
	}
	hint := "let root run once what this prints: agentvm gpu helper-setup"
	if sudo {
		name, err := Self()
		if err != nil {
			name = "#" + strconv.Itoa(os.Getuid()) // as sudoers(5) writes numbers
		}
		hint = fmt.Sprintf("let root do this once: echo '%s' >/etc/sudoers.d/agentvm-gpu (agentvm gpu helper-setup has the rest)", sudoersLine(name, c.exe))
	}
	return response{}, vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("only root may change drivers, and the helper cannot be run as root (%s)", strings.Join(said, "; "))), hint)
}

// complaint is what the helper begins with when it gives no answer.
const complaint = "agentvm " + Arg + ": "

func read(out []byte) (response, error) {
	dec := json.NewDecoder(bytes.NewReader(out))
	dec.DisallowUnknownFields()
	var a response
	if err := dec.Decode(&a); err != nil {
		return response{}, fmt.Errorf("read the helper's answer: %w", err)
	}
	if a.Error == "" {
		return a, nil
	}
	err := errors.New(a.Error)
	if class := classes[a.Class]; class != nil {
		err = vm.Classify(class, err)
	}
	if a.Hint != "" {
		err = vm.WithHint(err, a.Hint)
	}
	return a, err
}

// lastLine is what a program said in the end: sudo warns of other things first.
func lastLine(text string, err error) string {
	text = strings.TrimSpace(text)
	if line := text[strings.LastIndexByte(text, '\n')+1:]; line != "" {
		return line
	}
	return fmt.Sprint(err)
}

// runWith runs a program with input and bounds what it says. It waits for its
// end whatever ctx says: the program is root's, and cannot be killed by us.
// Ctrl-C reaches it by the terminal.
func runWith(ctx context.Context, argv []string, in []byte) ([]byte, string, error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	out, said := bounded{max: maxResponse}, bounded{max: 4 << 10}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &said
	err := cmd.Run()
	return out.kept, string(said.kept), err
}

// bounded keeps the first max bytes.
type bounded struct {
	kept []byte
	max  int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.kept = append(b.kept, p[:min(len(p), b.max-len(b.kept))]...)
	return len(p), nil
}
