package ssh

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/testenv"
)

func TestConfig(t *testing.T) {
	got, err := OpenSSHHost{Alias: "demo", User: "agent", Proxy: []string{"/usr/bin/agentvm", "ssh-proxy", "demo"}, KnownHosts: "/run/x/known_hosts"}.Config()
	if err != nil {
		t.Fatal(err)
	}
	want := `Host demo
  HostName demo
  User agent
  ProxyCommand /usr/bin/agentvm ssh-proxy demo
  HostKeyAlias demo
  UserKnownHostsFile "/run/x/known_hosts"
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  UpdateHostKeys no
  CheckHostIP no
  IdentitiesOnly yes
  ForwardAgent no
  ForwardX11 no
  Compression no
  ServerAliveInterval 30
`
	if got != want {
		t.Errorf("got\n%s", got)
	}
}

// OpenSSH itself, and then a shell, must read back what was meant.
func TestConfigRoundTrip(t *testing.T) {
	testenv.Require(t, "ssh")
	for _, odd := range []string{"plain", "with space", "it's", `say "hi"`, "100%h", "a#b", `back\slash`, "$HOME", "`id`", "tab\there", "ünïcode", "a,b=c;d&e|f", "trailing "} {
		t.Run(odd, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), odd)
			h := OpenSSHHost{Alias: "demo", User: "agent", Proxy: []string{"printf", "%s|", dir, "x y"}, KnownHosts: dir}
			text, err := h.Config()
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "config")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("ssh", "-G", "-F", file, "demo").CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s\n%s", err, out, text)
			}
			options := make(map[string]string)
			for line := range strings.Lines(string(out)) {
				name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
				options[name] = value
			}
			// ssh -G shows the file name unexpanded, and the command too.
			if got := strings.ReplaceAll(options["userknownhostsfile"], "%%", "%"); got != dir {
				t.Errorf("known hosts: got %q", got)
			}
			proxy := strings.ReplaceAll(options["proxycommand"], "%%", "%")
			said, err := exec.Command("sh", "-c", proxy).Output()
			if want := dir + "|x y|"; err != nil || string(said) != want {
				t.Errorf("proxy command %s: got %q, %v", proxy, said, err)
			}
		})
	}
}

func TestConfigRejects(t *testing.T) {
	ok := OpenSSHHost{Alias: "demo", User: "agent", Proxy: []string{"a"}, KnownHosts: "/k"}
	for _, change := range []func(*OpenSSHHost){
		func(h *OpenSSHHost) { h.Alias = "" },
		func(h *OpenSSHHost) { h.Alias = "a b" },
		func(h *OpenSSHHost) { h.Alias = "*" },
		func(h *OpenSSHHost) { h.Alias = "-oProxyCommand=x" },
		func(h *OpenSSHHost) { h.Proxy = nil },
		func(h *OpenSSHHost) { h.Proxy = []string{"a\nb"} },
		func(h *OpenSSHHost) { h.KnownHosts = "/a\nb" },
		func(h *OpenSSHHost) { h.KnownHosts = "/a/${HOME}" },
		func(h *OpenSSHHost) { h.KnownHosts = "relative" },
	} {
		h := ok
		change(&h)
		if text, err := h.Config(); err == nil {
			t.Errorf("accepted: %s", text)
		}
	}
}
