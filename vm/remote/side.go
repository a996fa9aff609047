package remote

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/mirror"
	"github.com/agentvm/agentvm/vm/tree"
)

// Operations of the other side, the words after Arg.
const (
	opScan    = "scan"    // look → scanned
	opChange  = "change"  // transfer, content → failures
	opFetch   = "fetch"   // transfer → content
	opForget  = "forget"  // Copy →
	opHas     = "has"     // an image's id → bool
	opImage   = "image"   // a manifest → offsets, content →
	opPrepare = "prepare" // Request → token
	opSignal  = "signal"  // token and signal →
	opResult  = "result"  // token → exit code, or nil
	opAttend  = "attend"  // Copy →, beats
)

// look asks what there is of a copy.
type look struct {
	Copy Copy   `json:"copy"`
	Sum  string `json:"sum"` // of the manifest that is known already
}

// scanned is what there is of a copy.
type scanned struct {
	Manifest mirror.Manifest `json:"manifest,omitempty"`
	Known    bool            `json:"known,omitempty"` // it is the one that was known
	Made     string          `json:"made"`            // the copy's identity; another one is another copy
	Odd      []string        `json:"odd,omitempty"`   // what cannot be copied and has content
}

// transfer is what is to be done to a copy, or fetched from it.
type transfer struct {
	Copy    Copy            `json:"copy"`
	Changes []mirror.Change `json:"changes"`
}

// Side is this program on the other host.
type Side struct {
	Dirs   instance.Dirs
	Images func() (*images.Cache, error)
}

// ErrUnknown is an operation that Serve does not know.
var ErrUnknown = errors.New("unknown operation")

// Serve does one operation. Its error has not been told to the other side.
func (s Side) Serve(ctx context.Context, op string, in io.Reader, out io.Writer) error {
	if err := s.Dirs.Make(); err != nil {
		return tell(out, struct{}{}, err)
	}
	switch op {
	case opScan:
		return Answer(in, out, func(l look) (scanned, error) { return s.scan(ctx, l) })
	case opChange:
		return s.change(ctx, in, out)
	case opFetch:
		return s.fetch(ctx, in, out)
	case opForget:
		return Answer(in, out, func(c Copy) (struct{}, error) { return struct{}{}, s.forget(c) })
	case opHas:
		return Answer(in, out, s.hasImage)
	case opImage:
		return s.image(ctx, in, out)
	case opPrepare:
		return Answer(in, out, s.prepare)
	case opSignal:
		return Answer(in, out, func(r signalRequest) (struct{}, error) { return struct{}{}, s.signal(r) })
	case opResult:
		return Answer(in, out, s.result)
	case opAttend:
		return s.attend(ctx, in, out)
	}
	return fmt.Errorf("%w: %q", ErrUnknown, op)
}

// Answer reads one message and tells what became of it.
func Answer[Q, A any](in io.Reader, out io.Writer, do func(Q) (A, error)) error {
	var request Q
	if err := ReadFrame(in, &request); err != nil {
		return err
	}
	value, err := do(request)
	return tell(out, value, err)
}

func tell[T any](out io.Writer, value T, err error) error {
	return WriteFrame(out, Reply[T]{Problem: ProblemOf(err), Value: value})
}

var copyIDRE = vm.Pattern(`^[0-9a-f]{16}$`)

// dir is where a copy's things lie; the workspace itself is a directory in it.
func (s Side) dir(c Copy) (string, error) {
	if !copyIDRE().MatchString(c.ID) || vm.ValidName(c.Name) != nil {
		return "", vm.Classify(vm.ErrUsage, fmt.Errorf("%q of %q is no copy of a workspace", c.Name, c.ID))
	}
	return filepath.Join(s.Dirs.State, "remote", c.ID), nil
}

// workspace opens the copy itself.
func (s Side) workspace(c Copy) (*os.Root, string, error) {
	dir, err := s.dir(c)
	if err != nil {
		return nil, "", err
	}
	root, err := os.OpenRoot(filepath.Join(dir, c.Name))
	if err != nil {
		return nil, "", fmt.Errorf("open the copy of the workspace: %w", err)
	}
	return root, dir, nil
}

