package remote

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestSending tells what goes to the other host, and how far it is.
func TestSending(t *testing.T) {
	c := newFake(t).mustDial()
	w := Workspace{Dir: t.TempDir(), State: t.TempDir(), Copy: Copy{ID: "0123456789abcdef", Name: "w"}}
	const size = 4 << 20
	var told []int64
	var parts []float64
	w.Sending = func(paths int, bytes int64) func(float64) {
		told = append(told, int64(paths), bytes)
		return func(part float64) { parts = append(parts, part) }
	}
	if err := os.WriteFile(filepath.Join(w.Dir, "large"), make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second has nothing to send
		if _, err := w.Sync(t.Context(), c, ""); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(told, []int64{1, size}) {
		t.Errorf("told of %d", told)
	}
	if !slices.IsSorted(parts) || len(parts) < 10 || len(parts) > 100 || parts[len(parts)-1] != 1 {
		t.Errorf("parts %v", parts)
	}
}
