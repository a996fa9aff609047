package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
)

// fakeBuilder writes tiny files where the real one runs mmdebstrap.
type fakeBuilder struct {
	builds atomic.Int32
	during func(ctx context.Context, j job) error // nil: nothing
}

func (f *fakeBuilder) build(ctx context.Context, j job, p Progress) (Manifest, error) {
	f.builds.Add(1)
	if err := os.Mkdir(j.out(""), 0o755); err != nil {
		return Manifest{}, err
	}
	for _, name := range []string{rootDiskName, kernelName, initrdName} {
		if err := os.WriteFile(j.out(name), []byte(j.plan.id()+name), 0o600); err != nil {
			return Manifest{}, err
		}
	}
	if f.during != nil {
		if err := f.during(ctx, j); err != nil {
			return Manifest{}, err
		}
	}
	return Manifest{Kernel: "6.1", RootSize: 4096, Packages: []Package{{"jq", "1", "all"}}}, nil
}

func (f *fakeBuilder) removeTree(_ context.Context, dir string) error { return os.RemoveAll(dir) }

func fakeCache(t testing.TB, dir string, b *fakeBuilder) *Cache {
	t.Helper()
	c, err := Open(dir, func(c *Cache) { c.builder = b })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// unfinished lists what builds have left.
func unfinished(t testing.TB, c *Cache) []string {
	t.Helper()
	m, err := filepath.Glob(filepath.Join(c.dir, "build", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

var (
	baseSpec  = Spec{Image: "debian-13"}
	layerSpec = Spec{Image: "debian-13", Packages: []string{"jq"}}
)

func TestEnsure(t *testing.T) {
	ctx := context.Background()
	b := &fakeBuilder{}
	c := fakeCache(t, t.TempDir(), b)
	if _, err := c.Find(ctx, layerSpec); !errors.Is(err, vm.ErrNotFound) {
		t.Errorf("Find before a build: %v", err)
	}
	layer, err := c.Ensure(ctx, layerSpec, nil)
	if err != nil {
		t.Fatal(err)
	}
	base, err := c.Find(ctx, baseSpec)
	if err != nil {
		t.Fatal(err)
	}
	if layer.Manifest.Base != base.ID || !layer.IsLayer() || base.IsLayer() {
		t.Errorf("layer %s is on %q, base is %s", layer.ID, layer.Manifest.Base, base.ID)
	}
	for range 2 {
		if _, err := c.Ensure(ctx, layerSpec, nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := b.builds.Load(); n != 2 {
		t.Errorf("%d builds, want 2", n)
	}
	for _, path := range []string{layer.RootDisk(), layer.Kernel(), layer.Initrd()} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o644 {
			t.Errorf("%s: %v %v", path, info, err)
		}
	}
	if err := layer.Verify(ctx); err != nil {
		t.Error(err)
	}
	if left := unfinished(t, c); left != nil {
		t.Errorf("left behind: %q", left)
	}
}

// Two builds of one image at once, each with a cache of its own as two
// processes have: one builds, the other waits, says so, and uses the result.
func TestEnsureConcurrently(t *testing.T) {
	dir := t.TempDir()
	waiting := make(chan struct{}, 8)
	b := &fakeBuilder{during: func(context.Context, job) error {
		<-waiting // until the other one waits
		return nil
	}}
	var group sync.WaitGroup
	for range 2 {
		c := fakeCache(t, dir, b)
		group.Go(func() {
			if _, err := c.Ensure(context.Background(), baseSpec, phaseFunc(func(name string) {
				if strings.HasPrefix(name, "wait for another build") {
					waiting <- struct{}{}
				}
			})); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := b.builds.Load(); n != 1 {
		t.Errorf("%d builds, want 1", n)
	}
}

type phaseFunc func(string)

func (f phaseFunc) Phase(name string) { f(name) }
func (phaseFunc) Line(string)         {}
func (phaseFunc) Fraction(float64)    {}

// The waiting one builds when the first fails, and gives up when told to.
func TestEnsureWaitsWithContext(t *testing.T) {
	c := fakeCache(t, t.TempDir(), &fakeBuilder{})
	p, err := newPlan(baseSpec, "", "")
	if err != nil {
		t.Fatal(err)
	}
	lock, ok, err := c.tryLock(p.baseID)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	_, err = c.Ensure(ctx, baseSpec, phaseFunc(func(string) { cancel() }))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want Canceled", err)
	}
	lock.Close()
	if _, err := c.Ensure(context.Background(), baseSpec, nil); err != nil {
		t.Error(err)
	}
}

func TestEnsureCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	c := fakeCache(t, t.TempDir(), &fakeBuilder{during: func(ctx context.Context, _ job) error {
		cancel()
		return context.Cause(ctx)
	}})
	if _, err := c.Ensure(ctx, baseSpec, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want Canceled", err)
	}
	if left := unfinished(t, c); left != nil {
		t.Errorf("left behind: %q", left)
	}
	if _, err := c.Find(context.Background(), baseSpec); !errors.Is(err, vm.ErrNotFound) {
		t.Errorf("a cancelled build left an image: %v", err)
	}
}

// TestHelperBuild is not a test: TestEnsureAfterKill runs it as a process.
func TestHelperBuild(t *testing.T) {
	dir := os.Getenv("IMAGES_TEST_KILL_DIR")
	if dir == "" {
		t.Skip("helper process")
	}
	c := fakeCache(t, dir, &fakeBuilder{during: func(context.Context, job) error {
		fmt.Println("building")
		time.Sleep(time.Minute)
		return nil
	}})
	_, err := c.Ensure(context.Background(), baseSpec, nil)
	t.Fatal(err)
}

// kill -9 in the middle of a build: the image is not there, and the next
// build of another image removes what is left.
func TestEnsureAfterKill(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestHelperBuild$", "-test.v")
	cmd.Env = append(os.Environ(), "IMAGES_TEST_KILL_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf, seen := make([]byte, 4096), ""
	for !strings.Contains(seen, "building") {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("helper ended early: %v after %q", err, seen)
		}
		seen += string(buf[:n])
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed

	b := &fakeBuilder{}
	c := fakeCache(t, dir, b)
	if left := unfinished(t, c); len(left) != 1 {
		t.Fatalf("the killed build left %q", left)
	}
	if _, err := c.Find(context.Background(), baseSpec); !errors.Is(err, vm.ErrNotFound) {
		t.Errorf("the killed build left an image: %v", err)
	}
	if _, err := c.Ensure(context.Background(), Spec{Image: "debian-12"}, nil); err != nil {
		t.Fatal(err)
	}
	if left := unfinished(t, c); left != nil {
		t.Errorf("not swept: %q", left)
	}
	if _, err := c.Ensure(context.Background(), baseSpec, nil); err != nil {
		t.Error(err)
	}
}

// A build in progress is not swept by another.
func TestSweepSparesTheLiving(t *testing.T) {
	dir := t.TempDir()
	c := fakeCache(t, dir, &fakeBuilder{})
	b := &fakeBuilder{during: func(ctx context.Context, j job) error {
		if _, err := c.Ensure(ctx, Spec{Image: "debian-12"}, nil); err != nil {
			return err
		}
		_, err := os.Stat(j.out(kernelName))
		return err
	}}
	if _, err := fakeCache(t, dir, b).Ensure(context.Background(), baseSpec, nil); err != nil {
		t.Error(err)
	}
}

func TestEnsureRepairs(t *testing.T) {
	ctx := context.Background()
	b := &fakeBuilder{}
	c := fakeCache(t, t.TempDir(), b)
	img, err := c.Ensure(ctx, baseSpec, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(img.Dir, manifestName), 20); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Find(ctx, baseSpec); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Find: %v, want ErrCorrupt", err)
	}
	list, err := c.List()
	if len(list) != 1 || !errors.Is(err, ErrCorrupt) {
		t.Errorf("List: %v, %v", list, err)
	}
	if _, err := c.Ensure(ctx, baseSpec, nil); err != nil {
		t.Fatal(err)
	}
	if b.builds.Load() != 2 {
		t.Error("not built anew")
	}
	if err := os.WriteFile(img.Kernel(), []byte(strings.Repeat("x", int(fileSize(t, img.Kernel())))), 0o644); err != nil {
		t.Fatal(err)
	}
	img, err = c.Find(ctx, baseSpec)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Verify(ctx); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), kernelName) {
		t.Errorf("Verify: %v", err)
	}
}

func fileSize(t testing.TB, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestGetAndRemove(t *testing.T) {
	ctx := context.Background()
	c := fakeCache(t, t.TempDir(), &fakeBuilder{})
	if _, err := c.Get("debian-13"); !errors.Is(err, vm.ErrNotFound) || vm.Hint(err) != "agentvm image build debian-13" {
		t.Errorf("Get of an image not built: %v, hint %q", err, vm.Hint(err))
	}
	layer, err := c.Ensure(ctx, layerSpec, nil)
	if err != nil {
		t.Fatal(err)
	}
	base := layer.Manifest.Base
	for arg, want := range map[string]string{"debian-13": base, layer.ID: layer.ID, layer.ID[:14]: layer.ID} {
		if img, err := c.Get(arg); err != nil || img.ID != want {
			t.Errorf("Get(%q): %v, %v", arg, img, err)
		}
	}
	for _, arg := range []string{"", "debian-1", "../images", "nothing"} {
		if img, err := c.Get(arg); err == nil {
			t.Errorf("Get(%q) found %s", arg, img.ID)
		}
	}
	if err := c.Remove(ctx, base, nil); !errors.Is(err, ErrInUse) {
		t.Errorf("removed a base under a layer: %v", err)
	}
	if err := c.Remove(ctx, layer.ID, []string{layer.ID}); !errors.Is(err, ErrInUse) {
		t.Errorf("removed an image in use: %v", err)
	}
	if err := c.Remove(ctx, "../locks", nil); !errors.Is(err, vm.ErrNotFound) {
		t.Errorf("removed something outside: %v", err)
	}
	for _, id := range []string{layer.ID, base} {
		if err := c.Remove(ctx, id, nil); err != nil {
			t.Error(err)
		}
	}
	list, err := c.List()
	if err != nil || len(list) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
}

func TestRequireSpace(t *testing.T) {
	err := requireSpace(t.TempDir(), 1<<60)
	if !errors.Is(err, vm.ErrHost) || vm.Hint(err) == "" {
		t.Errorf("error %v", err)
	}
}

func TestExplain(t *testing.T) {
	full := explain("mmdebstrap", []string{"dpkg: error: No space left on device"}, errors.New("exit status 1"))
	if !errors.Is(full, vm.ErrHost) || !strings.Contains(full.Error(), "No space left") {
		t.Errorf("full disk: %v", full)
	}
	offline := explain("mmdebstrap", []string{"W: Temporary failure resolving 'deb.debian.org'"}, errors.New("exit status 25"))
	if !strings.Contains(vm.Hint(offline), "network") {
		t.Errorf("offline: hint %q", vm.Hint(offline))
	}
}

func TestLineWriter(t *testing.T) {
	var lines []string
	w := lineWriter{line: func(s string) { lines = append(lines, s) }}
	for _, part := range []string{"one\ntw", "o\r", "\n\nthree"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	w.flush()
	if want := []string{"one", "two", "three"}; !slices.Equal(lines, want) || !slices.Equal(w.tail, want) {
		t.Errorf("lines %q, tail %q", lines, w.tail)
	}
}
