package sshd

import (
	"net"
	"os"
	"strings"
)

// localeFile says what language the user's programs speak.
const localeFile = "/etc/default/locale"

// path is where Debian's sshd has users look for programs.
const path = "/usr/local/bin:/usr/bin:/bin:/usr/games"

// environ is a program's: what the client asked for, and what a login sets. Of
// the second, the client decides about PATH and the language.
func (s *session) environ() []string {
	user := s.c.user
	env := []string{"PATH=" + path}
	if file, err := os.ReadFile(localeFile); err == nil {
		env = append(env, assignments(string(file))...)
	}
	env = append(env, s.env...) // of two with a name the last counts
	env = append(env, "USER="+user.Name, "LOGNAME="+user.Name, "HOME="+user.Home, "SHELL="+user.Shell)
	there, here := s.c.conn.RemoteAddr(), s.c.conn.LocalAddr()
	if host, port, err := net.SplitHostPort(there.String()); err == nil {
		if ourHost, ourPort, err := net.SplitHostPort(here.String()); err == nil {
			env = append(env, "SSH_CLIENT="+host+" "+port+" "+ourPort, "SSH_CONNECTION="+strings.Join([]string{host, port, ourHost, ourPort}, " "))
		}
	}
	if s.terminal != nil {
		env = append(env, "TERM="+s.terminal.term, "SSH_TTY="+s.terminal.theirs.Name())
	}
	return env
}

// assignments reads NAME=value, perhaps in quotes, one a line.
func assignments(text string) (env []string) {
	for line := range strings.Lines(text) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && name != "" && !strings.HasPrefix(name, "#") {
			env = append(env, name+"="+strings.Trim(value, `"'`))
		}
	}
	return env
}
