package images

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// testProgress logs phases with their times.
type testProgress struct {
	t     testing.TB
	start time.Time
	lines bool
}

func (p *testProgress) Phase(name string) {
	p.t.Logf("%6.1fs %s", time.Since(p.start).Seconds(), name)
}
func (p *testProgress) Fraction(float64) {}
func (p *testProgress) Line(text string) {
	if p.lines || strings.HasPrefix(text, "E: ") || strings.HasPrefix(text, "W: ") {
		p.t.Log(text)
	}
}

// testCache opens the cache that tests of a run share.
func testCache(t testing.TB) *Cache {
	t.Helper()
	dir := os.Getenv("AGENTVM_TEST_CACHE")
	if dir == "" {
		dir = t.TempDir()
	}
	c, err := Open(filepath.Join(dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRealBuild builds a base and a layer with the real tools as whoever
// runs it.
func TestRealBuild(t *testing.T) {
	requireBuild(t)
	c := testCache(t)
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	p := &testProgress{t: t, start: time.Now(), lines: os.Getenv("AGENTVM_TEST_VERBOSE") != ""}
	base, err := c.Ensure(ctx, Spec{Image: "debian-13"}, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("base %s: %.1f s, %d packages, kernel %s", base.ID, base.Manifest.BuildSeconds, len(base.Manifest.Packages), base.Manifest.Kernel)
	layer, err := c.Ensure(ctx, Spec{
		Image:    "debian-13",
		Packages: []string{"tree"},
		NPM:      []NPMPackage{{Name: "@mariozechner/pi-coding-agent", Version: "0.73.1"}},
		Run: []string{
			"test -z \"$(ls -A /sys)\" && ! test -e /run/host",
			"! mknod /tmp/null c 1 3 && ! mount -t tmpfs none /mnt && ! chroot / true",
			"test $(ls -d /proc/[0-9]* | wc -l) -lt 8 && ! echo 0 >/proc/sys/kernel/printk",
			"pi --version >/etc/pi-version && apt-get --version >/dev/null",
		},
	}, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("layer %s: %.1f s, npm tree %d", layer.ID, layer.Manifest.BuildSeconds, len(layer.Manifest.NPMTree))
	start := time.Now()
	for _, img := range []*Image{base, layer} {
		usage, err := img.DiskUsage()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s takes %d MiB", img.ID, usage>>20)
		if err := img.Verify(ctx); err != nil {
			t.Error(err)
		}
	}
	t.Logf("verify: %v", time.Since(start))
}

func requireBuild(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("builds real images")
	}
	if err := require(thisHost().check()); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}
