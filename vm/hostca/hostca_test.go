package hostca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/probes"
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

// put writes a file, and the directories above it.
func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// TestRemembered has each change of a file be seen.
func TestRemembered(t *testing.T) {
	mozilla, local, proxy := certificate(t, "Mozilla"), certificate(t, "Local"), certificate(t, "Proxy")
	root, bundle := t.TempDir(), ""
	h := Host{Root: root, Getenv: func(string) string { return bundle }, Known: probes.Store(t.TempDir())}
	for _, step := range []struct {
		change func()
		want   []string
	}{
		{func() { put(t, root+localDir+"/a.crt", mozilla+local) }, []string{mozilla, local}},
		{func() { put(t, root+mozillaDir+"/m.crt", mozilla) }, []string{local}},
		{func() { put(t, root+localDir+"/b.crt", proxy) }, []string{local, proxy}},
		{func() { put(t, root+localDir+"/a.crt", proxy+"\n") }, []string{proxy}},
		{func() { put(t, root+"/bundle", local); bundle = "/bundle" }, []string{proxy, local}},
		{func() { put(t, root+mozillaDir+"/l.crt", local+proxy) }, nil},
	} {
		step.change()
		for _, when := range []string{"first", "again"} {
			certs, warnings := h.Extra()
			var got []string
			for _, c := range certs {
				got = append(got, PEM(c))
			}
			if diff := cmp.Diff(step.want, got); diff != "" || len(warnings) > 0 {
				t.Errorf("%s: %v (-want +got):\n%s", when, warnings, diff)
			}
		}
	}
	// It is what was remembered that is used.
	files := func(dir string) []string {
		list, err := h.files(dir)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	block, _ := pem.Decode([]byte(local))
	h.Known.Write(kind, h.version(append(files(localDir), bundle), files(mozillaDir)), [][]byte{block.Bytes})
	if certs, warnings := h.Extra(); len(certs) != 1 || PEM(certs[0]) != local || len(warnings) > 0 {
		t.Errorf("%v, %v", certs, warnings)
	}
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
		put(t, filepath.Join(root, name), text)
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
