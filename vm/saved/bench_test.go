package saved

import (
	"bytes"
	"os"
	"testing"
)

// BenchmarkLoadMemory is the copy that every restore waits for: 128 MiB of
// content in a guest of 1 GiB, from the page cache.
func BenchmarkLoadMemory(b *testing.B) {
	const content = 128 << 20
	dir := b.TempDir()
	f, err := NewMemory(1 << 30)
	if err != nil {
		b.Fatal(err)
	}
	chunk := bytes.Repeat([]byte{1, 2, 3, 4}, 64<<10)
	for i := range int64(content / len(chunk)) {
		if _, err := f.WriteAt(chunk, i*2*int64(len(chunk))); err != nil {
			b.Fatal(err)
		}
	}
	if err := Write(dir, f, bytes.NewReader(nil)); err != nil {
		b.Fatal(err)
	}
	f.Close()
	s, err := Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(content)
	for b.Loop() {
		var to *os.File
		if to, err = NewMemory(1 << 30); err != nil {
			b.Fatal(err)
		}
		if err := s.LoadMemory(to); err != nil {
			b.Fatal(err)
		}
		to.Close()
	}
}
