package cloudinit

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// caVariables name files of extra CAs for one program or another. Sources:
// openssl-env(7), https://nodejs.org/api/cli.html#node_extra_ca_certsfile,
// https://curl.se/docs/manpage.html, https://requests.readthedocs.io/,
// https://git-scm.com/docs/git-config (http.sslCAInfo).
var caVariables = []string{
	"SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO",
}

const (
	mozillaDir = "/usr/share/ca-certificates/mozilla" // what Debian's ca-certificates ships
	localDir   = "/usr/local/share/ca-certificates"   // where update-ca-certificates(8) looks for the host's own
)

// extraCAs returns, as PEM, the CA certificates that the host trusts beyond
// the distribution's, each once, without those that have expired at now.
func (p Probe) extraCAs(now time.Time) (cas []string, warnings []error) {
	seen := map[[sha256.Size]byte]bool{}
	shipped, _ := p.certificateFiles(mozillaDir)
	for _, file := range shipped {
		certs, _ := p.certificates(file)
		for _, c := range certs {
			seen[sha256.Sum256(c.Raw)] = true
		}
	}
	files, err := p.certificateFiles(localDir)
	if err != nil {
		warnings = append(warnings, err)
	}
	for _, name := range caVariables {
		if file := p.Getenv(name); file != "" {
			files = append(files, file)
		}
	}
	for _, file := range files {
		certs, err := p.certificates(file)
		if err != nil {
			warnings = append(warnings, err)
		}
		for _, c := range certs {
			sum := sha256.Sum256(c.Raw)
			if !seen[sum] && isCA(c) && now.Before(c.NotAfter) {
				cas = append(cas, encodeCertificate(c))
			}
			seen[sum] = true
		}
	}
	return cas, warnings
}

// certificateFiles lists the *.crt files below dir, as paths without the
// probe's root.
func (p Probe) certificateFiles(dir string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(p.path(dir), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".crt") {
			files = append(files, dir+strings.TrimPrefix(path, p.path(dir)))
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return files, err
}

// certificates reads every certificate in a PEM file. What does not parse is
// reported and left out, since a trust store may well hold oddities.
func (p Probe) certificates(file string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(p.path(file))
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	var errs []error
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			errs = append(errs, fmt.Errorf("certificate in %s: %w", file, err))
			continue
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("no certificate in %s", file))
	}
	return certs, errors.Join(errs...)
}

// isCA tells CAs from servers. Version 1 roots say nothing of themselves; one
// that signed itself was made to be trusted.
func isCA(c *x509.Certificate) bool {
	if c.BasicConstraintsValid {
		return c.IsCA
	}
	return bytes.Equal(c.RawSubject, c.RawIssuer)
}

func encodeCertificate(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("is not one PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}
