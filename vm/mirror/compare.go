package mirror

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// Change is one path that is to become something else.
type Change struct {
	Path string `json:"path"`
	Old  *Entry `json:"old,omitempty"` // what must be there; nil: nothing
	New  *Entry `json:"new,omitempty"` // nil: nothing

	// InPlace has a file written to, and not replaced by another one: with
	// that, the mount that guards it would go.
	InPlace bool `json:"inPlace,omitempty"`
}

// Plan is what brings two sides in step.
type Plan struct {
	Push      []Change // to be done there, by path
	Pull      []Change // to be done here, by path
	Conflicts []string // what stays different, by path
	Base      Manifest // what is the same on both sides already
}

// Keep says which side's version of a conflict is the right one.
type Keep string

// Ways out of conflicts.
const (
	KeepBoth  Keep = "" // a conflict stays one
	KeepHere  Keep = "here"
	KeepThere Keep = "there"
)

// Compare decides what is to be done. base is what was last the same on both
// sides; what it lacks never was.
//
// Where both sides have a directory, what is in it is decided on one by one.
// Anything else is decided on as a whole, with all that is in it: it is copied
// if one side has it as it last was on both, and is a conflict otherwise.
//
// Of what cannot be copied nobody knows what it is: in its way, anything is a
// conflict, unless keep says that the other side is right.
//
// Nothing is pulled to the guarded paths and what is below them, which no guest
// is to change: what changed there is a conflict. KeepHere takes it back.
func Compare(base, here, there Manifest, keep Keep, guarded []string) Plan {
	c := comparison{base: base, here: here, there: there, keep: keep, in: map[string][]string{}, plan: Plan{Base: Manifest{}}}
	for _, p := range guarded {
		c.guarded = append(c.guarded, path.Clean(p))
	}
	seen := map[string]bool{}
	for _, m := range []Manifest{base, here, there} {
		for p := range m {
			if !seen[p] {
				seen[p] = true
				c.in[path.Dir(p)] = append(c.in[path.Dir(p)], p)
			}
		}
	}
	for _, p := range c.in["."] {
		c.decide(p)
	}
	byPath := func(a, b Change) int { return strings.Compare(a.Path, b.Path) }
	slices.SortFunc(c.plan.Push, byPath)
	slices.SortFunc(c.plan.Pull, byPath)
	slices.Sort(c.plan.Conflicts)
	return c.plan
}

type comparison struct {
	base, here, there Manifest
	keep              Keep
	guarded           []string
	in                map[string][]string // what lies in a directory, on any side
	plan              Plan
}

func (c *comparison) decide(p string) {
	b, h, t := c.base[p], c.here[p], c.there[p]
	if !isKind(h, Directory) || !isKind(t, Directory) {
		c.whole(p)
		return
	}
	way := conflict // about permissions
	switch {
	case same(t, b), !same(h, b) && c.keep == KeepHere:
		way = push
	case same(h, b), c.keep == KeepThere:
		way = pull
	case b == nil && t.Perm == unfinished: // somebody was killed in between
		way = push
	case b == nil && h.Perm == unfinished:
		way = pull
	}
	way = c.allowed(way, p)
	switch {
	case same(h, t):
		c.plan.Base[p] = plain(h)
	case way == conflict:
		c.conflict(p)
	default:
		c.copy(p, way)
	}
	for _, q := range c.in[p] {
		c.decide(q)
	}
}

// whole decides on a path and all that is in it.
func (c *comparison) whole(p string) {
	h, t := c.here[p], c.there[p]
	all := c.below(p, nil)
	alike := func(x, y Manifest) bool {
		return !slices.ContainsFunc(all, func(q string) bool { return !same(x[q], y[q]) })
	}
	way := conflict
	switch {
	case isKind(h, Other) && (t == nil || isKind(t, Other)), isKind(t, Other) && h == nil:
		return // there is nothing that could be copied, and nothing to remember
	case isKind(t, Other) && c.keep == KeepHere:
		way = push
	case isKind(h, Other) && c.keep == KeepThere:
		way = pull
	case isKind(h, Other), isKind(t, Other): // nobody knows what is in it
	case alike(c.there, c.base):
		way = push
	case alike(c.here, c.base), c.keep == KeepThere:
		way = pull
	case c.keep == KeepHere:
		way = push
	case alike(c.here, c.there):
		way = push // nothing
	}
	if way = c.allowed(way, all...); way == conflict {
		c.conflict(p)
		for _, q := range all {
			c.remember(q)
		}
		return
	}
	for _, q := range all {
		c.copy(q, way)
	}
}

