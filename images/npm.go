package images

import (
	"context"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// registry reads the npm registry: https://github.com/npm/registry/blob/main/docs/REGISTRY-API.md
type registry struct {
	url     string
	npmrc   string
	client  *http.Client
	getting func(name string) // told before every request
}

func newRegistry(n hostNet, getting func(string)) registry {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(n.cas)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if len(n.cas) > 0 {
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	transport.ResponseHeaderTimeout = time.Minute
	return registry{url: n.registry, npmrc: n.npmrc, client: &http.Client{Transport: transport}, getting: getting}
}

// release is one version of a package.
type release struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Dist    struct {
		Tarball   string `json:"tarball"`
		Integrity string `json:"integrity"`
	} `json:"dist"`
}

// resolve asks the registry for a version or a dist-tag of a package.
func (r registry) resolve(ctx context.Context, p NPMPackage) (release, error) {
	var rel release
	body, err := r.get(ctx, r.url+"/"+strings.Replace(p.Name, "/", "%2f", 1)+"/"+url.PathEscape(p.Version))
	if err != nil {
		return rel, fmt.Errorf("look up npm package %s@%s: %w", p.Name, p.Version, err)
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&rel); err != nil {
		return rel, fmt.Errorf("look up npm package %s@%s: read the registry's answer: %w", p.Name, p.Version, err)
	}
	if rel.Name != p.Name || !npmVersion().MatchString(rel.Version) {
		return rel, fmt.Errorf("look up npm package %s@%s: the registry answered with %q %q", p.Name, p.Version, rel.Name, rel.Version)
	}
	if p.Integrity != "" && rel.Dist.Integrity != p.Integrity {
		return rel, fmt.Errorf("npm package %s@%s has integrity %s, %s was expected", p.Name, rel.Version, rel.Dist.Integrity, p.Integrity)
	}
	return rel, nil
}

// download writes the archive of a package to path and checks it against
// the registry's digest.
func (r registry) download(ctx context.Context, p NPMPackage, path string) (release, error) {
	rel, err := r.resolve(ctx, p)
	if err != nil {
		return rel, err
	}
	want, ok := strings.CutPrefix(rel.Dist.Integrity, "sha512-")
	if !ok {
		return rel, fmt.Errorf("npm package %s@%s has no SHA-512 digest", p.Name, rel.Version)
	}
	body, err := r.get(ctx, rel.Dist.Tarball)
	if err != nil {
		return rel, fmt.Errorf("download npm package %s@%s: %w", p.Name, rel.Version, err)
	}
	defer body.Close()
	f, err := os.Create(path)
	if err != nil {
		return rel, err
	}
	defer f.Close()
	h := sha512.New()
	if _, err := io.Copy(io.MultiWriter(f, h), body); err != nil {
		return rel, fmt.Errorf("download npm package %s@%s: %w", p.Name, rel.Version, diskFull("", err))
	}
	if got := base64.StdEncoding.EncodeToString(h.Sum(nil)); got != want {
		return rel, fmt.Errorf("npm package %s@%s: archive has digest sha512-%s, registry says sha512-%s", p.Name, rel.Version, got, want)
	}
	return rel, f.Close()
}

func (r registry) get(ctx context.Context, address string) (io.ReadCloser, error) {
	r.getting(address)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	r.authorize(req)
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("GET %s: %s", address, resp.Status)
	}
	return resp.Body, nil
}

// authorize adds the credentials that the npm configuration has for exactly
// this host and path.
func (r registry) authorize(req *http.Request) {
	for line := range strings.Lines(r.npmrc) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		scope, kind, ok := strings.Cut(name, ":_")
		if !ok || !strings.HasPrefix("//"+req.URL.Host+req.URL.EscapedPath(), strings.TrimRight(scope, "/")+"/") {
			continue
		}
		switch kind {
		case "authToken":
			req.Header.Set("Authorization", "Bearer "+value)
		case "auth":
			req.Header.Set("Authorization", "Basic "+value)
		}
	}
}
