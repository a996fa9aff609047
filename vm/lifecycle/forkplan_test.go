package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

// forkable makes a machine that looks as if it ran from this configuration in
// the directory ws/p, with an empty disk file as its image.
func forkable(t *testing.T, project string) (m *Manager, inst *instance.Instance, spec instance.Spec) {
	t.Helper()
	testenv.Require(t, "qemu-img")
	m = testManager(t)
	m.Home = t.TempDir()
	dir := filepath.Join(m.Home, "ws", "p")
	config := filepath.Join(dir, "agentvm.yaml")
	disk := filepath.Join(m.Home, "disk.qcow2")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "sub"), 0o755),
		os.Mkdir(filepath.Join(m.Home, ".ssh"), 0o700),
		os.WriteFile(filepath.Join(m.Home, ".scribe"), nil, 0o600),
		os.Mkdir(filepath.Join(m.Home, "ws", "data"), 0o755),
		os.WriteFile(config, []byte("image: "+disk+"\n"+project), 0o600),
		exec.Command("qemu-img", "create", "-q", "-f", "qcow2", disk, "8M").Run(),
	); err != nil {
		t.Fatal(err)
	}
	agents, err := agent.Load(fstest.MapFS{"scribe.yaml": {Data: []byte("name: scribe\ndescription: Writes\ncommand: [scribe]\nconfig: [{path: ~/.scribe, secret: true}]\n")}})
	if err != nil {
		t.Fatal(err)
	}
	m.Agents = agents
	m.Images = func() (*images.Cache, error) { return images.Open(filepath.Join(m.Home, "cache")) }
	m.Accel = func(context.Context, *images.Image, *vm.Owner) (vm.Accel, string, error) { return vm.AccelKVM, "", nil }
	m.Hardware = func(_ context.Context, v vm.Machine) (string, error) { return fmt.Sprint(v.CPUs, v.Memory), nil }
	inst = running(t, m, "one", instance.Share{Source: dir})
	p, err := LoadProject(config)
	if err != nil {
		t.Fatal(err)
	}
	ws, err := CheckDirectory(dir, m.Home, false)
	if err != nil {
		t.Fatal(err)
	}
	pl, err := m.plan(t.Context(), p, ws, inst, instance.Spec{}, UpOptions{}, &notes{})
	if err != nil {
		t.Fatal(err)
	}
	spec = pl.spec
	if spec.Hardware, err = m.Hardware(t.Context(), spec.Machine); err != nil {
		t.Fatal(err)
	}
	if err := inst.WriteSpec(spec); err != nil {
		t.Fatal(err)
	}
	if spec, err = inst.Spec(); err != nil {
		t.Fatal(err)
	}
	return m, inst, spec
}

const forkedProject = `version: 1
agent: {use: scribe}
resources: {memory: 512MiB}
workspace: {hide: [.env], protect: [.git/hooks]}
mounts: [{source: ../data, target: /data, readonly: true}, {source: sub, target: /sub}]
network: {allow: [example.org], services: [{name: model.internal, port: 8080, target: "127.0.0.1:9999"}]}
env: {CI: "1"}
`

// TestForkTakesNoRights: the configuration is a file that the guest can write. A
// fork that would be given anything by it is refused before the machine is
// suspended, and nothing is left.
func TestForkTakesNoRights(t *testing.T) {
	for name, tt := range map[string]struct {
		from, to string // what the guest puts for what
		want     string
	}{
		"mount":         {"{source: sub", "{source: ~/.ssh, target: /ssh}, {source: sub", "shares"},
		"other source":  {"source: sub", "source: ~/.ssh", "shares"},
		"writable":      {", readonly: true", "", "shares"},
		"hide":          {"hide: [.env], ", "", "shares"},
		"protect":       {", protect: [.git/hooks]", "", "shares"},
		"wider network": {"example.org", `"*.example.org"`, "network.allow"},
		"more network":  {"[example.org]", "[example.org, example.com]", "network.allow"},
		"service":       {"9999", "22", "network.services"},
		"environment":   {`CI: "1"`, `CI: "2"`, "guest.env"},
		"credentials":   {"{use: scribe}", "{use: scribe, config: credentials}", "guest.copies"},
		"agent":         {"{use: scribe}", "{use: shell}", "agent"},
		"commands":      {"version: 1", "version: 1\nprovision: {run: [make]}", "guest.run"},
		"memory":        {"512MiB", "1GiB", "hardware"},
		"processors":    {"{memory", "{cpus: 7, memory", "machine.cpus"},
		"backend":       {"version: 1", "version: 1\nbackend: libvirt", "backend"},
		"image":         {"disk.qcow2", "gone.qcow2", "image"},
	} {
		t.Run(name, func(t *testing.T) {
			m, inst, spec := forkable(t, forkedProject)
			m.Libvirt = func(context.Context, string, bool) (string, error) { return "qemu:///session", nil }
			before, err := os.ReadFile(spec.Config)
			if err != nil {
				t.Fatal(err)
			}
			after := strings.Replace(string(before), tt.from, tt.to, 1)
			if err := os.WriteFile(spec.Config, []byte(after), 0o600); err != nil || after == string(before) {
				t.Fatal(err, after)
			}
			for _, view := range []bool{false, true} {
				if view && name == "writable" {
					continue // such a fork writes to nothing, whatever it is given
				}
				_, err := m.Fork(t.Context(), inst, 1, view, &notes{}, func() {})
				if !errors.Is(err, vm.ErrUsage) || !strings.Contains(err.Error(), `since "one" started: `) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(vm.Hint(err), "come") {
					t.Errorf("view %v: %v (%s)", view, err, vm.Hint(err))
				}
			}
			if got, _ := os.ReadDir(filepath.Dir(spec.Workspace)); len(got) != 2 {
				t.Errorf("beside the workspace: %v", got)
			}
			if list, err := m.Store.List(); len(list) != 1 {
				t.Errorf("machines: %v, %v", list, err)
			}
			if _, err := os.Lstat(inst.Path(instance.SnapshotsDir)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("snapshots: %v", err)
			}
			if s, err := inst.Status(); s.State != instance.Ready {
				t.Errorf("it is %s, %v", s.State, err)
			}
		})
	}
}

