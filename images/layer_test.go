package images

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", path, d)
	}
}

func TestInstallScript(t *testing.T) {
	host := hostNet{
		proxies: []string{"https_proxy=http://user:it's@proxy.example:3128"},
		cas:     []byte("PEM"),
	}
	for name, spec := range map[string]Spec{
		"install-npm.sh": {
			Image: "debian-13", Node: "22.23.3",
			NPM: []NPMPackage{{Name: "@scope/agent", Version: "1.2.3", Scripts: true}, {Name: "other", Version: "4.5.6"}},
		},
		"install-run.sh": {Image: "debian-13", Run: []string{`echo "it's" $HOME`, "make\ninstall"}},
	} {
		script := installScript(spec, host)
		golden(t, name, script)
		cmd := exec.Command("sh", "-n")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if got := installScript(Spec{Image: "debian-13", Packages: []string{"jq"}}, host); got != "" {
		t.Errorf("a layer of Debian packages only has a script:\n%s", got)
	}
}

func TestParsePackages(t *testing.T) {
	got := parsePackages("ii \tjq\t1.7\tamd64\nrc \told\t1\tall\nii \tbase-files\t13.8+deb13u8\tamd64\n")
	want := []Package{{"jq", "1.7", "amd64"}, {"base-files", "13.8+deb13u8", "amd64"}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestParseNPMTree(t *testing.T) {
	got, err := parseNPMTree([]byte(`{"name":"lib","dependencies":{
		"b":{"version":"2.0.0","dependencies":{"a":{"version":"1.0.0"},"optional":{}}},
		"a":{"version":"1.0.0"}}}`))
	want := []NPMInstalled{{"a", "1.0.0"}, {"b", "2.0.0"}}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Error(err, d)
	}
}
