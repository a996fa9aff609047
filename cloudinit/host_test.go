package cloudinit

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/hostca"
)

// fakeHost is a Probe of a made-up file tree and environment. Environment
// values that are paths stay paths below the tree.
func fakeHost(t *testing.T, files map[string]string, env map[string]string) Probe {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Probe{
		Root:   root,
		Getenv: func(name string) string { return env[name] },
		Git:    func(context.Context) func() map[string]string { return func() map[string]string { return nil } },
	}
}

// certificate makes a self-signed one.
func certificate(t *testing.T, name string, ca bool, until time.Duration) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotAfter: time.Now().Add(until), IsCA: ca, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return hostca.PEM(c)
}

// What the host trusts is hostca's to find; a guest gets the CAs of it.
func TestExtraCAs(t *testing.T) {
	proxy := certificate(t, "Proxy", true, time.Hour)
	expired := certificate(t, "Expired", true, -time.Hour)
	server := certificate(t, "Server", false, time.Hour)
	host := fakeHost(t, map[string]string{"/etc/bundle.pem": server + expired + proxy},
		map[string]string{"SSL_CERT_FILE": "/etc/bundle.pem", "CURL_CA_BUNDLE": "/etc/missing.pem"})
	facts := host.Facts(t.Context())
	if diff := cmp.Diff([]string{proxy}, facts.CAs); diff != "" {
		t.Errorf("CAs (-want +got):\n%s", diff)
	}
	if len(facts.Warnings) != 1 {
		t.Errorf("want a warning of the missing file, got %v", facts.Warnings)
	}
}

func TestTimezone(t *testing.T) {
	tests := []struct {
		name     string
		env      map[string]string
		link     string
		timezone string
		want     string
	}{
		{"nothing", nil, "", "", "UTC"},
		{"link", nil, "/usr/share/zoneinfo/America/Argentina/Ushuaia", "Europe/Rome\n", "America/Argentina/Ushuaia"},
		{"relative link", nil, "../usr/share/zoneinfo/Asia/Tokyo", "", "Asia/Tokyo"},
		{"file", nil, "", "Europe/Rome\n", "Europe/Rome"},
		{"environment", map[string]string{"TZ": ":Europe/Oslo"}, "", "Europe/Rome", "Europe/Oslo"},
		{"rule", map[string]string{"TZ": "CET-1CEST"}, "", "Europe/Rome", "Europe/Rome"},
		{"path", map[string]string{"TZ": ":/etc/localtime"}, "", "Europe/Rome", "Europe/Rome"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{"/etc/hostname": "x"}
			if tt.timezone != "" {
				files["/etc/timezone"] = tt.timezone
			}
			host := fakeHost(t, files, tt.env)
			if tt.link != "" {
				if err := os.Symlink(tt.link, host.path("/etc/localtime")); err != nil {
					t.Fatal(err)
				}
			}
			if got := host.timezone(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestLocale(t *testing.T) {
	tests := []struct {
		name string
		env  map[string]string
		file string
		want string
	}{
		{"nothing", nil, "", "C.UTF-8"},
		{"environment", map[string]string{"LANG": "de_DE.UTF-8"}, `LANG="en_GB.UTF-8"`, "de_DE.UTF-8"},
		{"LC_ALL first", map[string]string{"LANG": "de_DE.UTF-8", "LC_ALL": "fr_FR.UTF-8"}, "", "fr_FR.UTF-8"},
		{"file", nil, "# x\nLANG=\"en_GB.UTF-8\"\n", "en_GB.UTF-8"},
		{"C", map[string]string{"LANG": "C"}, "LANG=en_GB.UTF-8", "C.UTF-8"},
		{"nonsense", map[string]string{"LANG": "$(x)"}, "", "C.UTF-8"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			host := fakeHost(t, map[string]string{"/etc/default/locale": tt.file}, tt.env)
			if got := host.locale(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestGitIdentityIsClean(t *testing.T) {
	host := fakeHost(t, nil, nil)
	host.Git = func(context.Context) func() map[string]string {
		return func() map[string]string { return map[string]string{"user.name": "Ada", "user.email": "a\nb"} }
	}
	if diff := cmp.Diff(Git{Name: "Ada"}, host.Facts(t.Context()).Git); diff != "" {
		t.Error(diff)
	}
}

func TestGitIdentityOfTheHost(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", "")
	for name, text := range map[string]string{
		".gitconfig": "[user]\n\tname = Nobody\n[include]\n\tpath = who\n[username]\n\temail = other@example.org\n",
		"who":        "[user]\n\tname = \" Ada  Lovelace\"\n\temail = ada@example.org\n",
	} {
		if err := os.WriteFile(filepath.Join(home, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(Git{Name: "Ada  Lovelace", Email: "ada@example.org"}, HostProbe("").Facts(t.Context()).Git); diff != "" {
		t.Error(diff)
	}
	t.Setenv("HOME", t.TempDir())
	if git := HostProbe("").Facts(t.Context()).Git; git.Name+git.Email != "" {
		t.Errorf("without a configuration: %+v", git)
	}
}

func TestGenerateKey(t *testing.T) {
	pair, err := GenerateKey("demo host")
	if err != nil {
		t.Fatal(err)
	}
	cfg := minimalConfig(t)
	cfg.HostKey, cfg.AuthorizedKeys = pair.Private, []string{pair.Public}
	if _, err := NewSeed(cfg); err != nil {
		t.Errorf("a generated key is refused: %v", err)
	}
	if _, err := GenerateKey("two\nlines"); err == nil {
		t.Error("a comment of two lines is accepted")
	}
}
