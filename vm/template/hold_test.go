package template

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
)

func hold(t *testing.T, s Store, key string) *Template {
	t.Helper()
	held, err := s.Hold(key)
	if err != nil {
		t.Fatal(err)
	}
	return held
}

// TestHold: a template that somebody starts from is removed by nobody else.
func TestHold(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	if _, err := s.Hold(key("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in an empty store: %v", err)
	}
	made := publish(t, s, key("a"), 100<<10, time.Now())
	if err := os.Remove(filepath.Join(made.Dir, useLock)); err != nil { // as an older agentvm made it
		t.Fatal(err)
	}
	one, two := hold(t, s, key("a")), hold(t, s, key("a"))
	kept := func(when string) {
		t.Helper()
		if removed, err := s.Prune(nil); err != nil || len(removed) != 0 {
			t.Errorf("%s: pruned %v, %v", when, removed, err)
		}
		if err := s.Remove(made); !errors.Is(err, ErrInUse) || !errors.Is(err, vm.ErrUsage) || vm.Hint(err) == "" {
			t.Errorf("%s: %v", when, err)
		}
		if _, err := s.Find(key("a")); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	kept("held twice")
	if err := s.Remove(one); !errors.Is(err, ErrInUse) { // it gives up its own hold, not the other's
		t.Errorf("by a holder: %v", err)
	}
	kept("held once")
	two.Release()
	two.Release()
	if removed, err := s.Prune(nil); err != nil || len(removed) != 1 {
		t.Errorf("held no more: pruned %v, %v", removed, err)
	}
	if _, err := s.Hold(key("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after its removal: %v", err)
	}
}

// TestPublishHolds: whoever made a template is not robbed of it at once.
func TestPublishHolds(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	dir := s.Workshop(key("a"))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, DiskFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	made, err := s.Publish(dir, Manifest{Key: key("a")})
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.Get(made.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(other); !errors.Is(err, ErrInUse) {
		t.Errorf("removed while its maker holds it: %v", err)
	}
	if err := s.Remove(made); err != nil {
		t.Errorf("by its maker: %v", err)
	}
}

// TestFoundAndGone: a template that is removed after it was found is not held.
func TestFoundAndGone(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	made := publish(t, s, key("a"), 1, time.Now())
	found, err := s.Find(key("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(made); err != nil {
		t.Fatal(err)
	}
	if held, err := found.hold(); held || err != nil {
		t.Errorf("gone: held %v, %v", held, err)
	}
	// Being removed at this moment.
	made = publish(t, s, key("a"), 1, time.Now())
	l := newUseLock(made.Dir)
	if ok, err := l.TryLock(); !ok || err != nil {
		t.Fatal(ok, err)
	}
	defer l.Unlock()
	if _, err := s.Hold(key("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("while it is removed: %v", err)
	}
}

// TestHoldRace holds and removes at the same time: what is held stays whole.
func TestHoldRace(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	for range 50 {
		publish(t, s, key("a"), 1, time.Now())
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				held, err := s.Hold(key("a"))
				if errors.Is(err, fs.ErrNotExist) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				defer held.Release()
				time.Sleep(time.Millisecond)
				if _, err := os.Stat(filepath.Join(held.Dir, DiskFile)); err != nil {
					t.Errorf("removed while it is held: %v", err)
				}
			})
			all.Go(func() {
				if _, err := s.Prune(nil); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
}

// TestDoubt: the second start in a row that is cut short counts, of those that
// began after the first had ended.
func TestDoubt(t *testing.T) {
	s := Store{Dir: t.TempDir()}
	publish(t, s, key("a"), 1, time.Now())
	doubt := func(held *Template, want bool) {
		t.Helper()
		if again, err := held.Doubt(); err != nil || again != want {
			t.Errorf("again %v, %v; want %v", again, err, want)
		}
		held.Release()
	}
	one, same := hold(t, s, key("a")), hold(t, s, key("a"))
	doubt(one, false)
	doubt(same, false)
	early := hold(t, s, key("a"))
	good := hold(t, s, key("a"))
	if err := errors.Join(good.Trust(), good.Trust()); err != nil {
		t.Error(err)
	}
	good.Release()
	doubt(early, false) // another has started meanwhile
	doubt(hold(t, s, key("a")), true)
}
