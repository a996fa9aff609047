package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

// openSSH renders the configuration by which OpenSSH's clients use the proxy,
// in a directory with an unpleasant name.
func (g *guest) openSSH(socket string) (config string) {
	g.t.Helper()
	testenv.Require(g.t, "ssh")
	dir := filepath.Join(g.dir, `it's 100% "odd"`)
	if err := os.Mkdir(dir, 0o700); err != nil {
		g.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		g.t.Fatal(err)
	}
	h := OpenSSHHost{Alias: "vm1", User: "agent", Proxy: []string{self, "ssh-proxy", socket}, KnownHosts: filepath.Join(dir, "known hosts")}
	text, err := h.Config()
	if err != nil {
		g.t.Fatal(err)
	}
	config = filepath.Join(g.dir, "ssh_config")
	for name, content := range map[string]string{h.KnownHosts: h.KnownHostsLine(g.hostKey.PublicKey()), config: text} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			g.t.Fatal(err)
		}
	}
	return config
}

// command runs a host program and returns its standard output.
func (g *guest) command(stdin string, argv ...string) string {
	g.t.Helper()
	cmd := exec.CommandContext(timeout(g.t, time.Minute), argv[0], argv[1:]...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := cmd.Run(); err != nil {
		g.t.Fatalf("%q: %v\n%s", argv, err, errOut.String())
	}
	return out.String()
}

func TestProxyServesOpenSSH(t *testing.T) {
	g := newGuest(t)
	socket, _ := g.proxy(Proxy{})
	config := g.openSSH(socket)

	if got := g.command("data", "ssh", "-F", config, "vm1", "cat; whoami"); got != "dataagent\n" {
		t.Errorf("got %q", got)
	}
	err := exec.Command("ssh", "-F", config, "vm1", "exit 42").Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Errorf("exit code: %v", err)
	}
	if got := g.command("", "ssh", "-tt", "-F", config, "vm1", "tty"); !strings.HasPrefix(got, "/dev/pts/") {
		t.Errorf("terminal: got %q", got)
	}
	big := strings.Repeat("0123456789abcde\n", 1<<18)
	if got := g.command(big, "ssh", "-F", config, "vm1", "cat"); got != big {
		t.Errorf("4 MiB through cat: %d bytes came back", len(got))
	}
	// The connection of one client says "no more sessions"; the next one still works.
	if got := g.command("", "ssh", "-F", config, "vm1", "echo again"); got != "again\n" {
		t.Errorf("got %q", got)
	}
}

