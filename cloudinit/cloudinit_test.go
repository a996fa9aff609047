package cloudinit

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/testenv"
)

// TestSchema lets the real cloud-init judge what the golden files hold.
func TestSchema(t *testing.T) {
	testenv.Require(t, "cloud-init")
	for _, name := range []string{"full", "minimal", "dhcp"} {
		checkSchema(t, "user-data", filepath.Join("testdata", name+".user-data"))
	}
}

func TestNetworkSchema(t *testing.T) {
	testenv.Require(t, "cloud-init")
	help, _ := exec.Command("cloud-init", "schema", "--help").CombinedOutput()
	if !strings.Contains(string(help), "--schema-type") {
		return // before 23.4 there is no schema for networks; TestNetworkRenders has the say
	}
	checkSchema(t, "network-config", "testdata/full.network-config", "--schema-type", "network-config")
	checkSchema(t, "network-config", "testdata/dhcp.network-config", "--schema-type", "network-config")
}

// TestNetworkRenders lets the real cloud-init turn the network configuration
// into systemd-networkd's.
func TestNetworkRenders(t *testing.T) {
	testenv.Require(t, "cloud-init")
	if os.Getuid() != 0 {
		t.Skip("net-convert gives its output to a system user; the run as root covers it")
	}
	for name, want := range map[string][]string{
		"full": {"Name=eth0", "MACAddress=5a:94:ef:e4:0c:ee", "Address=192.168.127.2/24", "Gateway=192.168.127.1", "DNS=192.168.127.1", "DHCP=no"},
		"dhcp": {"Name=eth0", "DHCP=ipv4"},
	} {
		dir := t.TempDir()
		out, err := exec.Command("cloud-init", "devel", "net-convert", "-p", "testdata/"+name+".network-config", "-k", "yaml",
			"-d", dir, "-m", "eth0,5a:94:ef:e4:0c:ee", "-D", "debian", "-O", "networkd").CombinedOutput()
		if err != nil {
			t.Fatalf("net-convert: %v\n%s", err, out)
		}
		got := readFile(t, filepath.Join(dir, "etc/systemd/network/10-cloud-init-eth0.network"))
		for _, line := range want {
			if !strings.Contains(got, line+"\n") {
				t.Errorf("%s lacks %s:\n%s", name, line, got)
			}
		}
	}
}

// checkSchema asks for annotations, which name a deprecated key too.
func checkSchema(t *testing.T, what, file string, args ...string) {
	t.Helper()
	cmd := exec.Command("cloud-init", append([]string{"schema", "--annotate", "-c", file}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Valid") || strings.Contains(strings.ToLower(string(out)), "deprecat") {
		t.Errorf("cloud-init schema on %s %s: %v\n%s", what, file, err, out)
	}
}

// TestPyYAML checks the round trip with the parser that cloud-init uses.
func TestPyYAML(t *testing.T) {
	const python = "/usr/bin/python3" // Debian's, which its packages are for
	testenv.Require(t, python)
	if exec.Command(python, "-c", "import yaml").Run() != nil {
		testenv.Unavailable(t, "%v", "needs python3-yaml")
	}
	cfg := minimalConfig(t)
	var want []string
	for _, s := range awkward {
		if text(s) == nil {
			want = append(want, s)
		}
	}
	cfg.RunCmd = want
	file := filepath.Join(t.TempDir(), "user-data")
	if err := os.WriteFile(file, render(t, cfg).UserData, 0o600); err != nil {
		t.Fatal(err)
	}
	const script = `import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1], encoding="utf-8")), sys.stdout)`
	out, err := exec.Command(python, "-c", script, file).Output()
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ RunCmd [][]string }
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	for i, s := range want {
		if got.RunCmd[i][2] != s {
			t.Errorf("%q came back as %q", s, got.RunCmd[i][2])
		}
	}
}
