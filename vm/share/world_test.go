package share

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/testenv"
)

// Environment of the tests:
//
//	AGENTVM_TEST_CACHE   where downloaded packages stay; default: the user's cache directory,
//	                     for root /var/cache, where others can read them
//	AGENTVM_TEST_KERNEL  a Linux kernel with virtiofs and virtio-console built in;
//	                     default: Debian 13's cloud kernel, from the cache or downloaded
//
// TestMain lets copies of the test binary be the stage.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == InitArg {
		os.Exit(InitMain())
	}
	os.Exit(m.Run())
}

// flavours probes every virtiofsd to be had: the host's own, and Debian 13's.
func flavours(t testing.TB) map[string]Caps {
	t.Helper()
	all := map[string]Caps{}
	if caps, err := Probe(t.Context(), ""); err == nil {
		all[string(caps.Flavour)] = caps
	}
	if _, ok := all[string(FlavourRust)]; !ok {
		caps, err := Probe(t.Context(), "", rustVirtiofsd(t))
		if err != nil {
			t.Fatal(err)
		}
		all[string(caps.Flavour)] = caps
	}
	return all
}

// rustVirtiofsd wraps Debian 13's virtiofsd, with the libraries it needs.
func rustVirtiofsd(t testing.TB) string {
	t.Helper()
	root := testenv.Debian13(t)
	lib := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	wrapper := filepath.Join(publicDir(t), "virtiofsd")
	script := fmt.Sprintf("#!/bin/sh\nexec '%s/ld-linux-x86-64.so.2' --library-path '%s' '%s/usr/libexec/virtiofsd' \"$@\"\n", lib, lib, root)
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return wrapper
}

func kernel(t testing.TB) string {
	t.Helper()
	if k := os.Getenv("AGENTVM_TEST_KERNEL"); k != "" {
		return k
	}
	return filepath.Join(testenv.Debian13(t), "boot/vmlinuz")
}

func busybox(t testing.TB) string {
	t.Helper()
	for _, p := range []string{"usr/bin/busybox", "bin/busybox"} {
		if p = filepath.Join(testenv.Debian13(t), p); isFile(p) {
			return p
		}
	}
	t.Fatal("no busybox among Debian 13's packages")
	return ""
}

func isFile(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}

// publicDir is a temporary directory with a short name that every user may
// enter, and with it a unix socket.
func publicDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "share-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// initrd packs busybox and an init that runs the lines that arrive on hvc0.
func initrd(t testing.TB) string {
	t.Helper()
	dir := publicDir(t)
	files := map[string]string{
		"etc/passwd": "root:x:0:0::/:/bin/sh\nagent:x:1000:1000::/:/bin/sh\n",
		"etc/group":  "root:x:0:\nagent:x:1000:\n",
		"init": `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mount -t virtiofs workspace /workspace
mounted=$?
exec </dev/hvc0 >/dev/hvc0 2>&1
stty raw -echo
echo; echo "@end $mounted"
while read -r line; do
  (eval "$line") </dev/null 2>&1
  rc=$?; echo; echo "@end $rc"
done
poweroff -f
`}
	for name, content := range files {
		p := filepath.Join(dir, "root", name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := strings.Join([]string{
		"cd \"$1/root\"", "mkdir bin dev proc sys tmp workspace", "cp \"$2\" bin/busybox",
		"find . | \"$2\" cpio -o -H newc > ../initrd",
	}, " && ")
	if out, err := exec.Command("sh", "-c", script, "sh", dir, busybox(t)).CombinedOutput(); err != nil {
		t.Fatalf("pack an initrd: %v\n%s", err, out)
	}
	return filepath.Join(dir, "initrd")
}
