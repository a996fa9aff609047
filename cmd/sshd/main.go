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
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

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
	account, err := lookUp(flag.Arg(0), *shell, *keys)
	if err == nil && *worker {
		err = serve(account.User)
	} else if err == nil {
		err = monitor{account, *listen, *hostKey, *pidFile}.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sshd:", err)
		os.Exit(1)
	}
}

// account is a user of this system.
type account struct {
	sshd.User
	credential syscall.Credential
}

func lookUp(name, shell, keys string) (account, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return account{}, err
	}
	a := account{User: sshd.User{
		Name: name, Home: u.HomeDir, Shell: shell,
		AuthorizedKeys: cmp.Or(keys, filepath.Join(u.HomeDir, ".ssh/authorized_keys")),
		Sftp:           "/usr/lib/openssh/sftp-server",
	}}
	groups, err := u.GroupIds()
	if err != nil {
		return account{}, err
	}
	ids := []*uint32{&a.credential.Uid, &a.credential.Gid}
	for i, text := range append([]string{u.Uid, u.Gid}, groups...) {
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return account{}, fmt.Errorf("ids of %s: %w", name, err)
		}
		if i < len(ids) {
			*ids[i] = uint32(id)
		} else {
			a.credential.Groups = append(a.credential.Groups, uint32(id))
		}
	}
	if a.Shell == "" {
		a.Shell, err = loginShell(name)
	}
	return a, err
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
