package lifecycle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
)

// Project is a configuration and the directory that it speaks of.
type Project struct {
	Dir        string // where relative paths start
	ConfigPath string // empty: there is none, the defaults hold
	Config     config.Config
}

// FindProject looks for agentvm.yaml in dir and above it, not beyond the home
// directory. Without one the project is dir itself, with the defaults.
func FindProject(dir, home string) (Project, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Project{}, fmt.Errorf("find the project: %w", err)
	}
	for d := dir; ; d = filepath.Dir(d) {
		path := filepath.Join(d, config.FileName)
		c, err := config.Load(path)
		if err == nil {
			return Project{Dir: d, ConfigPath: path, Config: c}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return Project{}, err
		}
		if d == home || d == filepath.Dir(d) {
			return Project{Dir: dir, Config: config.Default()}, nil
		}
	}
}

// LoadProject reads one particular configuration file.
func LoadProject(path string) (Project, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Project{}, fmt.Errorf("find the configuration: %w", err)
	}
	c, err := config.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = vm.WithHint(vm.Classify(vm.ErrNotFound, err), "agentvm init writes a commented one")
	}
	return Project{Dir: filepath.Dir(path), ConfigPath: path, Config: c}, err
}

// Workspace is the directory that the project shares.
func (p Project) Workspace() string { return absolute(p.Dir, "", p.Config.Workspace.Path) }

// absolute resolves path against dir, and ~ against home.
func absolute(dir, home, path string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok && home != "" {
		return filepath.Join(home, rest)
	}
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(dir, path)
}

// Directory is a host directory that may be shared.
type Directory struct {
	Path  string // absolute, without symbolic links
	Owner vm.Owner
}

// CheckDirectory finds out whether path can be shared. Sharing / or a home
// directory would give away everything that this program is to keep safe; it
// is refused unless wide is set.
func CheckDirectory(path, home string, wide bool) (Directory, error) {
	refuse := func(hint, format string, args ...any) (Directory, error) {
		return Directory{}, vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf(format, args...)), hint)
	}
	if !utf8.ValidString(path) {
		return refuse("rename the directory", "directory %q is not valid UTF-8", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return refuse("create it, or name another", "directory %q does not exist", path)
	}
	if err != nil {
		return Directory{}, fmt.Errorf("look at directory %q: %w", path, err)
	}
	fi, err := os.Stat(real)
	if err != nil {
		return Directory{}, fmt.Errorf("look at directory %q: %w", path, err)
	}
	if !fi.IsDir() {
		return refuse("name the directory that holds it", "%q is a file, not a directory", path)
	}
	realHome, err := filepath.EvalSymlinks(home)
	if err != nil {
		realHome = home
	}
	const hint = "share a project directory inside it; --allow-wide shares it all the same"
	switch {
	case wide:
	case real == "/":
		return refuse(hint, "sharing / would share the whole host")
	case realHome != "" && (real == realHome || strings.HasPrefix(realHome+"/", real+"/")):
		return refuse(hint, "sharing %q would share your home directory", real)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Directory{}, fmt.Errorf("look at directory %q: no owner", path)
	}
	return Directory{Path: real, Owner: vm.Owner{UID: int(st.Uid), GID: int(st.Gid)}}, nil
}

// defaultProject is a directory without a configuration.
func defaultProject(dir string) Project { return Project{Dir: dir, Config: config.Default()} }