func (s Side) scan(ctx context.Context, l look) (scanned, error) {
	c := l.Copy
	dir, err := s.dir(c)
	if err != nil {
		return scanned{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return scanned{}, fmt.Errorf("make a copy of the workspace: %w", err)
	}
	made, err := identity(dir, c.Name)
	if err != nil {
		return scanned{}, fmt.Errorf("make a copy of the workspace: %w", err)
	}
	root, _, err := s.workspace(c)
	if err != nil {
		return scanned{}, err
	}
	defer root.Close()
	m, err := scanKnown(ctx, root, filepath.Join(dir, knownFile))
	if err != nil {
		return scanned{}, err
	}
	told := scanned{Made: made, Known: m.Sum() == l.Sum}
	if !told.Known {
		told.Manifest = m.Plain()
	}
	for p, e := range m {
		if e.Kind == mirror.Other && !hollow(root, p) {
			told.Odd = append(told.Odd, p)
		}
	}
	return told, nil
}

// hollow reports whether nothing is lost with what lies at a path: a pipe, a
// socket or a device.
func hollow(root *os.Root, path string) bool {
	fi, err := root.Lstat(path)
	return err == nil && fi.Mode()&(fs.ModeNamedPipe|fs.ModeSocket|fs.ModeDevice) != 0
}

// madeFile holds a copy's identity, beside it.
const madeFile = "made"

// identity is that of the copy in dir, which is made if it is not there. What
// is missing in a copy was deleted in it only if it is still the same one: so a
// new one gets its identity before it is there.
func identity(dir, name string) (string, error) {
	file := filepath.Join(dir, madeFile)
	_, missing := os.Lstat(filepath.Join(dir, name))
	data, err := os.ReadFile(file)
	if missing == nil && err == nil && len(data) > 0 {
		return string(data), nil
	}
	for _, err := range []error{missing, err} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	made := rand.Text()
	if err := vm.WriteFile(file, []byte(made), 0o600); err != nil {
		return "", err
	}
	if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return made, nil
}

func (s Side) change(ctx context.Context, in io.Reader, out io.Writer) error {
	t, root, err := s.begin(in)
	if err != nil {
		return tell(out, []mirror.Failure{}, err)
	}
	defer root.Close()
	failures, err := mirror.Apply(ctx, root, t.Changes, in)
	return tell(out, failures, err)
}

func (s Side) fetch(ctx context.Context, in io.Reader, out io.Writer) error {
	t, root, err := s.begin(in)
	if err := tell(out, struct{}{}, err); err != nil || root == nil {
		return err
	}
	defer root.Close()
	return mirror.Send(ctx, root, t.Changes, out)
}

func (s Side) begin(in io.Reader) (t transfer, root *os.Root, err error) {
	if err := ReadFrame(in, &t); err != nil {
		return t, nil, err
	}
	if err := mirror.CheckChanges(t.Changes); err != nil {
		return t, nil, err
	}
	root, _, err = s.workspace(t.Copy)
	return t, root, err
}

// removedSuffix marks a copy on its way out.
const removedSuffix = ".removed-"

// forget deletes a copy that no machine has. It is out of the way before
// anything in it is deleted.
func (s Side) forget(c Copy) error {
	dir, err := s.dir(c)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return s.sweepCopies()
	}
	ws, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("look at the copy of the workspace: %w", err)
	}
	machines, err := instance.Store{Dirs: s.Dirs}.ForWorkspace(filepath.Join(ws, c.Name))
	if err != nil {
		return err
	}
	if len(machines) > 0 {
		return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("%q still has the copy of the workspace", machines[0].Name)), "agentvm down deletes it")
	}
	if err := os.Rename(dir, dir+removedSuffix+rand.Text()); err != nil {
		return fmt.Errorf("remove the copy of the workspace: %w", err)
	}
	return s.sweepCopies()
}

// sweepCopies deletes the copies that are on their way out.
func (s Side) sweepCopies() (err error) {
	found, _ := filepath.Glob(filepath.Join(s.Dirs.State, "remote", "*"+removedSuffix+"*"))
	for _, dir := range found {
		err = errors.Join(err, tree.Remove(dir))
	}
	return err
}

func (s Side) hasImage(id string) (bool, error) {
	cache, err := s.Images()
	if err != nil {
		return false, err
	}
	_, err = cache.Get(id)
	if errors.Is(err, vm.ErrNotFound) || errors.Is(err, images.ErrCorrupt) {
		return false, nil
	}
	return err == nil, err
}

func (s Side) image(ctx context.Context, in io.Reader, out io.Writer) error {
	var m images.Manifest
	if err := ReadFrame(in, &m); err != nil {
		return err
	}
	cache, err := s.Images()
	if err != nil {
		return tell[images.Offsets](out, nil, err)
	}
	r, err := cache.Receive(ctx, m)
	if err != nil || r == nil {
		return tell[images.Offsets](out, nil, err)
	}
	defer r.Close()
	from, err := r.Offsets()
	if err := tell(out, from, err); err != nil || from == nil {
		return err
	}
	if err = r.Take(ctx, from, in); err == nil {
		err = r.Finish(ctx)
	}
	return tell(out, struct{}{}, err)
}