// allowed is the way that paths may go.
func (c *comparison) allowed(way direction, paths ...string) direction {
	if way != pull || !slices.ContainsFunc(paths, func(p string) bool { return c.isGuarded(p) && !same(c.here[p], c.there[p]) }) {
		return way
	}
	if c.keep == KeepHere {
		return push
	}
	return conflict
}

func (c *comparison) isGuarded(p string) bool {
	return slices.ContainsFunc(c.guarded, func(g string) bool { return p == g || strings.HasPrefix(p, g+"/") })
}

func (c *comparison) below(p string, list []string) []string {
	list = append(list, p)
	for _, q := range c.in[p] {
		list = c.below(q, list)
	}
	return list
}

type direction int

const (
	conflict direction = iota
	push
	pull
)

// copy makes one side's path like the other's, if it is not.
func (c *comparison) copy(p string, way direction) {
	h, t := c.here[p], c.there[p]
	switch {
	case same(h, t):
		if h != nil {
			c.plan.Base[p] = plain(h)
		}
		return
	case way == push && (h == nil && isKind(t, Other) || isKind(h, Other)): // it stays where it is
	case way == pull && (t == nil && isKind(h, Other) || isKind(t, Other)):
	case way == push:
		c.plan.Push = append(c.plan.Push, Change{Path: p, Old: t, New: h, InPlace: isKind(h, File) && isKind(t, File) && c.isGuarded(p)})
	default:
		c.plan.Pull = append(c.plan.Pull, Change{Path: p, Old: h, New: t})
	}
	c.remember(p)
}

func (c *comparison) conflict(p string) {
	c.plan.Conflicts = append(c.plan.Conflicts, p)
	c.remember(p)
}

// remember keeps what was last the same of a path that is not yet again.
func (c *comparison) remember(p string) {
	if b := c.base[p]; b != nil {
		c.plan.Base[p] = b
	}
}

func isKind(e *Entry, k Kind) bool { return e != nil && e.Kind == k }

// plain is an entry without what only one side knows of it.
func plain(e *Entry) *Entry {
	e2 := *e
	e2.Stamp = nil
	return &e2
}

// Done notes in base what Apply has done: all of changes but what failed.
func Done(base Manifest, changes []Change, failed []Failure) {
	not := map[string]bool{}
	for _, f := range failed {
		not[f.Path] = true
	}
	for _, c := range changes {
		switch {
		case not[c.Path]:
		case c.New == nil:
			delete(base, c.Path)
		default:
			base[c.Path] = plain(c.New)
		}
	}
}

// CheckChanges looks at changes that came from elsewhere.
func CheckChanges(changes []Change) error {
	if len(changes) > 2*maxEntries {
		return ErrTooLarge
	}
	seen := map[string]bool{}
	for _, c := range changes {
		for _, e := range []*Entry{c.Old, c.New} {
			if e == nil {
				continue
			}
			if err := e.check(); err != nil {
				return err
			}
			if e.Path != c.Path || e.Kind == Other && (e == c.New || c.New == nil) {
				return fmt.Errorf("%q is to become %q", c.Path, e.Path)
			}
		}
		if c.InPlace && (!isKind(c.Old, File) || !isKind(c.New, File)) {
			return fmt.Errorf("%q is no file that can be written to", c.Path)
		}
		if !goodPath(c.Path) || seen[c.Path] || strings.HasPrefix(path.Base(c.Path), tempPrefix) {
			return fmt.Errorf("%q cannot be changed", c.Path)
		}
		seen[c.Path] = true
	}
	return nil
}
