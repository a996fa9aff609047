package share

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

// view is the root directory of the process that serves the share. The C
// flavour waits for its one connection before it shuts itself in.
func view(t *testing.T, s *Server) string {
	t.Helper()
	conn, err := net.Dial("unix", s.spec.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		for _, pid := range append(children(t, s.PID()), s.PID()) {
			root := fmt.Sprintf("/proc/%d/root", pid)
			if _, err := os.Lstat(root + "/hello"); err == nil {
				return root
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("virtiofsd does not shut itself into the share")
		}
	}
}

func forEach(t *testing.T, test func(t *testing.T, caps Caps)) {
	for flavour, caps := range flavours(t) {
		t.Run(flavour, func(t *testing.T) { test(t, caps) })
	}
}

func TestReadOnly(t *testing.T) {
	testenv.RequireQEMU(t)
	forEach(t, func(t *testing.T, caps Caps) {
		dir := shareDir(t, ownerUser)
		s := startShare(t, caps, Spec{Source: dir, ReadOnly: true})
		g := boot(t, s.spec.Socket)
		g.do("mount -o remount,rw /workspace; cat hello")
		for _, cmd := range []string{"echo x >hello", "rm hello", "mkdir d", "chmod 600 hello", "mv hello h", "ln hello h"} {
			g.refuse("Read-only file system", "%s", cmd)
		}
	})
}

// A mount below the shared directory is another file system of the host's;
// nobody asked to share it.
func TestSubmountsAreNotShared(t *testing.T) {
	testenv.RequireRoot(t)
	dir := shareDir(t, ownerUser)
	for _, name := range []string{"mnt", "with space"} {
		at := filepath.Join(dir, name)
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		write(t, filepath.Join(at, "elsewhere"), "x")
	}
	forEach(t, func(t *testing.T, caps Caps) {
		s := startShare(t, caps, Spec{Source: dir})
		checkNoSubmounts(t, s)
	})
	asOrdinaryUser(t, "TestHelperSubmounts", "SHARE_DIR="+dir)
}

// TestHelperSubmounts is what an ordinary user does in the test above.
func TestHelperSubmounts(t *testing.T) {
	dir := os.Getenv("SHARE_DIR")
	if dir == "" {
		t.Skip("part of TestSubmountsAreNotShared")
	}
	forEach(t, func(t *testing.T, caps Caps) {
		checkNoSubmounts(t, startShare(t, caps, Spec{Source: dir}))
	})
}

func checkNoSubmounts(t *testing.T, s *Server) {
	t.Helper()
	root := view(t, s)
	for _, name := range []string{"mnt", "with space"} {
		if entries, err := os.ReadDir(filepath.Join(root, name)); err != nil || len(entries) != 0 {
			t.Errorf("the guest sees %v in a mount, %v", entries, err)
		}
	}
}

// TestOrdinaryUser runs the whole again as an ordinary user, one with a
// supplementary group and no subordinate ids.
func TestOrdinaryUser(t *testing.T) {
	testenv.RequireRoot(t)
	asOrdinaryUser(t, "TestShare|TestReadOnly|TestDeath|TestParent|TestReplaced|TestStart")
}

func asOrdinaryUser(t *testing.T, run string, env ...string) {
	t.Helper()
	home := publicDir(t)
	if out, err := exec.Command("cp", "-a", filepath.Dir(testenv.Debian13(t)), home).CombinedOutput(); err != nil {
		t.Fatalf("copy packages: %v\n%s", err, out)
	}
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", ownerUser.UID, ownerUser.GID), home).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	args := []string{"-test.run=^(" + run + ")", "-test.timeout=5m"}
	if testing.Verbose() {
		args = append(args, "-test.v")
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "AGENTVM_TEST_CACHE=" + home, "CI=" + os.Getenv("CI")}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(ownerUser.UID), Gid: uint32(ownerUser.GID), Groups: []uint32{12345}},
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("as an ordinary user: %v", err)
	}
	t.Logf("%s", out)
}