func TestProxyServesCopyTools(t *testing.T) {
	testenv.Require(t, "scp", "rsync", "git")
	g := newGuest(t)
	socket, _ := g.proxy(Proxy{})
	config := g.openSSH(socket)
	src := filepath.Join(g.dir, "src file")
	content := strings.Repeat("content", 100_000)
	if err := os.WriteFile(src, []byte(content), 0o640); err != nil {
		t.Fatal(err)
	}
	same := func(name string) {
		t.Helper()
		if got, err := os.ReadFile(name); err != nil || string(got) != content {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}

	g.command("", "scp", "-q", "-F", config, src, "vm1:by scp")
	same(filepath.Join(g.home, "by scp"))
	g.command("", "scp", "-q", "-F", config, "vm1:by scp", filepath.Join(g.dir, "back"))
	same(filepath.Join(g.dir, "back"))
	g.command("", "scp", "-O", "-q", "-F", config, src, "vm1:by-old-scp")
	same(filepath.Join(g.home, "by-old-scp"))
	g.command("put '"+src+"' by-sftp\n", "sftp", "-q", "-b", "-", "-F", config, "vm1")
	same(filepath.Join(g.home, "by-sftp"))
	g.command("", "rsync", "-a", "-e", "ssh -F "+config, src, "vm1:by-rsync")
	same(filepath.Join(g.home, "by-rsync"))

	repo := filepath.Join(g.dir, "repo")
	git := func(args ...string) {
		t.Helper()
		g.command("", append([]string{"git", "-c", "core.sshCommand=ssh -F " + config, "-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"}, args...)...)
	}
	git("init", "-q", repo)
	git("-C", repo, "commit", "-q", "--allow-empty", "-m", "first")
	g.command("", "ssh", "-F", config, "vm1", "git init -q --bare bare.git")
	git("-C", repo, "push", "-q", "vm1:bare.git", "HEAD:refs/heads/main")
	git("clone", "-q", "vm1:bare.git", filepath.Join(g.dir, "clone"))
}

func TestProxyRefusesAgentForwarding(t *testing.T) {
	g := newGuest(t)
	socket, _ := g.proxy(Proxy{})
	c := g.dialProxy(socket)
	ch, reqs, err := c.conn.OpenChannel(sessionChannel, nil)
	if err != nil {
		t.Fatal(err)
	}
	go gossh.DiscardRequests(reqs)
	defer ch.Close()
	for _, request := range []string{"auth-agent-req@openssh.com", "x11-req"} {
		if ok, err := ch.SendRequest(request, true, nil); ok || err != nil {
			t.Errorf("%s: %v, %v", request, ok, err)
		}
	}
	if _, _, err := c.conn.OpenChannel("x11", nil); err == nil {
		t.Error("an x11 channel was opened")
	}
	if !errors.Is(AllowChannel(authAgent), vm.ErrPolicy) {
		t.Error("not a refusal by policy")
	}
}

func TestProxyForwardsAgentWhenAllowed(t *testing.T) {
	testenv.Require(t, "ssh-agent", "ssh-add")
	if ours { // which forwards none: agentvm does not allow it
		return
	}
	g := newGuest(t, "AllowAgentForwarding yes")
	socket, _ := g.proxy(Proxy{Allow: func(string) error { return nil }})
	config := g.openSSH(socket)
	out := g.command("", "ssh-agent", "sh", "-c",
		fmt.Sprintf("ssh-keygen -q -t ed25519 -N '' -C lent -f '%s/lent' && ssh-add -q '%s/lent' && ssh -A -F '%s' vm1 ssh-add -l", g.dir, g.dir, config))
	if !strings.Contains(out, "lent") {
		t.Errorf("got %q", out)
	}
}

func TestProxyHangsUpWhenAClientDies(t *testing.T) {
	g := newGuest(t)
	socket, _ := g.proxy(Proxy{})
	c := g.dialProxy(socket)
	go c.Run(context.Background(), Command{Argv: []string{"sleep", "4713"}})
	eventually(t, "it runs", func() bool { return len(findProcess("sleep 4713")) == 1 })
	c.conn.Close()
	g.gone("sleep 4713")
	if out, _, _ := output(t, g.dialProxy(socket), Command{Argv: []string{"echo", "others live"}}); out != "others live\n" {
		t.Errorf("got %q", out)
	}
}

func TestProxyEndsClientsWithTheGuest(t *testing.T) {
	g := newGuest(t)
	socket, up := g.proxy(Proxy{})
	var all sync.WaitGroup
	for range 10 {
		c := g.dialProxy(socket)
		all.Go(func() {
			_, err := c.Run(timeout(t, time.Minute), Command{Argv: []string{"sleep", "4714"}})
			if !errors.Is(err, ErrConnection) {
				t.Errorf("got %v", err)
			}
			<-c.Done()
		})
	}
	eventually(t, "all run", func() bool { return len(findProcess("sleep 4714")) == 10 })
	g.kill()
	all.Wait()
	if err := up.Err(); !errors.Is(err, ErrConnection) {
		t.Errorf("upstream: %v", err)
	}
	for _, p := range findProcess("sleep 4714") {
		var pid int
		fmt.Sscanf(p, "/proc/%d/", &pid)
		proc, _ := os.FindProcess(pid)
		proc.Kill()
	}
}

func TestProxyWithoutGuest(t *testing.T) {
	checkLeaks(t)
	key, _ := testenv.NewKey(t)
	p := Proxy{HostKey: key, Upstream: func(context.Context) (*Client, error) { return nil, errors.New("it still boots") }}
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var served sync.WaitGroup
	served.Go(func() { p.Serve(ctx, ln) })
	defer served.Wait()
	defer cancel()
	c, err := DialProxy(ctx, ln.Addr().String(), key.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Run(ctx, Command{Argv: []string{"true"}}); err == nil || !strings.Contains(err.Error(), "it still boots") {
		t.Errorf("got %v", err)
	}
}

// A client that reads nothing must not slow another one down.
func TestProxyKeepsClientsApart(t *testing.T) {
	g := newGuest(t)
	socket, _ := g.proxy(Proxy{})
	stuck := g.dialProxy(socket)
	r, w := io.Pipe()
	go stuck.Run(context.Background(), Command{Argv: []string{"cat", "/dev/zero"}, Stdout: w})
	io.ReadFull(r, make([]byte, 1<<20))
	time.Sleep(200 * time.Millisecond)
	for range 20 {
		if out, _, _ := output(t, g.dialProxy(socket), Command{Argv: []string{"head", "-c", "1000000", "/dev/zero"}}); len(out) != 1000000 {
			t.Errorf("got %d bytes", len(out))
		}
	}
	r.Close()
}

func TestPeerAllowed(t *testing.T) {
	for _, tt := range []struct {
		peer, self int
		want       bool
	}{{1000, 1000, true}, {0, 1000, true}, {1001, 1000, false}, {1000, 0, false}, {0, 0, true}} {
		if peerAllowed(tt.peer, tt.self) != tt.want {
			t.Errorf("peer %d, self %d", tt.peer, tt.self)
		}
	}
}

// The socket's mode is the first lock. This is the second.
func TestProxyRefusesOtherUsers(t *testing.T) {
	testenv.RequireRoot(t)
	g := newGuest(t)
	socket, _ := g.proxy(Proxy{})
	for _, p := range []string{filepath.Dir(socket), socket} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	said := make(chan []byte)
	go func() {
		// Another uid for this one thread, which ends with the goroutine.
		runtime.LockOSThread()
		defer close(said)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); errno != 0 {
			t.Error(errno)
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
			t.Error(err)
			return
		}
		buf := make([]byte, 256)
		n, _ := unix.Read(fd, buf)
		said <- buf[:max(n, 0)]
	}()
	if banner := <-said; len(banner) > 0 {
		t.Errorf("the proxy talks to uid 65534: %q", banner)
	}
	output(t, g.dialProxy(socket), Command{Argv: []string{"true"}})
}
