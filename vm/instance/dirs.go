package instance

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/agentvm/agentvm/vm"
)

// Dirs are the four places where agentvm keeps things. docs/internals.md
// lists what lies in each.
type Dirs struct {
	State  string // instances; lost only by `agentvm down`
	Cache  string // images; can be built again
	Config string // the user's own settings and agent profiles
	Run    string // sockets; short, because a socket's path holds 107 bytes
}

// maxRun leaves room in sun_path (108 bytes with its NUL, unix(7)) for
// /<8 hex>/vm/<name>.sock below the run directory.
const maxRun = 108 - 1 - len("/01234567/vm/") - 40

// FindDirs decides where things are, from the environment and the user id.
// It creates nothing.
//
// AGENTVM_HOME puts everything below one directory. Otherwise an ordinary
// user's files follow the XDG base directories; root's lie in /var/lib and
// /var/cache, because the unprivileged user that QEMU then runs as must be
// able to reach them.
func FindDirs(getenv func(string) string, uid int) (Dirs, error) {
	if home := getenv("AGENTVM_HOME"); home != "" {
		if !filepath.IsAbs(home) {
			return Dirs{}, vm.Classify(vm.ErrUsage, fmt.Errorf("AGENTVM_HOME=%q is not an absolute path", home))
		}
		d := Dirs{State: filepath.Join(home, "state"), Cache: filepath.Join(home, "cache"), Config: filepath.Join(home, "config"), Run: filepath.Join(home, "run")}
		if len(d.Run) > maxRun {
			sum := sha256.Sum256([]byte(home))
			d.Run = fmt.Sprintf("/tmp/agentvm-%d-%s", uid, hex.EncodeToString(sum[:4]))
		}
		return d, nil
	}
	if uid == 0 {
		d := Dirs{State: "/var/lib/agentvm", Cache: "/var/cache/agentvm", Config: "/etc/agentvm", Run: "/run/agentvm"}
		return d, nil
	}
	xdg := func(variable, fallback string) (string, error) {
		if dir := getenv(variable); filepath.IsAbs(dir) {
			return filepath.Join(dir, "agentvm"), nil
		}
		home := getenv("HOME")
		if !filepath.IsAbs(home) {
			return "", vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("neither %s nor HOME is an absolute path", variable)), "set AGENTVM_HOME to a directory for agentvm's files")
		}
		return filepath.Join(home, fallback, "agentvm"), nil
	}
	var d Dirs
	var err error
	for _, x := range []struct {
		dst                *string
		variable, fallback string
	}{{&d.State, "XDG_STATE_HOME", ".local/state"}, {&d.Cache, "XDG_CACHE_HOME", ".cache"}, {&d.Config, "XDG_CONFIG_HOME", ".config"}} {
		if *x.dst, err = xdg(x.variable, x.fallback); err != nil {
			return Dirs{}, err
		}
	}
	d.Run = fmt.Sprintf("/tmp/agentvm-%d", uid)
	if dir := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) && len(dir)+len("/agentvm") <= maxRun && ownedBy(dir, uid) {
		d.Run = filepath.Join(dir, "agentvm")
	}
	return d, nil
}

// Images is the image cache.
func (d Dirs) Images() string { return filepath.Join(d.Cache, "images") }

// Templates is where machines that others start from are kept.
func (d Dirs) Templates() string { return filepath.Join(d.Cache, "templates") }

// Pool is where machines wait that are nobody's yet.
func (d Dirs) Pool() string { return filepath.Join(d.State, "pool") }

// UserConfig is the file with the user's own settings.
func (d Dirs) UserConfig() string { return filepath.Join(d.Config, "config.yaml") }

// Agents is where the user's own agent profiles lie.
func (d Dirs) Agents() string { return filepath.Join(d.Config, "agents") }

// Make creates the directories. As root they can be passed through, not
// listed, by the unprivileged users that virtual machines run as.
func (d Dirs) Make() error {
	mode := os.FileMode(0o700)
	if os.Getuid() == 0 {
		mode = 0o711
	}
	for _, dir := range []string{d.State, d.Cache, d.Run, filepath.Join(d.State, "instances")} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return vm.Classify(vm.ErrHost, fmt.Errorf("create %s: %w", dir, err))
		}
		// A directory in /tmp that somebody else made first would be theirs to replace.
		if !ownedBy(dir, os.Getuid()) {
			return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s belongs to another user", dir)), "remove it, or set AGENTVM_HOME")
		}
		// It may be older than this rule, or made under a strict umask.
		if err := os.Chmod(dir, mode); err != nil {
			return fmt.Errorf("create %s: %w", dir, err)
		}
	}
	return nil
}

// Reachable checks that a machine's processes can get to their files: root's
// machines run as unprivileged users.
func (d Dirs) Reachable() error {
	if os.Getuid() != 0 {
		return nil
	}
	return reachable(d.State, d.Cache, d.Run)
}

// reachable checks that the unprivileged users that root's machines run as
// can get to the directories.
func reachable(dirs ...string) error {
	for _, dir := range dirs {
		for d := dir; d != filepath.Dir(d); d = filepath.Dir(d) {
			fi, err := os.Stat(d)
			if err != nil {
				return fmt.Errorf("look at %s: %w", d, err)
			}
			if fi.Mode()&0o001 == 0 {
				return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s is closed to other users, and root's machines run as unprivileged ones, which must reach %s", d, dir)),
					"chmod o+x "+d+", or set AGENTVM_HOME to a directory elsewhere")
			}
		}
	}
	return nil
}

func ownedBy(dir string, uid int) bool {
	fi, err := os.Lstat(dir)
	if err != nil || !fi.IsDir() {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == uid
}