func TestDeathIsNoticed(t *testing.T) {
	forEach(t, func(t *testing.T, caps Caps) {
		s := startShare(t, caps, Spec{Source: shareDir(t, ownerUser)})
		view(t, s)
		if err := s.Err(); err != nil {
			t.Fatalf("while it runs: %v", err)
		}
		if err := unix.Kill(s.PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.Done():
		case <-time.After(time.Minute):
			t.Fatal("not noticed")
		}
		if err := s.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("Err() = %v", err)
		}
	})
}

// TestParentKilled kills the process that started the server as hard as can be.
func TestParentKilled(t *testing.T) {
	forEach(t, func(t *testing.T, caps Caps) {
		spec, err := json.Marshal(map[string]any{"Caps": caps, "Source": shareDir(t, ownerUser), "Socket": filepath.Join(publicDir(t), "fs")})
		if err != nil {
			t.Fatal(err)
		}
		parent := exec.Command("/proc/self/exe", "-test.run=^TestHelperParent$")
		parent.Env = append(os.Environ(), "SHARE_PARENT="+string(spec))
		out, err := parent.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := parent.Start(); err != nil {
			t.Fatal(err)
		}
		var pid int
		line, err := bufio.NewReader(out).ReadString('\n')
		if _, scanErr := fmt.Sscanf(line, "pid %d", &pid); scanErr != nil {
			_ = parent.Process.Kill()
			t.Fatalf("no pid: %q %v", line, err)
		}
		all := append(children(t, pid), pid)
		if err := parent.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = parent.Wait() // killed
		for _, pid := range all {
			for deadline := time.Now().Add(5 * time.Second); alive(pid); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("process %d outlives its parent", pid)
				}
			}
		}
		t.Logf("gone with the parent: %v", all)
	})
}

// alive says whether a process runs; one that nobody has waited for does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// TestHelperParent is the parent in the test above.
func TestHelperParent(t *testing.T) {
	if os.Getenv("SHARE_PARENT") == "" {
		t.Skip("part of TestParentKilled")
	}
	var in struct {
		Caps           Caps
		Source, Socket string
	}
	if err := json.Unmarshal([]byte(os.Getenv("SHARE_PARENT")), &in); err != nil {
		t.Fatal(err)
	}
	spec := Spec{Tag: "workspace", Source: in.Source, Socket: in.Socket}
	if os.Getuid() == 0 {
		spec.RunAs = &daemonUser
	}
	s, err := Start(t.Context(), in.Caps, spec)
	if err != nil {
		t.Fatal(err)
	}
	view(t, s)
	fmt.Printf("pid %d\n", s.PID())
	time.Sleep(time.Minute)
}

func TestStartFails(t *testing.T) {
	caps := Caps{Path: "/bin/false", Flavour: FlavourC}
	dir := shareDir(t, ownerUser)
	run := publicDir(t)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	var runAs *vm.Owner
	if os.Getuid() == 0 {
		runAs = &daemonUser
	}
	for _, c := range []struct {
		name string
		ctx  context.Context
		caps Caps
		spec Spec
		want string
		is   error
	}{
		{"no directory", t.Context(), caps, Spec{Source: dir + "/none"}, "no such file", os.ErrNotExist},
		{"a file", t.Context(), caps, Spec{Source: dir + "/hello"}, "not a directory", unix.ENOTDIR},
		{"outside", t.Context(), caps, Spec{Source: dir, Protect: []string{"../x"}}, "below the shared directory", vm.ErrUsage},
		{"whole", t.Context(), caps, Spec{Source: dir, Hide: []string{"."}}, "below the shared directory", vm.ErrUsage},
		{"long socket", t.Context(), caps, Spec{Source: dir, Socket: run + "/" + strings.Repeat("s", 108)}, "at most 107", unix.EINVAL},
		{"no program", t.Context(), Caps{Path: "/none", Flavour: FlavourC}, Spec{Source: dir}, "execute /none", nil},
		{"canceled", canceled, caps, Spec{Source: dir}, "canceled", context.Canceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.spec.Socket == "" {
				c.spec.Socket = filepath.Join(run, "fs")
			}
			c.spec.Tag, c.spec.RunAs = "workspace", runAs
			s, err := Start(c.ctx, c.caps, c.spec)
			if err == nil {
				s.Stop()
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("err = %v", err)
			}
			if entries, _ := os.ReadDir(run); len(entries) != 0 {
				t.Errorf("left: %v", entries)
			}
		})
	}
	if os.Getuid() == 0 {
		_, err := Start(t.Context(), caps, Spec{Source: dir, Socket: filepath.Join(run, "fs")})
		if !errors.Is(err, vm.ErrHost) {
			t.Errorf("as root without RunAs: %v", err)
		}
	}
}

