package sshd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	home, err := filepath.EvalSymlinks(user.Home)
	if err != nil || !isDirectory(home) {
		home = "/"
	}
	switch filepath.Base(user.Shell) {
	case "bash":
		if slices.ContainsFunc(env, ofBash) || !passes("/etc/bash.bashrc") || !passes(user.Home+"/.bashrc") {
			return nil, errShell
		}
		env = append(env, "SHLVL=0")
	case "sh", "dash": // read nothing before a command
	default:
		return nil, errShell
	}
	dir := home
	if p.Dir != "" {
		if slices.Contains(strings.Split(p.Dir, "/"), "..") {
			return nil, errShell // it keeps to the names by which it came somewhere, if they are there
		}
		if dir = filepath.Clean(p.Dir); !filepath.IsAbs(dir) {
			dir = filepath.Join(home, dir)
		}
		env = append(env, "OLDPWD="+home)
	}
	path, err := find(p.Argv[0], dir, lookup(env, "PATH"))
	if err != nil {
		return nil, err
	}
	return &exec.Cmd{Path: path, Args: p.Argv, Dir: dir, Env: append(env, "PWD="+dir), SysProcAttr: &syscall.SysProcAttr{Setsid: true}}, nil
}

// ofBash says whether a variable means something to bash when it starts.
func ofBash(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return strings.HasPrefix(name, "BASH") ||
		slices.Contains([]string{"OLDPWD", "POSIXLY_CORRECT", "PS1", "PS2", "PWD", "SHELLOPTS", "SHLVL"}, name)
}

// find looks for a program as a POSIX shell does (XCU 2.9.1.4). A path is not
// cleaned, since what is behind its symbolic links decides where .. leads.
func find(name, dir, path string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = dir + "/" + strings.TrimPrefix(name, "./") // as bash's exec has it
		}
		return name, nil // or it does not start
	}
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			return "", errShell
		}
		file := d + "/" + name
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

// maxStartup is how much of a startup file is looked at, in bytes.
const maxStartup = 64 << 10

// passes says whether a shell that is not interactive passes by all that is in
// a startup file. Bash reads it for a command that comes over SSH (its
// manual, "Invoked by remote shell daemon").
func passes(file string) bool {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe waits for nobody
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return false
	}
	text, err := io.ReadAll(io.LimitReader(f, maxStartup))
	if err != nil {
		return false
	}
	open, n := guards, 0
	for line := range strings.SplitSeq(string(text), "\n") {
		// A carriage return is no white space to bash.
		line = strings.Join(strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' }), " ")
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
	return n == 0 && len(text) < maxStartup // there is nothing in it
}
