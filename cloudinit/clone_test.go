package cloudinit

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/line"
)

const testMachineID = "0123456789abcdef0123456789abcdef"

func TestTemplateHoldsNothingOfOneMachine(t *testing.T) {
	cfg := fullConfig(t)
	files := render(t, cfg.Template())
	seed := string(files.UserData) + string(files.MetaData) + string(files.NetworkConfig)
	for what, secret := range map[string]string{
		"name": cfg.InstanceName, "key": cfg.AuthorizedKeys[0], "identity": cfg.Git.Email, "mount": cfg.Mounts[0].Target,
		"host key": strings.Split(string(cfg.HostKey), "\n")[1],
	} {
		if secret == "" || strings.Contains(seed, secret) {
			t.Errorf("the template's seed has the machine's %s %q", what, secret)
		}
	}
}

// TestTemplateIsTheSame: machines of one environment share a template.
func TestTemplateIsTheSame(t *testing.T) {
	a, b := fullConfig(t), fullConfig(t)
	b.InstanceName, b.Hostname, b.AuthorizedKeys, b.Mounts, b.Git = "other", "other", nil, nil, Git{}
	if got, want := render(t, a.Template()).InstanceID, render(t, b.Template()).InstanceID; got != want {
		t.Errorf("%s and %s", got, want)
	}
	b.Timezone = "Asia/Tokyo"
	if render(t, a.Template()).InstanceID == render(t, b.Template()).InstanceID {
		t.Error("another time zone, and the same template")
	}
}

func cloneConfig(t *testing.T) Config {
	t.Helper()
	cfg := fullConfig(t)
	cfg.Files, cfg.RunCmd, cfg.Partitioned = nil, nil, false
	return cfg
}

// TestClone: what the guest is told is what was meant, whatever it looks like.
func TestClone(t *testing.T) {
	cfg := cloneConfig(t)
	cfg.Mounts = append(cfg.Mounts, ShareMount{Tag: "mount7", Target: `/home/agent/it's"here";$(reboot)ü` + "`reboot`", ReadOnly: true})
	cfg.Git.Name = `O'Brien "$(reboot)" \n 🦉`
	call, err := Clone(cfg, testMachineID)
	if err != nil {
		t.Fatal(err)
	}
	var got clone
	if err := json.Unmarshal(call.Data, &got); err != nil || call.Function != line.Clone {
		t.Fatalf("%s: %v", call.Function, err)
	}
	last := got.Shares[len(got.Shares)-1]
	if want := cfg.Mounts[len(cfg.Mounts)-1]; last != (cloneShare{want.Tag, want.Target, true}) || !strings.Contains(got.GitConfig, `O'Brien \"$(reboot)\" \\n 🦉`) ||
		!slices.Equal(call.Texts, []string{strings.Join(cfg.AuthorizedKeys, "\n") + "\n", string(cfg.HostKey)}) || got.MachineID != testMachineID {
		t.Errorf("the guest is told %+v, %q", got, call.Texts)
	}
	if out, err := exec.Command("sh", "-n", "-c", got.Home).CombinedOutput(); err != nil || got.Home == "" {
		t.Errorf("%q: %v: %s", got.Home, err, out)
	}
}

func TestCloneRefuses(t *testing.T) {
	for name, alter := range map[string]func(*Config){
		"an image with a boot loader": func(c *Config) { c.Partitioned = true },
		"no host key":                 func(c *Config) { c.HostKey = nil },
		"nobody to log in":            func(c *Config) { c.AuthorizedKeys = nil },
		"files":                       func(c *Config) { c.Files = []GuestFile{{Path: "/a"}} },
		"commands":                    func(c *Config) { c.RunCmd = []string{"true"} },
		"a bad target":                func(c *Config) { c.Mounts = []ShareMount{{Tag: "a", Target: "relative"}} },
	} {
		cfg := cloneConfig(t)
		alter(&cfg)
		if _, err := Clone(cfg, testMachineID); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestClaim: a machine that waited is told its name and its shares, and no key.
func TestClaim(t *testing.T) {
	cfg := cloneConfig(t)
	call, err := Claim(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var got clone
	if err := json.Unmarshal(call.Data, &got); err != nil || call.Function != line.Claim {
		t.Fatalf("%s: %v", call.Function, err)
	}
	if got.Hostname == "" || got.GitConfig == "" || len(got.Shares) != len(cfg.Mounts) {
		t.Errorf("the guest is told %+v", got)
	}
	if len(call.Texts) > 0 || got.MachineID != "" || got.AuthorizedKeysFile != "" {
		t.Errorf("the guest is told %q, %s", call.Texts, call.Data)
	}
}
