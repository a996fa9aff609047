package libvirt

import (
	"bytes"
	"encoding/xml"
	"fmt"
)

// Namespace is the XML namespace of a domain's metadata that is agentvm's.
const Namespace = "https://github.com/agentvm/agentvm/domain/1.0"

// Metadata is what a domain carries of its machine, for people who look at a
// host's domains, and for agentvm to know its own.
type Metadata struct {
	XMLName   xml.Name `xml:"machine"`        // asked for by its namespace, it comes without
	ID        string   `xml:"id,attr"`        // the instance's, which is the domain's UUID too
	Name      string   `xml:"name,attr"`      // the instance's
	Workspace string   `xml:"workspace,attr"` // host directory
	User      int      `xml:"user,attr"`      // uid of whoever runs agentvm
	Config    string   `xml:"config,attr"`    // SHA-256 of the machine's description
}

// element writes the metadata with a prefix of its own, which libvirt wants.
func (m Metadata) element() (string, error) {
	var b bytes.Buffer
	b.WriteString(`<agentvm:machine xmlns:agentvm="` + Namespace + `"`)
	for _, a := range []struct{ name, value string }{
		{"id", m.ID}, {"name", m.Name}, {"workspace", m.Workspace}, {"user", fmt.Sprint(m.User)}, {"config", m.Config},
	} {
		b.WriteString(" " + a.name + `="`)
		if err := xml.EscapeText(&b, []byte(a.value)); err != nil {
			return "", err
		}
		b.WriteString(`"`)
	}
	b.WriteString("/>")
	return b.String(), nil
}

// parseMetadata reads the element as libvirt gives it back.
func parseMetadata(text string) (Metadata, error) {
	var m Metadata
	if err := xml.Unmarshal([]byte(text), &m); err != nil {
		return m, fmt.Errorf("read a domain's metadata: %w", err)
	}
	return m, nil
}
