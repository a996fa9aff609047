package mirror

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// alone runs a function on a thread of its own, which ends with it and with
// what it has made of itself.
func alone(do func() error) error {
	result := make(chan error, 1)
	go func() {
		defer close(result) // the test may end in it
		runtime.LockOSThread()
		result <- do()
	}()
	return <-result
}

// withMount runs a function while something is mounted in the workspace, for
// its thread alone.
func withMount(t *testing.T, source, workspace, target string, do func(*os.Root) error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root may mount")
	}
	if err := alone(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount(source, filepath.Join(workspace, target), "", unix.MS_BIND, ""); err != nil {
			return err
		}
		root, err := os.OpenRoot(workspace) // one that was open before is in the other namespace
		if err != nil {
			return err
		}
		return errors.Join(do(root), root.Close())
	}); err != nil {
		t.Fatal(err)
	}
}

// TestMounts has something mounted in a workspace, of the same file system.
func TestMounts(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	elsewhere := t.TempDir()
	for _, err := range []error{
		os.WriteFile(filepath.Join(elsewhere, "secret"), []byte("x"), 0o600),
		here.Mkdir("d", 0o700), here.WriteFile("f", nil, 0o600), here.WriteFile("d/mine", nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	base := bringInStep(t, here, there, Manifest{})
	before := scan(t, there)
	withMount(t, elsewhere, here.Name(), "d", func(here *os.Root) error {
		m := scan(t, here)
		if len(m) != 2 || m["d"].Kind != Other {
			t.Errorf("seen: %v", m)
		}
		if plan := Compare(base, m, before, KeepBoth, nil); len(plan.Push)+len(plan.Pull) > 0 || strings.Join(plan.Conflicts, " ") != "d" {
			t.Errorf("%s; %s; %q", paths(plan.Push), paths(plan.Pull), plan.Conflicts)
		}
		// What was decided on before it was mounted.
		secret := Entry{Path: "d/secret", Kind: Link, Target: "x"}
		failures, err := Apply(t.Context(), here, []Change{{Path: "d", Old: base["d"]}, {Path: "d/new", New: &Entry{Path: "d/new", Kind: Link, Target: "x"}}, {Path: "d/secret", Old: &secret}}, strings.NewReader(""))
		if len(failures) != 3 {
			t.Errorf("failures: %v", failures)
		}
		return err
	})
	withMount(t, filepath.Join(elsewhere, "secret"), here.Name(), "f", func(here *os.Root) error {
		if m := scan(t, here); m["f"].Kind != Other {
			t.Errorf("a file that is mounted: %v", m["f"])
		}
		return nil
	})
	if left, _ := os.ReadDir(elsewhere); len(left) != 1 {
		t.Errorf("there is %v", left)
	}
	if plan := Compare(base, scan(t, here), before, KeepBoth, nil); len(plan.Push)+len(plan.Pull)+len(plan.Conflicts) > 0 {
		t.Errorf("unmounted: %v", plan)
	}
}

// TestMaskStays has a file hidden as by the file server, in a namespace of its
// own, and changed from outside that.
func TestMaskStays(t *testing.T) {
	here, there := openRoot(t), openRoot(t)
	if err := here.WriteFile("g", []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	base := bringInStep(t, here, there, Manifest{})
	if err := here.WriteFile("g", []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	changes := Compare(base, scan(t, here), scan(t, there), KeepBoth, []string{"g"}).Push
	push, pushed := make(chan bool), make(chan bool)
	go func() { // on a thread of the host's namespace
		defer close(pushed)
		<-push
		if failures := apply(t, there, here, changes); len(failures) > 0 {
			t.Errorf("failures: %v", failures)
		}
	}()
	withMount(t, "/dev/null", there.Name(), "g", func(guest *os.Root) error {
		close(push)
		<-pushed
		if got, err := guest.ReadFile("g"); err != nil || len(got) > 0 {
			t.Errorf("the guest reads %q, %v", got, err)
		}
		return nil
	})
	if got, err := there.ReadFile("g"); err != nil || string(got) != "another" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestUnmounted has what was mounted from the beginning be there no more.
func TestUnmounted(t *testing.T) {
	base := side{"a": "1"}
	first := Compare(nil, side{"a": "1", "d": "|"}.manifest(), base.manifest(), KeepBoth, nil)
	if len(first.Conflicts)+len(first.Push)+len(first.Pull) > 0 {
		t.Errorf("%v", first)
	}
	then := Compare(first.Base, side{"a": "1", "d": "/"}.manifest(), base.manifest(), KeepBoth, nil)
	if paths(then.Push) != "d" || len(then.Pull) > 0 || then.Push[0].New == nil {
		t.Errorf("%v", then)
	}
}

// TestEveryHostHasMounts is for whoever may not mount.
func TestEveryHostHasMounts(t *testing.T) {
	root, err := os.OpenRoot("/")
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if got, err := mounted(root, "proc"); !got || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	plain := openRoot(t)
	if err := plain.Mkdir("d", 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := mounted(plain, "d"); got || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	if dir, err := enter(root, "proc"); !errors.Is(err, errMounted) {
		t.Errorf("%v, %v", dir, err)
	}
}
