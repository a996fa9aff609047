package mirror

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// side is a directory of the tests, as a map: a text is a file's content, "/"
// a directory, "->x" a link, and "|" something that cannot be copied.
type side map[string]string

func (s side) manifest() Manifest {
	m := Manifest{}
	for p, what := range s {
		e := &Entry{Path: p, Kind: File, Hash: what}
		switch {
		case what == "/":
			e = &Entry{Path: p, Kind: Directory}
		case what == "|":
			e = &Entry{Path: p, Kind: Other}
		case strings.HasPrefix(what, "->"):
			e = &Entry{Path: p, Kind: Link, Target: what[2:]}
		}
		m[p] = e
	}
	return m
}

func TestCompare(t *testing.T) {
	for name, tt := range map[string]struct {
		base, here, there     side
		keep                  Keep
		push, pull, conflicts string
	}{
		"the same":             {base: side{"a": "1"}, here: side{"a": "1"}, there: side{"a": "1"}},
		"never in step, equal": {here: side{"a": "1"}, there: side{"a": "1"}},
		"changed here":         {base: side{"a": "1"}, here: side{"a": "2"}, there: side{"a": "1"}, push: "a"},
		"changed there":        {base: side{"a": "1"}, here: side{"a": "1"}, there: side{"a": "2"}, pull: "a"},
		"changed alike":        {base: side{"a": "1"}, here: side{"a": "2"}, there: side{"a": "2"}},
		"changed on both":      {base: side{"a": "1"}, here: side{"a": "2"}, there: side{"a": "3"}, conflicts: "a"},
		"new on both":          {here: side{"a": "2"}, there: side{"a": "3"}, conflicts: "a"},
		"new here":             {here: side{"a": "2"}, push: "a"},
		"new there":            {there: side{"d": "/", "d/a": "2"}, pull: "d d/a"},
		"deleted here":         {base: side{"a": "1"}, there: side{"a": "1"}, push: "a"},
		"deleted there":        {base: side{"a": "1"}, here: side{"a": "1"}, pull: "a"},
		"deleted on both":      {base: side{"a": "1"}},
		"deleted and changed":  {base: side{"a": "1"}, there: side{"a": "2"}, conflicts: "a"},
		"into a deleted directory": {
			base: side{"d": "/", "d/a": "1"}, there: side{"d": "/", "d/a": "1", "d/b": "2"}, conflicts: "d"},
		"into a directory that became a file": {
			base: side{"d": "/"}, here: side{"d": "x"}, there: side{"d": "/", "d/b": "2"}, conflicts: "d"},
		"a link instead of a directory": {
			base: side{"d": "/", "d/a": "1"}, here: side{"d": "/", "d/a": "1"}, there: side{"d": "->/etc"}, pull: "d d/a"},
		"a link instead of a directory, in which something changed": {
			base: side{"d": "/", "d/a": "1"}, here: side{"d": "/", "d/a": "2"}, there: side{"d": "->/etc"}, conflicts: "d"},
		"a socket":                   {here: side{"s": "|"}},
		"a socket instead of a file": {base: side{"s": "1"}, here: side{"s": "1"}, there: side{"s": "|"}, conflicts: "s"},
		"a directory that nobody can read": {
			base: side{"d": "/", "d/a": "1"}, here: side{"d": "/", "d/a": "1"}, there: side{"d": "|"}, conflicts: "d"},
		"a socket instead of a file, keep here":  {base: side{"s": "1"}, here: side{"s": "1"}, there: side{"s": "|"}, keep: KeepHere, push: "s"},
		"a socket instead of a file, keep there": {base: side{"s": "1"}, here: side{"s": "1"}, there: side{"s": "|"}, keep: KeepThere, conflicts: "s"},
		"a socket here, keep there":              {here: side{"s": "|"}, there: side{"s": "1"}, keep: KeepThere, pull: "s"},
		"a socket here, and a directory":         {here: side{"s": "|"}, there: side{"s": "/", "s/a": "1", "s/s": "|"}, keep: KeepThere, pull: "s s/a"},
		"sockets on both":                        {here: side{"s": "|"}, there: side{"s": "|"}},
		"keep here":                              {base: side{"a": "1", "b": "1"}, here: side{"a": "2", "b": "1"}, there: side{"a": "3", "b": "2"}, keep: KeepHere, push: "a", pull: "b"},
		"keep there":                             {base: side{"a": "1", "b": "1"}, here: side{"a": "2", "b": "2"}, there: side{"a": "3", "b": "1"}, keep: KeepThere, push: "b", pull: "a"},
		"keep a deletion": {
			base: side{"d": "/", "d/a": "1"}, there: side{"d": "/", "d/a": "1", "d/b": "2"}, keep: KeepHere, push: "d d/a d/b"},
		"keep a directory": {
			base: side{"d": "/", "d/a": "1"}, there: side{"d": "/", "d/a": "1", "d/b": "2"}, keep: KeepThere, pull: "d d/a d/b"},
	} {
		t.Run(name, func(t *testing.T) {
			plan := Compare(tt.base.manifest(), tt.here.manifest(), tt.there.manifest(), tt.keep, nil)
			got := []string{paths(plan.Push), paths(plan.Pull), strings.Join(plan.Conflicts, " ")}
			if diff := cmp.Diff([]string{tt.push, tt.pull, tt.conflicts}, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestDeletedInItsWay has a socket come instead of a file that the other side
// deletes: nothing is left to be done, ever.
func TestDeletedInItsWay(t *testing.T) {
	base, socket := side{"s": "1", "d": "/", "d/a": "1"}.manifest(), side{"s": "|", "d": "|"}.manifest()
	for _, plan := range []Plan{Compare(base, socket, nil, KeepBoth, nil), Compare(base, nil, socket, KeepBoth, nil)} {
		if len(plan.Base)+len(plan.Push)+len(plan.Pull)+len(plan.Conflicts) > 0 {
			t.Errorf("%v", plan)
		}
	}
}

func paths(changes []Change) string {
	var list []string
	for _, c := range changes {
		list = append(list, c.Path)
	}
	return strings.Join(list, " ")
}

// TestInStep changes two real directories at random, brings them in step, and
// wants: nothing lost that was not the same on both sides before, conflicts
// as they were, all else the same; and nothing left to do.
func TestInStep(t *testing.T) {
	for seed := range uint64(150) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			here, there := openRoot(t), openRoot(t)
			base := Manifest{}
			for range 3 {
				disturb(t, random, here)
				disturb(t, random, there)
				base = bringInStep(t, here, there, base)
			}
		})
	}
}

func bringInStep(t *testing.T, here, there *os.Root, base Manifest) Manifest {
	t.Helper()
	h, far := scan(t, here), scan(t, there)
	if same := len(Compare(h, h, far, KeepBoth, nil).Pull) == 0 && len(h) == len(far); same != (h.Sum() == far.Plain().Sum()) {
		t.Error("the sums do not tell whether both are the same")
	}
	plan := Compare(base, h, far, KeepBoth, nil)
	conflict := map[string]bool{}
	for _, p := range plan.Conflicts {
		conflict[p] = true
	}
	move(t, there, here, plan.Push)
	Done(plan.Base, plan.Push, nil)
	move(t, here, there, plan.Pull)
	Done(plan.Base, plan.Pull, nil)
	h2, far2 := scan(t, here), scan(t, there)
	for _, m := range []struct{ before, after, base Manifest }{{h, h2, base}, {far, far2, base}} {
		for p, e := range m.before {
			begun := e.Kind == Directory && e.Perm == unfinished && m.base[p] == nil // its permissions are nobody's choice
			if !begun && !same(e, m.base[p]) && !same(e, h2[p]) && !same(e, far2[p]) {
				t.Errorf("%s was never the same on both sides, and is lost", p)
			}
			if conflict[p] && !same(e, m.after[p]) {
				t.Errorf("%s is a conflict, and was changed", p)
			}
		}
	}
	again := Compare(plan.Base, h2, far2, KeepBoth, nil)
	if len(again.Push)+len(again.Pull) > 0 || len(again.Conflicts) > len(plan.Conflicts) {
		t.Errorf("there is more to do: %s; %s; %q, was %q", paths(again.Push), paths(again.Pull), again.Conflicts, plan.Conflicts)
	}
	// Whoever insists gets there.
	kept := Compare(plan.Base, h2, far2, KeepThere, nil)
	move(t, there, here, kept.Push)
	move(t, here, there, kept.Pull)
	Done(kept.Base, append(kept.Push, kept.Pull...), nil)
	h3, far3 := scan(t, here), scan(t, there)
	last := Compare(kept.Base, h3, far3, KeepBoth, nil)
	if len(last.Push)+len(last.Pull)+len(last.Conflicts) > 0 {
		t.Errorf("kept one side, and still: %s; %s; %q", paths(last.Push), paths(last.Pull), last.Conflicts)
	}
	return last.Base
}

// disturb makes a few random changes.
func disturb(t *testing.T, random *rand.Rand, root *os.Root) {
	t.Helper()
	name := func() string {
		p := string('a' + rune(random.IntN(3)))
		for random.IntN(2) == 0 {
			p = path.Join(p, string('a'+rune(random.IntN(3))))
		}
		return p
	}
	for range 4 {
		p := name()
		switch random.IntN(6) {
		case 0:
			_ = root.RemoveAll(p)
		case 1:
			_ = root.MkdirAll(p, 0o700)
		case 2:
			_ = root.RemoveAll(p)
			_ = root.Symlink("../"+name(), p)
		case 3:
			_ = root.Chmod(p, 0o750)
		default:
			if fi, err := root.Lstat(p); err != nil || fi.Mode().IsRegular() {
				_ = root.MkdirAll(path.Dir(p), 0o700)
				_ = root.WriteFile(p, fmt.Append(nil, random.IntN(3)), 0o600)
			}
		}
	}
}

func openRoot(t *testing.T) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}

func scan(t *testing.T, root *os.Root) Manifest {
	t.Helper()
	m, err := Scan(t.Context(), root, nil)
	if err == nil {
		err = m.Check()
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// move has changes done in to, with content from from.
func move(t *testing.T, to, from *os.Root, changes []Change) {
	t.Helper()
	if err := CheckChanges(changes); err != nil {
		t.Fatal(err)
	}
	if failures := apply(t, to, from, changes); len(failures) > 0 {
		t.Errorf("failures: %v", failures)
	}
	left, _ := filepath.Glob(filepath.Join(to.Name(), "*", tempPrefix+"*"))
	if len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
