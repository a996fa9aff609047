package mirror

import (
	"cmp"
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
func Compare(base, here, there Manifest, keep Keep) Plan {
	c := comparison{base: base, here: here, there: there, keep: keep, final: map[string]*Entry{}, way: map[string]direction{}}
	for _, m := range []Manifest{base, here, there} {
		for p := range m {
			c.decide(p)
		}
	}
	for c.refuse() {
	}
	return c.plan()
}

type direction int

const (
	inStep direction = iota
	push
	pull
	conflict
	stays // on one side only, and cannot be copied
)

type comparison struct {
	base, here, there Manifest
	keep              Keep
	final             map[string]*Entry // what would be at a path in the end
	way               map[string]direction
}

func (c *comparison) decide(p string) {
	b, h, t := c.base[p], c.here[p], c.there[p]
	way, final := conflict, h
	switch {
	case other(h) && t == nil && b == nil || other(t) && h == nil && b == nil:
		way, final = stays, cmp.Or(h, t)
	case other(h) || other(t):
	case same(h, t):
		way = inStep
	case same(t, b), c.keep == KeepHere:
		way = push
	case same(h, b), c.keep == KeepThere:
		way, final = pull, t
	}
	c.way[p], c.final[p] = way, final
}

func other(e *Entry) bool { return e != nil && e.Kind == Other }

// refuse turns into conflicts what cannot be done without harm to something
// else, and reports whether there was any: what would lie in no directory, and
// what lies in one that nobody can look into.
func (c *comparison) refuse() (any bool) {
	for p := range c.way {
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			blind := other(c.here[dir]) || other(c.there[dir])
			lost := c.final[p] != nil && (c.final[dir] == nil || c.final[dir].Kind != Directory)
			switch {
			case blind:
				any = c.settle(p, conflict) || any
			case lost:
				any = c.settle(dir, c.wanted(dir)) || any
				any = c.settle(p, c.wanted(p)) || any
			}
		}
	}
	return any
}

// wanted is what becomes of a path that is in another's way.
func (c *comparison) wanted(p string) direction {
	switch {
	case c.keep == KeepHere && c.way[p] != push && c.way[p] != stays:
		return push
	case c.keep == KeepThere && c.way[p] != pull && c.way[p] != stays:
		return pull
	}
	return conflict
}

// settle makes another decision on a path, unless that is a conflict already.
func (c *comparison) settle(p string, way direction) bool {
	if c.way[p] == conflict || c.way[p] == inStep && way == conflict && c.here[p] == nil {
		return false
	}
	c.way[p] = way
	switch way {
	case push:
		c.final[p] = c.here[p]
	case pull:
		c.final[p] = c.there[p]
	default: // it stays, and so does what is in it
		c.final[p] = directory(c.here[p], c.there[p])
	}
	return true
}

// directory is what of two is one: a conflict leaves it where it is.
func directory(a, b *Entry) *Entry {
	if a != nil && a.Kind == Directory {
		return a
	}
	return b
}

func (c *comparison) plan() Plan {
	plan := Plan{Base: Manifest{}}
	for p, way := range c.way {
		h, t := c.here[p], c.there[p]
		switch way {
		case inStep:
			if h != nil {
				plan.Base[p] = plain(h)
			}
			continue
		case push:
			plan.Push = append(plan.Push, Change{p, t, h})
		case pull:
			plan.Pull = append(plan.Pull, Change{p, h, t})
		case conflict:
			plan.Conflicts = append(plan.Conflicts, p)
		case stays:
			continue
		}
		if b := c.base[p]; b != nil { // still what it was, until it is done
			plan.Base[p] = b
		}
	}
	byPath := func(a, b Change) int { return strings.Compare(a.Path, b.Path) }
	slices.SortFunc(plan.Push, byPath)
	slices.SortFunc(plan.Pull, byPath)
	slices.Sort(plan.Conflicts)
	return plan
}

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
			if e.Path != c.Path || e.Kind == Other {
				return fmt.Errorf("%q is to become %q", c.Path, e.Path)
			}
		}
		if !goodPath(c.Path) || seen[c.Path] || strings.HasPrefix(path.Base(c.Path), tempPrefix) {
			return fmt.Errorf("%q cannot be changed", c.Path)
		}
		seen[c.Path] = true
	}
	return nil
}
