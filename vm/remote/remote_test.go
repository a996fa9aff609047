package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/libvirt"
	"github.com/agentvm/agentvm/vm/mirror"
)

// TestMain makes the test binary, which is what is sent to the other host, do
// there what agentvm does.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == Arg {
		os.Exit(serveTest(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func serveTest(words []string) int {
	dirs, err := instance.FindDirs(os.Getenv, os.Getuid())
	side := Side{Dirs: dirs, Images: func() (*images.Cache, error) { return images.Open(dirs.Images()) }}
	if token, ok := IsRun(words); ok {
		code := 0
		if code, err = side.Run(token, runTest); err == nil {
			return code
		}
	} else if err == nil {
		err = side.Serve(context.Background(), words[0], os.Stdin, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// runTest prints what it was given, or sleeps.
func runTest(r Request) int {
	if r.Args[0] == "sleep" {
		fmt.Println("sleeping")
		time.Sleep(time.Minute)
	}
	var in bytes.Buffer
	_, _ = in.ReadFrom(os.Stdin)
	fmt.Printf("%q %q %s %q", r.Args, r.Env["SECRET"], r.Dir, in.String())
	code := 0
	_, _ = fmt.Sscan(r.Args[0], &code)
	return code
}

// fakeSSH stands for the system's: what it is to run on another host, it runs
// here, with another home. It notes its arguments.
const fakeSSH = `#!/bin/sh
printf '%%s\n' "$(printf %%s "$*" | tr '\n' ' ')" >>%[1]s/said
for a; do
	if [ "$a" = check ] || [ "$a" = exit ]; then exit 255; fi
	last=$a
done
if [ -e %[1]s/broken ]; then echo "ssh: no route to host" >&2; exit 255; fi
exec env -i GORACE=atexit_sleep_ms=0 HOME=%[1]s/home AGENTVM_HOME=%[1]s/home PATH=%[1]s/bin-there:"$PATH" sh -c "$last"
`

// fake is another host that is none.
type fake struct {
	t   *testing.T
	dir string
}

func newFake(t *testing.T) fake {
	t.Helper()
	// Programs lie in it: a file system on which none run will not do.
	dir, err := os.MkdirTemp("", "avmr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := fake{t, dir}
	for _, sub := range []string{"bin", "bin-there", "home", "run"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f.program("bin/ssh", fmt.Sprintf(fakeSSH, dir))
	t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	return f
}

func (f fake) program(name, text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o755); err != nil {
		f.t.Fatal(err)
	}
}

func (f fake) dial() (*Conn, error) {
	return Dial(f.t.Context(), libvirt.Elsewhere{Host: "box", User: "ada", Port: 22}, filepath.Join(f.dir, "run"), false)
}

func (f fake) mustDial() *Conn {
	f.t.Helper()
	c, err := f.dial()
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

func (f fake) said() string {
	data, _ := os.ReadFile(filepath.Join(f.dir, "said"))
	return string(data)
}

// TestProgramIsSent sends the program once, and again when what is there is
// not it.
func TestProgramIsSent(t *testing.T) {
	f := newFake(t)
	f.mustDial()
	found, _ := filepath.Glob(filepath.Join(f.dir, "home/cache/bin/*"))
	if len(found) != 1 {
		t.Fatalf("sent: %q", found)
	}
	fi, err := os.Lstat(found[0])
	if err != nil {
		t.Fatal(err)
	}
	f.mustDial()
	if again, err := os.Lstat(found[0]); err != nil || !os.SameFile(fi, again) {
		t.Errorf("it was sent again: %v", err)
	}
	for name, spoil := range map[string]func() error{
		"tampered": func() error { return os.WriteFile(found[0], []byte("#!/bin/sh\nexit 7\n"), 0o755) },
		"a link": func() error {
			return errors.Join(os.Rename(found[0], found[0]+".real"), os.Symlink(found[0]+".real", found[0]))
		},
		"missing": func() error { return os.Remove(found[0]) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if ok, err := f.mustDial().HasImage(t.Context(), "x"); ok || err != nil {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
		if fi, err := os.Lstat(found[0]); err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
}

func TestHostIsRefused(t *testing.T) {
	for name, tt := range map[string]struct{ uname, says string }{
		"another architecture":  {"case $1 in -m) echo riscv64;; *) echo Linux;; esac", "runs on Linux on " + machines[runtime.GOARCH] + " only"},
		"another system":        {"case $1 in -m) echo " + machines[runtime.GOARCH] + ";; *) echo Plan9;; esac", "box:22 is Plan9"},
		"a shell that chatters": {"echo welcome; echo Linux", "says something else than it was asked"},
		"an error":              {"echo oops >&2; exit 3", "says something else than it was asked"},
	} {
		f := newFake(t)
		f.program("bin-there/uname", "#!/bin/sh\n"+tt.uname+"\n")
		if _, err := f.dial(); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", name, err, tt.says)
		}
		if found, _ := filepath.Glob(filepath.Join(f.dir, "home/cache/bin/*")); len(found) > 0 {
			t.Errorf("%s: sent %q", name, found)
		}
	}
	f := newFake(t)
	f.program("broken", "")
	if _, err := f.dial(); !errors.Is(err, ErrConnection) || !strings.Contains(err.Error(), "no route to host") || vm.Hint(err) != "try: ssh -p 22 -l ada box true" {
		t.Errorf("%v, hint %q", err, vm.Hint(err))
	}
}

// TestSSHIsAsked looks at what ssh is told: nothing that is secret, and nothing
// that weakens the check of the host's key.
func TestSSHIsAsked(t *testing.T) {
	f := newFake(t)
	c := f.mustDial()
	r := Request{Copy: Copy{ID: "0123456789abcdef", Name: "w"}, Args: []string{"42", "an argument", "'"}, Dir: "sub", Env: map[string]string{"SECRET": "hush"}}
	if _, err := Do[scanned](t.Context(), c, look{Copy: r.Copy}, opScan); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	code, err := c.Run(t.Context(), r, Streams{In: strings.NewReader("the input"), Out: &out, Err: os.Stderr})
	if want := `["42" "an argument" "'"] "hush" sub "the input"`; err != nil || code != 42 || out.String() != want {
		t.Errorf("%d, %v, %s", code, err, out.String())
	}
	for line := range strings.Lines(f.said()) {
		if strings.Contains(line, "hush") || strings.Contains(line, "argument") || strings.Contains(line, "StrictHostKeyChecking") || strings.Contains(line, "KnownHosts") {
			t.Errorf("ssh was told %s", line)
		}
		if !strings.Contains(line, " -p 22 -l ada -- box ") || strings.Contains(line, Arg) && !strings.Contains(line, "BatchMode=yes") {
			t.Errorf("ssh was told %s", line)
		}
	}
	left, _ := filepath.Glob(filepath.Join(f.dir, "home/run/*"))
	if len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if code, err = c.Run(t.Context(), Request{Copy: r.Copy, Args: []string{"255"}, Dir: "."}, Streams{In: strings.NewReader(""), Out: &out, Err: os.Stderr}); code != 255 || err != nil {
		t.Errorf("a command that ends with 255: %d, %v", code, err)
	}
}

func TestRequestsAreChecked(t *testing.T) {
	c := newFake(t).mustDial()
	good := Copy{ID: "0123456789abcdef", Name: "w"}
	for name, r := range map[string]Request{
		"an id that is a path": {Copy: Copy{ID: "../../../../x", Name: "w"}, Dir: "."},
		"a name that is one":   {Copy: Copy{ID: good.ID, Name: "../x"}, Dir: "."},
		"a directory outside":  {Copy: good, Dir: "../x"},
		"a variable":           {Copy: good, Dir: ".", Env: map[string]string{"A B": "x"}},
	} {
		if _, err := Do[string](t.Context(), c, r, opPrepare); !errors.Is(err, vm.ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, token := range []string{"", "../x", strings.Repeat("A", 27)} {
		if _, err := Do[*int](t.Context(), c, token, opResult); !errors.Is(err, vm.ErrUsage) {
			t.Errorf("%q: %v", token, err)
		}
	}
	if _, err := Do[int](t.Context(), c, 1, "nonsense"); err == nil || !strings.Contains(err.Error(), "unknown operation") {
		t.Error(err)
	}
	if _, err := Do[[]mirror.Failure](t.Context(), c, transfer{good, []mirror.Change{{Path: "../x"}}}, opChange); err == nil || !strings.Contains(err.Error(), "cannot be changed") {
		t.Error(err)
	}
}

// TestSync is one workspace's life with its copy.
func TestSync(t *testing.T) {
	f := newFake(t)
	c := f.mustDial()
	w := Workspace{Dir: t.TempDir(), State: t.TempDir(), Copy: Copy{ID: "0123456789abcdef", Name: "w"}}
	there := filepath.Join(f.dir, "home/state/remote", w.Copy.ID, w.Copy.Name)
	write := func(dir, name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	holds := func(dir, name, want string) {
		t.Helper()
		if got, err := os.ReadFile(filepath.Join(dir, name)); string(got) != want {
			t.Errorf("%s holds %q (%v), want %q", filepath.Join(dir, name), got, err, want)
		}
	}
	sync := func(keep mirror.Keep) (InStep, error) {
		t.Helper()
		return w.Sync(t.Context(), c, keep)
	}
	write(w.Dir, "a", "one")
	write(w.Dir, "odd\n' \"$x\\/ü", strings.Repeat("content ", 50_000))
	if r, err := sync(""); err != nil || r.Pushed != 3 || r.Pulled != 0 || r.Gone {
		t.Errorf("%+v, %v", r, err)
	}
	holds(there, "odd\n' \"$x\\/ü", strings.Repeat("content ", 50_000))
	write(there, "a", "two")
	write(w.Dir, "b", "mine")
	if r, err := sync(""); err != nil || r.Pushed != 1 || r.Pulled != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	holds(w.Dir, "a", "two")
	holds(there, "b", "mine")
	if r, err := sync(""); err != nil || r.Pushed+r.Pulled != 0 {
		t.Errorf("again: %+v, %v", r, err)
	}
	write(w.Dir, "a", "mine")
	write(there, "a", "theirs")
	write(there, "c", "theirs")
	if _, err := sync(""); !errors.Is(err, ErrConflict) || !strings.HasSuffix(err.Error(), ": a") {
		t.Error(err)
	}
	holds(w.Dir, "a", "mine")
	holds(there, "a", "theirs")
	holds(w.Dir, "c", "theirs")
	if _, err := sync(mirror.KeepHere); err != nil {
		t.Error(err)
	}
	holds(there, "a", "mine")
	w.Guarded = []string{"c"}
	before, _ := os.Stat(filepath.Join(there, "c"))
	write(w.Dir, "c", "guarded")
	if r, err := sync(""); err != nil || r.Pushed != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	holds(there, "c", "guarded")
	if after, err := os.Stat(filepath.Join(there, "c")); err != nil || !os.SameFile(before, after) {
		t.Errorf("a guarded file was replaced: %v", err)
	}
	write(there, "c", "theirs")
	if _, err := sync(mirror.KeepThere); !errors.Is(err, ErrConflict) || !strings.HasSuffix(err.Error(), ": c") {
		t.Error(err)
	}
	holds(w.Dir, "c", "guarded")
	if _, err := sync(mirror.KeepHere); err != nil {
		t.Error(err)
	}
	holds(there, "c", "guarded")
	// A copy that is gone is no deletion, and neither is what is known of it.
	if err := os.RemoveAll(there); err != nil {
		t.Fatal(err)
	}
	if r, err := sync(""); err != nil || !r.Gone || r.Pulled != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	holds(there, "a", "mine")
	// Nor is one that was, though the word of it was lost or it was begun to be deleted.
	again := func(harm func() error) {
		t.Helper()
		if err := harm(); err != nil {
			t.Fatal(err)
		}
		if r, err := sync(""); err != nil || !r.Gone || r.Pulled != 0 {
			t.Errorf("%+v, %v", r, err)
		}
		holds(w.Dir, "b", "mine")
		holds(there, "b", "mine")
	}
	again(func() error {
		_, err := Do[scanned](t.Context(), c, look{Copy: w.Copy}, opScan)
		return errors.Join(os.RemoveAll(filepath.Dir(there)), err)
	})
	again(func() error {
		err := os.RemoveAll(there)
		_, lost := Do[scanned](t.Context(), c, look{Copy: w.Copy}, opScan)
		return errors.Join(err, lost)
	})
	again(func() error {
		return errors.Join(os.Remove(filepath.Join(filepath.Dir(there), madeFile)), os.Remove(filepath.Join(there, "b")))
	})
	if err := unix.Mkfifo(filepath.Join(there, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(there, "b\xff", "theirs")
	if r, err := sync(""); err != nil || len(r.There) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := os.Remove(filepath.Join(w.State, baseFile)); err != nil {
		t.Fatal(err)
	}
	write(there, "a", "theirs")
	if _, err := sync(""); !errors.Is(err, ErrConflict) {
		t.Errorf("without a base: %v", err)
	}
	state := filepath.Join(f.dir, "home/state")
	store := instance.Store{Dirs: instance.Dirs{State: state, Cache: t.TempDir(), Run: t.TempDir()}}
	inst, err := store.Create("m")
	if err == nil {
		err = inst.WriteSpec(instance.Spec{Name: "m", ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: there})
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Forget(t.Context(), w.Copy); !errors.Is(err, vm.ErrUsage) {
		t.Errorf("a copy that a machine has: %v", err)
	}
	if err := inst.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := c.Forget(t.Context(), w.Copy); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Join(f.dir, "home/state/remote")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestConnectionIsLost breaks it under a command.
func TestConnectionIsLost(t *testing.T) {
	f := newFake(t)
	c := f.mustDial()
	w := Copy{ID: "0123456789abcdef", Name: "w"}
	if _, err := Do[scanned](t.Context(), c, look{Copy: w}, opScan); err != nil {
		t.Fatal(err)
	}
	// The second ssh from here on, which runs the command, ends like a lost one.
	f.program("bin/ssh", strings.Replace(fmt.Sprintf(fakeSSH, f.dir), "exec env", `case $last in *" run "*) exit 255;; esac
exec env`, 1))
	_, err := c.Run(t.Context(), Request{Copy: w, Args: []string{"0"}, Dir: "."}, Streams{In: strings.NewReader(""), Out: os.Stdout, Err: os.Stderr})
	if !errors.Is(err, ErrConnection) || !errors.Is(err, ErrLost) {
		t.Error(err)
	}
	f.program("broken", "")
	if _, err := (Workspace{Dir: t.TempDir(), State: t.TempDir(), Copy: w}).Sync(t.Context(), c, ""); !errors.Is(err, ErrConnection) {
		t.Error(err)
	}
}

// TestEnds has a caller that does not want to wait any longer.
func TestEnds(t *testing.T) {
	f := newFake(t)
	c := f.mustDial()
	f.program("bin/ssh", "#!/bin/sh\nexec sleep 60\n")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, err := c.HasImage(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > 10*time.Second {
		t.Errorf("%v after %s", err, time.Since(begun))
	}
}

func TestFrames(t *testing.T) {
	var text string
	for name, data := range map[string][]byte{
		"too long":    {0xff, 0xff, 0xff, 0xff, '"'},
		"cut off":     {0, 0, 0, 9, '"', 'x'},
		"no JSON":     {0, 0, 0, 1, '{'},
		"no length":   {0, 0},
		"another one": append([]byte{0, 0, 0, 2}, "12"...),
	} {
		if err := ReadFrame(bytes.NewReader(data), &text); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	err := ProblemOf(vm.WithHint(vm.Classify(vm.ErrHost, errors.New("a\x1b[2Jb")), "do\x07 it")).Err()
	if !errors.Is(err, vm.ErrHost) || err.Error() != "ab" || vm.Hint(err) != "do it" {
		t.Errorf("%v, %q", err, vm.Hint(err))
	}
}

// TestPrintable: another host does not drive the terminal.
func TestPrintable(t *testing.T) {
	type inner struct{ Text string }
	v := struct {
		Name  string
		List  []inner
		Map   map[string]inner
		Other *inner
		None  *inner
		N     int
		at    time.Time
	}{"a\x1b[2Jb", []inner{{"\x1b]0;x\x07c"}}, map[string]inner{"k": {"d\x07"}}, &inner{"e\r"}, nil, 7, time.Now()}
	Printable(&v)
	if v.Name != "ab" || v.List[0].Text != "c" || v.Map["k"].Text != "d" || v.Other.Text != "e" || v.N != 7 {
		t.Errorf("%+v", v)
	}
}
