package images

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

func TestSpecNormal(t *testing.T) {
	got, err := Spec{
		Image:    "debian-13",
		Packages: []string{"tree", "jq", "tree"},
		NPM:      []NPMPackage{{Name: "b"}, {Name: "@a/x", Version: "1.2.3"}},
		Run:      []string{"second", "first"},
	}.normal()
	if err != nil {
		t.Fatal(err)
	}
	want := Spec{
		Image:    "debian-13",
		Packages: []string{"jq", "tree"},
		Node:     NodeDebian,
		NPM:      []NPMPackage{{Name: "@a/x", Version: "1.2.3"}, {Name: "b", Version: "latest"}},
		Run:      []string{"second", "first"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// What reaches a command line must not be taken for an option or for more
// than one word.
func TestSpecRejects(t *testing.T) {
	for _, s := range []Spec{
		{Packages: []string{"--allow-unauthenticated"}},
		{Packages: []string{"a b"}},
		{Packages: []string{""}},
		{Packages: []string{"x;reboot"}},
		{NPM: []NPMPackage{{Name: "../evil"}}},
		{NPM: []NPMPackage{{Name: "-g"}}, Node: "debian-"},
		{NPM: []NPMPackage{{Name: "x", Version: "git+ssh://host/x"}}},
		{NPM: []NPMPackage{{Name: "x"}, {Name: "x", Version: "1.0.0"}}},
		{Node: "22"},
	} {
		if _, err := s.normal(); !errors.Is(err, vm.ErrUsage) {
			t.Errorf("%+v: error %v, want ErrUsage", s, err)
		}
	}
}

func TestKeys(t *testing.T) {
	at := func(s Spec) plan {
		t.Helper()
		p, err := newPlan(s, "", "")
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	base := at(Spec{Image: "debian-13"})
	if base.layerID != "" || base.id() != base.baseID {
		t.Errorf("a bare spec has a layer: %+v", base)
	}
	one := at(Spec{Image: "debian-13", Packages: []string{"jq", "tree"}})
	same := at(Spec{Image: "debian-13", Packages: []string{"tree", "jq", "jq"}})
	if one.id() != same.id() {
		t.Error("the order of packages changes the key")
	}
	if one.baseID != base.baseID {
		t.Error("a layer changes its base's key")
	}
	ids := map[string]string{base.id(): "base", one.id(): "jq tree"}
	for name, s := range map[string]Spec{
		"other release": {Image: "debian-12"},
		"node":          {Image: "debian-13", Node: NodeDebian},
		"newer node":    {Image: "debian-13", Node: "22.23.3"},
		"npm":           {Image: "debian-13", NPM: []NPMPackage{{Name: "x", Version: "1.0.0"}}},
		"npm version":   {Image: "debian-13", NPM: []NPMPackage{{Name: "x", Version: "1.0.1"}}},
		"npm scripts":   {Image: "debian-13", NPM: []NPMPackage{{Name: "x", Version: "1.0.1", Scripts: true}}},
		"run":           {Image: "debian-13", Run: []string{"true"}},
	} {
		id := at(s).id()
		if other, ok := ids[id]; ok {
			t.Errorf("%s and %s share ID %s", name, other, id)
		}
		ids[id] = name
	}
	if p, _ := newPlan(Spec{Image: "debian-13"}, "http://mirror.example/debian", ""); p.baseID == base.baseID {
		t.Error("the mirror does not change the key")
	}
}

func TestKnown(t *testing.T) {
	for name, near := range map[string]string{
		"debian13": "debian-13", "debian-14": "debian-13", "trixie": "debian-13", "bookwurm": "debian-12",
		"Debian-12": "debian-12", "12": "debian-12", "debian:13": "debian-13", "windows-11": "",
	} {
		_, err := Known(name)
		if !errors.Is(err, vm.ErrNotFound) {
			t.Errorf("%s: error %v", name, err)
		}
		want := "name one of these, or the path of a disk image file"
		if near != "" {
			want = "did you mean " + near + "?"
		}
		if got := vm.Hint(err); got != want {
			t.Errorf("%s: hint %q, want %q", name, got, want)
		}
	}
}

// Every release of the catalogue has a recipe.
func TestPackageLists(t *testing.T) {
	for _, e := range Catalogue() {
		list, err := packageList(e.Suite)
		if err != nil {
			t.Error(err)
		}
		for _, p := range list {
			if !debianPackage().MatchString(p) {
				t.Errorf("%s: %q is not a package", e.Suite, p)
			}
		}
		if len(list) < 5 {
			t.Errorf("%s: only %q", e.Suite, list)
		}
	}
	if line, err := cmdline(); err != nil || line == "" {
		t.Errorf("command line %q, error %v", line, err)
	}
}
