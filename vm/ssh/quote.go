package ssh

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// maxCommand is the longest command line: sshd hands it to the login shell as
// one argument, and Linux bounds those (MAX_ARG_STRLEN, execve(2)).
const maxCommand = 128<<10 - 1

// commandLine is what the guest's login shell gets to run c. It is empty for
// a plain login shell.
func (c *Command) commandLine() (string, error) {
	line := c.Shell
	switch {
	case len(c.Argv) > 0 && c.Shell != "":
		return "", errors.New("a command has either arguments or a shell line")
	case len(c.Argv) > 0 && c.Argv[0] == "":
		return "", errors.New("a command needs a name")
	case len(c.Argv) > 0:
		// exec makes the command the leader of the session's process group,
		// which is what sshd signals, and its death is seen as it happened.
		line = "exec " + vm.ShellCommand(c.Argv...)
		if strings.HasPrefix(c.Argv[0], "-") {
			line = "exec -- " + vm.ShellCommand(c.Argv...) // not dash's to know
		}
	case c.Dir != "" && c.Shell != "":
		// eval keeps the line's own operators and comments to itself.
		line = "eval " + vm.ShellQuote(" "+c.Shell)
	case c.Dir != "":
		line = `exec "${SHELL:-/bin/sh}" -l`
	}
	if c.Dir != "" {
		dir := c.Dir
		if !path.IsAbs(dir) {
			dir = "./" + dir // neither "-" nor a name for CDPATH
		}
		line = "cd -- " + vm.ShellQuote(dir) + " && " + line
	}
	if strings.ContainsRune(line, 0) {
		return "", errors.New("a command cannot hold a NUL byte")
	}
	if len(line) > maxCommand {
		return "", fmt.Errorf("the command line has %d bytes, more than Linux takes (%d): pass the data on standard input", len(line), maxCommand)
	}
	return line, nil
}
