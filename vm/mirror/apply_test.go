package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func apply(t *testing.T, to, from *os.Root, changes []Change) []Failure {
	t.Helper()
	var stream bytes.Buffer
	if err := Send(t.Context(), from, changes, &stream); err != nil {
		t.Fatal(err)
	}
	failures, err := Apply(t.Context(), to, changes, &stream)
	if err != nil {
		t.Fatal(err)
	}
	if stream.Len() > 0 {
		t.Errorf("%d bytes were not read", stream.Len())
	}
	return failures
}

func pullAll(t *testing.T, here, there *os.Root) []Change {
	t.Helper()
	return Compare(nil, scan(t, here), scan(t, there), KeepBoth, nil).Pull
}

// TestHostile pulls from a directory with whatever a guest's root can make.
func TestHostile(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	dir := there.Name()
	outside := filepath.Join(t.TempDir(), "outside")
	for _, err := range []error{
		os.WriteFile(outside, []byte("secret"), 0o600),
		os.Symlink(outside, filepath.Join(dir, "file")),
		os.Symlink(filepath.Dir(outside), filepath.Join(dir, "dir")),
		os.Symlink("/dev/zero", filepath.Join(dir, "zero")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
		os.WriteFile(filepath.Join(dir, "name\xff"), nil, 0o600),
		os.WriteFile(filepath.Join(dir, "suid"), []byte("x"), 0o755),
		os.Chmod(filepath.Join(dir, "suid"), 0o755|os.ModeSetuid|os.ModeSetgid),
		os.WriteFile(filepath.Join(dir, "-rf\n\x1b[2J"), []byte("x"), 0o600),
		os.Mkdir(filepath.Join(dir, "sticky"), 0o755),
		os.Chmod(filepath.Join(dir, "sticky"), 0o555|os.ModeSticky|os.ModeSetgid),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0); err == nil {
		defer unix.Close(l)
		if err := unix.Bind(l, &unix.SockaddrUnix{Name: filepath.Join(dir, "socket")}); err != nil {
			t.Fatal(err)
		}
	}
	move(t, here, there, pullAll(t, here, there))
	want := map[string]os.FileMode{
		"file": os.ModeSymlink | 0o777, "dir": os.ModeSymlink | 0o777, "zero": os.ModeSymlink | 0o777,
		"suid": 0o755, "-rf\n\x1b[2J": 0o600, "sticky": os.ModeDir | 0o555,
	}
	entries, err := os.ReadDir(here.Name())
	if err != nil || len(entries) != len(want) {
		t.Errorf("%v, %v", entries, err)
	}
	for _, e := range entries {
		if fi, err := e.Info(); err != nil || fi.Mode() != want[e.Name()] {
			t.Errorf("%q is %v, %v", e.Name(), fi.Mode(), err)
		}
	}
	if target, _ := here.Readlink("file"); target != outside {
		t.Errorf("the link leads to %q", target)
	}
}

// TestLinksAreNotFollowed has a directory turn into a link after the decision.
func TestLinksAreNotFollowed(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	outside := t.TempDir()
	for _, root := range []*os.Root{here, there} {
		if err := root.Mkdir("d", 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := there.WriteFile("d/x", []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := here.Mkdir("mine", 0o700); err != nil {
		t.Fatal(err)
	}
	changes := Compare(nil, scan(t, here), scan(t, there), KeepBoth, nil).Pull
	for _, target := range []string{outside, "mine"} {
		if err := errors.Join(here.RemoveAll("d"), here.Symlink(target, "d")); err != nil {
			t.Fatal(err)
		}
		if failures := apply(t, here, there, changes); len(failures) != 1 {
			t.Errorf("%s: failures %v", target, failures)
		}
	}
	for _, dir := range []string{outside, filepath.Join(here.Name(), "mine")} {
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("written through the link: %v", left)
		}
	}
}

// TestNothingNewIsReplaced has each kind of change come after another.
func TestNothingNewIsReplaced(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	for _, name := range []string{"replaced", "deleted"} {
		if err := errors.Join(here.WriteFile(name, []byte("old"), 0o600), there.WriteFile(name, []byte("old"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	base := Compare(nil, scan(t, here), scan(t, there), KeepBoth, nil).Base
	if err := errors.Join(there.WriteFile("replaced", []byte("theirs"), 0o600), there.Remove("deleted"), there.WriteFile("made", []byte("theirs"), 0o600)); err != nil {
		t.Fatal(err)
	}
	changes := Compare(base, scan(t, here), scan(t, there), KeepBoth, nil).Pull
	if len(changes) != 3 {
		t.Fatal(paths(changes))
	}
	for _, name := range []string{"replaced", "deleted", "made"} {
		if err := here.WriteFile(name, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	failures := apply(t, here, there, changes)
	if len(failures) != 3 {
		t.Errorf("failures: %v", failures)
	}
	for _, name := range []string{"replaced", "deleted", "made"} {
		if got, _ := here.ReadFile(name); string(got) != "mine" {
			t.Errorf("%s holds %q", name, got)
		}
	}
	Done(base, changes, failures)
	if again := Compare(base, scan(t, here), scan(t, there), KeepBoth, nil); len(again.Conflicts) != 3 {
		t.Errorf("conflicts: %q", again.Conflicts)
	}
}

// TestKeepInstead replaces what cannot be copied, and no directory.
func TestKeepInstead(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	if err := errors.Join(here.WriteFile("p", []byte("mine"), 0o600), unix.Mkfifo(filepath.Join(there.Name(), "p"), 0o600)); err != nil {
		t.Fatal(err)
	}
	changes := Compare(nil, scan(t, here), scan(t, there), KeepHere, nil).Push
	move(t, there, here, changes)
	if got, err := there.ReadFile("p"); err != nil || string(got) != "mine" {
		t.Errorf("%q, %v", got, err)
	}
	// It is now something else than was decided on.
	if failures := apply(t, there, here, changes); len(failures) != 1 || !failures[0].Changed {
		t.Errorf("failures: %v", failures)
	}
	if err := errors.Join(there.Remove("p"), there.Mkdir("p", 0o700)); err != nil {
		t.Fatal(err)
	}
	changes[0].Old = &Entry{Path: "p", Kind: Other}
	if failures := apply(t, there, here, changes); len(failures) != 1 || failures[0].Changed {
		t.Errorf("a directory: failures %v", failures)
	}
	if _, err := there.Lstat("p"); err != nil {
		t.Error(err)
	}
	if CheckChanges([]Change{{Path: "p", Old: changes[0].Old}}) == nil || CheckChanges([]Change{{Path: "p", New: changes[0].Old}}) == nil {
		t.Error("something that cannot be copied is to be made or only deleted")
	}
}

// TestSourceChanges has a file change between its description and its sending.
func TestSourceChanges(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	for name, text := range map[string]string{"a": "one", "b": "two"} {
		if err := there.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	changes := pullAll(t, here, there)
	for _, text := range []string{"longer than it was", "1", "ONE"} {
		if err := there.WriteFile("a", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if failures := apply(t, here, there, changes[:1]); len(failures) != 1 {
			t.Errorf("%q: failures %v", text, failures)
		}
	}
	if failures := apply(t, here, there, changes); len(failures) != 1 || failures[0].Path != "a" {
		t.Errorf("failures: %v", failures)
	}
	if got, _ := here.ReadFile("b"); string(got) != "two" {
		t.Errorf("b holds %q", got)
	}
	if entries, _ := os.ReadDir(here.Name()); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

// TestStreamEnds cuts the stream at every byte.
func TestStreamEnds(t *testing.T) {
	there := openRoot(t)
	if err := there.WriteFile("a", []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	changes := pullAll(t, openRoot(t), there)
	var stream bytes.Buffer
	if err := Send(t.Context(), there, changes, &stream); err != nil {
		t.Fatal(err)
	}
	for n := range stream.Len() {
		here := openRoot(t)
		if _, err := Apply(t.Context(), here, changes, bytes.NewReader(stream.Bytes()[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		if entries, _ := os.ReadDir(here.Name()); len(entries) > 0 {
			t.Errorf("after %d bytes there is %v", n, entries)
		}
	}
}

// TestEndsHalfway wants directories to be what they are there, as far as they
// were made, and the next attempt to do the rest.
func TestEndsHalfway(t *testing.T) {
	there := openRoot(t)
	for _, err := range []error{
		there.Mkdir("d", 0o755), there.Mkdir("d/e", 0o755), there.WriteFile("d/e/a", []byte("content"), 0o600),
		there.WriteFile("d/e/b", nil, 0o600), there.Chmod("d/e", 0o555), there.Mkdir("f", 0o750),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = there.Chmod("d/e", 0o700) })
	changes := pullAll(t, openRoot(t), there)
	var stream bytes.Buffer
	if err := Send(t.Context(), there, changes, &stream); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	for name, attempt := range map[string]func(to *os.Root) error{
		"a lost connection": func(to *os.Root) error {
			_, err := Apply(t.Context(), to, changes, bytes.NewReader(stream.Bytes()[:7]))
			return err
		},
		"an interrupt": func(to *os.Root) error {
			_, err := Apply(ctx, to, changes, io.MultiReader(bytes.NewReader(stream.Bytes()[:7]), reading(cancel)))
			return err
		},
	} {
		to := openRoot(t)
		t.Cleanup(func() { _ = to.Chmod("d/e", 0o700) })
		if err := attempt(to); err == nil {
			t.Error("it did not end")
		}
		m := scan(t, to)
		if len(m) != 2 || m["d"].Perm != 0o755 || m["d/e"].Perm != 0o555 {
			t.Errorf("%s: %v, %v", name, m["d"], m["d/e"])
		}
		if again := Compare(nil, m, scan(t, there), KeepBoth, nil); paths(again.Pull) != "d/e/a d/e/b f" || len(again.Push)+len(again.Conflicts) > 0 {
			t.Errorf("%s: %v", name, again)
		}
	}
	// And one that was killed.
	for _, tt := range []struct {
		base        Manifest
		here, there os.FileMode
		want        string
	}{
		{nil, 0o700, 0o755, "[] [d] []"}, {nil, 0o755, 0o700, "[d] [] []"}, {nil, 0o755, 0o750, "[] [] [d]"},
		{Manifest{"d": {Path: "d", Kind: Directory, Perm: 0o711}}, 0o755, 0o700, "[] [] [d]"},
	} {
		m := func(perm os.FileMode) Manifest { return Manifest{"d": {Path: "d", Kind: Directory, Perm: perm}} }
		plan := Compare(tt.base, m(tt.here), m(tt.there), KeepBoth, nil)
		if got := fmt.Sprintf("[%s] [%s] %v", paths(plan.Push), paths(plan.Pull), plan.Conflicts); got != tt.want {
			t.Errorf("%o, %o: %s", tt.here, tt.there, got)
		}
	}
}

// TestKnownContentIsNotRead relies on what only the kernel sets.
func TestKnownContentIsNotRead(t *testing.T) {
	root := openRoot(t)
	if err := root.WriteFile("a", []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	first := scan(t, root)
	if first["a"].Stamp != nil {
		t.Error("a file that has just changed is trusted")
	}
	fi, err := root.Lstat("a")
	if err != nil {
		t.Fatal(err)
	}
	later := fi.ModTime().Add(time.Hour)
	e, err := look(t.Context(), root, "a", nil, later)
	if err != nil || e.Stamp == nil {
		t.Fatal(e, err)
	}
	known := *e
	known.Hash = strings.Repeat("0", 64)
	if again, err := look(t.Context(), root, "a", &known, later); err != nil || again.Hash != known.Hash {
		t.Errorf("it was read again: %v, %v", again, err)
	}
	time.Sleep(50 * time.Millisecond) // the kernel's clock for that has steps
	// A guest can set the times that it likes, and the size, and is found out.
	if err := root.WriteFile("a", []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := root.Chtimes("a", fi.ModTime(), fi.ModTime()); err != nil {
		t.Fatal(err)
	}
	if again, err := look(t.Context(), root, "a", &known, later); err != nil || again.Hash == known.Hash {
		t.Errorf("another content went unnoticed: %v, %v", again, err)
	}
}

// TestHuge has files of holes, which cost nothing to make.
func TestHuge(t *testing.T) {
	root := openRoot(t)
	make := func(name string, size int64) {
		f, err := root.Create(name)
		if err == nil {
			err = errors.Join(f.Truncate(size), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	make("huge", maxFile+1)
	if m := scan(t, root); m["huge"].Kind != Other {
		t.Errorf("%v", m["huge"])
	}
	make("large", maxFile)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, err := Scan(ctx, root, nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(begun))
	}
	e := Entry{Path: "a", Kind: File, Size: maxFile + 1, Hash: strings.Repeat("0", 64)}
	if (Manifest{"a": &e}).Check() == nil || CheckChanges([]Change{{Path: "a", New: &e}}) == nil {
		t.Error("it is taken from elsewhere")
	}
}

// TestDeepAndLong has directories that no path leads into any more.
func TestDeepAndLong(t *testing.T) {
	for name, width := range map[string]int{"deep": 1, "long": 200} {
		root := openRoot(t)
		top, err := root.OpenRoot(".")
		if err != nil {
			t.Fatal(err)
		}
		for range 400 {
			if err := top.Mkdir(strings.Repeat("d", width), 0o700); err != nil {
				t.Fatal(err)
			}
			next, err := top.OpenRoot(strings.Repeat("d", width))
			if err := errors.Join(err, top.Close()); err != nil {
				t.Fatal(err)
			}
			top = next
		}
		top.Close()
		m := scan(t, root)
		others := 0
		for _, e := range m {
			if e.Kind == Other {
				others++
			}
		}
		if others != 1 || len(m) > maxDepth+1 {
			t.Errorf("%s: %d of %d cannot be copied", name, others, len(m))
		}
	}
}

func FuzzCheck(f *testing.F) {
	for _, p := range []string{"a", "a/b", "", ".", "..", "../x", "/x", "a//b", "a/../b", "a/.", "\xff", "a\x00", tempPrefix + "x"} {
		f.Add(p, "target", uint32(0o644), int64(1))
	}
	f.Fuzz(func(t *testing.T, p, target string, perm uint32, size int64) {
		changes := []Change{{Path: p, New: &Entry{Path: p, Kind: Link, Target: target}}}
		if CheckChanges(changes) != nil {
			return
		}
		root := openRoot(t)
		parent := filepath.Dir(root.Name())
		before, _ := os.ReadDir(parent)
		_, err := Apply(t.Context(), root, changes, strings.NewReader(""))
		after, _ := os.ReadDir(parent)
		if err != nil || len(before) != len(after) {
			t.Errorf("%v, %v, %v", err, before, after)
		}
		if !filepath.IsLocal(p) {
			t.Errorf("%q was let through", p)
		}
	})
}
