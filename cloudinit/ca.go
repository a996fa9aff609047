package cloudinit

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"time"

	"github.com/agentvm/agentvm/vm/hostca"
)

// extraCAs returns, as PEM, the CAs that a guest takes over from the host,
// without those that have expired at now.
func (p Probe) extraCAs(now time.Time) (cas []string, warnings []error) {
	certs, warnings := hostca.Host{Root: p.Root, Getenv: p.Getenv, Known: p.Known}.Extra()
	for _, c := range certs {
		if isCA(c) && now.Before(c.NotAfter) {
			cas = append(cas, hostca.PEM(c))
		}
	}
	return cas, warnings
}

// isCA tells CAs from servers. Version 1 roots say nothing of themselves; one
// that signed itself was made to be trusted.
func isCA(c *x509.Certificate) bool {
	if c.BasicConstraintsValid {
		return c.IsCA
	}
	return bytes.Equal(c.RawSubject, c.RawIssuer)
}

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("is not one PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}
