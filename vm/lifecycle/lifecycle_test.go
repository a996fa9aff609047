package lifecycle

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/testenv"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func parse(t *testing.T, text string) config.Config {
	t.Helper()
	c, err := config.Parse("agentvm.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func profile(t *testing.T, name string) agent.Profile {
	t.Helper()
	set, err := agent.Load()
	if err != nil {
		t.Fatal(err)
	}
	p, err := set.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestResolveGolden(t *testing.T) {
	base := Inputs{
		Name: "web", ID: "01234567-89ab-cdef-0123-456789abcdef", Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Workspace: Directory{Path: "/home/ada/web", Owner: vm.Owner{UID: 1001, GID: 1002}},
		Image:     &images.Image{ID: "debian-13-0123", Dir: "/cache/debian-13-0123", Manifest: images.Manifest{Cmdline: "root=/dev/vda quiet"}},
		Host:      Host{UID: 1001, GID: 1002, Home: "/home/ada", Accel: vm.AccelKVM},
		Dir:       "/state/instances/web", Run: "/run/user/1001/agentvm/01234567",
	}
	for _, tt := range []struct {
		name  string
		alter func(*Inputs)
	}{
		{"defaults", func(in *Inputs) {
			in.Project = Project{Dir: "/home/ada/web", Config: config.Default()}
			in.Profile = profile(t, "shell")
		}},
		{"everything", func(in *Inputs) {
			in.Project = Project{Dir: "/home/ada/web", ConfigPath: "/home/ada/web/agentvm.yaml", Config: parse(t, `
version: 1
resources: {cpus: 8, memory: 16GiB, disk: 50GiB}
agent: {use: pi, config: credentials}
workspace: {mount: /src, readonly: true, protect: [.git/hooks], hide: [.env]}
mounts:
  - {source: ~/data, target: ~/data, readonly: true}
  - {source: /opt/models, target: /models/}
provision: {run: [make setup]}
network:
  allow: ["*.example.org:443", api.openai.com]
  services: [{name: model.internal, port: 8080, target: "127.0.0.1:9999"}]
env: {CI: "1", PI_OFFLINE: "0"}
`)}
			in.Mounts = []Directory{{Path: "/home/ada/data", Owner: vm.Owner{UID: 1001, GID: 1002}}, {Path: "/opt/models"}}
			in.Profile = profile(t, "pi")
			in.Host.AgentConfig = []string{"~/.pi/agent/settings.json"}
			in.Host.Accel = vm.AccelTCG
		}},
		{"root", func(in *Inputs) {
			in.Project = Project{Dir: "/home/ada/web", Config: config.Default()}
			in.Profile = profile(t, "shell")
			in.Host.UID, in.Host.GID = 0, 0
		}},
		{"libvirt", func(in *Inputs) {
			in.Project = Project{Dir: "/home/ada/web", Config: parse(t, "version: 1\nbackend: libvirt\nuri: qemu:///system\n")}
			in.Profile = profile(t, "shell")
		}},
		{"firmware", func(in *Inputs) {
			in.Project = Project{Dir: "/home/ada/web", Config: parse(t, "version: 1\nimage: ./disk.qcow2\nfirmware: uefi\n")}
			in.Profile = profile(t, "shell")
			in.Image = &images.Image{ID: "/home/ada/web/disk.qcow2"}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := base
			tt.alter(&in)
			got, err := json.MarshalIndent(Resolve(in), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", tt.name+".json")
			if *update {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.TrimSpace(string(want)), string(got)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEachInstanceOfRootHasItsOwnUser(t *testing.T) {
	h := Host{UID: 0}
	a, b := h.runAs("01234567-89ab-cdef-0123-456789abcdef"), h.runAs("11234567-89ab-cdef-0123-456789abcdef")
	if a.UID < vmUserBase || a.UID >= vmUserBase+vmUserCount || a.UID == b.UID || a.UID != a.GID {
		t.Errorf("%v and %v", a, b)
	}
	if (Host{UID: 7}).runAs("01234567-89ab-cdef-0123-456789abcdef") != nil {
		t.Error("an ordinary user's machine runs as somebody else")
	}
}

func TestCheckDirectory(t *testing.T) {
	home := filepath.Join(t.TempDir(), "home")
	odd := filepath.Join(home, "a, 'b\" \n ü "+strings.Repeat("x", 200))
	file := filepath.Join(home, "file")
	if err := os.MkdirAll(odd, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(home, "link")
	if err := os.Symlink(home, link); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, err string }{
		{"odd name", odd, ""},
		{"missing", filepath.Join(home, "nope"), "does not exist"},
		{"file", file, "is a file"},
		{"root", "/", "whole host"},
		{"home", home, "your home directory"},
		{"above home", filepath.Dir(home), "your home directory"},
		{"link to home", link, "your home directory"},
		{"not UTF-8", filepath.Join(home, "\xff"), "not valid UTF-8"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := CheckDirectory(tt.path, home, false)
			if tt.err == "" {
				if err != nil || d.Owner.UID != os.Getuid() || d.Path != odd {
					t.Errorf("%+v, %v", d, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.err) || !errors.Is(err, vm.ErrUsage) || vm.Hint(err) == "" {
				t.Errorf("error %v, hint %q", err, vm.Hint(err))
			}
		})
	}
	if _, err := CheckDirectory(home, home, true); err != nil {
		t.Errorf("told to, and refused: %v", err)
	}
}

func TestFindProject(t *testing.T) {
	home := t.TempDir()
	deep := filepath.Join(home, "p", "src", "deep")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	p, err := FindProject(deep, home)
	if err != nil || p.Dir != deep || p.ConfigPath != "" {
		t.Errorf("without a file: %+v, %v", p, err)
	}
	path := filepath.Join(home, "p", config.FileName)
	if err := os.WriteFile(path, []byte("version: 1\nworkspace: {path: src}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p, err = FindProject(deep, home)
	if err != nil || p.ConfigPath != path || p.Workspace() != filepath.Join(home, "p", "src") {
		t.Errorf("from below: %+v, %v", p, err)
	}
	if err := os.WriteFile(path, []byte("version: 1\nnope: 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := FindProject(deep, home); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("a broken file was passed over: %v", err)
	}
}

func testManager(t *testing.T) *Manager {
	t.Helper()
	home := t.TempDir()
	return &Manager{Store: instance.Store{Dirs: instance.Dirs{State: filepath.Join(home, "s"), Cache: filepath.Join(home, "c"), Run: filepath.Join(home, "r")}}}
}

func TestClaimNames(t *testing.T) {
	m := testManager(t)
	claim := func(path string, opt UpOptions) (string, bool, error) {
		p := Project{Config: config.Default()}
		i, created, err := m.claim(p, Directory{Path: path}, opt)
		if err != nil {
			return "", false, err
		}
		if created {
			if err := i.WriteSpec(instance.Spec{Name: i.Name, ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: path}); err != nil {
				t.Fatal(err)
			}
		}
		return i.Name, created, nil
	}
	for _, tt := range []struct {
		path    string
		opt     UpOptions
		name    string
		created bool
	}{
		{"/a/api", UpOptions{}, "api", true},
		{"/a/api", UpOptions{}, "api", false},
		{"/b/api", UpOptions{}, "api-2", true},
		{"/c/My Project!", UpOptions{}, "my-project", true},
		{"/c/42", UpOptions{}, "vm-42", true},
		{"/c/日本", UpOptions{}, "vm", true},
		{"/d", UpOptions{Name: "mine"}, "mine", true},
	} {
		name, created, err := claim(tt.path, tt.opt)
		if err != nil || name != tt.name || created != tt.created {
			t.Errorf("%s: %q, %v, %v", tt.path, name, created, err)
		}
	}
	if _, _, err := claim("/elsewhere", UpOptions{Name: "mine"}); !errors.Is(err, vm.ErrUsage) || !strings.Contains(err.Error(), "taken by the machine of /d") {
		t.Errorf("name clash: %v", err)
	}
	if _, _, err := claim("/x", UpOptions{Name: "Bad Name"}); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("bad name: %v", err)
	}
	if _, _, err := claim("/a/api", UpOptions{Name: "second"}); err != nil {
		t.Errorf("second machine of a workspace: %v", err)
	}
	if _, _, err := claim("/a/api", UpOptions{}); err == nil || !strings.Contains(vm.Hint(err), "--name") {
		t.Errorf("ambiguous: %v", err)
	}
	// One of a newer version may be this workspace's: no second is made beside it.
	newer, err := m.Store.Create("newer")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(newer.Path("instance.json"), []byte(`{"format": 99}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := claim("/a/newer", UpOptions{}); !errors.Is(err, vm.ErrHost) {
		t.Errorf("unreadable: %v", err)
	}
}

func TestNotEnoughMemory(t *testing.T) {
	if err := checkMemory(1 << 50); !errors.Is(err, vm.ErrHost) || !strings.Contains(vm.Hint(err), "resources.memory") {
		t.Errorf("got %v", err)
	}
	if err := checkMemory(1 << 20); err != nil {
		t.Error(err)
	}
}

func TestImageSpec(t *testing.T) {
	p := Project{Dir: "/p", Config: parse(t, "version: 1\nprovision: {packages: [ripgrep], npm: [\"@scope/tool@1.2.3\"], driver: nvidia, accept: [nvidia]}\n")}
	s := ImageSpec(p, "/home/ada", profile(t, "pi"))
	if s.Driver != "nvidia" || !slices.Equal(s.Accept, []string{"nvidia"}) {
		t.Errorf("%+v", s)
	}
	if s.Image != "debian-13" || s.Packages[0] != "ripgrep" || len(s.NPM) != 2 || s.NPM[1] != (images.NPMPackage{Name: "@scope/tool", Version: "1.2.3"}) || s.Node != "" {
		t.Errorf("%+v", s)
	}
	p.Config.Image = "debian-12" // whose Node.js is too old for it
	if s := ImageSpec(p, "/home/ada", profile(t, "pi")); s.Node != agent.NewerNode {
		t.Errorf("%+v", s)
	}
	p.Config.Image = "./disk.qcow2"
	if s := ImageSpec(p, "/home/ada", profile(t, "shell")); s.Image != "/p/disk.qcow2" {
		t.Errorf("%+v", s)
	}
}

func TestSupervisorEnvironment(t *testing.T) {
	got := supervisorEnv([]string{"PATH=/bin", "OPENAI_API_KEY=x", "LC_ALL=C", "https_proxy=http://p", "XDG_RUNTIME_DIR=/r", "HOMEX=y"})
	if diff := cmp.Diff([]string{"PATH=/bin", "LC_ALL=C", "https_proxy=http://p", "XDG_RUNTIME_DIR=/r"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestCloseOnExec(t *testing.T) {
	inherited, err := syscall.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(inherited)
	if err := closeOnExec(); err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(inherited), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
}

// TestImageOfDiskFile finds the disk file below an instance again, also when
// the project has come to name another.
func TestImageOfDiskFile(t *testing.T) {
	testenv.Require(t, "qemu-img")
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &Manager{Images: func() (*images.Cache, error) { return images.Open(filepath.Join(dir, "cache")) }}
	for _, tt := range []struct {
		image string
		notes int
	}{{"./disk.img", 0}, {"debian-13", 1}, {"./gone.img", 1}} {
		var r notes
		p := Project{Dir: dir, Config: parse(t, "version: 1\nimage: "+tt.image+"\n")}
		img, err := m.image(t.Context(), p, profile(t, "shell"), instance.Spec{ImageID: disk}, UpOptions{}, &r)
		if err != nil {
			t.Fatalf("%s: %v", tt.image, err)
		}
		if img.ID != disk || len(r.said) != tt.notes {
			t.Errorf("%s: image %s, notes %q", tt.image, img.ID, r.said)
		}
	}
}

// notes is a Report that keeps what the user should read.
type notes struct {
	images.Progress
	said []string
}

func (n *notes) Note(format string, args ...any) {
	n.said = append(n.said, fmt.Sprintf(format, args...))
}
func (n *notes) State(instance.Status) {}
