package ssh

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm/sshd"
	"github.com/agentvm/agentvm/vm/testenv"
)

// ours says that guests have the server of images of our own making, and not
// OpenSSH's, which other images bring.
var ours bool

// TestMain runs all tests with each server. It lets the test binary be one, and
// the proxy command of an OpenSSH client.
func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "ssh-proxy":
		err = Pipe(context.Background(), os.Args[2], os.Stdin, os.Stdout)
	case len(os.Args) == 3 && os.Args[1] == "ssh-server":
		err = serveOne(os.Args[2])
	default:
		code := m.Run()
		ours = true
		os.Exit(max(code, m.Run()))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// serveOne serves the connection that standard input is, for a guest in dir.
func serveOne(dir string) error {
	pem, err := os.ReadFile(filepath.Join(dir, "host_key"))
	if err != nil {
		return err
	}
	key, err := gossh.ParsePrivateKey(pem)
	if err != nil {
		return err
	}
	nc, err := net.FileConn(os.Stdin)
	if err != nil {
		return err
	}
	sshd.DefaultSignals()
	// Nothing but the connection keeps the socket.
	if err := sshd.Forget(os.Stdin, os.Stdout); err != nil {
		return err
	}
	server := sshd.Server{
		User:           sshd.User{Name: "agent", Home: filepath.Join(dir, "home"), Shell: "/bin/bash", Sftp: "/usr/lib/openssh/sftp-server"},
		HostKey:        key,
		AuthorizedKeys: func() ([]byte, error) { return os.ReadFile(filepath.Join(dir, "authorized_keys")) },
	}
	server.ServeConn(nc, nil)
	return nil
}

// guest is a server as the user agent, uid 1000, whoever runs the test: user
// namespaces map the caller to it and give it its own passwd file.
type guest struct {
	t       testing.TB
	dir     string
	home    string
	key     gossh.Signer // the user's
	hostKey gossh.Signer
	script  string

	mu    sync.Mutex
	procs []*exec.Cmd
}

// newGuest prepares a guest; extra lines go into sshd_config first, which is
// OpenSSH's alone.
func newGuest(t testing.TB, extra ...string) *guest {
	t.Helper()
	testenv.Require(t, "/usr/sbin/sshd", "unshare")
	checkLeaks(t)
	dir := t.TempDir()
	g := &guest{t: t, dir: dir, home: filepath.Join(dir, "home")}
	var hostPEM []byte
	g.key, _ = testenv.NewKey(t)
	g.hostKey, hostPEM = testenv.NewKey(t)
	if err := os.Mkdir(g.home, 0o700); err != nil {
		t.Fatal(err)
	}
	config := strings.Join(extra, "\n") + `

HostKey ` + dir + `/host_key
AuthorizedKeysFile ` + dir + `/authorized_keys
StrictModes no
UsePAM no
PidFile none
AcceptEnv *
MaxSessions 1000
AllowStreamLocalForwarding yes
Subsystem sftp internal-sftp
`
	server := `/usr/sbin/sshd -i -E "$0/log" -f "$0/sshd_config"`
	if ours {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		server = `"` + self + `" ssh-server "$0" 2>>"$0/log"`
	}
	script := `d='` + dir + `'
exec unshare --user --map-root-user --mount -- sh -c '
  mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/group" /etc/group &&
  exec unshare --user --map-user=1000 --map-group=1000 -- ` + server + `
' "$d"
`
	g.script = filepath.Join(dir, "sshd.sh")
	for name, content := range map[string]string{
		"host_key":        string(hostPEM),
		"authorized_keys": string(gossh.MarshalAuthorizedKey(g.key.PublicKey())),
		"sshd_config":     config,
		"passwd": "root:x:0:0::/root:/bin/sh\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n" +
			"agent:x:1000:1000::" + g.home + ":/bin/bash\n",
		"group":   "root:x:0:\nagent:x:1000:\n",
		"sshd.sh": script,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("unshare", "--user", "--map-root-user", "--mount", "true").CombinedOutput(); err != nil {
		testenv.Unavailable(t, "needs user namespaces: %v: %s", err, out)
	}
	t.Cleanup(func() {
		g.kill()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("sshd's log:\n%s", log)
		}
	})
	return g
}

