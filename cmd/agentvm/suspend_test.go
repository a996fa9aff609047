package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/saved"
)

// busyShare runs a program in the workspace until the test calls end.
func (h *host) busyShare(dir string) (end func()) {
	h.t.Helper()
	cmd := h.command(dir, "exec", "--", "sh", "-c", "echo here; exec sleep 600")
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	if _, err := pipe.Read(make([]byte, 4)); err != nil {
		h.t.Fatal(err)
	}
	return func() {
		h.guest(dir, "cd / && pkill -f 'sleep 60[0]'")
		_ = cmd.Wait()
	}
}

// TestSuspend saves a machine in use in every way: one that was booted, whose
// shares QEMU had from the start, and the same after it was resumed.
func TestSuspend(t *testing.T) {
	h := newHost(t)
	data := filepath.Join(h.home, "data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := h.project("p", "version: 1\nname: sleeper\nresources: {memory: 512MiB}\nmounts: [{source: "+data+", target: /data, readonly: true}]\n")
	h.up(dir, "--cold")
	const background = "cd / && (setsid sleep 98765 >/dev/null 2>&1 </dev/null &) && "
	h.guest(dir, background+"echo in memory >/dev/shm/kept; echo on disk >~/kept; sudo sh -c 'echo x >/root/x'")

	// inOrder checks that it is the same machine still, with its shares.
	inOrder := func(t *testing.T) {
		t.Helper()
		if got := h.guest(dir, "pgrep -c -f 'sleep 9876[5]'; cat /dev/shm/kept ~/kept"); got != "1\nin memory\non disk\n" {
			t.Errorf("in the guest: %q", got)
		}
		if err := os.WriteFile(filepath.Join(data, "in"), []byte("of the host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := h.guest(dir, "echo of the guest >/workspace/out; cat /data/in"); got != "of the host\n" {
			t.Errorf("/data/in: %q", got)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "out")); string(got) != "of the guest\n" {
			t.Errorf("out: %q, %v", got, err)
		}
		if o := h.runIn(dir, "", "exec", "--", "sudo", "touch", "/data/new"); o.code == 0 {
			t.Error("it could write to a read-only mount")
		}
		h.is(dir, "sleeper")
	}

	t.Run("a share in use", func(t *testing.T) {
		end := h.busyShare(dir)
		h.fails(dir, exitFailure, "/workspace is in use by process", "suspend")
		h.fails(dir, exitFailure, "sleep 600", "snapshot", "create", "busy")
		end()
		for _, hidden := range []struct{ hold, holder, end string }{
			{"sudo mkdir /mnt/w; sudo mount --bind /workspace /mnt/w", "/workspace is in use by a mount at /mnt/w\n", "sudo umount /mnt/w"},
			{"mount --bind /data /mnt/w", "/data is in use by a mount at /mnt/w\n", "umount /mnt/w"}, // read-only
			{"unshare --mount sleep 611 >/dev/null 2>&1 </dev/null &", "(sleep 611)", "pkill -f 'sleep 61[1]'"},
			{"exec 9>/workspace/out; umount --lazy /workspace; sleep 612 >/dev/null 2>&1 </dev/null &", "(sleep 612)",
				"pkill -f 'sleep 61[2]'; while pgrep -f 'sleep 61[2]'; do sleep 0.1; done; mount -t virtiofs workspace /workspace"},
		} {
			h.guest(dir, "cd / && sudo sh -c "+strconv.Quote(hidden.hold))
			h.fails(dir, exitFailure, hidden.holder, "suspend")
			h.guest(dir, "cd / && sudo sh -c "+strconv.Quote(hidden.end))
		}
		if list := h.snapshots(dir); len(list) > 0 {
			t.Errorf("snapshots: %+v", list)
		}
		inOrder(t)
	})
	t.Run("suspend and resume", func(t *testing.T) {
		for range 2 {
			h.must(dir, "suspend")
			if s := h.status(dir); s.State != instance.Suspended || len(s.Processes) > 0 {
				t.Errorf("status %+v", s)
			}
			h.nothingLeft()
			if c := h.resume(dir); !c.Restored {
				t.Error("it was not restored")
			}
			inOrder(t)
		}
		h.fails(dir, exitUsage, "", "resume", "sleeper", "too much")
	})
	t.Run("what waits is not saved", func(t *testing.T) { // as after a clone's listener that was killed
		h.guest(dir, "sudo sh -c 'udevadm control --stop-exec-queue; systemctl kill --signal=STOP systemd-journald; logger --tag=held still there'")
		h.must(dir, "suspend")
		h.resume(dir)
		const script = "timeout 60 sh -c 'until sudo journalctl --boot --quiet --output=cat --identifier=held | grep .; do sleep 0.1; done'; " +
			"timeout 60 udevadm settle; echo $?"
		if got := h.guest(dir, script); got != "still there\n0\n" {
			t.Errorf("it says %q", got)
		}
	})
	t.Run("snapshot", func(t *testing.T) {
		h.must(dir, "snapshot", "create", "before")
		inOrder(t) // it goes on
		full := h.instance("sleeper").Path(lifecycle.OverlayFile + ".new/no room")
		if err := os.MkdirAll(full, 0o700); err != nil {
			t.Fatal(err)
		}
		h.fails(dir, exitFailure, lifecycle.OverlayFile+".new", "snapshot", "restore", "before")
		inOrder(t) // it goes on
		if err := os.RemoveAll(filepath.Dir(full)); err != nil {
			t.Fatal(err)
		}
		h.guest(dir, "cd / && pkill -f 'sleep 9876[5]'; rm /dev/shm/kept ~/kept; sync")
		h.must(dir, "snapshot", "restore", "before")
		inOrder(t)
		h.must(dir, "stop")
		h.must(dir, "snapshot", "create", "stopped")
		list := h.snapshots(dir)
		if len(list) != 2 || !list[0].Memory || list[1].Memory {
			t.Errorf("snapshots: %+v", list)
		}
		h.must(dir, "snapshot", "restore", "before") // with a disk that has been shut down since
		inOrder(t)
		h.must(dir, "snapshot", "restore", "stopped")
		if s := h.status(dir); s.State != instance.Stopped {
			t.Errorf("it is %s", s.State)
		}
		h.must(dir, "snapshot", "rm", "stopped")
		h.fails(dir, exitNotFound, "has no snapshot", "snapshot", "restore", "stopped")
	})
	t.Run("fork", func(t *testing.T) {
		h.must(dir, "snapshot", "restore", "before")
		end := h.busyShare(dir)
		h.fails(dir, exitFailure, "/workspace is in use by process", "fork")
		end()
		h.fails(dir, exitUsage, "not a number of forks", "fork", "0")
		// The guest can write what a fork is to be.
		h.guest(dir, "echo 'network: {allow: [example.org]}' >>/workspace/agentvm.yaml")
		h.fails(dir, exitUsage, "has changed since \"sleeper\" started: network.allow", "fork")
		h.fails(dir, exitUsage, "look at it", "fork", "--readonly")
		h.guest(dir, "sed -i '$d' /workspace/agentvm.yaml")
		h.killCopying(dir)
		h.must(dir, "resume")
		h.nothingHalfDone(dir)
		h.must(dir, "fork", "2")
		inOrder(t)
		own := h.is(dir, "sleeper")
		boots := []string{own.BootID}
		for _, name := range []string{"sleeper-fork-1", "sleeper-fork-2"} {
			// Its project says that it is called sleeper, and its directory says which.
			fork := dir + strings.TrimPrefix(name, "sleeper")
			s := h.is(fork, name)
			if slices.Contains(boots, s.BootID) {
				t.Errorf("boot %s twice", s.BootID)
			}
			boots = append(boots, s.BootID)
			if got := h.guest(fork, "pgrep -c -f 'sleep 9876[5]'; cat /dev/shm/kept ~/kept /workspace/out; echo of the fork >/workspace/out"); got != "1\nin memory\non disk\nof the guest\n" {
				t.Errorf("%s: %q", name, got)
			}
			if name == "sleeper-fork-1" { // boots by a seed of its own
				h.runIn(fork, "", "exec", "--", "sudo", "systemctl", "reboot")
				h.until(fork, instance.Booting)
				h.until(fork, instance.Ready)
				if again := h.is(fork, name); again.BootID == s.BootID || again.HostKey != s.HostKey {
					t.Errorf("before: %+v, and after its own reboot %+v", s, again)
				}
				if got := h.guest(fork, "cat ~/kept /workspace/out"); got != "on disk\nof the fork\n" {
					t.Errorf("%s, rebooted: %q", name, got)
				}
			}
			h.must(fork, "down")
			if got, _ := os.ReadFile(filepath.Join(fork, "out")); string(got) != "of the fork\n" {
				t.Errorf("the workspace of %s that is left has %q", name, got)
			}
		}
		if got, _ := os.ReadFile(filepath.Join(dir, "out")); string(got) != "of the guest\n" {
			t.Errorf("the fork wrote %q to the workspace", got)
		}
		h.nothingHalfDone(dir)
	})
	t.Run("killed while it is saved", func(t *testing.T) {
		h.must(dir, "snapshot", "restore", "before")
		for _, process := range []string{"supervisor", "qemu"} {
			h.killSaving(dir, process)
			h.must(dir, "snapshot", "restore", "before")
			inOrder(t)
		}
	})
	t.Run("killed once it is saved", func(t *testing.T) {
		h.must(dir, "snapshot", "restore", "before")
		h.killSaved(dir, "last")
		h.must(dir, "snapshot", "restore", "last")
		inOrder(t)
		h.must(dir, "snapshot", "rm", "last")
	})
	t.Run("called off", func(t *testing.T) {
		cmd := h.command(dir, "suspend")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		h.until(dir, instance.Saving)
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		h.must(dir, "up") // which waits: the last moment to change one's mind may have been missed
		inOrder(t)
	})
	t.Run("damaged", func(t *testing.T) {
		h.must(dir, "suspend")
		memory := h.instance("sleeper").Path(filepath.Join(instance.SavedDir, "memory"))
		if err := os.Truncate(memory, 4096); err != nil {
			t.Fatal(err)
		}
		h.fails(dir, exitFailure, "agentvm up --cold", "resume")
		h.fails(dir, exitFailure, "agentvm up --cold", "up")
		if c := h.up(dir, "--cold"); c.Restored {
			t.Error("it was restored")
		}
		if got := h.guest(dir, "cat ~/kept; ls /dev/shm"); !strings.HasPrefix(got, "on disk\n") || strings.Contains(got, "kept") {
			t.Errorf("in the guest: %q", got)
		}
	})
	h.must(dir, "down")
	h.nothingLeft()
}

// killCopying kills a fork while it copies the workspace, with a cp that never
// gets to the end of it.
func (h *host) killCopying(dir string) {
	h.t.Helper()
	bin := h.t.TempDir()
	const cp = "#!/bin/sh\nfor last; do :; done\nmkdir \"$last\" && echo >\"$last/agentvm.yaml\"\nexec sleep 600\n"
	if err := os.WriteFile(filepath.Join(bin, "cp"), []byte(cp), 0o755); err != nil {
		h.t.Fatal(err)
	}
	cmd := h.command(dir, "fork")
	cmd.Env = append(cmd.Env, "PATH="+bin+":"+os.Getenv("PATH"))
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	var half []string
	for deadline := time.Now().Add(2 * time.Minute); len(half) == 0 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		half, _ = filepath.Glob(filepath.Join(filepath.Dir(dir), ".agentvm-fork-*", "agentvm.yaml"))
	}
	_ = cmd.Process.Kill()
	if err := cmd.Wait(); err == nil || len(half) != 1 {
		h.t.Fatalf("half copies %q, %v", half, err)
	}
	if s := h.status(dir); s.State != instance.Suspended {
		h.t.Errorf("it is %s", s.State)
	}
	if list, _ := filepath.Glob(dir + "-fork-*"); len(list) > 0 {
		h.t.Errorf("it looks as if there were %q", list)
	}
}

