package supervisor

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
)

// Tail returns the last n lines of a file that a guest wrote, made harmless
// for a terminal: control characters are dropped.
func Tail(path string, n int) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the end of %s: %w", path, err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("read the end of %s: %w", path, err)
	}
	const window = 64 << 10
	buf := make([]byte, min(size, window))
	if _, err := f.ReadAt(buf, size-int64(len(buf))); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read the end of %s: %w", path, err)
	}
	lines := strings.Split(strings.TrimSpace(Printable(string(bytes.ToValidUTF8(buf, []byte("?"))))), "\n")
	if len(lines) == 1 && lines[0] == "" {
		return nil, nil
	}
	return lines[max(0, len(lines)-n):], nil
}

// Printable drops what could drive a terminal: escape sequences' introducers
// and every other control character but newline and tab.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || !unicode.IsControl(r) {
			return r
		}
		return -1
	}, s)
}
