package share

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
)

func TestParseCaps(t *testing.T) {
	for _, c := range []struct {
		file, capabilities string
		flavour            Flavour
		has, lacks         []string
	}{
		{"c-7.2.help", `{"type": "fs"}`, FlavourC, []string{"source", "cache", "modcaps", "fd", "no_posix_lock"}, []string{"shared-dir", "translate-uid"}},
		{"rust-1.13.help", `{"type": "fs", "features": ["migrate-precopy", "separate-options"]}`, FlavourRust,
			[]string{"shared-dir", "readonly", "translate-uid", "no-announce-submounts", "fd"}, []string{"source"}},
	} {
		t.Run(c.file, func(t *testing.T) {
			help, err := os.ReadFile(filepath.Join("testdata", c.file))
			if err != nil {
				t.Fatal(err)
			}
			caps, err := parseCaps(c.capabilities, "virtiofsd 1.2\nmore\n", string(help))
			if err != nil {
				t.Fatal(err)
			}
			if caps.Flavour != c.flavour || caps.Version != "virtiofsd 1.2" {
				t.Errorf("caps = %+v", caps)
			}
			for _, o := range c.has {
				if !caps.Has(o) {
					t.Errorf("lacks %s, has %v", o, caps.Options)
				}
			}
			for _, o := range c.lacks {
				if caps.Has(o) {
					t.Errorf("has %s", o)
				}
			}
		})
	}
	for _, bad := range [][2]string{{"", ""}, {`{"type":"gpu"}`, ""}, {`{"type":"fs"}`, "usage: none"}} {
		if caps, err := parseCaps(bad[0], "v", bad[1]); err == nil {
			t.Errorf("parseCaps(%q) = %+v", bad, caps)
		}
	}
}

func TestProbeNothing(t *testing.T) {
	_, err := Probe(t.Context(), "", "/none/virtiofsd")
	if !errors.Is(err, ErrNoVirtiofsd) || !errors.Is(err, vm.ErrHost) || !strings.Contains(vm.Hint(err), "apt-get install") {
		t.Errorf("err = %v, hint %q", err, vm.Hint(err))
	}
	_, err = Probe(t.Context(), "", "/bin/true")
	if err == nil || !errors.Is(err, vm.ErrHost) {
		t.Errorf("of something else: %v", err)
	}
}

// What is known of a program is not asked for again, until the program is another.
func TestProbeIsKept(t *testing.T) {
	known, path := probes.Store(t.TempDir()), filepath.Join(t.TempDir(), "virtiofsd")
	asked := path + ".asked"
	install := func(version string) {
		t.Helper()
		script := "#!/bin/sh\necho >>" + asked + `
case $1 in
--print-capabilities) echo '{"type": "fs"}' ;;
--version) echo ` + version + ` ;;
--help) printf '      --shared-dir <path>\n      --fd <fd>\n' ;;
esac
`
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		install, want string
		asked         int // in all
	}{{"one", "one", 3}, {"", "one", 3}, {"another", "another", 6}, {"", "another", 6}} {
		if step.install != "" {
			install(step.install)
		}
		caps, err := Probe(t.Context(), known, path)
		if err != nil || caps.Version != step.want || caps.Flavour != FlavourRust {
			t.Fatalf("%+v, %v", caps, err)
		}
		if b, _ := os.ReadFile(asked); len(b) != step.asked {
			t.Errorf("asked %d times, want %d", len(b), step.asked)
		}
	}
}

func TestArgs(t *testing.T) {
	c := args(Caps{Flavour: FlavourC}, "/s", CacheNever, true, sandboxChroot)
	want := []string{"-f", "--fd=3", "-o", "source=/s", "-o", "sandbox=chroot", "-o", "cache=none", "-o", "log_level=warn",
		"-o", "modcaps=-chown:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap", "--thread-pool-size=0", "--rlimit-nofile=0"}
	if d := cmp.Diff(want, c); d != "" {
		t.Error(d)
	}
	old := args(Caps{Flavour: FlavourRust}, "/s", CacheAuto, true, sandboxNamespace)
	want = []string{"--fd=3", "--shared-dir=/s", "--sandbox=namespace", "--seccomp=kill", "--cache=auto", "--log-level=warn",
		"--modcaps=-chown:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap", "--thread-pool-size=0", "--rlimit-nofile=0"}
	if d := cmp.Diff(want, old); d != "" {
		t.Error(d)
	}
	recent := args(Caps{Flavour: FlavourRust, Options: []string{"readonly", "no-announce-submounts"}}, "/s", CacheAuto, true, sandboxNamespace)
	if d := cmp.Diff(append(want, "--no-announce-submounts", "--readonly"), recent); d != "" {
		t.Error(d)
	}
}

