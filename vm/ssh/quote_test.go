package ssh

import (
	"os/exec"
	"strings"
	"testing"
)

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"":          "''",
		"plain-1.2": "plain-1.2",
		"A=b":       "'A=b'",
		"~":         "'~'",
		"it's":      `'it'\''s'`,
		"a\nb":      "'a\nb'",
	} {
		if got := Quote(in); got != want {
			t.Errorf("Quote(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for _, tt := range []struct {
		cmd  Command
		want string
	}{
		{Command{}, ""},
		{Command{Shell: "a | b"}, "a | b"},
		{Command{Argv: []string{"ls", "-l", "a b"}}, "exec ls -l 'a b'"},
		{Command{Argv: []string{"-ls"}}, "exec -- -ls"},
		{Command{Argv: []string{"ls"}, Dir: "/w s"}, "cd -- '/w s' && exec ls"},
		{Command{Shell: "a # b", Dir: "sub"}, "cd -- ./sub && eval ' a # b'"},
		{Command{Dir: "/w"}, `cd -- /w && exec "${SHELL:-/bin/sh}" -l`},
	} {
		if got, err := tt.cmd.commandLine(); err != nil || got != tt.want {
			t.Errorf("got %q, %v, want %q", got, err, tt.want)
		}
	}
}

// Whatever the argument is, a shell sees one word with exactly these bytes.
func FuzzQuote(f *testing.F) {
	for _, s := range []string{"", " ", "'", `\`, "''\\'", "a\nb\n", "$(id)`id`${x}", "\xff\xfe", "-n", "*?[", "!x", "#", "~root", "a=b", "{a,b}", "\r\t"} {
		f.Add(s, "y")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if strings.ContainsRune(a+b, 0) || len(a)+len(b) > 30_000 {
			return
		}
		for _, shell := range []string{"sh", "bash"} {
			out, err := exec.Command(shell, "-c", `printf '%s\0' `+Quote(a)+" "+Quote(b)).Output()
			if err != nil || string(out) != a+"\x00"+b+"\x00" {
				t.Fatalf("%s: %q, %q became %q, %v", shell, a, b, out, err)
			}
		}
	})
}
