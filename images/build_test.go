package images

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
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

// TestRealBuild builds every base and a layer on it with the real tools, as
// whoever runs it. The commands of the first layer say what they may not do.
func TestRealBuild(t *testing.T) {
	requireBuild(t)
	c := testCache(t)
	for _, spec := range []Spec{
		{
			Image:    "debian-13",
			Packages: []string{"tree"},
			NPM:      []NPMPackage{{Name: "@mariozechner/pi-coding-agent", Version: "0.73.1"}},
			Run: []string{
				"tree --version && pi --version >/etc/pi-version",
				`test -z "$(ls -A /sys)" && ! test -e /run/host && ! test -e /run/build/npmrc`,
				"! mknod /tmp/null c 1 3 && ! mount -t tmpfs none /mnt && ! chroot / true",
				"test $(ls -d /proc/[0-9]* | wc -l) -lt 8 && ! echo 0 >/proc/sys/kernel/printk",
			},
		},
		{
			Image: "debian-12",
			Node:  "22.23.3",
			NPM:   []NPMPackage{{Name: "semver", Version: "7.7.2", Scripts: true}},
			Run:   []string{`test "$(node --version)" = v22.23.3 && semver 1.2.3`},
		},
	} {
		t.Run(spec.Image, func(t *testing.T) { buildReally(t, c, spec) })
	}
}

func buildReally(t *testing.T, c *Cache, spec Spec) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	p := &testProgress{t: t, start: time.Now(), lines: os.Getenv("AGENTVM_TEST_VERBOSE") != ""}
	base, err := c.Ensure(ctx, Spec{Image: spec.Image}, p)
	if err != nil {
		t.Fatal(err)
	}
	layer, err := c.Ensure(ctx, spec, p)
	if err != nil {
		t.Fatal(err)
	}
	if m := layer.Manifest; len(m.NPM) != 1 || m.NPM[0].Integrity == "" || len(m.NPMTree) == 0 || m.Kernel == "" || m.Cmdline == "" {
		t.Errorf("manifest: npm %+v, tree of %d, kernel %q, command line %q", m.NPM, len(m.NPMTree), m.Kernel, m.Cmdline)
	}
	for _, img := range []*Image{base, layer} {
		usage, err := img.DiskUsage()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: built in %.1f s, %d packages, %d MiB", img.ID, img.Manifest.BuildSeconds, len(img.Manifest.Packages), usage>>20)
		if err := img.Verify(ctx); err != nil {
			t.Error(err)
		}
	}
	if left := unfinished(t, c); left != nil {
		t.Errorf("left behind: %q", left)
	}
}

func requireBuild(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("builds real images")
	}
	if err := require(thisHost().check()); err != nil {
		testenv.Unavailable(t, "%v", err)
	}
}
