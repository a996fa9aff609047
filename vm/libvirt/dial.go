package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/agentvm/agentvm/vm"
)

// daemons are libvirt's servers of QEMU machines: the one for QEMU alone where
// a distribution uses it, and the one for everything.
var daemons = []struct{ program, socket string }{
	{"virtqemud", "virtqemud-sock"},
	{"libvirtd", "libvirt-sock"},
}

// sockets lists where a libvirt may listen, likeliest first.
func (u URI) sockets(getenv func(string) string) []string {
	if u.Socket != "" {
		return []string{u.Socket}
	}
	dir := "/run/libvirt"
	if u.Session {
		dir = sessionDir(getenv)
	}
	var list []string
	for _, d := range daemons {
		list = append(list, filepath.Join(dir, d.socket))
	}
	return list
}

// sessionDir is where a user's libvirt has its sockets
// (https://libvirt.org/daemons.html).
func sessionDir(getenv func(string) string) string {
	if dir := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "libvirt")
	}
	if dir := getenv("XDG_CACHE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "libvirt")
	}
	return filepath.Join(getenv("HOME"), ".cache", "libvirt")
}

// sessionStart bounds the start of a user's libvirt, which probes every
// emulator that is installed.
const sessionStart = 20 * time.Second

// dial connects to the libvirt. A user's own, which comes and goes as it is
// used, is started where it does not run.
func (u URI) dial(ctx context.Context, getenv func(string) string) (net.Conn, error) {
	conn, err := u.dialOnce(ctx, getenv)
	if err == nil || !u.Session || u.Socket != "" || !absent(err) {
		return conn, u.explain(err)
	}
	if err := startSession(getenv); err != nil {
		return nil, u.explain(err)
	}
	bounded, cancel := context.WithTimeout(ctx, sessionStart)
	defer cancel()
	for {
		conn, err := u.dialOnce(bounded, getenv)
		if err == nil || !absent(err) {
			return conn, u.explain(err)
		}
		select {
		case <-bounded.Done():
			return nil, u.explain(err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (u URI) dialOnce(ctx context.Context, getenv func(string) string) (conn net.Conn, err error) {
	for _, path := range u.sockets(getenv) {
		var one error
		if conn, one = (&net.Dialer{}).DialContext(ctx, "unix", path); one == nil {
			return conn, nil
		}
		if err == nil || absent(err) {
			err = one // who is there and refuses says more than who is not
		}
	}
	return nil, err
}

func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

const (
	installLibvirt = "sudo apt-get install libvirt-daemon-system"
	startLibvirt   = "sudo systemctl start libvirtd, after " + installLibvirt + " where there is none"
	joinLibvirt    = "sudo adduser $USER libvirt, then log in again; or use " + SessionURI
)

// explain says what to do about a libvirt that cannot be reached.
func (u URI) explain(err error) error {
	if err == nil {
		return nil
	}
	hint := ""
	switch {
	case errors.Is(err, fs.ErrPermission):
		hint = joinLibvirt
	case absent(err) && u.Session:
		hint = installLibvirt
	case absent(err):
		hint = startLibvirt
	}
	err = vm.Classify(vm.ErrHost, fmt.Errorf("connect to libvirt at %s: %w", u.Text, err))
	if hint == "" {
		return err
	}
	return vm.WithHint(err, hint)
}

// startSession starts the user's own libvirt as libvirt's client does; it ends
// by itself when nobody has used it for two minutes.
func startSession(getenv func(string) string) error {
	program := ""
	for _, d := range daemons {
		for _, dir := range append(filepath.SplitList(getenv("PATH")), "/usr/sbin") {
			path := filepath.Join(dir, d.program)
			if fi, err := os.Stat(path); err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0 && program == "" {
				program = path
			}
		}
	}
	if program == "" {
		return fmt.Errorf("start one: neither virtqemud nor libvirtd is there: %w", fs.ErrNotExist)
	}
	cmd := exec.Command(program, "--timeout=120", "--daemon")
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}
	for _, name := range []string{"HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"} {
		if v := getenv(name); v != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("start %s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	return nil
}