// TestForkPlan: a fork is what the machine is, in a copy of the workspace; what
// is in that copy is looked at again.
func TestForkPlan(t *testing.T) {
	m, inst, spec := forkable(t, forkedProject)
	for _, view := range []bool{false, true} {
		if err := m.checkFork(t.Context(), inst, spec, view, &notes{}); err != nil {
			t.Fatal(err)
		}
	}
	fork, err := m.Store.Create("one-fork-1")
	if err != nil {
		t.Fatal(err)
	}
	dir := spec.Workspace + "-fork-1"
	if err := os.CopyFS(dir, os.DirFS(spec.Workspace)); err != nil {
		t.Fatal(err)
	}
	target := forkTarget{name: fork.Name, dir: dir, config: filepath.Join(dir, "agentvm.yaml")}
	pl, err := m.forkPlan(t.Context(), target, fork, "", spec, &notes{})
	if err != nil {
		t.Fatal(err)
	}
	var sources []string
	for _, s := range pl.spec.Shares {
		sources = append(sources, s.Source)
	}
	if want := []string{dir, filepath.Join(m.Home, "ws", "data"), filepath.Join(dir, "sub")}; !slices.Equal(sources, want) || pl.spec.ID == spec.ID {
		t.Errorf("the fork shares %q as %s", sources, pl.spec.ID)
	}
	view := forkTarget{name: fork.Name, dir: spec.Workspace, config: spec.Config, view: true}
	if pl, err = m.forkPlan(t.Context(), view, fork, "", spec, &notes{}); err != nil {
		t.Fatal(err)
	}
	for _, s := range pl.spec.Shares {
		if !s.ReadOnly {
			t.Errorf("a view can write to %s", s.Source)
		}
	}
	own := spec
	own.ImageID = filepath.Join(spec.Workspace, "disk.qcow2")
	if _, err := m.forkTargets(inst, own, 1, false); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("an image in the workspace: %v", err)
	}
	// A name in the workspace that has become a link out of it.
	sub := filepath.Join(dir, "sub")
	if err := errors.Join(os.Remove(sub), os.Symlink(filepath.Join(m.Home, ".ssh"), sub)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.forkPlan(t.Context(), target, fork, "", spec, &notes{}); !errors.Is(err, vm.ErrUsage) || !strings.HasSuffix(err.Error(), ": shares") {
		t.Errorf("a link: %v", err)
	}
}

// TestForkComparesAll: whatever is in a spec, now or later, is compared, unless
// it is one of these.
func TestForkComparesAll(t *testing.T) {
	_, inst, spec := forkable(t, forkedProject)
	mayDiffer := []string{
		"Format", "Name", "ID", "Created", "Workspace", "View", "Config", "BootTimeout", "RestoreTimeout",
		"Machine.Name", "Machine.UUID", "Machine.Console", "Machine.QMP", "Machine.Line", "Machine.RunAs", "Machine.Saved",
	}
	var alter func(prefix string, v reflect.Value, check func(string))
	alter = func(prefix string, v reflect.Value, check func(string)) {
		for i := range v.NumField() {
			name, f := prefix+v.Type().Field(i).Name, v.Field(i)
			before := reflect.ValueOf(f.Interface())
			switch f.Kind() {
			case reflect.String:
				f.SetString(f.String() + "x")
			case reflect.Int, reflect.Int64:
				f.SetInt(f.Int() + 1)
			case reflect.Bool:
				f.SetBool(!f.Bool())
			case reflect.Slice:
				f.Set(reflect.Append(f, reflect.Zero(f.Type().Elem())))
			case reflect.Map:
				f.Set(reflect.MakeMap(f.Type()))
			case reflect.Pointer:
				if f.IsNil() {
					f.Set(reflect.New(f.Type().Elem()))
				} else {
					f.SetZero()
				}
			case reflect.Struct:
				if name != "Created" {
					alter(name+".", f, check)
				}
				continue
			default:
				t.Fatalf("%s is a %s", name, f.Kind())
			}
			check(name)
			f.Set(before)
		}
	}
	from := spec
	alter("", reflect.ValueOf(&from).Elem(), func(name string) {
		parts, err := differences(asFork(from, spec, inst, Host{UID: os.Getuid()}), spec)
		if err != nil || (len(parts) == 0) != slices.Contains(mayDiffer, name) {
			t.Errorf("%s: %q, %v", name, parts, err)
		}
	})
	from.Shares = slices.Clone(spec.Shares)
	alter("Shares.", reflect.ValueOf(&from.Shares[1]).Elem(), func(name string) {
		if parts, err := differences(asFork(from, spec, inst, Host{UID: os.Getuid()}), spec); err != nil || !slices.Contains(parts, "shares") {
			t.Errorf("%s: %q, %v", name, parts, err)
		}
	})
}
