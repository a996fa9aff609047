package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/mirror"
)

// Workspace is a directory here that has a copy there.
type Workspace struct {
	Dir   string // here
	State string // directory of ours for what is known of both copies
	Copy  Copy

	// Guarded paths are not the guest's to change: see [mirror.Compare].
	Guarded []string

	// Sending is told before that many paths go there, with that many bytes of
	// content, and gives what is to be told the part that is done, 0 to 1. nil:
	// nobody is.
	Sending func(paths int, bytes int64) (progress func(part float64))
}

// Copy names the copy of a workspace on the other host.
type Copy struct {
	ID   string `json:"id"`   // random, of this workspace alone
	Name string `json:"name"` // of its directory
}

// InStep is what a Sync came to.
type InStep struct {
	Pushed, Pulled int      // paths
	Left           []string // what cannot be copied and stays here
	Changed        []string // what changed while it was copied, and is the next one's
	There          []string // what cannot be copied and is only there
	Gone           bool     // there was a copy, and is none any more: it was made anew
}

// ErrConflict marks a workspace that changed on both sides.
var ErrConflict = errors.New("changed here and there")

// Names of the files in State, and of the side's own.
const (
	baseFile  = "base.json"  // what was last the same on both sides
	knownFile = "known.json" // what was last seen on one
)

// Sync brings both copies in step. Where the same path changed on both, it
// does the rest, and returns an error that wraps ErrConflict, unless keep says
// whose version is right.
func (w Workspace) Sync(ctx context.Context, c *Conn, keep mirror.Keep) (InStep, error) {
	var result InStep
	root, err := os.OpenRoot(w.Dir)
	if err != nil {
		return result, vm.Classify(vm.ErrUsage, fmt.Errorf("open the workspace: %w", err))
	}
	defer root.Close()
	here, err := scanKnown(ctx, root, filepath.Join(w.State, knownFile))
	if err != nil {
		return result, fmt.Errorf("look at the workspace: %w", err)
	}
	known, err := readJSON[base](filepath.Join(w.State, baseFile))
	if err != nil {
		return result, err
	}
	same := known.Paths
	seen, err := Do[scanned](ctx, c, look{w.Copy, same.Sum()}, opScan)
	if seen.Known {
		seen.Manifest = same
	}
	if err == nil {
		err = seen.Manifest.Check()
	}
	if err != nil {
		return result, fmt.Errorf("look at the workspace on %s: %w", c.host.Address(), err)
	}
	if seen.Made != known.Made { // nothing in it was deleted by anybody
		result.Gone = len(same) > 0
		same = nil
	}
	plan := mirror.Compare(same, here, seen.Manifest, keep, w.Guarded)
	failures, err := w.carryOut(ctx, c, root, plan, seen.Made)
	if err != nil {
		return result, fmt.Errorf("bring the workspace in step with %s: %w", c.host.Address(), err)
	}
	result.Pushed, result.Pulled = len(plan.Push), len(plan.Pull)
	for p, e := range here {
		if t := seen.Manifest[p]; e.Kind == mirror.Other && t == nil {
			result.Left = append(result.Left, p)
		}
	}
	result.There = slices.DeleteFunc(seen.Odd, func(p string) bool { return here[p] != nil })
	slices.Sort(result.Left)
	slices.Sort(result.There)
	for _, f := range failures {
		if f.Changed {
			result.Changed = append(result.Changed, f.Path)
		}
	}
	failures = slices.DeleteFunc(failures, func(f mirror.Failure) bool { return f.Changed })
	return result, errors.Join(conflicts(plan.Conflicts), failed(failures))
}

// carryOut does what the plan says, and notes what is the same afterwards.
func (w Workspace) carryOut(ctx context.Context, c *Conn, root *os.Root, plan mirror.Plan, made string) ([]mirror.Failure, error) {
	// What fails halfway is the same on both sides or not, which the next
	// comparison sees.
	keep := func() error { return writeJSON(filepath.Join(w.State, baseFile), base{made, plan.Base}) }
	if err := keep(); err != nil {
		return nil, err
	}
	failures, err := w.push(ctx, c, root, plan.Push)
	if err != nil {
		return nil, err
	}
	mirror.Done(plan.Base, plan.Push, failures)
	more, err := w.pull(ctx, c, root, plan.Pull)
	if err != nil {
		return nil, err
	}
	mirror.Done(plan.Base, plan.Pull, more)
	return append(failures, more...), keep()
}

