package remote

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Arg is the first argument of a program that another host's agentvm has sent.
const Arg = "remote-side"

// The scripts are for any POSIX shell. Where things lie is as
// instance.FindDirs decides.
const (
	whereScript = `if [ -n "${AGENTVM_HOME:-}" ]; then c=$AGENTVM_HOME/cache
elif [ "$(id -u)" = 0 ]; then c=/var/cache/agentvm
else c=${XDG_CACHE_HOME:-$HOME/.cache}/agentvm; fi
p=$c/bin/agentvm-%[1]s
right() { [ "$(sha256sum <"$1" | cut -d " " -f 1)" = %[1]s ]; }
`
	lookScript = whereScript + `uname -s; uname -m; printf "%%s\n" "$p"
if [ -f "$p" ] && [ ! -L "$p" ] && [ -O "$p" ] && right "$p"; then echo there; else echo missing; fi
`
	// The namespaces of shares have other users, who start this program too;
	// where it lies only root lets others pass.
	sendScript = "set -eu\n" + whereScript + `umask 077; mkdir -p "$c/bin"
if [ "$(id -u)" = 0 ]; then chmod 711 "$c" "$c/bin"; fi
t=$(mktemp "$c/bin/.agentvm-XXXXXXXX"); trap "rm -f \"$t\"" EXIT
cat >"$t"
right "$t" || { echo "it did not arrive whole" >&2; exit 1; }
chmod 755 "$t"; mv -f "$t" "$p"
`
)

// machines are uname's names of the architectures that Go knows by others.
var machines = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// install makes sure that this program is there, byte for byte.
func (c *Conn) install(ctx context.Context) error {
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("read this program: %w", err)
	}
	defer exe.Close()
	h := sha256.New()
	if _, err := io.Copy(h, exe); err != nil {
		return fmt.Errorf("read this program: %w", err)
	}
	digest := hex.EncodeToString(h.Sum(nil))
	there, err := c.look(ctx, digest)
	if err != nil || there {
		return err
	}
	if _, err := exe.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("read this program: %w", err)
	}
	if _, err := c.output(ctx, fmt.Sprintf(sendScript, digest), exe); err != nil {
		return fmt.Errorf("send agentvm to %s: %w", c.host.Address(), err)
	}
	if there, err = c.look(ctx, digest); err == nil && !there {
		err = fmt.Errorf("send agentvm to %s: it is not there", c.host.Address())
	}
	return err
}

// look finds out where the program is to lie, and whether it does.
func (c *Conn) look(ctx context.Context, digest string) (bool, error) {
	out, err := c.output(ctx, fmt.Sprintf(lookScript, digest), nil)
	if err != nil {
		return false, err
	}
	lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(lines) != 4 || !path.IsAbs(lines[2]) {
		return false, vm.WithHint(fmt.Errorf("%s says something else than it was asked: %s", c.host.Address(), clean(out)), "what its shell's start-up files print has to go")
	}
	want := machines[runtime.GOARCH]
	if lines[0] != "Linux" || lines[1] != want {
		return false, vm.Classify(vm.ErrHost, fmt.Errorf("%s is %s on %s, and this program runs on Linux on %s only", c.host.Address(), clean([]byte(lines[0])), clean([]byte(lines[1])), want))
	}
	c.program = lines[2]
	return lines[3] == "there", nil
}

// command is the shell's line that runs this program there.
func (c *Conn) command(words ...string) (string, error) {
	if c.program == "" {
		return "", errors.New("the program is not there yet")
	}
	return "exec " + vm.ShellCommand(append([]string{c.program, Arg}, words...)...), nil
}
