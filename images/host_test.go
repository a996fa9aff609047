package images

import (
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

func TestAptNetwork(t *testing.T) {
	got := aptNetwork(`APT::Architecture "amd64";
Acquire::http::Proxy "http://apt.example:3142";
Acquire::http::Proxy::intern.example "DIRECT";
Acquire::HTTPS::CAInfo "/etc/corp.pem";
Acquire::http::User-Agent "x";
Acquire::Languages "none";
`)
	want := "Acquire::http::Proxy \"http://apt.example:3142\";\n" +
		"Acquire::http::Proxy::intern.example \"DIRECT\";\n" +
		"Acquire::HTTPS::CAInfo \"/etc/corp.pem\";\n"
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestNPMSettings(t *testing.T) {
	home := t.TempDir()
	registry, npmrc := npmSettings(env("HOME", home))
	if registry != defaultRegistry || npmrc != "registry=https://registry.npmjs.org/\n" {
		t.Errorf("no settings: %s, %q", registry, npmrc)
	}
	writeFiles(t, home, map[string]string{".npmrc": `# comment
registry = "https://npm.example/team/"
//npm.example/team/:_authToken=${TOKEN}
@corp:registry=https://corp.example/
prefix=/home/me/.npm
`})
	registry, npmrc = npmSettings(env("HOME", home, "TOKEN", "s3cret"))
	want := "registry=https://npm.example/team/\n//npm.example/team/:_authToken=s3cret\n@corp:registry=https://corp.example/\n"
	if registry != "https://npm.example/team" || npmrc != want {
		t.Errorf("%s, %q", registry, npmrc)
	}
	if registry, _ = npmSettings(env("HOME", home, "npm_config_registry", "http://localhost:4873")); registry != "http://localhost:4873" {
		t.Errorf("the environment does not win: %s", registry)
	}
}

func TestProbeHostNet(t *testing.T) {
	root := t.TempDir()
	writeFiles(t, root, map[string]string{
		"etc/resolv.conf":                   "nameserver 192.0.2.1\n",
		"etc/ssl/certs/ca-certificates.crt": "# what the host trusts\n",
	})
	n := probeHostNet(t.Context(), env("HOME", root, "https_proxy", "http://proxy.example:3128"), root)
	if string(n.cas) != "# what the host trusts\n" || string(n.resolv) != "nameserver 192.0.2.1\n" {
		t.Errorf("CAs %q, resolv.conf %q", n.cas, n.resolv)
	}
	if d := cmp.Diff([]string{"https_proxy=http://proxy.example:3128"}, n.proxies); d != "" {
		t.Error(d)
	}
}

// fakeRegistry serves one package and, when broken, an archive that its
// digest does not fit.
func fakeRegistry(t *testing.T, broken bool) registry {
	t.Helper()
	mux := http.NewServeMux()
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	archive := []byte("archive")
	sum := sha512.Sum512(archive)
	mux.HandleFunc("/r/{name}/{version}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("name") != "@corp/tool" || r.PathValue("version") != "latest" || r.Header.Get("Authorization") != "Bearer abc" {
			http.NotFound(w, r)
			return
		}
		var rel release
		rel.Name, rel.Version = "@corp/tool", "1.2.3"
		rel.Dist.Tarball = server.URL + "/r/tool.tgz"
		rel.Dist.Integrity = "sha512-" + base64.StdEncoding.EncodeToString(sum[:])
		if err := json.NewEncoder(w).Encode(rel); err != nil {
			t.Error(err)
		}
	})
	mux.HandleFunc("/r/tool.tgz", func(w http.ResponseWriter, _ *http.Request) {
		if broken {
			archive = []byte("tampered")
		}
		w.Write(archive)
	})
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	host := strings.TrimPrefix(server.URL, "https:")
	return newRegistry(hostNet{registry: server.URL + "/r", cas: ca, npmrc: host + "/r/:_authToken=abc\n"}, func(string) {})
}

