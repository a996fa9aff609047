package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/network"
)

// Error is a mistake in a configuration file, with its place.
type Error struct {
	File         string
	Line, Column int    // from 1; 0 when the place is not known
	Msg          string // what is wrong
	Source       string // the offending line
	hint         string
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Msg)
	}
	s := fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Msg)
	if strings.TrimSpace(e.Source) != "" {
		s += fmt.Sprintf("\n%5d | %s\n      | %s^", e.Line, e.Source, strings.Repeat(" ", max(e.Column-1, 0)))
	}
	return s
}

// Hint names the next step.
func (e *Error) Hint() string { return e.hint }

// Unwrap makes a mistake in the configuration a wrong use of the program.
func (e *Error) Unwrap() error { return vm.ErrUsage }

// Load reads and checks the configuration at path. The error of a
// missing file satisfies errors.Is(err, fs.ErrNotExist).
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(filepath.Base(path), data)
}

// Format writes a configuration as Parse reads it.
func Format(c Config) ([]byte, error) { return yaml.Marshal(c) }

// Default is what a project without agentvm.yaml gets.
func Default() Config { return Config{Version: 1}.withDefaults() }

// Parse reads a configuration strictly and fills in the defaults. Every
// error is a *Error with file, line and column.
func Parse(file string, data []byte) (Config, error) {
	var c Config
	d, err := decode(file, data, &c, "run agentvm init to write a commented one")
	if err != nil {
		return Config{}, err
	}
	if err := d.check(c); err != nil {
		return Config{}, err
	}
	return c.withDefaults(), nil
}

// document is a file that is being read.
type document struct {
	file  string
	lines []string
	tree  *ast.File
	keys  []string // that the file may have
}

// decode reads the one document of a file into what v points to, strictly.
// ifEmpty says what to do about a file that has none.
func decode(file string, data []byte, v any, ifEmpty string) (*document, error) {
	d := &document{file: file, lines: strings.Split(string(data), "\n"), keys: configKeys(reflect.TypeOf(v))}
	tree, err := parser.ParseBytes(data, 0)
	if err != nil {
		return nil, d.wrap(err)
	}
	d.tree = tree
	if len(tree.Docs) == 0 || tree.Docs[0].Body == nil {
		return nil, d.errorAt("", "the file is empty", ifEmpty)
	}
	if len(tree.Docs) > 1 {
		return nil, d.errorAt("", "the file has more than one document", "remove the --- separators")
	}
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(v); err != nil {
		return nil, d.wrap(err)
	}
	return d, nil
}

// wrap turns an error of the YAML library into one with a place and a hint.
func (d *document) wrap(err error) error {
	var ye yaml.Error
	if !errors.As(err, &ye) {
		return &Error{File: d.file, Msg: err.Error()}
	}
	msg, hint := ye.GetMessage(), ""
	var unknown *yaml.UnknownFieldError
	var typ *yaml.TypeError
	var node *yaml.UnexpectedNodeTypeError
	switch {
	case errors.As(err, &unknown):
		key := strings.Trim(strings.TrimPrefix(msg, "unknown field "), `"`)
		msg = fmt.Sprintf("unknown key %q", key)
		if near := vm.Nearest(key, d.keys); near != "" {
			hint = fmt.Sprintf("did you mean %q?", near)
		} else {
			hint = "docs/configuration.md lists every key"
		}
	case errors.As(err, &node):
		msg = fmt.Sprintf("expected %s, found %s", nodeKind(node.Expected), nodeKind(node.Actual))
	case errors.As(err, &typ):
		msg = fmt.Sprintf("expected %s, found %s", yamlKind(typ.DstType), yamlKind(typ.SrcType))
	}
	return d.errorToken(ye.GetToken(), msg, hint)
}

func (d *document) errorToken(t *token.Token, msg, hint string) error {
	e := &Error{File: d.file, Msg: msg, hint: hint}
	if t != nil && t.Position != nil {
		e.Line, e.Column = t.Position.Line, t.Position.Column
		if e.Line >= 1 && e.Line <= len(d.lines) {
			e.Source = strings.TrimRight(d.lines[e.Line-1], "\r")
		}
	}
	return e
}

// has reports whether the file says anything at a YAML path.
func (d *document) has(path string) bool {
	yp, err := yaml.PathString(path)
	if err != nil {
		return false
	}
	n, err := yp.FilterFile(d.tree)
	return err == nil && n != nil
}

// errorAt points at the value at a YAML path such as "$.workspace.path".
func (d *document) errorAt(path, msg, hint string) error {
	if path != "" && d.tree != nil {
		if yp, err := yaml.PathString(path); err == nil {
			if n, err := yp.FilterFile(d.tree); err == nil && n != nil {
				return d.errorToken(n.GetToken(), msg, hint)
			}
		}
	}
	return &Error{File: d.file, Msg: msg, hint: hint}
}

