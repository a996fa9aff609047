package lifecycle

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/template"
)

// TestGiveUpSound: a template goes when it is damaged, or when two starts in a
// row are cut short, and never while another machine starts from it.
func TestGiveUpSound(t *testing.T) {
	damaged := instance.Status{RestoreFailed: true}
	cutShort := instance.Status{RestoreFailed: true, RestoreCutShort: true}
	for _, tt := range []struct {
		name   string
		starts []instance.Status // one after the other; Restored: it went well
		other  bool              // somebody else holds it
		gone   bool
		says   string
	}{
		{"damaged", []instance.Status{damaged}, false, true, "which is deleted: it boots instead (why)"},
		{"damaged, and another starts", []instance.Status{damaged}, true, false, "which another machine is starting from: it boots instead (why)"},
		{"cut short", []instance.Status{cutShort}, false, false, "which is deleted if the next machine cannot either: it boots instead (why)"},
		{"cut short twice", []instance.Status{cutShort, cutShort}, false, true, "which is deleted: it boots instead (why)"},
		{"cut short, and another starts", []instance.Status{cutShort, cutShort}, true, false, "which another machine is starting from: it boots instead (why)"},
		{"a good one between", []instance.Status{cutShort, {Restored: true}, cutShort}, false, false, "which is deleted if the next machine cannot either: it boots instead (why)"},
		{"damaged, after a doubt", []instance.Status{cutShort, damaged}, false, true, "which is deleted: it boots instead (why)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := testManager(t)
			m.Templates = template.Store{Dir: t.TempDir()}
			key := strings.Repeat("a", 64)
			made := publishTemplate(t, m.Templates, key)
			inst := m.Store.Open(filepath.Join(t.TempDir(), "web"))
			if tt.other {
				other, err := m.Templates.Hold(key)
				if err != nil {
					t.Fatal(err)
				}
				defer other.Release()
			}
			n := &notes{}
			for _, status := range tt.starts {
				from, err := m.Templates.Hold(key)
				if err != nil {
					t.Fatal(err)
				}
				if status.Restored {
					trust(from, n)
				} else if err := m.giveUp(inst, from, status, "why", n); err != nil {
					t.Error(err)
				}
				from.Release()
			}
			if last := n.said[len(n.said)-1]; !strings.HasSuffix(last, tt.says) {
				t.Errorf("%q, want %q", last, tt.says)
			}
			if _, err := os.Lstat(made.Dir); errors.Is(err, fs.ErrNotExist) != tt.gone {
				t.Errorf("gone %v, want %v", err, tt.gone)
			}
		})
	}
}

func publishTemplate(t *testing.T, s template.Store, key string) *template.Template {
	t.Helper()
	dir := s.Workshop(key)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, template.DiskFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	made, err := s.Publish(dir, template.Manifest{Key: key})
	if err != nil {
		t.Fatal(err)
	}
	made.Release()
	return made
}

// TestStopOfAStuckRestore: a machine whose supervisor has to be killed, since
// it was to be stopped, is not one to boot instead.
func TestStopOfAStuckRestore(t *testing.T) {
	m := testManager(t)
	inst, err := m.Store.Create("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.WriteSpec(instance.Spec{Name: "web", ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: "/w"}); err != nil {
		t.Fatal(err)
	}
	stuck := exec.Command("sleep", "600")
	if err := stuck.Start(); err != nil {
		t.Fatal(err)
	}
	defer stuck.Process.Kill()
	id, err := vm.ProcessID(stuck.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	release, err := inst.LockLive()
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = stuck.Wait(); release() }()
	if err := inst.WriteStatus(instance.Status{State: instance.Booting, HostBoot: instance.HostBoot(), Supervisor: id, Restoring: true}); err != nil {
		t.Fatal(err)
	}
	if stopped, err := m.Stop(t.Context(), inst, 0, func() {}); err != nil || !stopped {
		t.Errorf("stopped %v, %v", stopped, err)
	}
	if s, err := inst.Status(); err != nil || s.State != instance.Failed || s.RestoreFailed {
		t.Errorf("%+v, %v", s, err)
	}
}