func TestDecideIdentity(t *testing.T) {
	root, user, guest, daemon := vm.Owner{}, vm.Owner{UID: 5, GID: 6}, vm.Owner{UID: 1000, GID: 1000}, vm.Owner{UID: 70, GID: 71}
	for _, c := range []struct {
		name          string
		caller, owner vm.Owner
		runAs         *vm.Owner
		host, disk    vm.Owner
		fails         bool
	}{
		{"user", user, user, nil, user, user, false},
		{"user, another's directory", user, root, nil, user, user, false},
		{"user as another", user, user, &daemon, user, user, true},
		{"root's directory", root, root, &daemon, daemon, root, false},
		{"user's directory", root, user, &daemon, daemon, user, false},
		{"root as root", root, user, nil, user, user, true},
		{"root as uid 0", root, user, &vm.Owner{GID: 1}, user, user, true},
		{"root as gid 0", root, user, &vm.Owner{UID: 1}, user, user, true},
	} {
		id, err := decideIdentity(c.caller, c.owner, guest, c.runAs)
		if (err != nil) != c.fails || !c.fails && id != (identity{Guest: guest, Host: c.host, Disk: c.disk}) {
			t.Errorf("%s: %+v, %v", c.name, id, err)
		}
	}
	id, err := identity{Host: daemon, Disk: user}.withoutIdmap(unix.EINVAL)
	if err != nil || id.Host != user {
		t.Errorf("a user's directory without idmapping: %+v, %v", id, err)
	}
	_, err = identity{Host: daemon, Disk: root}.withoutIdmap(unix.EINVAL)
	if !errors.Is(err, vm.ErrHost) || vm.Hint(err) == "" {
		t.Errorf("root's directory without idmapping: %v", err)
	}
}

func TestRestrictions(t *testing.T) {
	got := restrictions([]string{"a/b/c", "a/b/d", "top", "a/b/c/inner", "dir"}, []string{"dir/secret", "z", "z/in", "a/b/d"})
	want := []restriction{
		{"a", pinned}, {"dir", protected}, {"top", protected}, {"z", hidden},
		{"a/b", pinned}, {"dir/secret", hidden},
		{"a/b/c", protected}, {"a/b/d", hidden},
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(restriction{})); d != "" {
		t.Error(d)
	}
}

func TestMountsBelow(t *testing.T) {
	const info = `21 1 0:20 / /sys rw - tmpfs tmpfs rw
22 21 8:1 / /sys/share rw - ext4 /dev/sda rw
23 22 0:30 / /sys/share/b/deep rw - tmpfs t rw
24 22 0:31 / /sys/share/with\040space rw - tmpfs t rw
25 22 0:32 / /sys/share/b rw - tmpfs t rw
26 21 0:33 / /sys/shared rw - tmpfs t rw
`
	got, err := mountsBelow(strings.NewReader(info), "/sys/share")
	if want := []string{"b", "with space"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("mountsBelow = %q, %v; want %q", got, err, want)
	}
	if _, err := mountsBelow(strings.NewReader("1 2 3\n"), "/"); err == nil {
		t.Error("a malformed line passes")
	}
}

