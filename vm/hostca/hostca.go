// Package hostca finds the certificate authorities that this host trusts.
// Guests take over those beyond the distribution's, image builds all of them;
// both look in the same places.
package hostca

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
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm/probes"
)

// variables name files of extra CAs for one program or another. Sources:
// openssl-env(7), https://nodejs.org/api/cli.html#node_extra_ca_certsfile,
// https://curl.se/docs/manpage.html, https://requests.readthedocs.io/,
// https://git-scm.com/docs/git-config (http.sslCAInfo).
var variables = []string{
	"SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO",
}

const (
	bundleFile = "/etc/ssl/certs/ca-certificates.crt" // what update-ca-certificates(8) makes of all
	mozillaDir = "/usr/share/ca-certificates/mozilla" // what Debian's ca-certificates ships
	localDir   = "/usr/local/share/ca-certificates"   // where update-ca-certificates looks for the host's own
)

// Host is where to look. It changes nothing.
type Host struct {
	Root   string // prefix of every path read, those in variables too; "/" for the real host
	Getenv func(string) string
	Known  probes.Store // keeps what was found for as long as no file changes
}

// Extra returns the certificates that somebody added to the distribution's,
// each once, and what could not be read. Every start of a machine asks, so what
// was found without a fault is remembered.
func (h Host) Extra() (certs []*x509.Certificate, warnings []error) {
	files, err := h.files(localDir)
	if err != nil {
		warnings = append(warnings, err)
	}
	for _, name := range variables {
		if file := h.Getenv(name); file != "" && !slices.Contains(files, file) {
			files = append(files, file)
		}
	}
	if len(files) == 0 {
		return nil, warnings
	}
	shipped, _ := h.files(mozillaDir)
	key, known := h.version(files, shipped), [][]byte(nil)
	if h.Known.Read(kind, key, &known) {
		if certs, err := x509.ParseCertificates(bytes.Join(known, nil)); err == nil {
			return certs, warnings
		}
	}
	certs, lost := h.added(files, shipped)
	if len(lost) == 0 {
		for _, c := range certs {
			known = append(known, c.Raw)
		}
		h.Known.Write(kind, key, known)
	}
	return certs, append(warnings, lost...)
}

// kind is what Extra finds, among what is remembered.
const kind = "host-cas"

// version differs when any of the files does, or there is another one.
func (h Host) version(files ...[]string) string {
	var b strings.Builder
	for _, file := range slices.Concat(files...) {
		b.WriteString(file)
		if info, err := os.Stat(h.path(file)); err == nil {
			b.WriteString(" " + probes.Version(info))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// added returns the certificates in files that are not in those of the
// distribution. Of most it is enough that they are known: those are not parsed.
func (h Host) added(files, shipped []string) (certs []*x509.Certificate, warnings []error) {
	seen := h.digests(shipped)
	for _, file := range files {
		found, err := h.read(file)
		if err != nil {
			warnings = append(warnings, err)
		}
		for _, der := range found {
			sum := sha256.Sum256(der)
			if seen[sum] {
				continue
			}
			seen[sum] = true
			// A trust store may well hold oddities.
			c, err := x509.ParseCertificate(der)
			if err != nil {
				warnings = append(warnings, fmt.Errorf("certificate in %s: %w", file, err))
				continue
			}
			certs = append(certs, c)
		}
	}
	return certs, warnings
}

// digests returns those of the certificates in files.
func (h Host) digests(files []string) map[[sha256.Size]byte]bool {
	sums := map[[sha256.Size]byte]bool{}
	for _, file := range files {
		found, _ := h.read(file) // what cannot be read counts as added
		for _, der := range found {
			sums[sha256.Sum256(der)] = true
		}
	}
	return sums
}

// Bundle returns all that the host trusts as PEM: the system's bundle as it
// is, and what it lacks of Extra.
func (h Host) Bundle() []byte {
	bundle, _ := os.ReadFile(h.path(bundleFile)) // none: only what was added
	has := map[[sha256.Size]byte]bool{}
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		has[sha256.Sum256(block.Bytes)] = true
	}
	extra, _ := h.Extra() // guests' starts warn of what cannot be read
	for _, c := range extra {
		if !has[sha256.Sum256(c.Raw)] {
			if len(bundle) > 0 && !bytes.HasSuffix(bundle, []byte("\n")) {
				bundle = append(bundle, '\n')
			}
			bundle = append(bundle, PEM(c)...)
		}
	}
	return bundle
}

// PEM encodes a certificate.
func PEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// path is where a file lies. A relative one, which only a variable may hold,
// starts in the current directory, as for the programs that read it.
func (h Host) path(name string) string {
	if !filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(h.Root, name)
}

// files lists the *.crt files below dir, as paths without the root.
func (h Host) files(dir string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(h.path(dir), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".crt") {
			files = append(files, dir+strings.TrimPrefix(path, h.path(dir)))
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return files, err
}

// read returns every certificate of a PEM file, in DER.
func (h Host) read(file string) (certs [][]byte, err error) {
	data, err := os.ReadFile(h.path(file))
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			certs = append(certs, block.Bytes)
		}
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("no certificate in %s", file)
	}
	return certs, nil
}