// base is what was last the same on both sides.
type base struct {
	Made  string          `json:"made"` // the identity of the copy
	Paths mirror.Manifest `json:"paths"`
}

func (w Workspace) push(ctx context.Context, c *Conn, root *os.Root, changes []mirror.Change) ([]mirror.Failure, error) {
	if len(changes) == 0 {
		return nil, nil
	}
	call, err := c.Start(ctx, opChange)
	if err != nil {
		return nil, err
	}
	var reply Reply[[]mirror.Failure]
	if err = WriteFrame(call.In, transfer{w.Copy, changes}); err == nil {
		err = mirror.Send(ctx, root, changes, w.sending(call.In, changes))
	}
	// What was in the way of sending may be told by the answer.
	if readErr := ReadFrame(call.Out, &reply); readErr == nil {
		err = reply.Problem.Err()
	} else if err == nil {
		err = readErr
	}
	return reply.Value, call.End(err)
}

// sending tells of what goes to out.
func (w Workspace) sending(out io.Writer, changes []mirror.Change) io.Writer {
	if w.Sending == nil {
		return out
	}
	t := &telling{Writer: out}
	for _, c := range changes {
		if c.New != nil {
			t.total += c.New.Size
		}
	}
	t.progress = w.Sending(len(changes), t.total)
	return t
}

// telling tells how much of a total has been written.
type telling struct {
	io.Writer
	sent, total int64
	told        float64
	progress    func(float64)
}

func (t *telling) Write(p []byte) (int, error) {
	n, err := t.Writer.Write(p)
	t.sent += int64(n)
	// What is sent is a little more than the content.
	if part := min(1, float64(t.sent)/float64(max(1, t.total))); part-t.told >= 0.01 {
		t.told = part
		t.progress(part)
	}
	return n, err
}

func (w Workspace) pull(ctx context.Context, c *Conn, root *os.Root, changes []mirror.Change) ([]mirror.Failure, error) {
	if len(changes) == 0 {
		return nil, nil
	}
	call, err := c.Start(ctx, opFetch)
	if err != nil {
		return nil, err
	}
	var reply Reply[struct{}]
	var failures []mirror.Failure
	if err = WriteFrame(call.In, transfer{w.Copy, changes}); err == nil {
		err = ReadFrame(call.Out, &reply)
	}
	if err == nil {
		err = reply.Problem.Err()
	}
	if err == nil {
		failures, err = mirror.Apply(ctx, root, changes, call.Out)
	}
	return failures, call.End(err)
}

// maxListed is how many paths a message names.
const maxListed = 20

func conflicts(paths []string) error {
	if len(paths) == 0 {
		return nil
	}
	return vm.WithHint(fmt.Errorf("%w, and left as it is on both sides: %s", ErrConflict, List(paths)),
		"agentvm sync --keep here (or there) takes one side's version of these; what protect and hide name is only ever taken from here")
}

func failed(failures []mirror.Failure) error {
	if len(failures) == 0 {
		return nil
	}
	var paths []string
	for _, f := range failures {
		paths = append(paths, f.Path+" ("+clean([]byte(f.Why))+")")
	}
	return vm.WithHint(fmt.Errorf("could not be brought in step: %s", List(paths)), "agentvm sync tries again")
}

// List names a few of many paths, fit for a terminal.
func List(paths []string) string {
	var words []string
	for _, p := range paths[:min(len(paths), maxListed)] {
		words = append(words, strings.Trim(fmt.Sprintf("%q", p), `"`))
	}
	if more := len(paths) - maxListed; more > 0 {
		words = append(words, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(words, ", ")
}

// scanKnown looks at a directory, and keeps what it saw for the next time.
func scanKnown(ctx context.Context, root *os.Root, file string) (mirror.Manifest, error) {
	known, err := readManifest(file)
	if err != nil {
		known = nil // it only saves work
	}
	m, err := mirror.Scan(ctx, root, known)
	if err != nil {
		return nil, err
	}
	return m, writeJSON(file, m)
}

func readManifest(file string) (mirror.Manifest, error) {
	return readJSON[mirror.Manifest](file)
}

// readJSON reads what is known of a workspace; of what is not there, nothing.
func readJSON[T any](file string) (v T, err error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return v, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	if err != nil {
		return v, fmt.Errorf("read what is known of the workspace: %s: %w", file, err)
	}
	return v, nil
}

func writeJSON(file string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := vm.WriteFile(file, data, 0o600); err != nil {
		return fmt.Errorf("keep what is known of the workspace: %w", err)
	}
	return nil
}
