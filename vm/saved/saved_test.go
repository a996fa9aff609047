package saved

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const size = 16 << 20

// memory returns guest memory with content at these offsets.
func memory(t *testing.T, content map[int64][]byte) *os.File {
	t.Helper()
	f, err := NewMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	for offset, b := range content {
		if _, err := f.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(r.Uint32()) | 1
	}
	return b
}

func all(t *testing.T, f *os.File) []byte {
	t.Helper()
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func save(t *testing.T, f *os.File) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := Write(dir, f, strings.NewReader("the state")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRoundTrip(t *testing.T) {
	for name, content := range map[string]map[int64][]byte{
		"nothing":       nil,
		"first byte":    {0: {1}},
		"last byte":     {size - 1: {1}},
		"across blocks": {block - 5: noise(3*block + 10)},
		"scattered":     {page: {1}, 3 * page: {2}, 9 << 20: noise(5 * page), 12<<20 + 7: {3}},
		"zeros":         {2 << 20: make([]byte, 2<<20), 5 << 20: {1}},
	} {
		t.Run(name, func(t *testing.T) {
			f := memory(t, content)
			s, err := Open(save(t, f))
			if err != nil {
				t.Fatal(err)
			}
			back := memory(t, nil)
			if err := s.LoadMemory(back); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(all(t, f), all(t, back)) {
				t.Error("the memory came back different")
			}
			if state, err := s.State(); err != nil || string(state) != "the state" {
				t.Errorf("state %q, %v", state, err)
			}
		})
	}
}

func TestZerosTakeNoRoom(t *testing.T) {
	s, err := Open(save(t, memory(t, map[int64][]byte{0: make([]byte, 8<<20), 9 << 20: {1}})))
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Bytes() - int64(len("the state")); got != page {
		t.Errorf("%d bytes for one page", got)
	}
}

func TestDamage(t *testing.T) {
	f := memory(t, map[int64][]byte{page: noise(64 * page)})
	alter := func(name string, change func(b []byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, change(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	cut := func(b []byte) []byte { return b[:len(b)-1] }
	replace := func(old, new string) func([]byte) []byte {
		return func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(new), 1) }
	}
	for name, harm := range map[string]func(*testing.T, string){
		"a flipped bit of memory": alter(memoryFile, flip),
		"memory cut short":        alter(memoryFile, cut),
		"a flipped bit of state":  alter(stateFile, flip),
		"state cut short":         alter(stateFile, cut),
		"index cut short":         alter(indexFile, cut),
		"another format":          alter(indexFile, replace(fmt.Sprintf(`"format":%d`, Format), fmt.Sprintf(`"format":%d`, Format+1))),
		"a segment outside":       alter(indexFile, replace(`[4096,`, `[16777216,`)),
		"a segment too long":      alter(indexFile, replace(`,262144]`, `,262145]`)),
		"no memory":               func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, memoryFile)) },
		"no state":                func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, stateFile)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := save(t, f)
			harm(t, dir)
			s, err := Open(dir)
			if err == nil {
				err = s.LoadMemory(memory(t, nil))
			}
			if err == nil {
				_, err = s.State()
			}
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestUnfinished: what a save that was cut short leaves is not taken for whole.
func TestUnfinished(t *testing.T) {
	dir := save(t, memory(t, nil))
	if err := os.Remove(filepath.Join(dir, indexFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestMemoryKeepsItsSize(t *testing.T) {
	f := memory(t, nil)
	if f.Truncate(1) == nil || f.Truncate(2*size) == nil {
		t.Error("its size can be changed")
	}
}

func FuzzOpen(f *testing.F) {
	f.Add([]byte(`{"format":1,"size":16777216,"segments":[[4096,4096]],"memory":{"bytes":4096,"crc32c":1},"state":{"bytes":1,"crc32c":1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		for name, b := range map[string][]byte{indexFile: data, memoryFile: noise(page), stateFile: {1}} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s, err := Open(dir)
		if err != nil || s.MemorySize() != size {
			return
		}
		_ = s.LoadMemory(memory(t, nil)) // must not crash
	})
}

// TestImage is a machine in another's format.
func TestImage(t *testing.T) {
	dir := t.TempDir()
	if err := SealImage(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without an image: %v", err)
	}
	path := filepath.Join(dir, ImageFile)
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	if err := SealImage(dir); !errors.Is(err, ErrDamaged) || Exists(dir) {
		t.Errorf("an empty image: %v", err)
	}
	for name, dir := range map[string]string{"an empty image": dir, "nothing": t.TempDir()} {
		if got, err := CheckImage(dir); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
	write("all of it")
	if got, err := CheckImage(dir); err != nil || got != path {
		t.Errorf("not sealed: %q, %v", got, err)
	}
	if err := SealImage(dir); err != nil || !Exists(dir) {
		t.Fatal(err)
	}
	if got, err := CheckImage(dir); err != nil || got != path {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("opened as QEMU's own: %v", err)
	}
	moved := filepath.Join(t.TempDir(), "moved")
	if err := Move(moved, dir); err != nil || Exists(dir) {
		t.Errorf("moved: %v", err)
	}
	if err := Move(dir, moved); err != nil || !Exists(dir) {
		t.Errorf("moved back: %v", err)
	}
	if err := Move(moved, t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("moved nothing: %v", err)
	}
	for range 2 { // the second time there is nothing
		if err := Discard(moved); err != nil || Exists(moved) {
			t.Errorf("discarded: %v", err)
		}
	}
	write("all")
	if _, err := CheckImage(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("a short image: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := CheckImage(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("no image: %v", err)
	}
	if _, err := CheckImage(save(t, memory(t, nil))); !errors.Is(err, ErrDamaged) {
		t.Errorf("QEMU's own: %v", err)
	}
}
