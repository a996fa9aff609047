package images

import (
	"fmt"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Spec says which image is wanted: a base by its catalogue name and, when any
// other field is set, what is baked in on top of it.
//
// A build happens on the host. Run and npm scripts are confined to the image's
// tree, without devices or privileges, but they do reach the host's network. They are for agent
// profiles; commands that a project brings belong into the guest.
type Spec struct {
	Image    string       `json:"image"`              // catalogue name, see [Catalogue]
	Packages []string     `json:"packages,omitempty"` // Debian packages, as apt-get install takes them
	Node     string       `json:"node,omitempty"`     // "", NodeDebian or an exact version such as 22.23.3
	NPM      []NPMPackage `json:"npm,omitempty"`      // installed globally under /usr/local
	Run      []string     `json:"run,omitempty"`      // shell commands, as root, with network, after all else
	Driver   string       `json:"driver,omitempty"`   // for cards, see [Drivers]

	// Accept names the drivers whose licences the user has agreed to. It
	// decides whether the image may be had, not what is in it.
	Accept []string `json:"-"`
}

// NodeDebian asks for the distribution's own Node.js. It is what an empty
// [Spec.Node] means when npm packages are wanted.
const NodeDebian = "debian"

// NPMPackage is one package of the npm registry.
type NPMPackage struct {
	Name    string `json:"name"`
	Version string `json:"version"` // an exact version or a dist-tag; empty: latest

	// Scripts lets the package's own install scripts run. They stay off
	// otherwise, for it and for everything that it depends on.
	Scripts bool `json:"scripts,omitempty"`

	// Integrity is the registry's digest of the package's archive, in
	// Subresource Integrity form. The build records it; in a Spec it pins it.
	Integrity string `json:"integrity,omitempty"`
}

var (
	debianPackage = vm.Pattern(`^[a-z0-9][a-z0-9+.-]+([=/][A-Za-z0-9.+:~-]+)?$`)
	npmName       = vm.Pattern(`^(@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*$`)
	npmVersion    = vm.Pattern(`^[A-Za-z0-9][A-Za-z0-9.+_-]*$`)
	nodeVersion   = vm.Pattern(`^\d+\.\d+\.\d+$`)
)

// layered reports whether the spec asks for more than a base image.
func (s Spec) layered() bool {
	return len(s.Packages)+len(s.NPM)+len(s.Run) > 0 || s.Node != "" || s.Driver != ""
}

// normal returns the spec in the one form that stands for every way to write
// the same wish, so that equal wishes share a key. Run keeps its order.
func (s Spec) normal() (Spec, error) {
	out := Spec{Image: s.Image, Node: s.Node, Run: slices.Clone(s.Run), Driver: s.Driver}
	for _, p := range s.Packages {
		if !debianPackage().MatchString(p) {
			return Spec{}, invalid("%q is not the name of a Debian package", p)
		}
	}
	out.Packages = slices.Compact(slices.Sorted(slices.Values(s.Packages)))

	for _, p := range s.NPM {
		if p.Version == "" {
			p.Version = "latest"
		}
		if !npmName().MatchString(p.Name) {
			return Spec{}, invalid("%q is not the name of an npm package", p.Name)
		}
		if !npmVersion().MatchString(p.Version) {
			return Spec{}, invalid("npm package %s: %q is neither a version nor a tag", p.Name, p.Version)
		}
		out.NPM = append(out.NPM, p)
	}
	slices.SortFunc(out.NPM, func(a, b NPMPackage) int { return strings.Compare(a.Name, b.Name) })
	for i := 1; i < len(out.NPM); i++ {
		if out.NPM[i].Name == out.NPM[i-1].Name {
			return Spec{}, invalid("npm package %s is listed twice", out.NPM[i].Name)
		}
	}

	if out.Node == "" && len(out.NPM) > 0 {
		out.Node = NodeDebian
	}
	if out.Node != "" && out.Node != NodeDebian && !nodeVersion().MatchString(out.Node) {
		return Spec{}, invalid("Node.js version %q is not of the form 22.23.3", out.Node)
	}
	return out, nil
}

func invalid(format string, args ...any) error {
	return vm.Classify(vm.ErrUsage, fmt.Errorf(format, args...))
}
