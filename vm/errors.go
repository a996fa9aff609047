package vm

import "errors"

// Classes of failure that the command line turns into exit codes. Wrap them
// with %w; the text around them says what was attempted on what.
var (
	ErrHost     = errors.New("the host cannot do this") // exit code 3
	ErrNotFound = errors.New("not found")               // exit code 4
	ErrPolicy   = errors.New("refused by policy")       // exit code 5
	ErrTimeout  = errors.New("timed out")               // exit code 124
	ErrUsage    = errors.New("invalid use")             // exit code 2
)

// WithHint attaches to err the one line that tells a user what to do next.
// It returns nil when err is nil.
func WithHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{err: err, hint: hint}
}

// Hint returns the outermost hint attached to err or to an error it wraps,
// or "".
func Hint(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// Classify marks err as belonging to one of the classes above without
// changing its text.
func Classify(class, err error) error {
	if err == nil {
		return nil
	}
	return &classified{class: class, err: err}
}

type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }
func (h *hinted) Hint() string  { return h.hint }

type classified struct{ class, err error }

func (c *classified) Error() string   { return c.err.Error() }
func (c *classified) Unwrap() []error { return []error{c.err, c.class} }
