package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestValidName(t *testing.T) {
	for _, name := range []string{"a", "web", "web-2", "x9", strings.Repeat("a", maxName)} {
		if err := ValidName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "Web", "2web", "-web", "web-", "a_b", "a.b", "a/b", "..", "a b", "ä", "a\n", strings.Repeat("a", maxName+1)} {
		if ValidName(name) == nil {
			t.Errorf("%q is accepted", name)
		}
	}
}

func TestNameFor(t *testing.T) {
	for workspace, want := range map[string]string{
		"/home/ada/web":        "web",
		"/home/ada/My Shop!":   "my-shop",
		"/home/ada/2048":       "vm-2048",
		"/home/ada/größe":      "gr-e",
		"/home/ada/日本":         "vm",
		"/home/ada/a, 'b'\n c": "a-b-c",
		"/":                    "vm",
	} {
		if got := NameFor(workspace); got != want {
			t.Errorf("%q: %q, want %q", workspace, got, want)
		}
	}
}

func FuzzNameFor(f *testing.F) {
	f.Add("/home/ada/--a--" + strings.Repeat("-b", 40))
	f.Fuzz(func(t *testing.T, workspace string) {
		name := NameFor(workspace)
		if err := ValidName(name); err != nil {
			t.Errorf("%q: %v", workspace, err)
		}
		if err := ValidName(name + "-999"); err != nil { // room for a number
			t.Errorf("%q: %v", workspace, err)
		}
	})
}

func TestValidVariable(t *testing.T) {
	for name, want := range map[string]bool{"A": true, "_a1": true, "": false, "1A": false, "A-B": false, "A=B": false, "A B": false, "Ä": false} {
		if ValidVariable(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}

func TestNearest(t *testing.T) {
	words := []string{"debian-12", "debian-13", "shell"}
	for word, want := range map[string]string{"debain-13": "debian-13", "Shel": "shell", "unrelated-thing": "", "": ""} {
		if got := Nearest(word, words); got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
}

func TestErrors(t *testing.T) {
	base := errors.New("no such file")
	err := fmt.Errorf("open: %w", WithHint(Classify(ErrHost, base), "install it"))
	if err.Error() != "open: no such file" || Hint(err) != "install it" {
		t.Errorf("%v, hint %q", err, Hint(err))
	}
	if !errors.Is(err, ErrHost) || !errors.Is(err, base) || errors.Is(err, ErrUsage) {
		t.Error("the classes are wrong")
	}
	if WithHint(nil, "x") != nil || Classify(ErrHost, nil) != nil || Hint(base) != "" {
		t.Error("something was made of nothing")
	}
}

func TestProcID(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	id, err := ProcessID(cmd.Process.Pid)
	if err != nil || !id.Alive() {
		t.Fatalf("%v, %v", id, err)
	}
	// The number was reused: what runs under it now is somebody else.
	stranger := ProcID{PID: id.PID, Start: id.Start + 1}
	if stranger.Alive() {
		t.Error("a reused number is taken for the process")
	}
	if err := stranger.Kill(); err != nil || !id.Alive() {
		t.Errorf("killing a process that is gone: %v, and the other lives: %v", err, id.Alive())
	}
	if err := id.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
	if id.Alive() {
		t.Error("it survives its end")
	}
	if err := id.Kill(); err != nil {
		t.Errorf("killing it again: %v", err)
	}
	if (ProcID{}).Alive() || (ProcID{}).Kill() != nil {
		t.Error("no process is one")
	}
	if self, err := ProcessID(os.Getpid()); err != nil || !self.Alive() {
		t.Errorf("this process: %v, %v", self, err)
	}
}
