package share

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

// ownerUser and daemonUser are nobody in particular.
var (
	ownerUser  = vm.Owner{UID: 54321, GID: 54322}
	daemonUser = vm.Owner{UID: 64321, GID: 64322}
)

// shareDir makes a directory to share, owned by owner if that is not the caller.
func shareDir(t testing.TB, owner vm.Owner) string {
	t.Helper()
	dir := filepath.Join(publicDir(t), "ws")
	write(t, filepath.Join(dir, "hello"), "from the host\n")
	write(t, filepath.Join(dir, "mode-000"), "secret\n")
	write(t, filepath.Join(dir, ".git/config"), "[core]\n")
	write(t, filepath.Join(dir, ".git/hooks/pre-commit"), "true\n")
	write(t, filepath.Join(dir, "hidden.env"), "SECRET=1\n")
	write(t, filepath.Join(dir, "private/key"), "SECRET=1\n")
	chmod(t, filepath.Join(dir, "mode-000"), 0)
	symlink(t, "hello", filepath.Join(dir, "link"))
	if os.Getuid() == 0 {
		err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(p, owner.UID, owner.GID))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// write makes a file as whoever owns its directory would.
func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	err := unix.Stat(filepath.Dir(path), &st)
	if err := errors.Join(err, os.Chown(path, int(st.Uid), int(st.Gid))); err != nil {
		t.Fatal(err)
	}
}

