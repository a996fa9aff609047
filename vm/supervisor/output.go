package supervisor

import (
	"strings"

	"github.com/agentvm/agentvm/vm/console"
)

// outputBytes is what is kept of what a command in the guest prints. The
// guest may be hostile: it could print until the host's memory is full.
const outputBytes = 64 << 10

// head keeps the beginning of what is written to it, tail the end.
type (
	head struct{ kept []byte }
	tail struct{ kept []byte }
)

func (h *head) Write(p []byte) (int, error) {
	h.kept = append(h.kept, p[:min(len(p), outputBytes-len(h.kept))]...)
	return len(p), nil
}

func (h *head) String() string { return string(h.kept) }

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	p = p[max(0, n-outputBytes):]
	drop := max(0, len(t.kept)+len(p)-outputBytes)
	t.kept = append(t.kept[:copy(t.kept, t.kept[drop:])], p...)
	return n, nil
}

func (t *tail) String() string { return string(t.kept) }

// reasonBytes is more than any reason worth reading.
const reasonBytes = 4 << 10

// plain makes a text that the guest had a part in fit to be shown: its
// control sequences would be obeyed by the terminal of whoever reads it.
func plain(s string) string {
	if len(s) > reasonBytes {
		s = s[:reasonBytes] + " [...]"
	}
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = console.Printable([]byte(line))
	}
	return strings.Join(lines, "\n")
}
