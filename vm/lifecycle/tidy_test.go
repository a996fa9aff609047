package lifecycle

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/tree"
)

// halfCopy is a cp that never gets to the end of a copy.
const halfCopy = "#!/bin/sh\nfor last; do :; done\nmkdir \"$last\" && echo half >\"$last/file\"\nexec sleep 600\n"

// copyingHome names the directory of a machine whose workspace TestCopyingHelper
// is to copy.
const copyingHome = "AGENTVM_TEST_COPYING"

// TestCopyingHelper is the process that TestKilledFork kills.
func TestCopyingHelper(t *testing.T) {
	home := os.Getenv(copyingHome)
	if home == "" {
		t.Skip("is run by TestKilledFork")
	}
	m := &Manager{Store: instance.Store{Dirs: instance.Dirs{State: filepath.Join(home, "s"), Cache: filepath.Join(home, "c"), Run: filepath.Join(home, "r")}}}
	inst, err := m.Store.Get("one")
	if err != nil {
		t.Fatal(err)
	}
	spec, err := inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	t.Error(m.copyForks(t.Context(), inst, spec, []forkTarget{{dir: spec.Workspace + "-fork-1"}}, &notes{}))
}

// TestKilledFork: a command that is killed while it copies a workspace leaves
// nothing that looks like a copy, and the next one for that machine deletes what
// it has left, and nothing else.
func TestKilledFork(t *testing.T) {
	m := testManager(t)
	inst, ws := stopped(t, m)
	spec, err := inst.Spec()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	others := filepath.Join(filepath.Dir(ws), copyPrefix+"of somebody else")
	if err := errors.Join(
		os.WriteFile(filepath.Join(bin, "cp"), []byte(halfCopy), 0o755),
		os.Mkdir(others, 0o755),
		os.WriteFile(filepath.Join(ws, "file"), []byte("whole"), 0o644),
		os.MkdirAll(filepath.Join(snapshotDir(inst, forkDir), "x"), 0o700),
		os.MkdirAll(filepath.Join(snapshotDir(inst, makingDir), "x"), 0o700),
		os.MkdirAll(filepath.Join(snapshotDir(inst, "kept"), "x"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestCopyingHelper$")
	cmd.Env = append(os.Environ(), copyingHome+"="+filepath.Dir(m.Store.Dirs.State), "PATH="+bin+":"+os.Getenv("PATH"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var half []string
	for deadline := time.Now().Add(time.Minute); len(half) == 0 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		half, _ = filepath.Glob(filepath.Join(filepath.Dir(ws), copyPrefix+"*", "file"))
	}
	_ = cmd.Process.Kill()
	if err := cmd.Wait(); len(half) != 1 || err == nil {
		t.Fatalf("half copies %q, %v", half, err)
	}
	if list, _ := filepath.Glob(ws + "*"); len(list) != 1 {
		t.Errorf("it looks as if there were %q", list)
	}

	// A name that has been made a link since is not followed.
	outside := t.TempDir()
	link := filepath.Join(filepath.Dir(ws), copyPrefix+"link")
	list, err := copies(inst)
	if err != nil || len(list) != 1 {
		t.Fatalf("noted: %q, %v", list, err)
	}
	if err := errors.Join(os.Symlink(outside, link), writeCopies(inst, append(list, link, ws))); err != nil {
		t.Fatal(err)
	}
	m.tidyKilled(inst)
	for path, want := range map[string]bool{
		filepath.Dir(half[0]): false, snapshotDir(inst, forkDir): false, snapshotDir(inst, makingDir): false, inst.Path(copiesFile): false,
		others: true, outside: true, link: true, ws: true, snapshotDir(inst, "kept"): true,
	} {
		if exists(path) != want {
			t.Errorf("%s is there: %v", path, !want)
		}
	}

	// The next one copies it whole, under a name that comes last.
	targets := []forkTarget{{dir: ws + "-fork-1"}}
	if err := m.copyForks(t.Context(), inst, spec, targets, &notes{}); err != nil {
		t.Fatal(err)
	}
	if exists(targets[0].dir) || !strings.HasPrefix(filepath.Base(targets[0].copy), ".") {
		t.Errorf("copied to %+v", targets[0])
	}
	if err := tree.Rename(targets[0].dir, targets[0].copy); err != nil {
		t.Fatal(err)
	}
	if err := dropCopies(inst); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(targets[0].dir, "file")); string(got) != "whole" {
		t.Errorf("copied: %q, %v", got, err)
	}
}

// TestTidyLetsBe: what is still being used or written is not deleted.
func TestTidyLetsBe(t *testing.T) {
	m := testManager(t)
	inst, _ := stopped(t, m)
	fork := running(t, m, "one-fork-1", instance.Share{Source: "/x"})
	spec, err := fork.Spec()
	if err != nil {
		t.Fatal(err)
	}
	memory, making := snapshotDir(inst, forkDir), snapshotDir(inst, makingDir)
	spec.Machine.Saved = memory
	if err := errors.Join(
		fork.WriteSpec(spec), fork.WriteStatus(instance.Status{State: instance.Starting}),
		os.MkdirAll(memory, 0o700), os.MkdirAll(making, 0o700), os.WriteFile(filepath.Join(making, snapshotFile), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	m.tidyKilled(inst)
	if !exists(memory) || !exists(making) {
		t.Errorf("a fork goes on from there: %v; a snapshot that is whole: %v", exists(memory), exists(making))
	}
	if err := errors.Join(fork.WriteStatus(instance.Status{State: instance.Ready}), os.Remove(filepath.Join(making, snapshotFile))); err != nil {
		t.Fatal(err)
	}
	m.tidyKilled(inst)
	if exists(memory) || exists(making) {
		t.Errorf("left: %v, %v", exists(memory), exists(making))
	}
	saving := running(t, m, "two", instance.Share{Source: "/y"})
	making = snapshotDir(saving, makingDir)
	if err := errors.Join(saving.WriteStatus(instance.Status{State: instance.Saving}), os.MkdirAll(making, 0o700)); err != nil {
		t.Fatal(err)
	}
	m.tidyKilled(saving)
	if _, err := os.Lstat(making); errors.Is(err, fs.ErrNotExist) {
		t.Error("a supervisor was writing there")
	}
}
