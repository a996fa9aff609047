package template

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
)

func key(c string) string { return strings.Repeat(c, 64) }

func publish(t *testing.T, s Store, key string, bytes int, used time.Time) *Template {
	t.Helper()
	dir := s.Workshop(key)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"memory": make([]byte, bytes), DiskFile: nil} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	made, err := s.Publish(dir, Manifest{Key: key, Created: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	made.Release()
	if err := os.Chtimes(filepath.Join(made.Dir, manifestFile), used, used); err != nil {
		t.Fatal(err)
	}
	return made
}

func ids(t *testing.T, s Store) (list []string) {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, t := range all {
		list = append(list, t.Key[:1])
	}
	return list
}

func TestFind(t *testing.T) {
	s := Store{Dir: t.TempDir(), Max: 1 << 30}
	if _, err := s.Find(key("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in an empty store: %v", err)
	}
	made := publish(t, s, key("a"), 1, time.Now())
	found, err := s.Find(key("a"))
	if err != nil || found.ID != made.ID {
		t.Fatalf("%v, %v", found, err)
	}
	if _, err := s.Find(key("a")[:63] + "b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another key with the same first digits: %v", err)
	}
	if got, err := s.Get(made.ID[:4]); err != nil || got.ID != made.ID {
		t.Errorf("by prefix: %v, %v", got, err)
	}
	if _, err := s.Get("zz"); !errors.Is(err, vm.ErrNotFound) {
		t.Errorf("unknown id: %v", err)
	}
	if err := s.Remove(found); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Find(key("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after its removal: %v", err)
	}
}

// TestHalfMade: what a killed program leaves is not a template.
func TestHalfMade(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	if err := os.MkdirAll(s.Workshop(key("a")), 0o700); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(s.Dir, key("b")[:keyDigits]+"-1")
	if err := os.MkdirAll(half, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"", "{", `{"format":99,"key":"` + key("b") + `"}`, `{"format":2,"key":"` + key("c") + `"}`} {
		if err := os.WriteFile(filepath.Join(half, manifestFile), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := ids(t, s); len(got) != 0 {
			t.Errorf("%q makes a template", content)
		}
	}
}

// TestFaulty: what nothing can start from is seen, and does not stay for ever.
func TestFaulty(t *testing.T) {
	now := time.Now()
	s := Store{Dir: t.TempDir(), Max: 250 << 10}
	whole := publish(t, s, key("a"), 100<<10, now.Add(-2*time.Hour))
	data, err := os.ReadFile(filepath.Join(whole.Dir, manifestFile))
	if err != nil {
		t.Fatal(err)
	}
	spoil := func(c string, content []byte, used time.Time) {
		t.Helper()
		made := publish(t, s, key(c), 100<<10, used)
		path := filepath.Join(made.Dir, manifestFile)
		if content == nil {
			err = os.Remove(path)
		} else {
			err = errors.Join(os.WriteFile(path, content, 0o600), os.Chtimes(path, used, used))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	spoil("b", data[:len(data)/2], now)
	spoil("c", []byte{}, now)
	spoil("d", []byte(`{"format":2,"key":"`+key("e")+`"}`), now)
	spoil("e", nil, now)
	spoil("0", []byte(`{"format":99,"key":{"another":"type"}}`), now.Add(-3*time.Hour))
	spoil("1", []byte(`{"format":1,"key":"`+key("1")+`"}`), now.Add(-time.Hour))
	for _, stranger := range []string{"locks", key("2")[:keyDigits] + "-other-1"} { // not ours
		if err := os.MkdirAll(filepath.Join(s.Dir, stranger), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	faults := func() (all string) {
		list, err := s.Faulty()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			all += f.ID[:1] + " " + string(f.Fault) + ", "
		}
		return all
	}
	for _, want := range []string{"b damaged", "c damaged", "d damaged", "e damaged", "0 of another version", "1 of another version"} {
		if got := faults(); !strings.Contains(got, want+", ") {
			t.Errorf("%q lacks %q", got, want)
		}
	}
	// The damaged go at once, and then the least recently used, whoever's it is.
	removed, err := s.Prune(nil)
	if err != nil || len(removed) != 5 {
		t.Errorf("removed %d, %v", len(removed), err)
	}
	if got := faults(); got != "1 of another version, " || len(ids(t, s)) != 1 {
		t.Errorf("left %q and %q", ids(t, s), got)
	}
	s.Max = 150 << 10
	if removed, err := s.Prune(nil); err != nil || len(removed) != 1 || removed[0].ID != whole.ID {
		t.Errorf("removed %v, %v", removed, err)
	}
	for _, stranger := range []string{"locks", key("2")[:keyDigits] + "-other-1"} {
		if _, err := os.Stat(filepath.Join(s.Dir, stranger)); err != nil {
			t.Error(err)
		}
	}
}

func TestPrune(t *testing.T) {
	now := time.Now()
	s := Store{Dir: t.TempDir(), Max: 350 << 10}
	old := publish(t, s, key("a"), 100<<10, now.Add(-3*time.Hour))
	publish(t, s, key("b"), 100<<10, now.Add(-2*time.Hour))
	publish(t, s, key("c"), 100<<10, now.Add(-time.Hour))
	if removed, err := s.Prune(nil); err != nil || len(removed) != 0 {
		t.Errorf("within the bound: %v, %v", removed, err)
	}
	if err := os.Mkdir(filepath.Join(s.Dir, "removed-half"), 0o700); err != nil {
		t.Fatal(err)
	}
	publish(t, s, key("d"), 100<<10, now)
	removed, err := s.Prune(old)
	if err != nil || len(removed) != 1 || removed[0].Key != key("b") {
		t.Errorf("removed %v, %v", removed, err)
	}
	if got := strings.Join(ids(t, s), ""); got != "dca" {
		t.Errorf("left %s, the last used first", got)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Dir, "removed-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestLock(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	release, err := s.Lock(t.Context(), key("a"), func() { t.Error("nobody else is there") })
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Lock(t.Context(), key("b"), func() { t.Error("another key waits") })
	if err != nil {
		t.Fatal(err)
	}
	other()
	waited := false
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, key("a"), func() { waited = true }); err == nil || !waited {
		t.Errorf("a second holder: %v, waited %v", err, waited)
	}
	release()
	if release, err = s.Lock(t.Context(), key("a"), func() {}); err != nil {
		t.Error(err)
	} else {
		release()
	}
}

// TestCopyDisk: a disk that is not what was published is never given out.
func TestCopyDisk(t *testing.T) {
	s := Store{Dir: t.TempDir(), Max: 1 << 30}
	made := publish(t, s, key("a"), 1, time.Now())
	to := filepath.Join(t.TempDir(), "disk")
	if err := made.CopyDisk(to); err != nil {
		t.Fatal(err)
	}
	if err := made.CopyDisk(to); err == nil || errors.Is(err, ErrDisk) {
		t.Errorf("onto a disk that is there: %v", err)
	}
	for name, harm := range map[string]func(path string) error{
		"another byte": func(path string) error { return os.WriteFile(path, []byte{1}, 0o600) },
		"gone":         os.Remove,
	} {
		if err := harm(filepath.Join(made.Dir, DiskFile)); err != nil {
			t.Fatal(err)
		}
		if err := made.CopyDisk(to + name); !errors.Is(err, ErrDisk) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(to + name); err == nil {
			t.Errorf("%s: it was copied", name)
		}
	}
}
