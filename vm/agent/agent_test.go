package agent

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/agentvm/agentvm/vm"
)

func load(t *testing.T) *Set {
	t.Helper()
	s, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestBuiltin(t *testing.T) {
	s := load(t)
	want := []string{"aider", "claude", "codex", "gemini", "opencode", "pi", "shell"}
	if diff := cmp.Diff(want, s.Names()); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	for _, name := range s.Names() {
		p, err := s.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		if p.Docs == "" || len(p.VersionCommand) == 0 || len(p.Prompt) == 0 {
			t.Errorf("%s lacks docs, a version command or a prompt", name)
		}
		if len(p.Install.NPM) > 0 && p.Install.MinNode == "" {
			t.Errorf("%s is an npm package and names no Node.js", name)
		}
		for _, c := range p.Config {
			base := c.Path[strings.LastIndexByte(c.Path, '/')+1:]
			if (strings.Contains(base, "auth") || strings.Contains(base, "cred") || base == ".env") && !c.Secret {
				t.Errorf("%s: %s looks like a secret and is not marked", name, c.Path)
			}
		}
	}
}

// TestJSONIsAProfile reads what `agentvm agents --json` prints as a profile:
// JSON is YAML, and the keys are those of the documents.
func TestJSONIsAProfile(t *testing.T) {
	s := load(t)
	for _, name := range s.Names() {
		p, err := s.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(name, data)
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, data)
		} else if diff := cmp.Diff(p, again, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s (-profile +JSON):\n%s", name, diff)
		}
	}
}

func TestUnknown(t *testing.T) {
	_, err := load(t).Get("cluade")
	if !errors.Is(err, vm.ErrNotFound) {
		t.Errorf("error %v is not ErrNotFound", err)
	}
	if hint := vm.Hint(err); !strings.Contains(hint, "did you mean claude?") || !strings.Contains(hint, "opencode") {
		t.Errorf("hint is %q", hint)
	}
}

func TestUserProfiles(t *testing.T) {
	extra := fstest.MapFS{
		"mine.yaml":  {Data: []byte("name: mine\ndescription: my own\ncommand: [mine]\n")},
		"pi.yaml":    {Data: []byte("name: pi\ndescription: my pi\ncommand: [pi, --mine]\n")},
		"notes.txt":  {Data: []byte("not a profile")},
		"sub/x.yaml": {Data: []byte("not read")},
	}
	s, err := Load(os.DirFS("/does/not/exist"), extra)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"mine": "my own", "pi": "my pi"} {
		if p, err := s.Get(name); err != nil || p.Description != want {
			t.Errorf("%s: %q, %v", name, p.Description, err)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	const head = "name: x\ndescription: d\ncommand: [x]\n"
	tests := []struct{ name, profile, want string }{
		{"unknown key", head + "comand: [x]\n", "comand"},
		{"wrong type", head + "env: A\n", "x.yaml"},
		{"other name", "name: y\ndescription: d\ncommand: [y]\n", "the file's name says"},
		{"no command", "name: x\ndescription: d\n", "no command"},
		{"no description", "name: x\ncommand: [x]\n", "no description"},
		{"range", head + "install: {npm: [{name: a, version: ^1.0.0}]}\n", "not exact"},
		{"latest", head + "install: {npm: [{name: a, version: latest}]}\n", "not exact"},
		{"npm option", head + "install: {npm: [{name: --x, version: 1.0.0}, {name: a b, version: 1.0.0}]}\n", `"a b" has no valid name`},
		{"Node", head + "install: {minNode: \"20\"}\n", "three numbers"},
		{"config outside", head + "config: [{path: ~/../x}]\n", "below ~/"},
		{"config absolute", head + "config: [{path: /etc/passwd}]\n", "below ~/"},
		{"config home", head + "config: [{path: ~/}]\n", "below ~/"},
		{"variable", head + "env: [\"A=b\"]\n", "environment variable"},
		{"allow URL", head + "allow: [\"https://example.org\"]\n", "host name"},
		{"allow all", head + "allow: [\"*\"]\n", "host name"},
		{"prompt", head + "prompt: [x, -p]\n", "{prompt}"},
		{"empty", "", "x.yaml"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(fstest.MapFS{"x.yaml": {Data: []byte(tt.profile)}})
			if !errors.Is(err, vm.ErrUsage) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "x.yaml") {
				t.Errorf("error %v, want ErrUsage with x.yaml and %q", err, tt.want)
			}
		})
	}
}

func TestPromptCommand(t *testing.T) {
	p, err := load(t).Get("pi")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"pi", "-p", "fix $(it) {prompt}"}
	if diff := cmp.Diff(want, p.PromptCommand("fix $(it) {prompt}")); diff != "" {
		t.Error(diff)
	}
	if p.Prompt[2] != "{prompt}" {
		t.Error("the profile itself was changed")
	}
	if got := (Profile{}).PromptCommand("x"); got != nil {
		t.Errorf("no prompt mode, got %q", got)
	}
}

func TestNodeFor(t *testing.T) {
	tests := []struct {
		install    Install
		have, want string
	}{
		{Install{}, "18.20.4", ""},
		{Install{MinNode: "20.6.0"}, "20.19.2", ""},
		{Install{MinNode: "20.6.0"}, "20.6.0", ""},
		{Install{MinNode: "20.6.0"}, "18.20.4", NewerNode},
		{Install{MinNode: "20.6.0"}, "9.99.99", NewerNode},
		{Install{MinNode: "22.19.0"}, "20.19.2", NewerNode},
		{Install{MinNode: "20.6.0", Node: "22.23.3"}, "20.19.2", "22.23.3"},
	}
	for _, tt := range tests {
		if got := tt.install.NodeFor(tt.have); got != tt.want {
			t.Errorf("%+v on %s: got %q, want %q", tt.install, tt.have, got, tt.want)
		}
	}
}
