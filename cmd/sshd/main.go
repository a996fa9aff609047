// Command sshd is the SSH server of guests of our own making: see package sshd.
//
//	sshd [flags] USER
//
// One process, root's, has the host key and the port, and serves nobody. It has
// a worker that runs as the user and serves all connections. On SIGHUP it reads
// the host key again and starts another worker; the one before serves its
// connections to their end. A host key that is a pipe is waited for: that is how
// a guest is saved before it is anybody's.
package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/sshd"
)

func main() {
	listen := flag.String("listen", ":22", "address to listen on")
	hostKey := flag.String("host-key", "/etc/ssh/ssh_host_ed25519_key", "file with the host key")
	pidFile := flag.String("pid-file", "/run/sshd.pid", "written when connections are served")
	shell := flag.String("shell", "", "the user's login shell (default: as in /etc/passwd)")
	keys := flag.String("authorized-keys", "", "file with the keys that may log in (default: the user's own)")
	worker := flag.Bool("worker", false, "serve connections: the port is descriptor 3, the host key comes by standard input")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: sshd [flags] USER")
		os.Exit(2)
	}
	// A write to a standard stream that nobody reads is no reason to end: see
	// package os/signal.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	u := login{name: flag.Arg(0), shell: *shell, keys: *keys}
	run := monitor{u, *listen, *hostKey, *pidFile}.run
	if *worker {
		run = u.serve
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "sshd:", err)
		os.Exit(1)
	}
}

// login is who may log in, and what was said of them instead of what the system
// knows, if anything.
type login struct{ name, shell, keys string }

// user is what programs are started for.
func (l login) user() (u sshd.User, keys string, err error) {
	known, err := user.Lookup(l.name)
	if err != nil {
		return u, "", err
	}
	u = sshd.User{Name: l.name, Home: known.HomeDir, Shell: l.shell, Sftp: "/usr/lib/openssh/sftp-server"}
	if u.Shell == "" {
		u.Shell, err = loginShell(l.name)
	}
	return u, cmp.Or(l.keys, filepath.Join(known.HomeDir, ".ssh/authorized_keys")), err
}

// credential is what they run as.
func (l login) credential() (*syscall.Credential, error) {
	known, err := user.Lookup(l.name)
	if err != nil {
		return nil, err
	}
	groups, err := known.GroupIds()
	if err != nil {
		return nil, err
	}
	var ids []uint32
	for _, text := range append([]string{known.Uid, known.Gid}, groups...) {
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("ids of %s: %w", l.name, err)
		}
		ids = append(ids, uint32(id))
	}
	return &syscall.Credential{Uid: ids[0], Gid: ids[1], Groups: ids[2:]}, nil
}

// loginShell is what package user leaves out.
func loginShell(name string) (string, error) {
	const file = "/etc/passwd"
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Split(strings.TrimSuffix(line, "\n"), ":"); len(f) == 7 && f[0] == name {
			if f[6] == "" {
				return "/bin/sh", nil
			}
			return f[6], nil
		}
	}
	return "", fmt.Errorf("%s is not in %s", name, file)
}
