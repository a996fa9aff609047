package vm

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestWriteFile(t *testing.T) {
	elsewhere, dir := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", elsewhere)
	path := filepath.Join(dir, "key")
	then := time.Now().Add(-time.Hour).Truncate(time.Second)
	if err := os.Chtimes(elsewhere, then, then); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"old", "new"} {
		if err := WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != text {
			t.Errorf("read %q, %v", got, err)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("beside it lies %v, %v", left, err)
	}
	if info, err := os.Stat(elsewhere); err != nil || !info.ModTime().Equal(then) {
		t.Errorf("something was made in another directory: %v", err)
	}
}
