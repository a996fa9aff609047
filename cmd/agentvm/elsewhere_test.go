package main

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/libvirt"
)

// hereOnly are the commands that are about this host, or see to other hosts
// themselves.
var hereOnly = map[string]bool{
	"init": true, "ls": true, "status": true, "down": true, "sync": true, "doctor": true, "agents": true, "version": true,
	"supervise": true, // its argument is this host's own
	"image ls":  true, "image build": true, "image inspect": true, "image rm": true,
	"template ls": true, "template rm": true, "template prune": true, "pool ls": true, "pool drain": true,
	"gpu ls": true, "gpu check": true, "gpu bind": true, "gpu release": true, "gpu recover": true, "gpu helper-setup": true,
}

// TestEveryCommandHasItsPlace wants a decision for each command on what it does
// about a machine on another host.
func TestEveryCommandHasItsPlace(t *testing.T) {
	found := map[string]bool{}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		path := strings.TrimPrefix(cmd.CommandPath(), "agentvm ")
		if !cmd.HasSubCommands() {
			found[path] = true
			if _, goes := ways[path]; goes == hereOnly[path] {
				t.Errorf("agentvm %s: elsewhere %v, here only %v", path, goes, hereOnly[path])
			}
		}
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk((&app{getenv: os.Getenv}).rootCommand())
	for path := range hereOnly {
		if !found[path] {
			t.Errorf("there is no command %s", path)
		}
	}
}

func TestOutlivesSession(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ada"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		uid  int
		name string
		want bool
	}{{0, "root", true}, {1000, "ada", true}, {1000, "bob", false}, {1000, "", false}} {
		if got := outlivesSession(tt.uid, tt.name, dir); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

// TestConfigurationThere has the other host read the same configuration.
func TestConfigurationThere(t *testing.T) {
	_, text, _ := strings.Cut(readDoc(t, "docs/configuration.md"), "Everything at once:\n\n```yaml\n")
	text, _, _ = strings.Cut(text, "```")
	text += "backend: libvirt\nuri: qemu+ssh://ada@box:1/session?socket=/s\non_disconnect: pause\n"
	for _, text := range []string{text, "version: 1\nbackend: libvirt\nuri: qemu+ssh://ada@box:1/session?socket=/s\n"} {
		want, err := config.Parse(config.FileName, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		host, there, err := libvirt.ParseElsewhere(want.URI)
		if err != nil || !there {
			t.Fatal(there, err)
		}
		data, err := configThere(want, host, "shop")
		if err != nil {
			t.Fatal(err)
		}
		got, err := config.Parse(config.FileName, data)
		if err != nil {
			t.Fatalf("%v in\n%s", err, data)
		}
		want.URI, want.OnDisconnect, want.Workspace.Path = "qemu:///session?socket=/s", "", "./shop"
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

// TestGuestIsChecked: what another host says becomes lines of a file that ssh
// reads.
func TestGuestIsChecked(t *testing.T) {
	signer, err := gossh.NewSignerFromKey(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
	if err != nil {
		t.Fatal(err)
	}
	key := signer.PublicKey().Marshal()
	for name, tt := range map[string]struct {
		id   guestID
		good bool
	}{
		"as it is":          {guestID{"day", "agent", key}, true},
		"a user with lines": {guestID{"day", "agent\n  ProxyCommand x", key}, false},
		"a name with lines": {guestID{"day\nHost *", "agent", key}, false},
		"a name of several": {guestID{"day *", "agent", key}, false},
		"no user":           {guestID{"day", "", key}, false},
		"no key":            {guestID{"day", "agent", []byte("x")}, false},
	} {
		if _, err := tt.id.check(); (err == nil) != tt.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}
