package main

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/agent"
)

// TestAgents installs agents by their profiles and starts each in a machine:
// those named in AGENTVM_TEST_AGENTS, apart by commas, or all; otherwise one
// that starts soon under emulation. The demo has another.
func TestAgents(t *testing.T) {
	t.Parallel()
	set, err := agent.Load()
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"codex"}
	switch wish := os.Getenv("AGENTVM_TEST_AGENTS"); wish {
	case "":
	case "all":
		names = set.Names()
	default:
		names = strings.Split(wish, ",")
	}
	h := newHost(t)
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			p, err := set.Get(name)
			if err != nil {
				t.Fatal(err)
			}
			dir := h.project(name, "version: 1\nresources: {memory: 2GiB}\n")
			up := h.must(dir, "up", "--agent", name)
			o := h.must(dir, append([]string{"exec", "--"}, p.VersionCommand...)...)
			if !regexp.MustCompile(`\d+\.\d+`).MatchString(o.stdout) {
				t.Errorf("%q prints no version: %q", p.VersionCommand, o.stdout)
			}
			for _, pkg := range p.Install.NPM {
				if !strings.Contains(o.stdout, pkg.Version) {
					t.Errorf("%q prints %q, want %s", p.VersionCommand, o.stdout, pkg.Version)
				}
			}
			t.Logf("%s: up in %s, version in %s", strings.TrimSpace(o.stdout), up.took, o.took)
			h.must(dir, "down")
		})
	}
}
