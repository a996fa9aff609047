package vm

import (
	"os/exec"
	"strings"
	"testing"
)

func TestShellQuote(t *testing.T) {
	for in, want := range map[string]string{
		"":          "''",
		"plain-1.2": "plain-1.2",
		"A=b":       "'A=b'",
		"~":         "'~'",
		"it's":      `'it'\''s'`,
		"a\nb":      "'a\nb'",
	} {
		if got := ShellQuote(in); got != want {
			t.Errorf("ShellQuote(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestShellCommand(t *testing.T) {
	got := ShellCommand("A=b", "-a", "b c", "", "it's", "x,,y=z", "==", "$HOME", "a\nb")
	if want := `'A=b' -a 'b c' '' 'it'\''s' x,,y=z '==' '$HOME' 'a` + "\n" + `b'`; got != want {
		t.Errorf("got %s", got)
	}
}

// Whatever the argument is, a shell sees one word with exactly these bytes.
func FuzzShellCommand(f *testing.F) {
	for _, s := range []string{"", " ", "'", `\`, "''\\'", "a\nb\n", "$(id)`id`${x}", "\xff\xfe", "-n", "*?[", "!x", "#", "~root", "a=b", "=ls", "{a,b}", "\r\t"} {
		f.Add(s, "y")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if strings.ContainsRune(a+b, 0) || len(a)+len(b) > 30_000 {
			return
		}
		for _, shell := range []string{"sh", "bash"} {
			out, err := exec.Command(shell, "-c", ShellCommand("printf", `%s\0`, a, b)).Output()
			if err != nil || string(out) != a+"\x00"+b+"\x00" {
				t.Fatalf("%s: %q, %q became %q, %v", shell, a, b, out, err)
			}
		}
	})
}
