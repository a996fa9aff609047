package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
)

func TestLoadUser(t *testing.T) {
	path := filepath.Join(t.TempDir(), UserFile)
	if u, err := LoadUser(path); err != nil || u != (User{}) {
		t.Errorf("without a file: %+v, %v", u, err)
	}
	for text, want := range map[string]string{
		"pool: 2\n":          "",
		"pool: 0\n":          "",
		"pool: 65\n":         "config.yaml:1:7: pool must be 0 to 64",
		"pool: -1\n":         "config.yaml:1:7",
		"pool: two\n":        "config.yaml:1:7",
		"polo: 2\n":          `config.yaml:1:1: unknown key "polo"`,
		"pool: 1\n---\na: 1": "more than one document",
		"":                   "the file is empty",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadUser(path)
		if want == "" {
			if err != nil {
				t.Errorf("%q: %v", text, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) || vm.Hint(err) == "" && strings.HasPrefix(text, "polo") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}