var (
	packageRE     = vm.Pattern(`^[a-z0-9][a-z0-9+.-]+$`)
	npmRE         = vm.Pattern(`^(@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*@[0-9]+\.[0-9]+\.[0-9]+[0-9A-Za-z.+-]*$`)
	driverRE      = vm.Pattern(`^[a-z0-9][a-z0-9.-]*$`)
	serviceNameRE = vm.Pattern(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
)

// rule is what must hold of the value at a path.
type rule struct {
	ok              bool
	path, msg, hint string
}

// check finds impossible values, each with its place.
func (d *document) check(c Config) error {
	r, w := c.Resources, c.Workspace
	uriErr := checkURI(c.URI)
	rules := []rule{
		{c.Version == 1, "$.version", fmt.Sprintf("version %d is not known", c.Version), "this agentvm reads version: 1"},
		{c.Name == "" || vm.ValidName(c.Name) == nil, "$.name", fmt.Sprint(vm.ValidName(c.Name)), ""},
		{r.CPUs >= 0 && r.CPUs <= maxCPUs && (r.CPUs != 0 || !d.has("$.resources.cpus")), "$.resources.cpus", fmt.Sprintf("cpus must be 1 to %d", maxCPUs), ""},
		{r.Memory >= minMemory || !d.has("$.resources.memory"), "$.resources.memory", fmt.Sprintf("memory must be at least %v", minMemory), ""},
		{r.Memory%(1<<20) == 0, "$.resources.memory", "memory must be a whole number of MiB", ""},
		{r.Disk >= minDisk || !d.has("$.resources.disk"), "$.resources.disk", fmt.Sprintf("disk must be at least %v", minDisk), ""},
		{c.Firmware == "" || c.Firmware == vm.FirmwareBIOS || c.Firmware == vm.FirmwareUEFI, "$.firmware", fmt.Sprintf("firmware %q is not known", c.Firmware), "use bios or uefi"},
		{slices.Contains([]string{"", BackendQEMU, BackendLibvirt}, c.Backend), "$.backend", fmt.Sprintf("backend %q is not known", c.Backend), "use qemu or libvirt"},
		{c.URI == "" || c.Backend == BackendLibvirt, "$.uri", "uri says which libvirt, and the backend is not libvirt", "backend: libvirt"},
		{slices.Contains([]string{"", Continue, Pause}, c.OnDisconnect), "$.on_disconnect", fmt.Sprintf("on_disconnect %q is not known", c.OnDisconnect), "use continue or pause"},
		{c.OnDisconnect == "" || mayBeElsewhere(c), "$.on_disconnect", "on_disconnect is about a machine on another host, and this one is not", "uri: qemu+ssh://USER@HOST/system"},
		{uriErr == nil, "$.uri", fmt.Sprint(uriErr), vm.Hint(uriErr)},
		{slices.Contains([]string{"", "copy", "credentials", "none"}, c.Agent.Config), "$.agent.config", fmt.Sprintf("config %q is not known", c.Agent.Config), "use copy, credentials or none"},
		{w.Mount == "" || goodMountPoint(w.Mount), "$.workspace.mount", fmt.Sprintf("mount %q is not an absolute path below / without spaces", w.Mount), "for example /workspace"},
	}
	for i, path := range w.Protect {
		rules = append(rules, rule{filepath.IsLocal(path), fmt.Sprintf("$.workspace.protect[%d]", i), fmt.Sprintf("%q leaves the workspace", path), "paths are relative to the workspace"})
	}
	for i, path := range w.Hide {
		rules = append(rules, rule{filepath.IsLocal(path), fmt.Sprintf("$.workspace.hide[%d]", i), fmt.Sprintf("%q leaves the workspace", path), "paths are relative to the workspace"})
	}
	seen := map[string]bool{cmp.Or(plainMount(w.Mount), DefaultMount): true}
	for i, m := range c.Mounts {
		at := fmt.Sprintf("$.mounts[%d]", i)
		rules = append(rules,
			rule{m.Source != "", at, "a mount needs a source", "source: a directory of the host"},
			rule{goodMountPoint(m.Target), at + ".target", fmt.Sprintf("target %q is not an absolute path below / without spaces", m.Target), "~ is the agent's home in the machine"},
			rule{!seen[plainMount(m.Target)], at + ".target", fmt.Sprintf("target %q is used twice", m.Target), ""})
		seen[plainMount(m.Target)] = true
	}
	for i, pkg := range c.Provision.Packages {
		rules = append(rules, rule{packageRE().MatchString(pkg), fmt.Sprintf("$.provision.packages[%d]", i), fmt.Sprintf("%q is not a package name", pkg), ""})
	}
	for i, pkg := range c.Provision.NPM {
		rules = append(rules, rule{npmRE().MatchString(pkg), fmt.Sprintf("$.provision.npm[%d]", i), fmt.Sprintf("%q does not name an exact version", pkg), "write name@1.2.3, so that everyone gets the same"})
	}
	for i, name := range append([]string{c.Provision.Driver}, c.Provision.Accept...) {
		at := "$.provision.driver"
		if i > 0 {
			at = fmt.Sprintf("$.provision.accept[%d]", i-1)
		}
		rules = append(rules, rule{driverRE().MatchString(name) || i == 0 && name == "", at, fmt.Sprintf("%q is not a driver's name", name), "nvidia, amd or intel"})
	}
	for i, allow := range c.Network.Allow {
		_, err := network.ParseRule(allow)
		rules = append(rules, rule{err == nil, fmt.Sprintf("$.network.allow[%d]", i), fmt.Sprint(err), ""})
	}
	services := map[string]bool{}
	for i, s := range c.Network.Services {
		at := fmt.Sprintf("$.network.services[%d]", i)
		err := checkTarget(s.Target)
		port := fmt.Sprintf("%s:%d", s.Name, s.Port)
		rules = append(rules,
			rule{serviceNameRE().MatchString(s.Name), at + ".name", fmt.Sprintf("%q is not a host name", s.Name), ""},
			rule{s.Port >= 1 && s.Port <= 65535, at + ".port", "port must be 1 to 65535", ""},
			rule{err == nil, at + ".target", fmt.Sprint(err), "write host:port, for example 127.0.0.1:8080"},
			rule{!services[port], at + ".port", fmt.Sprintf("%s is named twice", port), ""})
		services[port] = true
	}
	for i, name := range c.Agent.Env {
		rules = append(rules, rule{vm.ValidVariable(name), fmt.Sprintf("$.agent.env[%d]", i), fmt.Sprintf("%q is not a variable's name", name), "list names only; values come from your environment"})
	}
	for _, name := range slices.Sorted(maps.Keys(c.Env)) {
		rules = append(rules, rule{vm.ValidVariable(name), "$.env", fmt.Sprintf("%q is not a variable's name", name), ""})
	}
	for _, r := range append(rules, d.checkGPU(c)...) {
		if !r.ok {
			return d.errorAt(r.path, r.msg, r.hint)
		}
	}
	return nil
}

// goodMountPoint accepts an absolute, clean path other than /, or one in the
// agent's home. It must fit in a field of fstab(5).
func goodMountPoint(path string) bool {
	path = plainMount(path)
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/" && !strings.ContainsFunc(path, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) })
}

// plainMount writes a mount point in the one form that stands for all.
func plainMount(path string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		path = "/home/agent/" + rest
	}
	if len(path) > 1 {
		path = strings.TrimSuffix(path, "/")
	}
	return path
}