// TestFilter runs the filter on system calls, in x/net/bpf's machine: that
// one loads big-endian words where the kernel loads native ones.
func TestFilter(t *testing.T) {
	raw, err := filter()
	if err != nil {
		t.Fatal(err)
	}
	insns, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("cannot disassemble")
	}
	machine, err := bpf.NewVM(insns)
	if err != nil {
		t.Fatal(err)
	}
	const (
		allow = uint32(unix.SECCOMP_RET_ALLOW)
		zero  = uint32(unix.SECCOMP_RET_ERRNO)
		eperm = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPERM)
		kill  = uint32(unix.SECCOMP_RET_KILL_PROCESS)
	)
	for _, c := range []struct {
		name string
		arch uint32
		nr   uint32
		args [4]uint32
		want uint32
	}{
		{"another architecture", auditArch + 1, unix.SYS_READ, [4]uint32{}, kill},
		{"x32", auditArch, unix.SYS_READ | 0x40000000, [4]uint32{}, kill},
		{"read", auditArch, unix.SYS_READ, [4]uint32{}, allow},
		{"setresuid", auditArch, unix.SYS_SETRESUID, [4]uint32{}, zero},
		{"setresgid", auditArch, unix.SYS_SETRESGID, [4]uint32{}, zero},
		{"setgroups", auditArch, unix.SYS_SETGROUPS, [4]uint32{}, zero},
		{"fchownat", auditArch, unix.SYS_FCHOWNAT, [4]uint32{}, zero},
		{"geteuid", auditArch, unix.SYS_GETEUID, [4]uint32{}, zero},
		{"getegid", auditArch, unix.SYS_GETEGID, [4]uint32{}, allow},
		{"openat2", auditArch, unix.SYS_OPENAT2, [4]uint32{}, uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS)},
		{"chmod 755", auditArch, unix.SYS_FCHMODAT, [4]uint32{0, 0, 0o755}, allow},
		{"chmod 1777", auditArch, unix.SYS_FCHMODAT, [4]uint32{0, 0, 0o1777}, allow},
		{"chmod u+s", auditArch, unix.SYS_FCHMODAT, [4]uint32{0, 0, 0o4755}, eperm},
		{"chmod g+s", auditArch, unix.SYS_FCHMOD, [4]uint32{0, 0o2755}, eperm},
		{"chmod u+s, new call", auditArch, unix.SYS_FCHMODAT2, [4]uint32{0, 0, 0o4755}, eperm},
		{"mknod suid", auditArch, unix.SYS_MKNODAT, [4]uint32{0, 0, unix.S_IFREG | 0o4755}, eperm},
		{"mknod", auditArch, unix.SYS_MKNODAT, [4]uint32{0, 0, unix.S_IFREG | 0o755}, allow},
		{"open", auditArch, unix.SYS_OPENAT, [4]uint32{0, 0, unix.O_RDWR, 0xffffffff}, allow},
		{"open a directory", auditArch, unix.SYS_OPENAT, [4]uint32{0, 0, unix.O_DIRECTORY, 0xffffffff}, allow},
		{"create", auditArch, unix.SYS_OPENAT, [4]uint32{0, 0, unix.O_CREAT, 0o644}, allow},
		{"create suid", auditArch, unix.SYS_OPENAT, [4]uint32{0, 0, unix.O_CREAT, 0o4755}, eperm},
		{"unnamed suid", auditArch, unix.SYS_OPENAT, [4]uint32{0, 0, unix.O_TMPFILE, 0o4755}, eperm},
	} {
		data := make([]byte, 64)
		binary.BigEndian.PutUint32(data[offNr:], c.nr)
		binary.BigEndian.PutUint32(data[offArch:], c.arch)
		for i, a := range c.args {
			binary.BigEndian.PutUint32(data[offArgs+8*i:], a)
		}
		got, err := machine.Run(data)
		if err != nil || uint32(got) != c.want {
			t.Errorf("%s: %#x, %v; want %#x", c.name, got, err, c.want)
		}
	}
}

// The supervisor's umask is strict, and must not cut the modes of what the
// guest makes.
func TestUmaskIsNotInherited(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	out, err := selfCommand(t.Context(), filterArg, "/bin/sh", "-c", "umask").CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "0000" {
		t.Errorf("umask %q, %v", out, err)
	}
}

func TestTail(t *testing.T) {
	var x tail
	for range 1000 {
		if n, err := x.Write([]byte("0123456789\n")); n != 11 || err != nil {
			t.Fatal(n, err)
		}
	}
	if s := x.String(); len(s) > tailSize || !strings.HasSuffix(s, "0123456789") {
		t.Errorf("kept %d bytes", len(s))
	}
}
