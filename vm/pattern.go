package vm

import (
	"regexp"
	"sync"
)

// Pattern is regexp.MustCompile for a variable of a package, put off until the
// first call. A machine's start runs this program several times, and each run
// needs few of all its expressions.
func Pattern(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}
