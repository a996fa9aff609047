package cloudinit

import (
	"bytes"
	"encoding/base64"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/kdomanski/iso9660"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// fixture returns a file of testdata.
func fixture(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// fullConfig uses every field.
func fullConfig(t testing.TB) Config {
	return Config{
		InstanceName:   "demo",
		Hostname:       "demo.test",
		User:           Account{Name: "agent", UID: 1000},
		AuthorizedKeys: []string{strings.TrimSpace(fixture(t, "client_key.pub"))},
		HostKey:        []byte(fixture(t, "host_key")),
		Timezone:       "Europe/Berlin",
		Locale:         "C.UTF-8",
		CAs:            []string{fixture(t, "ca.pem")},
		Git:            Git{Name: `Ada "the first" Lovelace`, Email: "ada@example.org", SafeDirectories: []string{"/workspace"}, SharedWorktrees: true},
		Mounts: []ShareMount{
			{Tag: "workspace", Target: "/workspace"},
			{Tag: "share1", Target: "/home/agent/.config/pi", ReadOnly: true},
		},
		Files: []GuestFile{
			{Path: "/etc/motd", Content: []byte("welcome: yes\n\ttab\n")},
			{Path: "/opt/blob", Content: []byte{0, 0xff, '\n'}, Mode: 0o755},
			{Path: "/home/agent/.pi/agent/models.json", Content: []byte(`{"a": "b"}`), Mode: 0o600, Owner: "agent"},
		},
		RunCmd: []string{"echo 'done: yes' > /run/done"},
		Network: Network{
			MAC:     "5a:94:ef:e4:0c:ee",
			Address: "192.168.127.2/24", Gateway: "192.168.127.1", DNS: []string{"192.168.127.1"},
		},
	}
}

func minimalConfig(t testing.TB) Config {
	return Config{
		InstanceName:   "demo",
		User:           Account{Name: "agent", UID: 1000},
		AuthorizedKeys: []string{fullConfig(t).AuthorizedKeys[0]},
	}
}

func render(t testing.TB, cfg Config) Files {
	t.Helper()
	seed, err := NewSeed(cfg)
	if err != nil {
		t.Fatal(err)
	}
	files, err := seed.Render()
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestRenderGolden(t *testing.T) {
	dhcp := minimalConfig(t)
	dhcp.Network = Network{MAC: "5a:94:ef:e4:0c:ee", DHCP4: true}
	dhcp.Partitioned, dhcp.CAs = true, fullConfig(t).CAs
	for name, cfg := range map[string]Config{"full": fullConfig(t), "minimal": minimalConfig(t), "dhcp": dhcp} {
		t.Run(name, func(t *testing.T) {
			files := render(t, cfg)
			for suffix, got := range map[string][]byte{
				"user-data": files.UserData, "meta-data": files.MetaData, "network-config": files.NetworkConfig,
			} {
				golden := filepath.Join("testdata", name+"."+suffix)
				if *update {
					if err := os.WriteFile(golden, got, 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(want), string(got)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", golden, diff)
				}
			}
		})
	}
}

func TestLocaleFallsBack(t *testing.T) {
	tests := []struct {
		locale      string
		locales     []string
		partitioned bool
		want        string
	}{
		{"", nil, false, ""},
		{"C.UTF-8", nil, false, "C.UTF-8"},
		{"de_DE.UTF-8", nil, false, "C.UTF-8"},
		{"de_DE.UTF-8", []string{"de_DE.UTF-8"}, false, "de_DE.UTF-8"},
		{"de_DE.UTF-8", nil, true, "de_DE.UTF-8"},
	}
	for _, tt := range tests {
		cfg := minimalConfig(t)
		cfg.Locale, cfg.Locales, cfg.Partitioned = tt.locale, tt.locales, tt.partitioned
		seed, err := NewSeed(cfg)
		if err != nil || seed.UserData.Locale != tt.want {
			t.Errorf("%+v: got %q, %v", tt, seed.UserData.Locale, err)
		}
	}
}

func TestCAs(t *testing.T) {
	cfg := fullConfig(t)
	built, err := NewSeed(cfg)
	if err != nil {
		t.Fatal(err)
	}
	bundle := built.UserData.WriteFiles[len(built.UserData.WriteFiles)-1]
	if bundle.Path != CABundle || !bundle.Append || bundle.Content != cfg.CAs[0] || built.UserData.CACerts != nil {
		t.Errorf("a built image's last file is %+v", bundle)
	}
	cfg.Partitioned = true
	foreign, err := NewSeed(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if foreign.UserData.CACerts == nil || len(foreign.UserData.WriteFiles) != len(built.UserData.WriteFiles)-2 {
		t.Error("a foreign image's CAs are not left to cloud-init")
	}
}

func TestInstanceIDFollowsContent(t *testing.T) {
	base := render(t, fullConfig(t)).InstanceID
	if again := render(t, fullConfig(t)).InstanceID; again != base {
		t.Errorf("same content, other id: %s, %s", base, again)
	}
	changes := map[string]func(*Config){
		"instance name": func(c *Config) { c.InstanceName = "other" },
		"file":          func(c *Config) { c.Files[0].Content = []byte("x") },
		"network":       func(c *Config) { c.Network.Gateway = "192.168.127.9" },
		"run":           func(c *Config) { c.RunCmd = nil },
	}
	for name, change := range changes {
		cfg := fullConfig(t)
		change(&cfg)
		if render(t, cfg).InstanceID == base {
			t.Errorf("%s changed, the instance-id did not", name)
		}
	}
}

func TestISO(t *testing.T) {
	seed, err := NewSeed(fullConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	first, second := filepath.Join(dir, "one.iso"), filepath.Join(dir, "two.iso")
	if err := seed.WriteISO(first); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // the library's stamps count hundredths of a second
	if err := seed.WriteISO(second); err != nil {
		t.Fatal(err)
	}
	a, b := []byte(readFile(t, first)), []byte(readFile(t, second))
	if !bytes.Equal(a, b) {
		t.Error("two seeds of the same content differ")
	}
	if info, _ := os.Stat(first); info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v", info.Mode())
	}
	if got := string(a[32808:32814]); got != "cidata" {
		t.Errorf("volume label is %q", got)
	}
	files := render(t, fullConfig(t))
	want := map[string]string{
		"user-data":      string(files.UserData),
		"meta-data":      string(files.MetaData),
		"network-config": string(files.NetworkConfig),
	}
	if diff := cmp.Diff(want, readISO(t, a)); diff != "" {
		t.Errorf("ISO content (-want +got):\n%s", diff)
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func readISO(t *testing.T, image []byte) map[string]string {
	t.Helper()
	iso, err := iso9660.OpenImage(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	root, err := iso.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	children, err := root.GetChildren()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, c := range children {
		data, err := io.ReadAll(c.Reader())
		if err != nil {
			t.Fatal(err)
		}
		got[c.Name()] = string(data)
	}
	return got
}

func TestWriteISOKeepsOldFileOnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seed.iso")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := (&Seed{LocalHostname: "bad name"}).WriteISO(path)
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("error is %v", err)
	}
	if got := readFile(t, path); got != "old" {
		t.Errorf("file is now %q", got)
	}
}

// FuzzRoundTrip looks for strings that come back from YAML as something else.
func FuzzRoundTrip(f *testing.F) {
	for _, s := range awkward {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		cfg := minimalConfig(t)
		cfg.Files = []GuestFile{{Path: "/etc/fuzz", Content: []byte(s)}}
		if text(s) == nil {
			cfg.RunCmd = []string{s}
		}
		if noControl(s) == nil {
			cfg.Git.Name = s
		}
		files := render(t, cfg)
		var got struct {
			WriteFiles []File    `yaml:"write_files"`
			RunCmd     []Command `yaml:"runcmd"`
			Rest       map[string]any
		}
		if err := yaml.Unmarshal(files.UserData, &got); err != nil {
			t.Fatalf("%v\n%s", err, files.UserData)
		}
		last := got.WriteFiles[len(got.WriteFiles)-1]
		content := last.Content
		if last.Encoding == "b64" {
			decoded, err := base64.StdEncoding.DecodeString(content)
			if err != nil {
				t.Fatal(err)
			}
			content = string(decoded)
		}
		if content != s {
			t.Errorf("content %q came back as %q", s, content)
		}
		if cfg.RunCmd != nil && got.RunCmd[0][2] != s {
			t.Errorf("command %q came back as %q", s, got.RunCmd[0][2])
		}
	})
}

// awkward strings are those that YAML, or its version 1.1, has ideas about.
var awkward = []string{
	"", "yes", "no", "~", "null", "012", "0x1F", "1e3", "1:30", "12:30:45", "2001-01-01", "<<", "=", "!!str x",
	"- a", "a: b", "a #b", "'", `"`, `\`, "&a", "*a", "{a: b}", "[a]", "%YAML 1.1", "---", "...", "| x", "> x",
	"a\nb", "\n", "  lead", "trail  ", "\ttab", "a\r\nb", "\u0085", "\u2028", "\ufeff", "\u00a0", "😀", "\x07\x1b", "\x7f",
	"\x00", "\xff\xfe", "\ufffe", strings.Repeat("long ", 400), "${x} $(y) `z`", "{{ v }}", "## template: jinja",
}