// nothingHalfDone checks that killed commands have left nothing of a machine or
// of a copy.
func (h *host) nothingHalfDone(dir string) {
	h.t.Helper()
	for _, pattern := range []string{h.instance("sleeper").Path(instance.SnapshotsDir + "/.*"), h.instance("sleeper").Path("copies.json"), filepath.Join(filepath.Dir(dir), ".agentvm-fork-*")} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			h.t.Errorf("left: %v", left)
		}
	}
}

// killSaving kills a process of the machine while a snapshot of it is made, its second.
func (h *host) killSaving(dir, process string) {
	h.t.Helper()
	cmd := h.command(dir, "snapshot", "create", "killed")
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.until(dir, instance.Saving)
	h.kill(dir, process)
	if cmd.Wait() == nil {
		h.t.Error("it says that it has made a snapshot")
	}
	h.until(dir, instance.Failed)
	h.nothingLeft()
	if list := h.snapshots(dir); len(list) != 1 {
		h.t.Errorf("snapshots: %+v", list)
	}
}

// killSaved kills QEMU when a snapshot has all that it is to have, and its guest
// has not gone on yet.
func (h *host) killSaved(dir, name string) {
	h.t.Helper()
	cmd := h.command(dir, "snapshot", "create", name)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.until(dir, instance.Saving)
	qemu := h.status(dir).Processes["qemu"]
	whole := h.instance("sleeper").Path(filepath.Join(instance.SnapshotsDir, ".making"))
	for deadline := time.Now().Add(time.Minute); !saved.Exists(whole) && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if qemu == 0 || !saved.Exists(whole) {
		h.t.Fatalf("QEMU %d, and nothing is saved in %s", qemu, whole)
	}
	_ = syscall.Kill(qemu, syscall.SIGKILL)
	if cmd.Wait() == nil || !strings.Contains(said.String(), "agentvm snapshot restore "+name) {
		h.t.Errorf("it says %q", said.String())
	}
	h.until(dir, instance.Failed)
	h.nothingLeft()
}

func (h *host) resume(dir string) (c came) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(dir, "resume", "--json").stdout), &c); err != nil {
		h.t.Fatal(err)
	}
	return c
}

func (h *host) snapshots(dir string) (list []snapshotView) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(dir, "snapshot", "ls", "--json").stdout), &list); err != nil {
		h.t.Fatal(err)
	}
	return list
}
