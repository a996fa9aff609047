package ssh

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
)

// makeTree builds a tree with everything that a copy must keep.
func makeTree(t *testing.T, root string) {
	t.Helper()
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	big := make([]byte, 3<<20)
	rand.Read(big)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(root, "sub dir", "deep"), 0o755))
	for name, content := range map[string][]byte{"a": []byte("a"), "empty": nil, "sub dir/it's *": []byte("odd"), "sub dir/deep/big": big, "ünï\nx": []byte("nl")} {
		must(os.WriteFile(filepath.Join(root, name), content, 0o644))
	}
	must(os.Chmod(filepath.Join(root, "a"), 0o750))
	must(os.Chmod(filepath.Join(root, "empty"), 0o400|fs.ModeSetuid))
	must(os.Symlink("../a", filepath.Join(root, "sub dir", "up")))
	must(os.Symlink("sub dir/deep", filepath.Join(root, "to-dir")))
	for _, name := range []string{"a", "sub dir/deep/big", "sub dir"} {
		must(os.Chtimes(filepath.Join(root, name), old, old))
	}
}

// sameTree compares names, kinds, permissions, contents, links and times.
func sameTree(t *testing.T, want, got string) {
	t.Helper()
	count := func(root string) (n int) {
		filepath.WalkDir(root, func(string, fs.DirEntry, error) error { n++; return nil })
		return n
	}
	if count(want) != count(got) {
		t.Errorf("%d entries, want %d", count(got), count(want))
	}
	filepath.WalkDir(want, func(p string, d fs.DirEntry, _ error) error {
		rel, _ := filepath.Rel(want, p)
		a, _ := os.Lstat(p)
		b, err := os.Lstat(filepath.Join(got, rel))
		if err != nil {
			t.Error(err)
			return nil
		}
		if a.Mode()&^fs.ModeSetuid != b.Mode() {
			t.Errorf("%s: mode %v, want %v", rel, b.Mode(), a.Mode())
		}
		if d.Type() == fs.ModeSymlink {
			x, _ := os.Readlink(p)
			y, _ := os.Readlink(filepath.Join(got, rel))
			if x != y {
				t.Errorf("%s: link to %q, want %q", rel, y, x)
			}
			return nil
		}
		if a.ModTime().Unix() != b.ModTime().Unix() {
			t.Errorf("%s: time %v, want %v", rel, b.ModTime(), a.ModTime())
		}
		if d.Type().IsRegular() {
			x, _ := os.ReadFile(p)
			y, err := os.ReadFile(filepath.Join(got, rel))
			if err != nil || !bytes.Equal(x, y) {
				t.Errorf("%s: other content (%d bytes, want %d), %v", rel, len(y), len(x), err)
			}
		}
		return nil
	})
}