// checkURI wants a libvirt on this host, or on one that SSH reaches, or none.
func checkURI(uri string) error {
	if uri == "" {
		return nil
	}
	_, elsewhere, err := libvirt.ParseElsewhere(uri)
	if !elsewhere {
		_, err = libvirt.ParseURI(uri)
	}
	return err
}

// mayBeElsewhere reports whether the machine is on another host, as far as its
// configuration says.
func mayBeElsewhere(c Config) bool {
	_, elsewhere, _ := libvirt.ParseElsewhere(c.URI)
	return c.Backend == BackendLibvirt && (c.URI == "" || elsewhere)
}

// checkTarget wants a host and a port's number.
func checkTarget(target string) error {
	host, port, err := net.SplitHostPort(target)
	if err != nil {
		return err
	}
	if n, err := strconv.ParseUint(port, 10, 16); host == "" || err != nil || n == 0 {
		return fmt.Errorf("%q is not a host and a port", target)
	}
	return nil
}

// configKeys collects every key that the configuration knows.
func configKeys(t reflect.Type) []string {
	for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	var keys []string
	for f := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(f).Tag.Get("yaml"), ",")
		keys = append(append(keys, name), configKeys(t.Field(f).Type)...)
	}
	return keys
}

// yamlKind names a Go type in the words of YAML.
func yamlKind(t reflect.Type) string {
	if t == nil {
		return "something else"
	}
	switch t.Kind() {
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "a mapping"
	case reflect.String:
		return "a text"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64, reflect.Int, reflect.Int64, reflect.Uint64, reflect.Uint:
		return "a number"
	}
	return t.String()
}

// nodeKind names a kind of YAML node in the same words.
func nodeKind(t ast.NodeType) string {
	switch t {
	case ast.SequenceType:
		return "a list"
	case ast.MappingType, ast.MappingValueType:
		return "a mapping"
	case ast.StringType, ast.LiteralType:
		return "a text"
	case ast.BoolType:
		return "true or false"
	case ast.IntegerType, ast.FloatType:
		return "a number"
	}
	return "something else"
}