// dial starts a server on one end of a socket pair.
func (g *guest) dial(context.Context) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "client"), os.NewFile(uintptr(fds[1]), "server")
	defer ours.Close()
	defer theirs.Close()
	cmd := exec.Command("sh", g.script)
	cmd.Stdin, cmd.Stdout = theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.procs = append(g.procs, cmd)
	g.mu.Unlock()
	return net.FileConn(ours)
}

// kill ends every server: a power cut, as far as clients can see.
func (g *guest) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, cmd := range g.procs {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
	}
	g.procs = nil
}

func (g *guest) config() Config {
	return Config{User: "agent", Key: g.key, HostKey: g.hostKey.PublicKey()}
}

// connect is a connection straight to the guest.
func (g *guest) connect() *Client {
	g.t.Helper()
	c, err := Connect(timeout(g.t, time.Minute), g.dial, g.config())
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// proxy serves the guest on a unix socket.
func (g *guest) proxy(p Proxy) (socket string, up *Client) {
	g.t.Helper()
	up = g.connect()
	p.HostKey = g.hostKey
	p.Upstream = func(context.Context) (*Client, error) { return up, nil }
	dir, err := os.MkdirTemp("", "ssh") // short: sun_path has 108 bytes
	if err != nil {
		g.t.Fatal(err)
	}
	socket = filepath.Join(dir, "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		g.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- p.Serve(ctx, ln) }()
	g.t.Cleanup(func() {
		cancel()
		select {
		case err := <-served:
			if err != nil {
				g.t.Errorf("serve: %v", err)
			}
		case <-time.After(time.Minute):
			g.t.Error("the proxy does not stop")
		}
		os.RemoveAll(dir)
	})
	return socket, up
}

// viaProxy is a connection through a proxy.
func (g *guest) viaProxy() *Client {
	g.t.Helper()
	socket, _ := g.proxy(Proxy{})
	return g.dialProxy(socket)
}

func (g *guest) dialProxy(socket string) *Client {
	g.t.Helper()
	c, err := DialProxy(timeout(g.t, time.Minute), socket, g.hostKey.PublicKey())
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	return c
}

// both runs a test on a direct and on a proxied connection: a proxy that
// works cannot be told from the guest.
func both(t *testing.T, test func(t *testing.T, g *guest, c *Client)) {
	t.Run("direct", func(t *testing.T) {
		g := newGuest(t)
		test(t, g, g.connect())
	})
	t.Run("proxy", func(t *testing.T) {
		g := newGuest(t)
		test(t, g, g.viaProxy())
	})
}

func timeout(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// output runs cmd and returns what it printed.
func output(t testing.TB, c *Client, cmd Command) (stdout, stderr string, status ExitStatus) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	status, err := c.Run(timeout(t, time.Minute), cmd)
	if err != nil {
		t.Fatalf("run %q %q: %v", cmd.Argv, cmd.Shell, err)
	}
	return out.String(), errOut.String(), status
}

// eventually waits until ok holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// checkLeaks fails the test when goroutines of this package or of x/crypto
// stay behind. It is called first, so that its cleanup runs last.
func checkLeaks(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		var left []string
		for range 300 {
			if left = goroutines(); len(left) == 0 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("%d goroutines stay behind:\n%s", len(left), strings.Join(left, "\n\n"))
	})
}

func goroutines() (ours []string) {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "testing.tRunner") || strings.Contains(g, "testing.(*B)") || strings.Contains(g, "TestMain") {
			continue
		}
		if strings.Contains(g, "agentvm/vm/ssh.") || strings.Contains(g, "crypto/ssh.") {
			ours = append(ours, g)
		}
	}
	return ours
}
