package mirror

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCompareGuarded(t *testing.T) {
	for name, tt := range map[string]struct {
		base, here, there     side
		keep                  Keep
		push, pull, conflicts string
	}{
		"changed here":                {base: side{"g": "1"}, here: side{"g": "2"}, there: side{"g": "1"}, push: "g!"},
		"deleted here":                {base: side{"g": "1"}, there: side{"g": "1"}, push: "g"},
		"new here":                    {here: side{"g": "1"}, push: "g"},
		"changed there":               {base: side{"g": "1"}, here: side{"g": "1"}, there: side{"g": "2"}, conflicts: "g"},
		"changed there, keep there":   {base: side{"g": "1"}, here: side{"g": "1"}, there: side{"g": "2"}, keep: KeepThere, conflicts: "g"},
		"changed there, keep here":    {base: side{"g": "1"}, here: side{"g": "1"}, there: side{"g": "2"}, keep: KeepHere, push: "g!"},
		"deleted there":               {base: side{"g": "1"}, here: side{"g": "1"}, conflicts: "g"},
		"new there":                   {there: side{"g": "1"}, conflicts: "g"},
		"new there, in a directory":   {there: side{"d": "/", "d/g": "/", "d/g/x": "1"}, conflicts: "d"},
		"below":                       {base: side{"g": "/", "g/a": "1", "g/b": "1"}, here: side{"g": "/", "g/a": "2", "g/b": "1"}, there: side{"g": "/", "g/a": "1", "g/b": "2"}, push: "g/a!", conflicts: "g/b"},
		"the directory above is gone": {base: side{"d": "/", "d/g": "1"}, here: side{"d": "/", "d/g": "1"}, conflicts: "d"},
		"beside":                      {base: side{"gg": "1"}, here: side{"gg": "1"}, there: side{"gg": "2"}, pull: "gg"},
	} {
		t.Run(name, func(t *testing.T) {
			plan := Compare(tt.base.manifest(), tt.here.manifest(), tt.there.manifest(), tt.keep, []string{"./g/", "d/g"})
			push := ""
			for _, c := range plan.Push {
				push += " " + c.Path
				if c.InPlace {
					push += "!"
				}
			}
			got := []string{strings.TrimSpace(push), paths(plan.Pull), strings.Join(plan.Conflicts, " ")}
			if diff := cmp.Diff([]string{tt.push, tt.pull, tt.conflicts}, got); diff != "" {
				t.Error(diff)
			}
			for p := range tt.base {
				if len(plan.Conflicts) > 0 && plan.Base[p] == nil {
					t.Errorf("%s is not remembered", p)
				}
			}
		})
	}
	modes := func(perm os.FileMode) Manifest { return Manifest{"g": {Path: "g", Kind: Directory, Perm: perm}} }
	if plan := Compare(modes(0o700), modes(0o700), modes(0o777), KeepBoth, []string{"g"}); len(plan.Pull) > 0 || len(plan.Conflicts) != 1 {
		t.Errorf("a directory's permissions: %v", plan)
	}
}

// TestWrittenInPlace looks at the file and at what else can be seen meanwhile.
func TestWrittenInPlace(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	if err := errors.Join(here.WriteFile("g", []byte("longer than it will be"), 0o600), here.WriteFile("a", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	base := bringInStep(t, here, there, Manifest{})
	before, err := there.Lstat("g")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(here.WriteFile("g", []byte("changed"), 0o600), here.Chmod("g", 0o444)); err != nil {
		t.Fatal(err)
	}
	changes := Compare(base, scan(t, here), scan(t, there), KeepBoth, []string{"g"}).Push
	if err := CheckChanges(changes); err != nil || len(changes) != 1 {
		t.Fatal(changes, err)
	}
	var stream bytes.Buffer
	if err := Send(t.Context(), here, changes, &stream); err != nil {
		t.Fatal(err)
	}
	for n := range stream.Len() { // nothing of an attempt that is cut off
		_, err := Apply(t.Context(), there, changes, io.MultiReader(bytes.NewReader(stream.Bytes()[:n]), reading(func() {
			if entries, _ := os.ReadDir(there.Name()); len(entries) != 2 {
				t.Errorf("seen: %v", entries)
			}
		})))
		if got, _ := there.ReadFile("g"); !errors.Is(err, io.ErrUnexpectedEOF) || string(got) != "longer than it will be" {
			t.Errorf("after %d bytes: %q, %v", n, got, err)
		}
	}
	move(t, there, here, changes)
	after, err := there.Lstat("g")
	if got, _ := there.ReadFile("g"); err != nil || !os.SameFile(before, after) || string(got) != "changed" || after.Mode() != 0o444 {
		t.Errorf("%q, %v, %v", got, after, err)
	}
	if mine, err := here.Lstat("g"); err != nil || !after.ModTime().Equal(mine.ModTime()) {
		t.Errorf("%v, %v", after.ModTime(), err)
	}
}

// reading calls a function when it is read, and is at its end.
type reading func()

func (r reading) Read([]byte) (int, error) {
	r()
	return 0, io.EOF
}

// TestInPlaceIsChecked has something else come to the place that is written to.
func TestInPlaceIsChecked(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	if err := here.WriteFile("g", []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	base := bringInStep(t, here, there, Manifest{})
	if err := here.WriteFile("g", []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	changes := Compare(base, scan(t, here), scan(t, there), KeepBoth, []string{"g"}).Push
	if err := errors.Join(there.WriteFile("other", []byte("one"), 0o600), there.Remove("g"), there.Symlink("other", "g")); err != nil {
		t.Fatal(err)
	}
	if failures := apply(t, there, here, changes); len(failures) != 1 || !failures[0].Changed {
		t.Errorf("failures: %v", failures)
	}
	if err := errors.Join(there.Remove("g"), there.WriteFile("g", []byte("three"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if failures := apply(t, there, here, changes); len(failures) != 1 || !failures[0].Changed {
		t.Errorf("failures: %v", failures)
	}
	for name, want := range map[string]string{"other": "one", "g": "three"} {
		if got, _ := there.ReadFile(name); string(got) != want {
			t.Errorf("%s holds %q", name, got)
		}
	}
	for _, c := range []Change{{Path: "g", New: changes[0].New}, {Path: "g", Old: changes[0].Old}, {Path: "g", Old: &Entry{Path: "g", Kind: Link, Target: "x"}, New: changes[0].New}} {
		c.InPlace = true
		if CheckChanges([]Change{c}) == nil {
			t.Errorf("%v is taken", c)
		}
	}
}
