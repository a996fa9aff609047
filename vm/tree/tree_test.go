package tree

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

// source makes a directory with an odd name and something of every kind.
func source(t *testing.T) string {
	t.Helper()
	src := filepath.Join(t.TempDir(), "a b,c", "-ü")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(src, "d"), 0o750),
		os.WriteFile(filepath.Join(src, "d", "f"), []byte("x"), 0o640),
		os.WriteFile(filepath.Join(src, "same"), []byte("same"), 0o644),
		os.Symlink("/etc", filepath.Join(src, "out")),
	); err != nil {
		t.Fatal(err)
	}
	return src
}

func check(t *testing.T, dst string) {
	t.Helper()
	if to, err := os.Readlink(filepath.Join(dst, "out")); to != "/etc" {
		t.Errorf("the link is %q, %v", to, err)
	}
	if info, err := os.Stat(filepath.Join(dst, "d", "f")); err != nil || info.Mode() != 0o640 {
		t.Errorf("the file is %v, %v", info, err)
	}
}

// TestCopy: a copy is as the original, links included, and is whole or not there.
func TestCopy(t *testing.T) {
	src := source(t)
	if err := Copy(t.Context(), src+"-1", src); err != nil {
		t.Fatal(err)
	}
	check(t, src+"-1")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Copy(ended, src+"-2", src); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if err := Copy(t.Context(), src+"-3", src+"-nothing"); err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("of nothing: %v", err)
	}
	for _, left := range []string{"-2", "-3"} {
		if _, err := os.Lstat(src + left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", left, err)
		}
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// TestKeep: what is the same is kept once, and what only looks the same is not.
func TestKeep(t *testing.T) {
	testenv.Require(t, "rsync")
	src := source(t)
	file := filepath.Join(src, "d", "f")
	then := time.Unix(1e9, 0)
	if err := os.Chtimes(file, then, then); err != nil {
		t.Fatal(err)
	}
	one, two := src+"-1", src+"-2"
	if err := Keep(t.Context(), one, src, ""); err != nil {
		t.Fatal(err)
	}
	// Another content of the same size, with the same time.
	if err := errors.Join(os.WriteFile(file, []byte("y"), 0o640), os.Chtimes(file, then, then)); err != nil {
		t.Fatal(err)
	}
	if err := Keep(t.Context(), two, src, one); err != nil {
		t.Fatal(err)
	}
	check(t, one)
	check(t, two)
	for dir, want := range map[string]string{one: "x", two: "y"} {
		if got, err := os.ReadFile(filepath.Join(dir, "d", "f")); string(got) != want {
			t.Errorf("%s has %q, %v", dir, got, err)
		}
	}
	sharesBlocks := exec.Command("cp", "--reflink=always", filepath.Join(src, "same"), src+"-probe").Run() == nil
	if !sharesBlocks && inode(t, filepath.Join(one, "same")) != inode(t, filepath.Join(two, "same")) {
		t.Error("kept twice")
	}
}

// TestPutBack: everything is as it was, and what came since is gone.
func TestPutBack(t *testing.T) {
	testenv.Require(t, "rsync")
	src := source(t)
	kept := src + "-kept"
	if err := Keep(t.Context(), kept, src, ""); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := errors.Join(
		os.WriteFile(filepath.Join(src, "same"), []byte("S"), 0o600),
		os.WriteFile(filepath.Join(src, "new"), nil, 0o600),
		os.RemoveAll(filepath.Join(src, "d")),
		os.Symlink(outside, filepath.Join(src, "d")), // where the file would be written through
	); err != nil {
		t.Fatal(err)
	}
	if err := PutBack(t.Context(), src, kept); err != nil {
		t.Fatal(err)
	}
	check(t, src)
	if got, err := os.ReadFile(filepath.Join(src, "same")); string(got) != "same" {
		t.Errorf("same is %q, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(src, "new")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("new is left: %v", err)
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("written outside: %v", left)
	}
}

// TestRemove: what a copy has made read-only can be deleted by its owner.
func TestRemove(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "kept")
	outside := t.TempDir()
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755),
		os.WriteFile(filepath.Join(dir, "a", "b", "f"), nil, 0o444),
		os.Symlink(outside, filepath.Join(dir, "a", "out")),
		os.Chmod(outside, 0o555),
		os.Chmod(filepath.Join(dir, "a", "b"), 0o555),
		os.Chmod(filepath.Join(dir, "a"), 0o555),
	); err != nil {
		t.Fatal(err)
	}
	if err := Remove(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o555 {
		t.Errorf("a link was followed: %v, %v", info, err)
	}
	if err := Remove(dir); err != nil {
		t.Errorf("what is not there: %v", err)
	}
}

// TestRename: a copy does not take the place of anything.
func TestRename(t *testing.T) {
	dir := t.TempDir()
	copied, taken := filepath.Join(dir, ".copied"), filepath.Join(dir, "taken")
	if err := errors.Join(os.Mkdir(copied, 0o755), os.Mkdir(taken, 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := Rename(taken, copied); !errors.Is(err, fs.ErrExist) {
		t.Errorf("error %v", err)
	}
	if err := Rename(filepath.Join(dir, "free"), copied); err != nil {
		t.Error(err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 2 || list[0].Name() != "free" {
		t.Errorf("there are %v", list)
	}
}
