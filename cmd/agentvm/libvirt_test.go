package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestLibvirt takes one machine of a real libvirt's through the same day as
// TestMachine does, and through what may happen to libvirt. Root's is the
// system's, an ordinary user's its own.
func TestLibvirt(t *testing.T) {
	h := newHost(t)
	lv := testenv.StartLibvirtd(t)
	d := newDay(t, h, "backend: libvirt\nuri: "+lv.URI()+"\n")
	dir := d.dir
	h.must(dir, "image", "build") // not what libvirt takes

	t.Run("up", func(t *testing.T) {
		if o := h.must(dir, "up"); !strings.Contains(o.stderr, "libvirt cannot go on from a template") {
			t.Errorf("it does not say why it boots:\n%s", o.stderr)
		}
		if v := h.status(dir); v.State != instance.Ready || len(v.Warnings) != 0 || v.Backend != "libvirt" || v.URI != lv.URI() {
			t.Fatalf("%+v", v)
		}
	})
	t.Run("domain", func(t *testing.T) { ownDomain(t, d, lv) })
	for _, c := range slices.Concat(dayCases, localCases) {
		t.Run(c.name, func(t *testing.T) { c.run(t, d) })
	}
	h.fails(dir, exitNotFound, libvirt.DomainName(h.spec("day").Machine)+".log", "logs", "-s", "qemu")
	t.Run("saved image is damaged", func(t *testing.T) {
		h.must(dir, "suspend")
		if err := os.Truncate(h.instance("day").Path(filepath.Join(instance.SavedDir, saved.ImageFile)), 1<<20); err != nil {
			t.Fatal(err)
		}
		h.fails(dir, exitFailure, "agentvm up --cold", "resume")
		libvirtIsEmpty(t, h, lv)
		h.must(dir, "up", "--cold")
	})
	t.Run("killed while it is saved", func(t *testing.T) {
		h.must(dir, "snapshot", "create", "before")
		for _, process := range []string{"supervisor", "qemu", "supervisor"} {
			h.killSaving(dir, process)
			h.must(dir, "snapshot", "restore", "before")
			h.guest(dir, "echo still here")
		}
		h.must(dir, "snapshot", "rm", "before")
	})
	t.Run("called off", func(t *testing.T) {
		h.guest(dir, "echo in memory >/dev/shm/kept")
		image := filepath.Join(h.instance("day").Path(instance.SavedDir), saved.ImageFile)
		for _, after := range []time.Duration{0, 300 * time.Millisecond, 800 * time.Millisecond} {
			cmd := h.command(dir, "suspend")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for range 60000 { // until it is written to, which takes a second or two
				if _, err := os.Stat(image); err == nil {
					break
				}
				time.Sleep(2 * time.Millisecond)
			}
			time.Sleep(after)
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait()
			h.must(dir, "up") // whether that was too late or not
			if got := h.guest(dir, "cat /dev/shm/kept"); got != "in memory\n" {
				t.Errorf("called off after %s: in memory is %q", after, got)
			}
			t.Logf("after %s: restored %v", after, h.status(dir).Restored)
		}
	})
	t.Run("libvirt ends once it is saved", func(t *testing.T) {
		h.guest(dir, "echo in memory >/dev/shm/kept")
		var out bytes.Buffer
		cmd := h.command(dir, "snapshot", "create", "cut")
		cmd.Stderr = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for range 60000 { // it takes a second or more to go on from there
			if h.instance("day").Suspended() {
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
		lv.Kill(syscall.SIGKILL)
		if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "could not go on") {
			t.Errorf("snapshot create: %v\n%s", err, out.String())
		}
		h.until(dir, instance.Suspended)
		h.nothingLeft()
		lv.Start()
		if c := h.resume(dir); !c.Restored {
			t.Error("it was not restored")
		}
		if got := h.guest(dir, "cat /dev/shm/kept"); got != "in memory\n" {
			t.Errorf("in memory: %q", got)
		}
		if list := h.snapshots(dir); len(list) != 0 {
			t.Errorf("snapshots: %+v", list)
		}
	})
	t.Run("memory is one machine's alone", func(t *testing.T) {
		h.fails(dir, exitHost, "its memory can only be its own", "fork", "1")
		h.must(dir, "snapshot", "create", "--disk-only", "live")
		h.guest(dir, "echo still here")
		h.must(dir, "snapshot", "rm", "live")
	})
	t.Run("libvirt restarts", func(t *testing.T) {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			lv.Kill(sig)
			h.guest(dir, "cat keep")
			lv.Start()
			h.guest(dir, "cat keep")
		}
		if v := h.status(dir); v.State != instance.Ready {
			t.Errorf("%s: %s", v.State, v.Reason)
		}
	})
	t.Run("libvirt hangs", func(t *testing.T) {
		lv.Signal(syscall.SIGSTOP)
		o := h.must(dir, "stop", "--timeout", "2s")
		lv.Signal(syscall.SIGCONT)
		if o.took > time.Minute {
			t.Errorf("it took %s", o.took)
		}
		libvirtIsEmpty(t, h, lv)
	})
	t.Run("ended in libvirt", func(t *testing.T) {
		booting := startBooting(t, h, dir)
		lv.Virsh("destroy", lv.Domains()[0])
		if out, err := booting(); err == nil || !strings.Contains(out, "ended in libvirt") {
			t.Errorf("start: %v\n%s", err, out)
		}
		libvirtIsEmpty(t, h, lv)
	})
	t.Run("supervisor is killed", func(t *testing.T) {
		booting := startBooting(t, h, dir)
		h.kill(dir, "supervisor")
		noDomains(t, lv) // nobody has looked
		if v := h.until(dir, instance.Failed); !strings.Contains(v.Reason, "was killed while booting") {
			t.Errorf("reason %q", v.Reason)
		}
		if out, err := booting(); err == nil {
			t.Errorf("start succeeded:\n%s", out)
		}
		libvirtIsEmpty(t, h, lv)
	})
	t.Run("libvirt ends meanwhile", func(t *testing.T) {
		cmd, out := startCommand(t, h, dir)
		for range 6000 { // until QEMU has been asked for
			if found, _ := filepath.Glob(filepath.Join(h.home, "run/*/vm/console.sock")); len(found) > 0 {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		lv.Kill(syscall.SIGKILL)
		begun := time.Now()
		if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "libvirt") {
			t.Errorf("start: %v\n%s", err, out)
		}
		if took := time.Since(begun); took > time.Minute {
			t.Errorf("it took %s to fail", took)
		}
		h.nothingLeft()
		lv.Start()
		libvirtIsEmpty(t, h, lv)
	})
	t.Run("guest powers itself off", func(t *testing.T) {
		// What both the supervisor and its guard may have left.
		leftover(t, h, lv)
		if o := h.runIn(dir, "", "doctor"); !strings.Contains(o.stdout, "domain foreign: it is left of machine \"day\"") || !strings.Contains(o.stdout, "ok    libvirt: ") {
			t.Errorf("doctor says\n%s", o.stdout)
		}
		h.must(dir, "start")
		h.runIn(dir, "", "exec", "--", "sudo", "systemctl", "poweroff")
		if v := h.until(dir, instance.Stopped); !strings.Contains(v.Reason, "powered itself off") {
			t.Errorf("reason %q", v.Reason)
		}
		libvirtIsEmpty(t, h, lv)
	})
	t.Run("disk snapshot", func(t *testing.T) {
		h.must(dir, "snapshot", "create", "cold")
		h.must(dir, "snapshot", "rm", "cold")
	})
	t.Run("somebody else's domain", func(t *testing.T) {
		lv.Virsh("define", domainFile(t, h, ""))
		h.fails(dir, exitFailure, "that is not agentvm's", "start")
		if got := lv.Domains(); len(got) != 1 || got[0] != "foreign" {
			t.Errorf("domains: %q", got)
		}
		lv.Virsh("undefine", "foreign")
	})
	t.Run("libvirt is not there", func(t *testing.T) {
		lv.Kill(syscall.SIGTERM)
		o := h.runIn(dir, "", "start")
		if o.code != exitHost || !strings.Contains(o.stderr, "connect to libvirt at "+lv.URI()) || !strings.Contains(o.stderr, "hint: ") || o.took > 30*time.Second {
			t.Errorf("exit code %d after %s\n%s", o.code, o.took, o.stderr)
		}
		lv.Start()
	})
	leftover(t, h, lv)
	h.must(dir, "down")
	libvirtIsEmpty(t, h, lv)
}

// leftover is a domain of the machine's that nobody stands behind.
func leftover(t *testing.T, h *host, lv *testenv.Libvirtd) {
	t.Helper()
	lv.Virsh("create", "--paused", domainFile(t, h, "<metadata>"+metadataOf(t, h)+"</metadata>"))
}

// ownDomain looks at the machine as libvirt's other users see it.
func ownDomain(t *testing.T, d day, lv *testenv.Libvirtd) {
	spec := d.h.spec("day")
	name := libvirt.DomainName(spec.Machine)
	if got := lv.Domains(); len(got) != 1 || got[0] != name {
		t.Fatalf("domains %q, want %s", got, name)
	}
	var meta libvirt.Metadata
	if err := xml.Unmarshal([]byte(lv.Virsh("metadata", name, "--uri", libvirt.Namespace)), &meta); err != nil {
		t.Fatal(err)
	}
	if meta.ID != spec.ID || meta.Name != "day" || meta.Workspace != d.dir || meta.User != os.Getuid() || len(meta.Config) != 64 {
		t.Errorf("metadata %+v", meta)
	}
	text := lv.Virsh("dumpxml", name)
	if strings.Contains(text, "<interface") || strings.Contains(text, "<graphics") {
		t.Errorf("the machine has a network or a screen of libvirt's:\n%s", text)
	}
	if out := lv.Virsh("domblklist", name); !strings.Contains(out, "root.qcow2") {
		t.Errorf("its disks:\n%s", out)
	}
}

// startBooting starts the machine and waits until it boots. What it returns
// waits for the command's end.
func startBooting(t *testing.T, h *host, dir string) func() (string, error) {
	t.Helper()
	cmd, out := startCommand(t, h, dir)
	h.until(dir, instance.Booting)
	return func() (string, error) { err := cmd.Wait(); return out.String(), err }
}

func startCommand(t *testing.T, h *host, dir string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	cmd := h.command(dir, "start")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, &out
}

// domainFile writes a small domain with the machine's UUID.
func domainFile(t *testing.T, h *host, more string) string {
	t.Helper()
	file := filepath.Join(h.home, "foreign.xml")
	text := fmt.Sprintf("<domain type='qemu'><name>foreign</name><uuid>%s</uuid>%s<memory>65536</memory><os><type>hvm</type></os></domain>", h.spec("day").ID, more)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// metadataOf takes a domain's metadata from what agentvm would give libvirt.
func metadataOf(t *testing.T, h *host) string {
	t.Helper()
	spec := h.spec("day")
	o := h.must(spec.Workspace, "up", "--dry-run")
	_, text, _ := strings.Cut(o.stdout, "<metadata>")
	text, _, ok := strings.Cut(text, "</metadata>")
	if !ok {
		t.Fatalf("no metadata in\n%s", o.stdout)
	}
	return text
}

// libvirtIsEmpty waits until libvirt has no domain and the host nothing of the
// machine.
func libvirtIsEmpty(t *testing.T, h *host, lv *testenv.Libvirtd) {
	t.Helper()
	noDomains(t, lv)
	h.nothingLeft()
}

func noDomains(t *testing.T, lv *testenv.Libvirtd) {
	t.Helper()
	var left []string
	for range 600 {
		if left = lv.Domains(); len(left) == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if len(left) > 0 {
		t.Errorf("libvirt still has %q", left)
	}
}
