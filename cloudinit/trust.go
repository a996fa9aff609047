package cloudinit

import (
	"fmt"
	"strings"

	"github.com/agentvm/agentvm/vm/hostca"
)

// CABundle is the file in Debian's guests that holds every trusted CA.
const CABundle = "/etc/ssl/certs/ca-certificates.crt"

// CAEnv makes programs that bring their own list of CAs use the guest's:
// Node.js and Bun, OpenSSL and Go, Python's requests. The sources are those
// in package hostca.
func CAEnv() map[string]string {
	return map[string]string{
		"NODE_EXTRA_CA_CERTS": CABundle,
		"SSL_CERT_FILE":       CABundle,
		"REQUESTS_CA_BUNDLE":  CABundle,
	}
}

// caFiles makes the guest trust cas as update-ca-certificates(8) would: the
// certificates lie where it looks for local ones, so that its later runs keep
// them, and the bundle has them at once. cloud-init's ca_certs module runs it
// instead, which hashes all 140 shipped certificates anew: 70 seconds of a boot
// in an emulated machine.
func caFiles(cas []string) []File {
	var out []File
	for i, ca := range cas {
		f := newFile(fmt.Sprintf("/usr/local/share/ca-certificates/host-%d.crt", i+1), []byte(ca), 0o644)
		out = append(out, f)
	}
	if len(out) > 0 {
		bundle := newFile(CABundle, []byte(strings.Join(cas, "")), 0o644)
		bundle.Append = true
		out = append(out, bundle)
	}
	return out
}

// caCerts leaves the work to cloud-init, which knows every distribution's ways.
func caCerts(cas []string) *CACerts {
	if len(cas) == 0 {
		return nil
	}
	return &CACerts{Trusted: cas}
}

// canonicalCAs checks that each of cas is one certificate and drops what else
// its PEM carried.
func canonicalCAs(cas []string) ([]string, error) {
	var out []string
	for i, ca := range cas {
		c, err := parseCertificate([]byte(ca))
		if err != nil {
			return nil, fmt.Errorf("%w: CA certificate %d: %w", ErrInvalid, i+1, err)
		}
		out = append(out, hostca.PEM(c))
	}
	return out, nil
}