func chmod(t testing.TB, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func symlink(t testing.TB, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

// startShare starts a server that ends with the test, and fills in what
// every test needs.
func startShare(t testing.TB, caps Caps, spec Spec) *Server {
	t.Helper()
	spec.Tag, spec.Socket, spec.Log = "workspace", filepath.Join(publicDir(t), "fs"), t.Output()
	if os.Getuid() == 0 {
		spec.RunAs = &daemonUser
	}
	s, err := Start(t.Context(), caps, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}

// eachFlavour runs a test with every virtiofsd, and as root with a
// directory of root's and one of somebody else's.
func eachFlavour(t *testing.T, test func(t *testing.T, caps Caps, owner vm.Owner)) {
	testenv.RequireQEMU(t)
	owners := map[string]vm.Owner{"user": {UID: os.Getuid(), GID: os.Getgid()}}
	if os.Getuid() == 0 {
		owners = map[string]vm.Owner{"roots": {}, "users": ownerUser}
	}
	for flavour, caps := range flavours(t) {
		for who, owner := range owners {
			t.Run(flavour+"/"+who, func(t *testing.T) { test(t, caps, owner) })
		}
	}
}

func TestShare(t *testing.T) {
	eachFlavour(t, func(t *testing.T, caps Caps, owner vm.Owner) {
		dir := shareDir(t, owner)
		s := startShare(t, caps, Spec{
			Source:  dir,
			Protect: []string{".git/config", ".git/hooks", "absent"},
			Hide:    []string{"hidden.env", "private"},
		})
		g := boot(t, s.spec.Socket)
		t.Run("daemon", func(t *testing.T) { checkDaemon(t, s, owner) })
		for _, check := range []struct {
			name string
			test func(*testing.T, *guest, string)
		}{
			{"ownership", checkOwnership}, {"privilege", checkPrivilege}, {"protected", checkProtected},
			{"hidden", checkHidden}, {"live", checkLive},
		} {
			t.Run(check.name, func(t *testing.T) {
				g.t = t
				check.test(t, g, dir)
			})
		}
		if u := s.Unprotected(); len(u) != 1 || u[0].Path != "absent" {
			t.Errorf("Unprotected() = %v", u)
		}
		g.kill()
		<-s.Done()
		if !errors.Is(s.Err(), ErrDisconnected) {
			t.Errorf("after QEMU went away: %v", s.Err())
		}
		if _, err := os.Stat(s.spec.Socket); !os.IsNotExist(err) {
			t.Errorf("the socket stays: %v", err)
		}
		checkOwners(t, dir, owner)
	})
}

// checkOwners looks at all that the guest left on the host.
func checkOwners(t *testing.T, dir string, owner vm.Owner) {
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if int(st.Uid) != owner.UID || int(st.Gid) != owner.GID {
			t.Errorf("%s belongs to %d:%d, want %d:%d", p, st.Uid, st.Gid, owner.UID, owner.GID)
		}
		if st.Mode&setIDBits != 0 || info.Mode()&os.ModeDevice != 0 {
			t.Errorf("%s has mode %v", p, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// checkDaemon looks at the process from the host.
func checkDaemon(t *testing.T, s *Server, owner vm.Owner) {
	want := owner.UID
	if os.Getuid() == 0 {
		want = daemonUser.UID
	}
	for _, pid := range append(children(t, s.PID()), s.PID()) {
		var st unix.Stat_t
		if err := unix.Stat("/proc/"+strconv.Itoa(pid), &st); err != nil {
			t.Fatal(err)
		}
		status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(status), "\n") {
			f := strings.Fields(line)
			if len(f) > 4 && (f[0] == "Uid:" || f[0] == "Gid:") {
				for _, id := range f[1:] {
					if id == "0" || f[0] == "Uid:" && id != strconv.Itoa(want) {
						t.Errorf("virtiofsd runs as %s", line)
					}
				}
			}
			if len(f) == 2 && f[0] == "Seccomp:" && f[1] != "2" {
				t.Errorf("virtiofsd without seccomp: %s", line)
			}
		}
		self, err := os.Readlink("/proc/self/ns/user")
		if err != nil {
			t.Fatal(err)
		}
		if ns, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/user"); err == nil && ns == self {
			t.Error("virtiofsd is in the host's user namespace")
		}
	}
}

func checkOwnership(t *testing.T, g *guest, dir string) {
	if out := g.do("stat -c %%u:%%g hello"); out != "1000:1000" {
		t.Errorf("the owner's file belongs to %s in the guest", out)
	}
	for _, as := range []func(string, ...any) (string, bool){g.agent, g.try} {
		out, ok := as("rm -rf d; mkdir d && echo x >d/f && ln -s f d/s && ln d/f d/h && mkfifo d/p && mv d/f d/g && chmod 700 d/g && stat -c %%u:%%g d d/* | sort -u")
		if !ok || out != "1000:1000" {
			t.Errorf("making files: ok=%v, %s", ok, out)
		}
	}
	if out, ok := g.agent("cat hello && echo more >>hello && cat link"); !ok || out != "from the host\nfrom the host\nmore" {
		t.Errorf("reading and appending: %q", out)
	}
	// Root in the guest may read what the mode keeps from the agent.
	if out := g.do("cat mode-000"); out != "secret" {
		t.Errorf("root reads %q", out)
	}
	if out, ok := g.agent("cat mode-000"); ok {
		t.Errorf("the agent reads %q", out)
	}
	// Giving files away does nothing.
	g.do("chown 0:0 d/g; chown 1234:4321 d/g; true")
	if out := g.do("echo 3 >/proc/sys/vm/drop_caches; stat -c %%u:%%g d/g"); out != "1000:1000" {
		t.Errorf("after chown: %s", out)
	}
	g.do("umask 022; echo r >as-root; mkdir -p rootdir/sub; chmod 0444 as-root; echo again >as-root; cat as-root")
}

func checkPrivilege(t *testing.T, g *guest, dir string) {
	g.refuse("Operation not permitted", "mknod dev-c c 1 3")
	g.refuse("Operation not permitted", "mknod dev-b b 254 0")
	g.do("cp /bin/busybox bb")
	g.refuse("Operation not permitted", "chmod 4755 bb")
	g.refuse("Operation not permitted", "chmod 2755 bb")
	g.refuse("Operation not permitted", "chmod 2755 d")
	g.do("chmod 1777 d && chmod 755 d")
	// A mode given on creation.
	g.do("umask 0; mkdir -m 0777 m; rmdir m")
	g.do("echo x >/tmp/suid && chmod 4755 /tmp/suid; cp -p /tmp/suid suid; tar -C /tmp -cf /tmp/t.tar suid; rm -f suid; tar -xpf /tmp/t.tar; true")
	g.refuse("", "setfattr -n security.capability -v 0sAQAAAgAgAAAAAAAAAAAAAAAAAAA= bb")
	g.refuse("", "mount -o bind,rw /nowhere /workspace/.git/hooks")
}

func checkProtected(t *testing.T, g *guest, dir string) {
	const ro = "Read-only file system"
	g.refuse(ro, "echo evil >>.git/config")
	g.refuse(ro, "echo evil >.git/hooks/post-checkout")
	g.refuse(ro, "rm .git/hooks/pre-commit")
	g.refuse("", "mv .git/hooks .git/h2")
	g.refuse("", "rm -rf .git/hooks")
	g.refuse("", "mv .git .git2")
	g.refuse("", "rmdir .git")
	g.refuse("", "echo x >evil; mv -f evil .git/config")
	g.refuse("", "echo x >.git/evil; busybox mv -T -f .git/evil .git/config")
	g.refuse("", "ln .git/config hardlink")
	g.do("mount -o remount,rw /workspace")
	g.refuse(ro, "echo evil >>.git/config")
	g.do("echo ok >.git/index && mv .git/index .git/index2 && mkdir .git/objects")
	if b, err := os.ReadFile(filepath.Join(dir, ".git/config")); err != nil || string(b) != "[core]\n" {
		t.Errorf("the protected file: %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".git/hooks/pre-commit")); err != nil {
		t.Error(err)
	}
}

func checkHidden(t *testing.T, g *guest, dir string) {
	if out := g.do("cat hidden.env; ls -A private"); out != "" {
		t.Errorf("the guest sees %q", out)
	}
	g.refuse("", "echo x >hidden.env")
	g.refuse("", "echo x >private/new")
	g.refuse("", "mv private elsewhere")
	g.refuse("", "ln hidden.env there && grep SECRET there")
}

// checkLive looks for changes from the other side.
func checkLive(t *testing.T, g *guest, dir string) {
	p := filepath.Join(dir, "live")
	within := func(what, want, cmd string) {
		t.Helper()
		start := time.Now()
		var out string
		for time.Since(start) < 30*time.Second { // a second, and what an emulated guest may need
			if out, _ = g.try("%s", cmd); out == want {
				t.Logf("%s: seen after %v", what, time.Since(start))
				return
			}
		}
		t.Errorf("%s: the guest sees %q, want %q", what, out, want)
	}
	within("absent", "absent", "test -e live || echo absent")
	write(t, p, "one")
	within("new file", "one", "cat live")
	write(t, p, "two")
	within("same size, cached", "two", "cat live")
	write(t, p, "three and more")
	within("longer", "three and more", "cat live")
	write(t, p+".new", "four")
	if err := os.Rename(p+".new", p); err != nil {
		t.Fatal(err)
	}
	within("replaced", "four", "cat live")
	chmod(t, p, 0o600)
	within("mode", "600", "stat -c %a live")
	if err := os.Remove(p); err != nil {
		t.Fatal(err)
	}
	within("removed", "absent", "test -e live || echo absent")
	g.do("mkdir -p listing; ls listing")
	write(t, filepath.Join(dir, "listing/x"), "")
	within("listing", "x", "ls listing")
	// A program that keeps the file open and reads on, like tail -f.
	write(t, p, "a\n")
	g.do("(tail -f live >/tmp/tailed &) ; sleep 1")
	f, err := os.OpenFile(p, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("b\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	time.Sleep(time.Second) // tail looks once a second
	within("appended while open", "a\nb", "cat /tmp/tailed")
	// And back.
	g.do("echo guest >live")
	if b, err := os.ReadFile(p); err != nil || string(b) != "guest\n" {
		t.Errorf("the host reads %q, %v", b, err)
	}
}

// children lists the processes that pid started.
func children(t testing.TB, pid int) []int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, n)
	}
	return pids
}
