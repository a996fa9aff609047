package cloudinit

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"

	"github.com/goccy/go-yaml"
)

// Seed is everything that cloud-init is told, as typed values. Its
// instance-id is not among them: it follows from them.
type Seed struct {
	UserData      UserData
	LocalHostname string
	Network       *NetworkConfig // nil: cloud-init's default
}

// Files are a NoCloud seed's files as they stand on the ISO.
type Files struct {
	UserData      []byte
	MetaData      []byte
	NetworkConfig []byte // nil: none
	InstanceID    string
}

type metaData struct {
	InstanceID    string `yaml:"instance-id"`
	LocalHostname string `yaml:"local-hostname"`
}

// Render validates the seed and writes it as YAML.
func (s *Seed) Render() (Files, error) {
	if err := s.Validate(); err != nil {
		return Files{}, err
	}
	body, err := marshal(s.UserData)
	if err != nil {
		return Files{}, fmt.Errorf("render user-data: %w", err)
	}
	f := Files{UserData: append([]byte("#cloud-config\n"), body...)}
	if s.Network != nil {
		if f.NetworkConfig, err = marshal(s.Network); err != nil {
			return Files{}, fmt.Errorf("render network-config: %w", err)
		}
	}
	f.InstanceID = instanceID(f.UserData, f.NetworkConfig, []byte(s.LocalHostname))
	f.MetaData, err = marshal(metaData{f.InstanceID, s.LocalHostname})
	if err != nil {
		return Files{}, fmt.Errorf("render meta-data: %w", err)
	}
	return f, nil
}

// instanceID digests the parts, each behind its length, so that no bytes can
// move from one part to the next unseen.
func instanceID(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		_, _ = io.WriteString(h, strconv.Itoa(len(p))+":") // a hash never fails
		h.Write(p)
	}
	return "iid-" + hex.EncodeToString(h.Sum(nil))[:32]
}

// marshal writes v with every string in double quotes. The escapes that
// strconv.Quote uses for valid UTF-8 are all YAML escapes of the same meaning
// (https://yaml.org/spec/1.1/#id872840), and quoting everything leaves no
// string for YAML 1.1, which cloud-init's PyYAML speaks, to take for
// something else: yes, 012, 1:30 and ~ stay strings.
func marshal(v any) ([]byte, error) {
	return yaml.MarshalWithOptions(v, yaml.CustomMarshaler(func(s string) ([]byte, error) {
		return []byte(strconv.Quote(s)), nil
	}))
}
