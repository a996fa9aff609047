package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/share"
	"github.com/agentvm/agentvm/vm/testenv"
)

func TestMain(m *testing.M) {
	// What the scripts run starts this very program to look at virtiofsd.
	if len(os.Args) > 1 && os.Args[1] == share.InitArg {
		os.Exit(share.InitMain())
	}
	if len(os.Args) > 1 && os.Args[1] == gpu.ReadArg { // and at cards
		os.Exit(gpu.ReadMain(os.Args))
	}
	testenv.KeepLibvirtd()
	testscript.Main(tests{m}, map[string]func(){
		"agentvm": func() { os.Exit(Main(append([]string{"agentvm"}, os.Args[1:]...))) },
	})
}

// tests clears up after all of them.
type tests struct{ *testing.M }

func (t tests) Run() int {
	defer func() { os.RemoveAll(built) }() // it has no name before they run
	return t.M.Run()
}

// TestScripts runs the command line without a machine.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               isolate,
	})
}

// isolate gives a script a home of its own.
func isolate(env *testscript.Env) error {
	home := filepath.Join(env.WorkDir, "home")
	env.Setenv("HOME", home)
	exe, err := exec.LookPath("agentvm") // testscript puts it on PATH
	if err != nil {
		return err
	}
	env.Setenv("EXE", exe)
	env.Setenv("AGENTVM_HOME", filepath.Join(home, "agentvm"))
	dirs, err := instance.FindDirs(env.Getenv, os.Getuid())
	if err != nil {
		return err
	}
	env.Defer(func() { os.RemoveAll(dirs.Run) }) // outside the home, where its path would be too long
	return os.MkdirAll(home, 0o755)
}

// TestDoctorSaysEachThingOnce looks at this host, whatever it lacks.
func TestDoctorSaysEachThingOnce(t *testing.T) {
	home := t.TempDir()
	a := &app{getenv: func(name string) string { return map[string]string{"AGENTVM_HOME": home}[name] }}
	findings, err := a.examine(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range findings {
		if f.Detail == "" || seen[f.Name] {
			t.Errorf("it says nothing, or a second time: %+v", f)
		}
		seen[f.Name] = true
	}
	// Root needs less, so what two parts ask of an ordinary user's host is made up.
	same, other := vm.Finding{Name: "a", Detail: "x"}, vm.Finding{Name: "a", Detail: "y"}
	if diff := cmp.Diff([]vm.Finding{same, other}, distinct([]vm.Finding{same}, nil, []vm.Finding{other, same})); diff != "" {
		t.Error(diff)
	}
}

func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{vm.Classify(vm.ErrUsage, errors.New("x")), 2},
		{errors.New(`unknown command "x" for "agentvm"`), 2},
		{vm.WithHint(vm.Classify(vm.ErrHost, errors.New("x")), "y"), 3},
		{fmt.Errorf("a: %w", vm.ErrNotFound), 4},
		{fmt.Errorf("a: %w", vm.ErrPolicy), 5},
		{fmt.Errorf("a: %w", vm.ErrTimeout), 124},
		{remoteExit(42), 42},
		{connectionError{vm.ErrTimeout}, 255},
		{errInterrupted, 130},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("exitCode(%v) = %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestParseForward(t *testing.T) {
	for _, tt := range []struct{ in, local, remote string }{
		{"8080", "127.0.0.1:8080", "127.0.0.1:8080"},
		{"9000:80", "127.0.0.1:9000", "127.0.0.1:80"},
		{"0:80", "127.0.0.1:0", "127.0.0.1:80"},
		{"0.0.0.0:9000:80", "0.0.0.0:9000", "127.0.0.1:80"},
		{"[::1]:9000:80", "[::1]:9000", "127.0.0.1:80"},
		{"", "", ""}, {"x", "", ""}, {"0", "", ""}, {"1:2:3", "", ""}, {"70000", "", ""}, {"[::1", "", ""}, {"80:", "", ""},
	} {
		local, remote, err := parseForward(tt.in)
		if local != tt.local || remote != tt.remote || (err == nil) != (tt.local != "") {
			t.Errorf("parseForward(%q) = %q, %q, %v", tt.in, local, remote, err)
		}
	}
}

func TestSplitGuestPath(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("web:file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		in, path, name string
		guest          bool
	}{
		{":a", "a", "", true},
		{":", ".", "", true},
		{"web:/a b", "/a b", "web", true},
		{"web:file", "web:file", "", false},
		{"./a:b", "./a:b", "", false},
		{"plain", "plain", "", false},
		{"C:x", "C:x", "", false},
	} {
		path, name, guest := splitGuestPath(tt.in)
		if path != tt.path || name != tt.name || guest != tt.guest {
			t.Errorf("splitGuestPath(%q) = %q, %q, %v", tt.in, path, name, guest)
		}
	}
}
