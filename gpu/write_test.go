package gpu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == WriteArg {
		os.Exit(WriteMain(os.Args))
	}
	if len(os.Args) > 1 && os.Args[1] == ReadArg {
		os.Exit(ReadMain(os.Args))
	}
	os.Exit(m.Run())
}

// TestWrite writes as a child does for real. A FIFO without a reader stands
// for a driver that does not let go.
func TestWrite(t *testing.T) {
	root := t.TempDir()
	h := Host{Root: root, Patience: 10 * time.Second}
	if err := os.WriteFile(filepath.Join(root, "override"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.write(t.Context(), "/override", "\n"); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(root, "override")); err != nil || string(data) != "\n" {
		t.Errorf("%q, %v", data, err)
	}
	if err := h.write(t.Context(), "/nothing", "x"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
	if err := unix.Mkfifo(filepath.Join(root, "unbind"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Patience = 200 * time.Millisecond
	if err := h.write(t.Context(), "/unbind", "x"); !errors.Is(err, ErrBlocked) {
		t.Error(err)
	}
}
