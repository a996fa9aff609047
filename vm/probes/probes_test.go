package probes

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestStore(t *testing.T) {
	s := Store(filepath.Join(t.TempDir(), "not", "there yet"))
	var got []string
	if s.Read("kind", "key", &got) {
		t.Error("an answer that nobody gave")
	}
	s.Write("kind", "key", []string{"an answer"})
	if !s.Read("kind", "key", &got) || len(got) != 1 || got[0] != "an answer" {
		t.Errorf("kept as %q", got)
	}
	for _, other := range [][2]string{{"other", "key"}, {"kind", "other"}} {
		if s.Read(other[0], other[1], &got) {
			t.Errorf("%q has the answer of another", other)
		}
	}
	if err := os.WriteFile(s.file("kind", "key"), []byte(`["an ans`), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.Read("kind", "key", &got) {
		t.Error("half an answer is taken for one")
	}
	none := Store("")
	none.Write("kind", "key", got)
	if none.Read("kind", "key", &got) {
		t.Error("the store that keeps nothing has kept it")
	}
}

func TestBuild(t *testing.T) {
	dir := t.TempDir()
	program, link := filepath.Join(dir, "program"), filepath.Join(dir, "link")
	seen := map[string]bool{}
	for _, step := range []func() error{
		func() error { return os.WriteFile(program, []byte("one"), 0o700) },
		func() error { return os.WriteFile(program, []byte("another"), 0o700) },
		func() error { return os.Chtimes(program, time.Time{}, time.Unix(1e9, 0)) },
		func() error { // another of that time and size, as an installer may bring
			return errors.Join(os.WriteFile(program+".new", []byte("another"), 0o700), os.Chtimes(program+".new", time.Time{}, time.Unix(1e9, 0)), os.Rename(program+".new", program))
		},
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		build, err := Build(program)
		if err != nil || seen[build] {
			t.Errorf("%q, %v, after %v", build, err, seen)
		}
		seen[build] = true
	}
	if err := os.Symlink("program", link); err != nil {
		t.Fatal(err)
	}
	if build, err := Build(link); err != nil || !seen[build] {
		t.Errorf("by a link it is %q, %v", build, err)
	}
	if build, err := Build(filepath.Join(dir, "none")); err == nil {
		t.Errorf("nothing is %q", build)
	}
}
