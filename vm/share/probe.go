package share

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
)

// Flavour is one of the two programs named virtiofsd.
type Flavour string

const (
	FlavourC    Flavour = "c"    // in QEMU's tree until 7.2, deprecated in 6.2, removed in 8.0
	FlavourRust Flavour = "rust" // https://gitlab.com/virtio-fs/virtiofsd
)

// Caps is what one virtiofsd can do.
type Caps struct {
	Path    string
	Flavour Flavour
	Version string // as it calls itself; to show, never to compare

	// Options holds the long options of the Rust flavour and the -o options of
	// the C flavour that its help names, without dashes.
	Options []string
}

// Has says whether virtiofsd knows the named option.
func (c Caps) Has(option string) bool { return slices.Contains(c.Options, option) }

// ErrNoVirtiofsd says that no virtiofsd was found.
var ErrNoVirtiofsd = errors.New("no virtiofsd found")

// installHint is what brings virtiofsd: a package of its own where the Rust
// flavour is packaged, QEMU's common files before that (Debian 12).
const installHint = "sudo apt-get install virtiofsd, or on Debian 12: apt-get install qemu-system-common"

// DefaultPaths is where distributions put virtiofsd: Debian 12 in the third
// place, Debian 13 in the first with a link in the third, Fedora in the first, Arch in the second.
var DefaultPaths = []string{
	"/usr/libexec/virtiofsd",
	"/usr/lib/virtiofsd",
	"/usr/lib/qemu/virtiofsd",
	"virtiofsd", // on PATH
}

// Probe asks the first virtiofsd that answers among paths, or among
// DefaultPaths when none are given, what it is. The answer is kept under the
// program's build and asked for again when the file changes.
func Probe(ctx context.Context, known probes.Store, paths ...string) (Caps, error) {
	if len(paths) == 0 {
		paths = DefaultPaths
	}
	var failed error
	for _, p := range paths {
		path, err := exec.LookPath(p)
		if err != nil {
			continue
		}
		if path, err = filepath.Abs(path); err != nil {
			return Caps{}, fmt.Errorf("look for virtiofsd: %w", err)
		}
		caps, err := know(ctx, known, path)
		if err == nil {
			return caps, nil
		}
		failed = errors.Join(failed, err)
	}
	if failed != nil {
		return Caps{}, vm.Classify(vm.ErrHost, failed)
	}
	err := fmt.Errorf("look for virtiofsd in %s: %w", strings.Join(paths, ", "), ErrNoVirtiofsd)
	return Caps{}, vm.WithHint(vm.Classify(vm.ErrHost, err), installHint)
}

// know returns what is known of one virtiofsd, or asks it.
func know(ctx context.Context, known probes.Store, path string) (caps Caps, err error) {
	const format = 1 // of what is kept: of Caps, and of how a help text is read
	build, err := probes.Build(path)
	if err != nil {
		return caps, fmt.Errorf("look for virtiofsd: %w", err)
	}
	key := fmt.Sprint(build, " ", format)
	if known.Read("virtiofsd-caps", key, &caps) && caps.Path == path {
		return caps, nil
	}
	if caps, err = ask(ctx, path); err == nil {
		known.Write("virtiofsd-caps", key, caps)
	}
	return caps, err
}

// ask runs one virtiofsd three times, each of which only prints. It runs
// under the filter: the C flavour ends before it looks at its arguments if it
// cannot drop its supplementary groups, and only root can.
func ask(ctx context.Context, path string) (Caps, error) {
	var out [3]string
	for i, flag := range []string{"--print-capabilities", "--version", "--help"} {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := notWired()
		var b []byte
		if err == nil {
			b, err = selfCommand(ctx, filterArg, path, flag).Output()
		}
		cancel()
		if err != nil {
			var said string
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
				said = strings.TrimSpace(string(exit.Stderr))
			}
			return Caps{}, fmt.Errorf("ask %s for %s: %w %s", path, flag, err, said)
		}
		out[i] = string(b)
	}
	caps, err := parseCaps(out[0], out[1], out[2])
	if err != nil {
		return Caps{}, fmt.Errorf("ask %s what it can do: %w", path, err)
	}
	caps.Path = path
	return caps, nil
}

var (
	longOption = vm.Pattern(`(?m)^\s+(?:-\w, )?(?:-\w\s+)?--([a-z][a-z0-9-]+)`)
	dashO      = vm.Pattern(`(?m)^\s+-o ([a-z0-9_|/]+)`)
)

// parseCaps tells the flavours apart. Only the C one documents -o source,
// and only the Rust one has --shared-dir; both print capabilities as QEMU's
// docs/interop/vhost-user.json lays down.
func parseCaps(capabilities, version, help string) (Caps, error) {
	var printed struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal([]byte(capabilities), &printed); err != nil || printed.Type != "fs" {
		return Caps{}, fmt.Errorf("its capabilities are not those of a virtiofs daemon: %.200q", capabilities)
	}
	first, _, _ := strings.Cut(strings.TrimSpace(version), "\n")
	caps := Caps{Version: first}
	for _, m := range longOption().FindAllStringSubmatch(help, -1) {
		caps.Options = append(caps.Options, m[1])
	}
	if caps.Has("shared-dir") {
		caps.Flavour = FlavourRust
	} else {
		caps.Flavour = FlavourC
		for _, m := range dashO().FindAllStringSubmatch(help, -1) {
			caps.Options = append(caps.Options, strings.FieldsFunc(m[1], func(r rune) bool { return r == '|' || r == '/' })...)
		}
	}
	slices.Sort(caps.Options)
	caps.Options = slices.Compact(caps.Options)
	need := "shared-dir"
	if caps.Flavour == FlavourC {
		need = "source"
	}
	if !caps.Has(need) || !caps.Has("fd") {
		return Caps{}, fmt.Errorf("%s lacks the options %s and fd", caps.Version, need)
	}
	return caps, nil
}
