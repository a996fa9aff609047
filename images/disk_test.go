package images

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/agentvm/agentvm/vm"

	"github.com/agentvm/agentvm/vm/testenv"
)

func must(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
}

func TestLocalAndOverlay(t *testing.T) {
	testenv.Require(t, "qemu-img")
	ctx := context.Background()
	// Names that qemu-img must not read as protocols or options.
	dir := filepath.Join(t.TempDir(), `a b,c:d "é"`)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "file:"+disk, "8M")
	c := fakeCache(t, t.TempDir(), &fakeBuilder{})
	img, err := c.Resolve(ctx, Spec{Image: disk})
	if err != nil {
		t.Fatal(err)
	}
	if img.DiskFormat() != "qcow2" || img.Kernel() != "" || img.Initrd() != "" || img.Manifest.RootSize != 8<<20 || img.RootDisk() != disk {
		t.Errorf("%+v", img)
	}
	if err := img.Verify(ctx); err != nil {
		t.Error(err)
	}

	overlay := filepath.Join(dir, "overlay.qcow2")
	if err := CreateOverlay(ctx, overlay, img, 16<<20); err != nil {
		t.Fatal(err)
	}
	info, err := inspectDisk(ctx, overlay)
	if err != nil || info.Size != 16<<20 || info.Backing != disk {
		t.Errorf("overlay %+v, %v", info, err)
	}
	if err := CreateOverlay(ctx, overlay, img, 0); !errors.Is(err, os.ErrExist) {
		t.Errorf("an overlay was overwritten: %v", err)
	}
	small := filepath.Join(dir, "small.qcow2")
	if err := CreateOverlay(ctx, small, img, 4<<20); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("a shrunk disk: %v", err)
	}
	if _, err := os.Stat(small); err == nil {
		t.Error("a refused overlay is left")
	}

	// A disk that names another file as its backing file would show it to the guest.
	if _, err := Local(ctx, overlay); !errors.Is(err, vm.ErrPolicy) || vm.Hint(err) == "" {
		t.Errorf("a disk with a backing file: %v", err)
	}
	if _, err := c.Resolve(ctx, Spec{Image: disk, Packages: []string{"jq"}}); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("packages on a disk file: %v", err)
	}
}

func TestLocalErrors(t *testing.T) {
	testenv.Require(t, "qemu-img")
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{"empty.img": ""})
	must(t, "qemu-img", "create", "-q", "-f", "vmdk", filepath.Join(dir, "x.vmdk"), "8M")
	for path, want := range map[string]error{
		filepath.Join(dir, "absent.img"): vm.ErrNotFound,
		filepath.Join(dir, "empty.img"):  vm.ErrUsage,
		dir:                              vm.ErrUsage,
		filepath.Join(dir, "x.vmdk"):     vm.ErrUsage,
	} {
		if _, err := Local(context.Background(), path); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}
}

func TestIsPath(t *testing.T) {
	for name, want := range map[string]bool{
		"debian-13": false, "./debian-13": true, "/x": true, "disk.qcow2": true, "disk.img": true, "trixie": false,
	} {
		if IsPath(name) != want {
			t.Errorf("IsPath(%q) is %v", name, !want)
		}
	}
}

// The root disk promises zeroed inode tables and does not pay for them.
func TestPackDisk(t *testing.T) {
	testenv.Require(t, "/usr/sbin/mke2fs", "/usr/sbin/dumpe2fs")
	s := requireSandbox(t)
	work := t.TempDir()
	writeFiles(t, work, map[string]string{"tree/etc/hostname": "guest", "out/.keep": ""})
	b := build{debian: debian{s}, job: job{work: work}, to: Discard}
	if err := b.packDisk(context.Background()); err != nil {
		t.Fatal(err)
	}
	disk := b.out(rootDiskName)
	if n := fileSize(t, disk); n != rootSize {
		t.Errorf("%d bytes, want %d", n, int64(rootSize))
	}
	if n, err := allocated(disk); err != nil || n > 64<<20 {
		t.Errorf("an empty disk takes %d MiB (%v)", n>>20, err)
	}
	out, err := exec.Command("/usr/sbin/dumpe2fs", disk).Output()
	if err != nil {
		t.Fatal(err)
	}
	zeroed, groups := bytes.Count(out, []byte("ITABLE_ZEROED")), bytes.Count(out, []byte(": (Blocks "))
	if zeroed != groups || groups == 0 {
		t.Errorf("%d of %d groups have zeroed inode tables", zeroed, groups)
	}
	must(t, "/usr/sbin/e2fsck", "-fn", disk)
}
