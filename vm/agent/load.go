package agent

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"

	"github.com/agentvm/agentvm/vm"
)

//go:embed profiles/*.yaml
var builtin embed.FS

// Set holds profiles by name.
type Set struct {
	profiles map[string]func() (Profile, error)
}

// Load reads the built-in profiles and then every *.yaml file at the top of
// each of extra; a later profile replaces an earlier one of its name. A
// directory that does not exist adds nothing. What is wrong with one of extra
// is found here; the built-in ones, of which a command needs one, are parsed
// when they are asked for.
func Load(extra ...fs.FS) (*Set, error) {
	own, err := fs.Sub(builtin, "profiles")
	if err != nil {
		return nil, fmt.Errorf("read built-in agent profiles: %w", err)
	}
	s := &Set{profiles: map[string]func() (Profile, error){}}
	if _, err := s.add(own); err != nil {
		return nil, err
	}
	for _, dir := range extra {
		names, err := s.add(dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if _, err := s.profiles[name](); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

// add makes the profiles of a directory known, unread, and returns their names.
func (s *Set) add(dir fs.FS) (names []string, err error) {
	entries, err := fs.ReadDir(dir, ".")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read agent profiles: %w", err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".yaml")
		if !ok || e.IsDir() {
			continue
		}
		s.profiles[name] = sync.OnceValues(func() (Profile, error) { return read(dir, name) })
		names = append(names, name)
	}
	return names, nil
}

func read(dir fs.FS, name string) (Profile, error) {
	file := name + ".yaml"
	data, err := fs.ReadFile(dir, file)
	if err != nil {
		return Profile{}, fmt.Errorf("read agent profile: %w", err)
	}
	p, err := parse(name, data)
	if err != nil {
		return Profile{}, vm.Classify(vm.ErrUsage, fmt.Errorf("agent profile %s: %w", file, err))
	}
	return p, nil
}

// Names lists the profiles in order.
func (s *Set) Names() []string { return slices.Sorted(maps.Keys(s.profiles)) }

// Get returns the profile of that name. The error of an unknown one wraps
// vm.ErrNotFound and has a hint.
func (s *Set) Get(name string) (Profile, error) {
	if profile, ok := s.profiles[name]; ok {
		return profile()
	}
	hint := "known agents: " + strings.Join(s.Names(), ", ")
	if near := vm.Nearest(name, s.Names()); near != "" {
		hint = fmt.Sprintf("did you mean %s? %s", near, hint)
	}
	return Profile{}, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("no agent is called %q", name)), hint)
}

func parse(name string, data []byte) (Profile, error) {
	var p Profile
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&p); err != nil {
		return p, err
	}
	if p.Name != name {
		return p, fmt.Errorf("is for %q, the file's name says %q", p.Name, name)
	}
	return p, p.validate()
}

var (
	nameRE    = vm.Pattern(`^[a-z][a-z0-9-]{0,31}$`)
	versionRE = vm.Pattern(`^\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?$`) // semver.org, exact
	nodeRE    = vm.Pattern(`^\d+\.\d+\.\d+$`)
	packageRE = vm.Pattern(`^(@[a-z0-9~][a-z0-9._~-]*/)?[a-z0-9~][a-z0-9._~-]*$`)
	hostRE    = vm.Pattern(`^(\*\.)?([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}$`)
)

// validate reports everything that is wrong.
func (p Profile) validate() error {
	var errs []error
	must := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	must(nameRE().MatchString(p.Name), "name %q does not match %s", p.Name, nameRE())
	must(p.Description != "", "has no description")
	must(len(p.Command) > 0, "has no command")
	must(len(p.Prompt) == 0 || slices.Contains(p.Prompt, promptArgument), "prompt has no %s argument", promptArgument)
	for _, v := range []string{p.Install.MinNode, p.Install.Node} {
		must(v == "" || nodeRE().MatchString(v), "Node.js version %q is not three numbers", v)
	}
	for _, n := range p.Install.NPM {
		must(packageRE().MatchString(n.Name), "npm package %q has no valid name", n.Name)
		must(versionRE().MatchString(n.Version), "npm package %s: version %q is not exact", n.Name, n.Version)
	}
	for _, c := range p.Config {
		rest, ok := strings.CutPrefix(c.Path, "~/")
		must(ok && fs.ValidPath(rest) && rest != ".", "config path %q is not a plain path below ~/", c.Path)
	}
	for _, name := range append(slices.Sorted(maps.Keys(p.SetEnv)), p.Env...) {
		must(vm.ValidVariable(name), "%q is no name of an environment variable", name)
	}
	for _, host := range p.Allow {
		must(hostRE().MatchString(host), "allowed name %q is no host name", host)
	}
	for _, argv := range [][]string{p.Command, p.Prompt, p.VersionCommand} {
		must(len(argv) == 0 || argv[0] != "" && path.Clean(argv[0]) == argv[0], "command %q does not start with a program", argv)
	}
	return errors.Join(errs...)
}
