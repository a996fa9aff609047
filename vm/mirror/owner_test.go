package mirror

import (
	"errors"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// asNobody runs a function without root's right to read and write everything.
// It has to use roots that are open already: their paths lead through
// directories of root's.
func asNobody(t *testing.T, do func(), roots ...*os.Root) {
	t.Helper()
	if os.Getuid() != 0 {
		do()
		return
	}
	const nobody = 65534
	if err := alone(func() error {
		for _, root := range roots {
			if err := os.Lchown(root.Name(), nobody, nobody); err != nil {
				return err
			}
		}
		if err := errors.Join(unix.Setfsgid(nobody), unix.Setfsuid(nobody)); err != nil {
			return err
		}
		do()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestReadOnlyDirectories has some like those of Go's module cache.
func TestReadOnlyDirectories(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	asNobody(t, func() {
		modes := func(perm os.FileMode) {
			if err := errors.Join(here.Chmod("d", perm), here.Chmod("d/e", perm)); err != nil {
				t.Error(err)
			}
		}
		for _, err := range []error{
			here.Mkdir("d", 0o755), here.Mkdir("d/e", 0o755), here.WriteFile("d/replaced", []byte("one"), 0o444),
			here.WriteFile("d/deleted", nil, 0o444), here.WriteFile("d/e/deleted", nil, 0o444), here.Symlink("x", "d/link"),
		} {
			if err != nil {
				t.Error(err)
			}
		}
		modes(0o555)
		if err := here.WriteFile("d/x", nil, 0o600); !errors.Is(err, os.ErrPermission) {
			t.Errorf("the test writes everywhere: %v", err)
		}
		base := bringInStep(t, here, there, Manifest{})
		modes(0o755)
		for _, err := range []error{
			here.Remove("d/replaced"), here.WriteFile("d/replaced", []byte("two"), 0o444), here.WriteFile("d/new", nil, 0o444),
			here.Remove("d/deleted"), here.Remove("d/link"), here.Symlink("y", "d/link"), here.Mkdir("d/made", 0o555),
			here.WriteFile("d/e/guarded", []byte("one"), 0o444),
		} {
			if err != nil {
				t.Error(err)
			}
		}
		modes(0o555)
		base = bringInStep(t, here, there, base)
		if h, far := scan(t, here), scan(t, there); h.Sum() != far.Sum() || far["d"].Perm != 0o555 || far["d/e"].Perm != 0o555 {
			t.Errorf("%v, %v", h, far)
		}
		modes(0o755)
		if err := errors.Join(here.Remove("d/e/guarded"), here.WriteFile("d/e/guarded", []byte("two"), 0o444)); err != nil {
			t.Error(err)
		}
		modes(0o555)
		plan := Compare(base, scan(t, here), scan(t, there), KeepBoth, []string{"d/e"})
		move(t, there, here, plan.Push)
		Done(plan.Base, plan.Push, nil)
		if err := errors.Join(here.Chmod("d", 0o755), here.Chmod("d/e", 0o755), here.RemoveAll("d")); err != nil {
			t.Error(err)
		}
		bringInStep(t, here, there, plan.Base)
		if m := scan(t, there); len(m) > 0 {
			t.Errorf("left: %v", m)
		}
	}, here, there)
}

// TestOwner has root bring somebody's workspace in step.
func TestOwner(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	owner := os.Getuid()
	if owner == 0 {
		owner = 12345
		if err := os.Lchown(here.Name(), owner, owner); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(there.MkdirAll("d/e", 0o700), there.WriteFile("d/a", nil, 0o600), there.Symlink("/etc/passwd", "d/link")); err != nil {
		t.Fatal(err)
	}
	move(t, here, there, pullAll(t, here, there))
	for _, p := range []string{"d", "d/e", "d/a", "d/link"} {
		fi, err := here.Lstat(p)
		if err != nil {
			t.Fatal(err)
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != owner || os.Getuid() == 0 && int(st.Gid) != owner {
			t.Errorf("%s: %+v", p, st)
		}
	}
}

func TestUnreadable(t *testing.T) {
	root := openRoot(t)
	asNobody(t, func() { testUnreadable(t, root) }, root)
}

func testUnreadable(t *testing.T, root *os.Root) {
	if err := root.WriteFile("f", nil, 0o000); err != nil {
		t.Fatal(err)
	}
	modes := []os.FileMode{0o000, 0o100, 0o300, 0o400, 0o600}
	for _, mode := range modes {
		d := mode.String()
		if err := errors.Join(root.Mkdir(d, 0o700), root.WriteFile(d+"/x", nil, 0o600), root.Chmod(d, mode)); err != nil {
			t.Fatal(err)
		}
		defer root.Chmod(d, 0o700)
	}
	m := scan(t, root)
	for name, e := range m {
		if e.Kind != Other {
			t.Errorf("%s is a %s", name, e.Kind)
		}
	}
	if len(m) != 1+len(modes) {
		t.Errorf("%v", m)
	}
}
