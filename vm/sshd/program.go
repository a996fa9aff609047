package sshd

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/ssh/wire"
)

// errShell leaves a program to the shell, which knows better, or can say what
// is wrong with it.
var errShell = errors.New("the shell has a say in this")

// program is what a client runs by name and arguments. The user's shell would
// do no more than look for it and execute it, and starting a shell takes
// longer than many a program. So it is not asked, unless it has something to
// read first or the program cannot be found.
func (s *session) program(r *gossh.Request) (*exec.Cmd, error) {
	p, err := wire.ParseProgram(r.Payload)
	if err != nil {
		return nil, err
	}
	user, env := s.c.user, s.environ()
	home := user.Home
	if !isDirectory(home) {
		home = "/"
	}
	switch filepath.Base(user.Shell) {
	case "bash":
		if lookup(env, "BASH_ENV") != "" || !passes("/etc/bash.bashrc") || !passes(filepath.Join(user.Home, ".bashrc")) {
			return nil, errShell
		}
		env = append(env, "SHLVL=0")
	case "sh", "dash": // read nothing before a command
	default:
		return nil, errShell
	}
	dir := home
	if p.Dir != "" {
		if dir = p.Dir; !filepath.IsAbs(dir) {
			dir = filepath.Join(home, dir)
		}
		env = append(env, "OLDPWD="+home)
	}
	dir = filepath.Clean(dir)
	path, err := find(p.Argv[0], dir, lookup(env, "PATH"))
	if err != nil {
		return nil, err
	}
	return &exec.Cmd{Path: path, Args: p.Argv, Dir: dir, Env: append(env, "PWD="+dir), SysProcAttr: &syscall.SysProcAttr{Setsid: true}}, nil
}

// find looks for a program as a POSIX shell does (XCU 2.9.1.4).
func find(name, dir, path string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name) // as bash's exec has it
		}
		return name, nil // or it does not start
	}
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			return "", errShell
		}
		file := filepath.Join(d, name)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && unix.Access(file, unix.X_OK) == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// lookup returns a variable of an environment. Of two with a name the last counts.
func lookup(env []string, name string) (value string) {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			value = v
		}
	}
	return value
}

func isDirectory(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// guards are how a startup file begins that has nothing for a shell which is
// not interactive: Debian's, now and before, and that of its users' own.
var guards = [][]string{
	{`[ -z "${PS1-}" ] && return`},
	{`[ -z "$PS1" ] && return`},
	{`[[ $- != *i* ]] && return`},
	{`case $- in`, `*i*) ;;`, `*) return;;`, `esac`},
}

// passes says whether a shell that is not interactive passes by all that is in
// a startup file. Bash reads it for a command that comes over SSH (its
// manual, "Invoked by remote shell daemon").
func passes(file string) bool {
	f, err := os.Open(file)
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	open := guards
	lines := bufio.NewScanner(f)
	for n := 0; lines.Scan(); {
		line := strings.Join(strings.Fields(lines.Text()), " ")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		var still [][]string
		for _, g := range open {
			switch {
			case g[n] != line:
			case n == len(g)-1:
				return true
			default:
				still = append(still, g)
			}
		}
		if open = still; len(open) == 0 {
			return false
		}
		n++
	}
	return lines.Err() == nil && len(open) == len(guards) // there is nothing in it
}
