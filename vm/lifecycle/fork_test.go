package lifecycle

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// running makes an instance that looks as if it ran, for as long as the test does.
func running(t *testing.T, m *Manager, name string, shares ...instance.Share) *instance.Instance {
	t.Helper()
	inst, err := m.Store.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.WriteSpec(instance.Spec{Name: name, ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: shares[0].Source, Shares: shares}); err != nil {
		t.Fatal(err)
	}
	release, err := inst.LockLive()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	if err := inst.WriteStatus(instance.Status{State: instance.Ready}); err != nil {
		t.Fatal(err)
	}
	return inst
}

// TestForkAlone: no other machine that can write to what is copied may run.
func TestForkAlone(t *testing.T) {
	for name, tt := range map[string]struct {
		share   instance.Share
		refused bool
	}{
		"the same":       {instance.Share{Source: "/w/p"}, true},
		"above":          {instance.Share{Source: "/w"}, true},
		"everything":     {instance.Share{Source: "/"}, true},
		"below":          {instance.Share{Source: "/w/p/sub"}, true},
		"read-only":      {instance.Share{Source: "/w/p", ReadOnly: true}, false},
		"beside":         {instance.Share{Source: "/w/pp"}, false},
		"somewhere else": {instance.Share{Source: "/x"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			m := testManager(t)
			inst := running(t, m, "one", instance.Share{Source: "/w/p"})
			running(t, m, "other", tt.share)
			if err := m.aloneWith(inst, "/w/p"); (err != nil) != tt.refused {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestForkTargets(t *testing.T) {
	m := testManager(t)
	ws := filepath.Join(t.TempDir(), "p")
	inst := running(t, m, "one", instance.Share{Source: ws})
	spec := instance.Spec{Name: "one", Workspace: ws, Config: filepath.Join(ws, "agentvm.yaml")}
	if err := os.MkdirAll(ws+"-fork-1", 0o700); err != nil {
		t.Fatal(err)
	}
	running(t, m, "one-fork-3", instance.Share{Source: "/x"})
	list, err := m.forkTargets(inst, spec, 2, false)
	if err != nil || len(list) != 2 || list[0].name != "one-fork-2" || list[1].dir != ws+"-fork-4" || list[1].config != ws+"-fork-4/agentvm.yaml" {
		t.Errorf("%+v, %v", list, err)
	}
	spec.Config = "/elsewhere/agentvm.yaml"
	if _, err := m.forkTargets(inst, spec, 1, false); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("a configuration elsewhere: %v", err)
	}
	list, err = m.forkTargets(inst, spec, 1, true)
	if err != nil || list[0] != (forkTarget{name: "one-fork-1", dir: ws, config: spec.Config, view: true}) {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestForkAt: the project of a fork has its original's name, and means the fork.
func TestForkAt(t *testing.T) {
	m := testManager(t)
	running(t, m, "one", instance.Share{Source: "/w"})
	running(t, m, "one-fork-1", instance.Share{Source: "/w-fork-1"})
	for _, tt := range []struct{ ws, name, want string }{
		{"/w-fork-1", "one", "one-fork-1"},
		{"/w", "one", ""},
		{"/w-fork-1", "unused", ""},
		{"/new", "one", ""},
	} {
		inst, err := m.forkAt(tt.ws, tt.name)
		if got := name(inst); err != nil || got != tt.want {
			t.Errorf("%s in %s: %q, %v", tt.name, tt.ws, got, err)
		}
	}
}

func name(inst *instance.Instance) string {
	if inst == nil {
		return ""
	}
	return inst.Name
}