func TestRegistryDownload(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "tool.tgz")
	p := NPMPackage{Name: "@corp/tool", Version: "latest"}
	rel, err := fakeRegistry(t, false).download(ctx, p, path)
	if err != nil || rel.Version != "1.2.3" {
		t.Fatal(rel, err)
	}
	if data, err := os.ReadFile(path); string(data) != "archive" {
		t.Errorf("downloaded %q, %v", data, err)
	}
	if _, err := fakeRegistry(t, true).download(ctx, p, path); err == nil || !strings.Contains(err.Error(), "registry says") {
		t.Errorf("a tampered archive passes: %v", err)
	}
	p.Integrity = "sha512-AAAA"
	if _, err := fakeRegistry(t, false).resolve(ctx, p); err == nil || !strings.Contains(err.Error(), "was expected") {
		t.Errorf("a pinned integrity is ignored: %v", err)
	}
	if _, err := fakeRegistry(t, false).resolve(ctx, NPMPackage{Name: "absent", Version: "1.0.0"}); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("an absent package: %v", err)
	}
}

func TestCheck(t *testing.T) {
	root := t.TempDir()
	writeFiles(t, root, map[string]string{
		"etc/subuid":        "other:100000:65536\nada:200000:65536\n",
		"etc/subgid":        "ada:200000:1000\n",
		"proc/self/ns/user": "",
		"proc/sys/kernel/apparmor_restrict_unprivileged_userns":          "1\n",
		"usr/share/keyrings/debian-archive-bookworm-automatic.gpg":       "",
		"etc/apt/trusted.gpg.d/debian-archive-bookworm-stable.asc":       "",
		"usr/share/keyrings/debian-archive-bullseye-security-stable.gpg": "",
	})
	h := host{
		uid: 1000, username: "ada", root: root,
		look: func(p string) (string, error) {
			if p == "mmdebstrap" || p == "/usr/sbin/mmdebstrap" || p == "mke2fs" {
				return "", errors.New("not found")
			}
			return filepath.Join("/usr/bin", p), nil
		},
		free: func(dir string) (int64, error) {
			if dir != "/" {
				return 0, os.ErrNotExist
			}
			return 1 << 30, nil
		},
	}
	fixes := map[string]string{}
	for _, f := range append(h.check(), h.space("/no/such/dir")) {
		if f.Status != vm.FindingOK {
			fixes[f.Name] = f.Fix
		}
	}
	want := map[string]string{
		"mmdebstrap":            "sudo apt-get install mmdebstrap",
		"Debian archive keys":   "sudo apt-get update && sudo apt-get install debian-archive-keyring",
		"subordinate ids":       "sudo usermod --add-subuids 200000-265535 --add-subgids 200000-265535 ada",
		"user namespaces":       "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
		"disk space for images": "free some space, or set AGENTVM_HOME to a directory on a larger disk",
	}
	if d := cmp.Diff(want, fixes); d != "" {
		t.Error(d)
	}
	if err := require(h.check()); !errors.Is(err, vm.ErrHost) || vm.Hint(err) != "sudo apt-get install mmdebstrap" {
		t.Errorf("require: %v, hint %q", err, vm.Hint(err))
	}
}

// Each line of agentvm doctor says something, also where all is well.
func TestCheckSaysWhatItFound(t *testing.T) {
	root := t.TempDir()
	writeFiles(t, root, map[string]string{
		"etc/subuid": "ada:200000:65536\n", "etc/subgid": "ada:200000:65536\n", "proc/self/ns/user": "",
		"usr/share/keyrings/debian-archive-bookworm-stable.gpg": "", "usr/share/keyrings/debian-archive-trixie-stable.gpg": "",
	})
	h := host{
		uid: 1000, username: "ada", root: root,
		look: func(p string) (string, error) { return filepath.Join("/usr/bin", p), nil },
		free: func(string) (int64, error) { return 1 << 40, nil },
	}
	said := map[string]string{}
	for _, f := range append(h.check(), h.space("/cache")) {
		if f.Status != vm.FindingOK {
			t.Errorf("%+v", f)
		}
		said[f.Name] = f.Detail
	}
	want := map[string]string{
		"mmdebstrap": "/usr/bin/mmdebstrap", "mke2fs": "/usr/bin/mke2fs", "unshare": "/usr/bin/unshare", "tar": "/usr/bin/tar",
		"qemu-img": "/usr/bin/qemu-img", "newuidmap": "/usr/bin/newuidmap", "newgidmap": "/usr/bin/newgidmap",
		"Debian archive keys":   "for trixie, bookworm",
		"subordinate ids":       "ada has the 65534 that are needed",
		"user namespaces":       "allowed",
		"disk space for images": "1048576 MiB free in /cache",
	}
	if d := cmp.Diff(want, said); d != "" {
		t.Error(d)
	}
}
