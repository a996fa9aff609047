package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/testenv"
)

// workday is what every image has to be good for: up, the workspace, root in
// the guest, no network, and a disk that outlives a stop.
func workday(t *testing.T, h *host, dir string) {
	t.Helper()
	h.must(dir, "up")
	h.guest(dir, "echo of the guest >made && sudo touch /var/kept && test $(id -un) = agent")
	if got, err := os.ReadFile(filepath.Join(dir, "made")); err != nil || string(got) != "of the guest\n" {
		t.Errorf("the workspace has %q, %v", got, err)
	}
	for _, target := range []string{"http://example.org/", "http://1.1.1.1/"} {
		if o := h.runIn(dir, "", "exec", "--", "python3", "-c", "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)", target); o.code != 1 {
			t.Errorf("%s: exit code %d\n%s", target, o.code, o.stderr)
		}
	}
	h.must(dir, "stop")
	h.nothingLeft()
	if o := h.must(dir, "start"); strings.Contains(o.stderr, "--recreate") {
		t.Errorf("the second start finds another image:\n%s", o.stderr)
	}
	h.guest(dir, "cat made && test -e /var/kept")
	h.must(dir, "down")
}

// TestDebian12 is a day with the other image of the catalogue.
func TestDebian12(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	dir := h.project("old", "version: 1\nimage: debian-12\nagent: {use: shell}\nresources: {memory: 1GiB}\n")
	if c := h.up(dir); !c.Restored {
		t.Errorf("it has no template: %s", c.notes)
	}
	for script, want := range map[string]string{
		". /etc/os-release && echo $VERSION_ID": "12\n",
		"systemctl --failed --no-legend":        "",
		"python3 -c 'import json; print(json.load(open(\"/run/cloud-init/result.json\"))[\"v1\"][\"errors\"])'": "[]\n",
	} {
		if got := h.guest(dir, script); got != want {
			t.Errorf("%s: %q", script, got)
		}
	}
	workday(t, h, dir)
}

// TestFirmwareBoot runs a Debian of its own making, boot loader and all,
// where the program knows nothing of what is on the disk.
func TestFirmwareBoot(t *testing.T) {
	t.Parallel()
	testenv.RequireRoot(t) // two boots of a stock Debian take minutes under emulation
	h := newHost(t)
	disk := firmwareDisk(t)
	for _, firmware := range []string{"bios", "uefi"} {
		t.Run(firmware, func(t *testing.T) {
			t.Parallel()
			h := &host{t: t, home: h.home, program: h.program}
			dir := h.project(firmware, "version: 1\nimage: ./disk.qcow2\nfirmware: "+firmware+"\nresources: {memory: 1GiB, disk: 4GiB}\n")
			if err := os.Symlink(disk, filepath.Join(dir, "disk.qcow2")); err != nil {
				t.Fatal(err)
			}
			h.must(dir, "up", "--timeout", "20m") // beside other tests
			started := h.guest(dir, "test -d /sys/firmware/efi && echo uefi || echo bios")
			if strings.TrimSpace(started) != firmware {
				t.Errorf("it was started by %s", started)
			}
			h.guest(dir, "echo of the guest >made")
			if _, err := os.Stat(filepath.Join(dir, "made")); err != nil {
				t.Error(err)
			}
			h.must(dir, "down") // a second boot takes over a minute, and shows nothing new
		})
	}
}

// firmwarePackages are a stock Debian that cloud-init can set up, and what
// makes a disk of it.
const firmwarePackages = "linux-image-cloud-amd64,initramfs-tools,systemd-sysv,udev,dbus,cloud-init,cloud-guest-utils," +
	"netplan.io,systemd-resolved,openssh-server,sudo,iproute2,e2fsprogs,fdisk,python3," +
	"grub-common,grub-pc-bin,grub-efi-amd64-bin,dosfstools,mtools"

// firmwareDisk returns a disk with Debian 13 and boot loaders for BIOS and UEFI.
func firmwareDisk(t *testing.T) string {
	t.Helper()
	script, err := filepath.Abs("testdata/firmware-disk.sh")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	key := sha256.Sum256(append(text, firmwarePackages...))
	disk := filepath.Join(testenv.CacheDir(t), fmt.Sprintf("firmware-%x.qcow2", key[:6]))
	if _, err := os.Stat(disk); err == nil {
		return disk
	}
	// Root of the user namespace is the user, so the result is the user's.
	work, err := os.MkdirTemp("/var/tmp", "agentvm-firmware")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(work)
	hook := filepath.Join(work, "disk.sh")
	if err := os.WriteFile(hook, text, 0o644); err != nil {
		t.Fatal(err)
	}
	sandbox := []string{"--mount", "--pid", "--fork", "--kill-child", "--"}
	if os.Getuid() != 0 {
		sandbox = append([]string{"--user", "--map-root-user", "--map-auto"}, sandbox...)
	}
	cmd := exec.Command("unshare", append(sandbox,
		"mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=null", "--include="+firmwarePackages,
		fmt.Sprintf(`--customize-hook=sh %s %s "$1"`, hook, work), "trixie", "-")...)
	cmd.Env = append(os.Environ(), "TMPDIR=/var/tmp")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make a disk with a boot loader: %v\n%s", err, out)
	}
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", filepath.Join(work, "disk.raw"), disk+".new").CombinedOutput(); err != nil {
		t.Fatalf("convert: %v\n%s", err, out)
	}
	if err := os.Chmod(disk+".new", 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(disk+".new", disk); err != nil {
		t.Fatal(err)
	}
	return disk
}
