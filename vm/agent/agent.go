// Package agent knows coding agents as data: how to install one in an image,
// how to start it, which of the host's files and variables it may have and
// which names it must reach. The profiles are YAML files, one an agent, with
// the source of each fact beside it; a user may add more.
//
// It promises:
//
//   - A profile is read strictly: an unknown key, a version that is not exact
//     or a path outside the home directory is an error that names the file.
//   - A profile never carries a secret, and a file that holds one is marked, so
//     that it leaves the host only when the user asks for that.
//   - Nothing here runs anything or looks at the host.
//
// In a machine the virtual machine is the sandbox. The profiles therefore
// start agents without their own permission prompts where they have a switch
// for it.
package agent

import (
	"cmp"
	"slices"
	"strings"
)

// Profile is one agent.
type Profile struct {
	Name        string `yaml:"name" json:"name"`
	Description string `yaml:"description" json:"description"`
	Docs        string `yaml:"docs" json:"docs,omitempty"` // where the agent documents itself

	Install        Install  `yaml:"install" json:"install,omitzero"`
	Command        []string `yaml:"command" json:"command"`                         // starts it for a person at a terminal
	Prompt         []string `yaml:"prompt" json:"prompt,omitempty"`                 // does one task and exits; see [Profile.PromptCommand]
	VersionCommand []string `yaml:"versionCommand" json:"versionCommand,omitempty"` // prints a version, needs no network and no account

	Config []ConfigPath      `yaml:"config" json:"config,omitempty"` // of the host's user, to be copied
	Env    []string          `yaml:"env" json:"env,omitempty"`       // names of host variables that it may get
	SetEnv map[string]string `yaml:"setEnv" json:"setEnv,omitempty"` // what it always gets
	Allow  []string          `yaml:"allow" json:"allow,omitempty"`   // names that it must reach
}

// Install says what an image needs so that the agent can start in it.
type Install struct {
	Packages []string     `yaml:"packages" json:"packages,omitempty"` // of the distribution
	MinNode  string       `yaml:"minNode" json:"minNode,omitempty"`   // oldest Node.js that runs it; empty: needs none
	Node     string       `yaml:"node" json:"node,omitempty"`         // exact Node.js to use whatever the distribution has
	NPM      []NPMPackage `yaml:"npm" json:"npm,omitempty"`
	Run      []string     `yaml:"run" json:"run,omitempty"` // shell commands, as root, with network, after the packages
}

// NPMPackage is one package of the npm registry, in an exact version.
type NPMPackage struct {
	Name    string `yaml:"name" json:"name"`
	Version string `yaml:"version" json:"version"`
	Scripts bool   `yaml:"scripts" json:"scripts,omitempty"` // its install scripts must run
}

// ConfigPath is a file or directory in the home directory, written ~/….
type ConfigPath struct {
	Path   string `yaml:"path" json:"path"`
	Secret bool   `yaml:"secret" json:"secret,omitempty"` // holds credentials: copied only when asked for
}

// NewerNode is the Node.js, a long-term support release on npm as the
// package node, that replaces a distribution's too old one.
const NewerNode = "24.21.0"

// NodeFor returns the exact Node.js version that an image needs beside its
// distribution's, which is have; empty means that the distribution's will do.
// Debian 12 has 18.20.4 and Debian 13 has 20.19.2 (https://tracker.debian.org/pkg/nodejs).
func (i Install) NodeFor(have string) string {
	if i.Node != "" || i.MinNode == "" || compareVersions(have, i.MinNode) >= 0 {
		return i.Node
	}
	return NewerNode
}

// compareVersions orders versions of three numbers.
func compareVersions(a, b string) int {
	return slices.CompareFunc(strings.Split(a, "."), strings.Split(b, "."), func(x, y string) int {
		return cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y))
	})
}

// promptArgument stands for the task in Profile.Prompt.
const promptArgument = "{prompt}"

// PromptCommand returns the argument vector that does one task and exits, or
// nil when the agent has no such mode.
func (p Profile) PromptCommand(task string) []string {
	argv := slices.Clone(p.Prompt)
	for i, arg := range argv {
		if arg == promptArgument {
			argv[i] = task
		}
	}
	return argv
}