// A program that ends at once is the daemon's failure, with what it said.
func TestStartedProgramEnds(t *testing.T) {
	program := filepath.Join(publicDir(t), "virtiofsd")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho no luck >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := startShare(t, Caps{Path: program, Flavour: FlavourC}, Spec{Source: shareDir(t, ownerUser)})
	<-s.Done()
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "no luck") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("Err() = %v", err)
	}
}

// A container masks parts of /proc, and then the kernel lets nobody inside
// mount a fresh one. See mount_too_revealing() in Linux's fs/namespace.c.
func TestMaskedProc(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.Require(t, "unshare")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const script = `mount --bind /dev/null /proc/version && exec "$0" -test.run='^TestHelperMasked$'`
	cmd := exec.Command("unshare", "-m", "sh", "-c", script, exe)
	cmd.Env = append(os.Environ(), "SHARE_MASKED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestHelperMasked is what runs with a masked /proc in the test above.
func TestHelperMasked(t *testing.T) {
	if os.Getenv("SHARE_MASKED") == "" {
		t.Skip("part of TestMaskedProc")
	}
	forEach(t, func(t *testing.T, caps Caps) {
		s := startShare(t, caps, Spec{Source: shareDir(t, ownerUser)})
		view(t, s)
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.PID()))
		if err != nil || !strings.Contains(string(args), "sandbox=chroot") {
			t.Errorf("virtiofsd runs with %q, %v", args, err)
		}
	})
}

// Replacing the directory by a link between two looks at it must not share
// what the link leads to.
func TestReplacedSource(t *testing.T) {
	base := publicDir(t)
	real := filepath.Join(base, "real")
	write(t, filepath.Join(real, "hello"), "x")
	symlink(t, "real", filepath.Join(base, "link"))
	for flavour, caps := range flavours(t) {
		s := startShare(t, caps, Spec{Source: filepath.Join(base, "link")})
		if got := view(t, s); got == "" {
			t.Errorf("%s does not follow a link to the directory", flavour)
		}
	}
	_, err := sourceTree(plan{Source: filepath.Join(base, "link")})
	if !errors.Is(err, unix.ELOOP) {
		t.Errorf("the stage follows a link: %v", err)
	}
	_, err = sourceTree(plan{Source: real, Dev: 1, Ino: 1})
	if err == nil || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("the stage takes another directory: %v", err)
	}
}

func TestProtectionLostIsNoticed(t *testing.T) {
	forEach(t, func(t *testing.T, caps Caps) {
		dir := shareDir(t, ownerUser)
		s := startShare(t, caps, Spec{Source: dir, Protect: []string{".git/config", ".git/hooks"}})
		view(t, s)
		// As git config does on the host.
		write(t, filepath.Join(dir, ".git/config.lock"), "[core]\n")
		if err := os.Rename(filepath.Join(dir, ".git/config.lock"), filepath.Join(dir, ".git/config")); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(5 * time.Second); len(s.Unprotected()) == 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("not noticed")
			}
		}
		if u := s.Unprotected(); len(u) != 1 || u[0].Path != ".git/config" {
			t.Errorf("Unprotected() = %v", u)
		}
	})
}