func TestCopyTreeBothWays(t *testing.T) {
	both(t, func(t *testing.T, g *guest, c *Client) {
		ctx := timeout(t, time.Minute)
		src := filepath.Join(g.dir, "src tree")
		makeTree(t, src)
		var last CopyProgress
		o := CopyOptions{Progress: func(p CopyProgress) { last = p }}
		if err := c.Upload(ctx, src, "copy", o); err != nil {
			t.Fatal(err)
		}
		sameTree(t, src, filepath.Join(g.home, "copy"))
		if last.Files != 5 || last.Bytes < 3<<20 {
			t.Errorf("progress: %+v", last)
		}
		if err := c.Download(ctx, "~/copy", filepath.Join(g.dir, "back"), o); err != nil {
			t.Fatal(err)
		}
		sameTree(t, src, filepath.Join(g.dir, "back"))

		// Again, onto what is there; and into an existing directory.
		os.Chmod(filepath.Join(g.home, "copy", "empty"), 0o600)
		if err := c.Upload(ctx, src+"/.", "again", o); err != nil {
			t.Error(err)
		}
		if err := c.Download(ctx, g.home+"/copy/", filepath.Join(g.dir, "back"), o); err != nil {
			t.Error(err)
		}
		sameTree(t, src, filepath.Join(g.home, "again"))
		if _, err := os.Stat(filepath.Join(g.dir, "back", "copy", "a")); err != nil {
			t.Error(err)
		}
		left, _ := filepath.Glob(filepath.Join(g.dir, "back", ".agentvm-*"))
		if len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestCopyFile(t *testing.T) {
	g := newGuest(t)
	c := g.viaProxy()
	ctx := timeout(t, time.Minute)
	src := filepath.Join(g.dir, "file")
	if err := os.WriteFile(src, []byte("content"), 0o640); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"", "~/named", g.home + "/"} {
		if err := c.Upload(ctx, src, to, CopyOptions{}); err != nil {
			t.Errorf("to %q: %v", to, err)
		}
	}
	for _, name := range []string{"file", "named"} {
		if got, err := os.ReadFile(filepath.Join(g.home, name)); err != nil || string(got) != "content" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	var out bytes.Buffer
	if err := c.ReadFile(ctx, "named", &out); err != nil || out.String() != "content" {
		t.Errorf("read: %q, %v", out.String(), err)
	}
	if err := c.WriteFile(ctx, strings.NewReader("streamed"), "streamed", 0o600); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(filepath.Join(g.home, "streamed")); string(got) != "streamed" {
		t.Errorf("written: %q", got)
	}
	for name, err := range map[string]error{
		"no source":       c.Download(ctx, "missing", g.dir, CopyOptions{}),
		"no target dir":   c.Upload(ctx, src, "missing/", CopyOptions{}),
		"no target path":  c.Upload(ctx, src, "missing/x", CopyOptions{}),
		"read of nothing": c.ReadFile(ctx, "missing", &out),
	} {
		if !errors.Is(err, vm.ErrNotFound) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := c.Upload(ctx, src, "named/", CopyOptions{}); err == nil {
		t.Error("a file was taken for a directory")
	}
	if err := c.Download(ctx, "/dev/zero", filepath.Join(g.dir, "zero"), CopyOptions{}); err == nil {
		t.Error("a device was copied")
	}
}

func TestDownloadDistrustsTheGuest(t *testing.T) {
	g := newGuest(t)
	c := g.viaProxy()
	tree, dst := filepath.Join(g.home, "tree"), filepath.Join(g.dir, "dst")
	outside := filepath.Join(g.dir, "outside")
	for _, d := range []string{filepath.Join(tree, "into"), filepath.Join(tree, "fine"), dst, outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Symlink("/etc/passwd", filepath.Join(tree, "absolute"))
	os.Symlink("../../x", filepath.Join(tree, "fine", "up"))
	os.WriteFile(filepath.Join(tree, "fine", "file"), []byte("new"), 0o755|fs.ModeSetuid)
	os.Chmod(filepath.Join(tree, "fine", "file"), 0o755|fs.ModeSetuid|fs.ModeSetgid)

	err := c.Download(timeout(t, time.Minute), "tree", dst, CopyOptions{})
	var skipped *SkippedError
	if !errors.As(err, &skipped) || len(skipped.Entries) != 2 {
		t.Errorf("got %v", err)
	}
	info, err := os.Stat(filepath.Join(dst, "tree", "fine", "file"))
	if err != nil || info.Mode() != 0o755 {
		t.Errorf("got %v, %v", info, err)
	}
	// A link on the host, where the guest has a directory or a file.
	os.RemoveAll(filepath.Join(dst, "tree"))
	os.Mkdir(filepath.Join(dst, "tree"), 0o755)
	os.Symlink(outside, filepath.Join(dst, "tree", "into"))
	os.WriteFile(filepath.Join(tree, "into", "evil"), nil, 0o644)
	if err := c.Download(timeout(t, time.Minute), "tree", dst, CopyOptions{}); err == nil || errors.As(err, &skipped) {
		t.Errorf("followed a link: %v", err)
	}
	os.Remove(filepath.Join(dst, "tree", "into"))
	os.WriteFile(filepath.Join(outside, "kept"), []byte("old"), 0o644)
	os.WriteFile(filepath.Join(tree, "kept"), []byte("new"), 0o644)
	os.Symlink(filepath.Join(outside, "kept"), filepath.Join(dst, "tree", "kept"))
	c.Download(timeout(t, time.Minute), "tree", dst, CopyOptions{})
	if got, _ := os.ReadFile(filepath.Join(outside, "kept")); string(got) != "old" {
		t.Errorf("wrote through a link: %q", got)
	}
	if left, _ := os.ReadDir(outside); len(left) != 1 {
		t.Errorf("outside: %v", left)
	}
}

func TestUploadDoesNotFollowLinksOutOfTheTree(t *testing.T) {
	g := newGuest(t)
	c := g.viaProxy()
	src := filepath.Join(g.dir, "src")
	os.Mkdir(src, 0o755)
	os.Symlink("/etc/hostname", filepath.Join(src, "link"))
	if err := c.Upload(timeout(t, time.Minute), src, "copy", CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(filepath.Join(g.home, "copy", "link")); target != "/etc/hostname" {
		t.Errorf("got %q, %v", target, err)
	}
}

func TestCopyCancelled(t *testing.T) {
	g := newGuest(t)
	c := g.viaProxy()
	big := filepath.Join(g.home, "big")
	f, err := os.Create(big)
	if err != nil {
		t.Fatal(err)
	}
	f.Truncate(4 << 30)
	f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	dst := filepath.Join(g.dir, "big")
	err = c.Download(ctx, "big", dst, CopyOptions{Progress: func(CopyProgress) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(g.dir, ".agentvm-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := os.Stat(dst); err == nil {
		t.Error("a part of the file is there")
	}
}

func TestStaysInside(t *testing.T) {
	for _, tt := range []struct {
		rel, target string
		want        bool
	}{
		{"", "a", true}, {"", "a/b", true}, {"", ".", true}, {"", "./a//b", true},
		{"a", "..", true}, {"a/b", "../../c", true},
		{"", "..", false}, {"a", "../..", false}, {"", "/etc", false}, {"", "", false},
		{"a/b", "c/../../..", false}, {"a/b", "link/../x", false}, {"a", "./../../x", false},
	} {
		if got := staysInside(tt.rel, tt.target); got != tt.want {
			t.Errorf("staysInside(%q, %q) = %v", tt.rel, tt.target, got)
		}
	}
}

func TestSafeName(t *testing.T) {
	for name, want := range map[string]bool{"a": true, "...": true, "a b": true, "": false, ".": false, "..": false, "a/b": false, "../x": false, "/x": false, "a\x00": false} {
		if safeName(name) != want {
			t.Errorf("%q", name)
		}
	}
}
