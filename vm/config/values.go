package config

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
)

// Size is a number of bytes, written as "4GiB", "512M" or a plain number.
// Units are binary, whether spelled GiB, GB or G.
type Size int64

// String renders the size in binary units.
func (s Size) String() string { return units.BytesSize(float64(s)) }

// ParseSize reads a size as the configuration and the flags write it.
func ParseSize(s string) (Size, error) {
	n, err := units.RAMInBytes(strings.TrimSpace(s))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not a size; write for example 4GiB or 512MiB", s)
	}
	return Size(n), nil
}

// UnmarshalYAML implements the node form of goccy/go-yaml, which keeps the position.
func (s *Size) UnmarshalYAML(n ast.Node) error {
	v, err := ParseSize(scalar(n))
	if err != nil {
		return atNode(n, err.Error())
	}
	*s = v
	return nil
}

// MarshalYAML writes the size back in the form that people write.
func (s Size) MarshalYAML() ([]byte, error) { return []byte(s.String()), nil }

// Count is a whole number; unlike an int, it refuses 1.5 rather than round it.
type Count int

// UnmarshalYAML implements the node form of goccy/go-yaml, which keeps the position.
func (c *Count) UnmarshalYAML(n ast.Node) error {
	v, err := strconv.Atoi(scalar(n))
	if err != nil {
		return atNode(n, fmt.Sprintf("%q is not a whole number", scalar(n)))
	}
	*c = Count(v)
	return nil
}

// scalar is the text of a scalar node; for anything else a description.
func scalar(n ast.Node) string {
	if s, ok := n.(ast.ScalarNode); ok {
		return fmt.Sprint(s.GetValue())
	}
	return strings.TrimSpace(n.String())
}

func atNode(n ast.Node, msg string) error {
	return &yaml.SyntaxError{Message: msg, Token: n.GetToken()}
}
