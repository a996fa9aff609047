package ssh

import "testing"

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
