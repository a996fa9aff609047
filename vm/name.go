package vm

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/agnivade/levenshtein"
)

// maxName keeps an instance's name usable as a host name label.
const maxName = 40

var nameRE = Pattern(`^[a-z]([a-z0-9-]*[a-z0-9])?$`)

// ValidName reports why name cannot name an instance, or nil. A name is also
// the guest's host name, so the rules are those of RFC 1123 labels, with a
// letter first.
func ValidName(name string) error {
	switch {
	case name == "":
		return errors.New("a name cannot be empty")
	case len(name) > maxName:
		return fmt.Errorf("name %q is longer than %d characters", name, maxName)
	case !nameRE().MatchString(name):
		return fmt.Errorf("name %q must be lower-case letters, digits and dashes, and start with a letter", name)
	}
	return nil
}

var variableRE = Pattern(`^[A-Za-z_][A-Za-z0-9_]*$`)

// ValidVariable reports whether every shell takes name for an environment
// variable's.
func ValidVariable(name string) bool { return variableRE().MatchString(name) }

// NameFor makes a valid name out of a workspace's directory name.
func NameFor(workspace string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(filepath.Base(workspace)) {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	name := b.String()
	if name == "" || name[0] >= '0' && name[0] <= '9' {
		name = "vm-" + name
	}
	return strings.Trim(name[:min(len(name), maxName-5)], "-")
}

// Nearest returns the candidate that a mistyped word most likely meant, or "".
func Nearest(word string, candidates []string) string {
	best, distance := "", max(2, len(word)/3)+1
	for _, c := range candidates {
		if d := levenshtein.ComputeDistance(strings.ToLower(word), strings.ToLower(c)); d < distance {
			best, distance = c, d
		}
	}
	return best
}
