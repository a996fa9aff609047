package lifecycle

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

func testPlan() plan {
	return plan{
		spec: instance.Spec{
			Name: "web", ID: "01234567-89ab-cdef-0123-456789abcdef", Image: "debian-13", Disk: 20 << 30, Workspace: "/home/ada/web",
			Shares:  []instance.Share{{Tag: "workspace", Source: "/home/ada/web", Target: "/workspace"}},
			Network: instance.Network{Allow: []string{"example.org"}},
			Guest:   instance.Guest{User: GuestUser, Home: GuestHome, Env: map[string]string{"A": "secret"}, Run: []string{"make"}, Copies: []instance.Copy{{Source: "/home/ada/.pi"}}},
			Machine: vm.Machine{
				Name: "web", UUID: "01234567-89ab-cdef-0123-456789abcdef", CPUs: 2, Memory: 1 << 30,
				Disks:  []vm.Disk{{ID: "root", Path: "/state/root.qcow2"}, {ID: "seed", Path: "/state/seed.iso"}},
				NICs:   []vm.NIC{{MAC: guestMAC, Socket: "/run/net.sock"}},
				Shares: []vm.Share{{Tag: "workspace", Socket: "/run/workspace.sock"}},
			},
		},
		image: &images.Image{ID: "debian-13-0123", Dir: "/cache/debian-13-0123", Manifest: images.Manifest{Files: []images.File{{Name: "root.img", Digest: "sha256:1"}}}},
		facts: cloudinit.Facts{Timezone: "Europe/Berlin", Locale: "C.UTF-8"},
		git:   cloudinit.Git{Name: "Ada", Email: "ada@example.org"},
	}
}

func TestTemplateKey(t *testing.T) {
	m := &Manager{Hardware: func(_ context.Context, m vm.Machine) (string, error) {
		b, err := json.Marshal([]any{m.CPUs, m.Memory})
		return string(b), err
	}}
	key := func(change func(*plan)) string {
		t.Helper()
		p := testPlan()
		change(&p)
		k, err := m.templateKey(t.Context(), p, templateConfig(p))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	same := key(func(*plan) {})
	for name, change := range map[string]func(*plan){
		"name and id": func(p *plan) { p.spec.Name, p.spec.ID = "other", "11234567-89ab-cdef-0123-456789abcdef" },
		"workspace":   func(p *plan) { p.spec.Workspace, p.spec.Shares[0].Source = "/b", "/b" },
		"mounts":      func(p *plan) { p.spec.Shares = append(p.spec.Shares, instance.Share{Tag: "mount0", Target: "/data"}) },
		"git":         func(p *plan) { p.git = cloudinit.Git{} },
		"network":     func(p *plan) { p.spec.Network = instance.Network{} },
		"guest":       func(p *plan) { p.spec.Guest.Env, p.spec.Guest.Run = nil, nil },
	} {
		if key(change) != same {
			t.Errorf("the %s of one machine is part of the template", name)
		}
	}
	for name, change := range map[string]func(*plan){
		"memory":            func(p *plan) { p.spec.Machine.Memory *= 2 },
		"image":             func(p *plan) { p.image.ID = "debian-12-0123" },
		"image, built anew": func(p *plan) { p.image.Manifest.Files[0].Digest = "sha256:2" },
		"size of the disk":  func(p *plan) { p.spec.Disk *= 2 },
		"time zone":         func(p *plan) { p.facts.Timezone = "UTC" },
		"user":              func(p *plan) { p.spec.Guest.User = "other" },
	} {
		if key(change) == same {
			t.Errorf("another %s, and the same template", name)
		}
	}
}

// TestTemplateIsNobodys: nothing of the project is in what a template boots from.
func TestTemplateIsNobodys(t *testing.T) {
	p := testPlan()
	inst := instance.Store{Dirs: instance.Dirs{Run: "/run/agentvm"}}.Open("/cache/templates/making/template-0123456789ab")
	data, err := json.Marshal(nobodys(p, inst, "89abcdef-0123-4567-89ab-cdef01234567"))
	if err != nil {
		t.Fatal(err)
	}
	for _, private := range []string{`"web"`, "/home/ada", "/state", p.spec.ID, "example.org", "secret", `"make"`, "/workspace"} {
		if strings.Contains(string(data), private) {
			t.Errorf("the template knows %q: %s", private, data)
		}
	}
}
