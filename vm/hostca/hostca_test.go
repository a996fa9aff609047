package hostca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// certificate makes a self-signed one.
func certificate(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return PEM(c)
}

func TestHost(t *testing.T) {
	const odd = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" // no parser takes it
	mozilla, local, team, proxy, git := certificate(t, "Mozilla"), certificate(t, "Local"), certificate(t, "Team"), certificate(t, "Proxy"), certificate(t, "Git")
	root := t.TempDir()
	for name, text := range map[string]string{
		bundleFile:                       odd + mozilla + local,
		mozillaDir + "/Mozilla.crt":      mozilla,
		localDir + "/local.crt":          local,
		localDir + "/team/nested.crt":    team,
		localDir + "/team/README":        "not a certificate",
		localDir + "/zz/local-again.crt": local,
		"/etc/bundle.pem":                "# comment\n" + mozilla + proxy,
		"/etc/broken.pem":                odd + proxy,
		"/etc/empty.pem":                 "",
		"/etc/git.pem":                   git,
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	env := map[string]string{
		"SSL_CERT_FILE":       "/etc/bundle.pem",
		"NODE_EXTRA_CA_CERTS": "/etc/broken.pem",
		"CURL_CA_BUNDLE":      "/etc/empty.pem",
		"REQUESTS_CA_BUNDLE":  "/etc/missing.pem",
		"GIT_SSL_CAINFO":      "/etc/git.pem",
	}
	h := Host{Root: root, Getenv: func(name string) string { return env[name] }}
	extra, warnings := h.Extra()
	var got []string
	for _, c := range extra {
		got = append(got, PEM(c))
	}
	if diff := cmp.Diff([]string{local, team, proxy, git}, got); diff != "" {
		t.Errorf("extra (-want +got):\n%s", diff)
	}
	if len(warnings) != 3 {
		t.Errorf("want three warnings (broken, empty, missing), got %v", warnings)
	}
	if diff := cmp.Diff(odd+mozilla+local+team+proxy+git, string(h.Bundle())); diff != "" {
		t.Errorf("bundle (-want +got):\n%s", diff)
	}
	t.Chdir(filepath.Join(root, "etc"))
	relative := Host{Root: t.TempDir(), Getenv: func(name string) string { return map[string]string{"GIT_SSL_CAINFO": "git.pem"}[name] }}
	if got := string(relative.Bundle()); got != git {
		t.Errorf("of a relative path: %q", got)
	}
	bare := Host{Root: t.TempDir(), Getenv: func(string) string { return "" }}
	if extra, warnings := bare.Extra(); len(extra)+len(warnings)+len(bare.Bundle()) > 0 {
		t.Errorf("a host without any: %v, %v", extra, warnings)
	}
}
