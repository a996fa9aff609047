package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// smallImage puts an image into a cache that no build has made: a disk of 8 MiB
// with three stretches of data, and a small file.
func smallImage(t *testing.T, c *Cache) *Image {
	t.Helper()
	const id = "debian-13-0123456789ab"
	dir := c.imageDir(id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	disk, err := os.Create(filepath.Join(dir, rootDiskName))
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1 << 20, 5<<20 + 4096} {
		if _, err := disk.WriteAt(bytes.Repeat([]byte{byte(at>>16) + 1}, 200_000), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(disk.Truncate(8<<20), disk.Close(), os.WriteFile(filepath.Join(dir, kernelName), []byte("kernel"), 0o644)); err != nil {
		t.Fatal(err)
	}
	m := Manifest{Format: formatVersion, ID: id, Name: "debian-13", Arch: debianArch(), RootSize: 8 << 20}
	if m.Files, err = digestDir(dir); err != nil {
		t.Fatal(err)
	}
	if err := writeManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	img, err := c.load(id)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func openCache(t *testing.T) *Cache {
	t.Helper()
	c, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// receive takes over an image from a stream that ends after limit bytes, or is
// changed on the way, and reports how many bytes went.
func receive(t *testing.T, to *Cache, img *Image, limit int64, change func([]byte) []byte) (int64, error) {
	t.Helper()
	r, err := to.Receive(t.Context(), img.Manifest)
	if err != nil || r == nil {
		return 0, err
	}
	defer r.Close()
	from, err := r.Offsets()
	if err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if err := img.Send(t.Context(), from, &stream, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	n := int64(stream.Len())
	if err := r.Take(t.Context(), from, io.LimitReader(bytes.NewReader(change(stream.Bytes())), limit)); err != nil {
		return n, err
	}
	return n, r.Finish(t.Context())
}

func unchanged(b []byte) []byte { return b }

func TestTransfer(t *testing.T) {
	here, there := openCache(t), openCache(t)
	img := smallImage(t, here)
	old := filepath.Join(there.dir, "incoming", "debian-12-0123456789ab")
	if err := errors.Join(os.MkdirAll(old, 0o755), os.Chtimes(old, time.Time{}, time.Now().Add(-2*keepIncoming))); err != nil {
		t.Fatal(err)
	}
	whole, err := receive(t, there, img, 1<<40, unchanged)
	if err != nil {
		t.Fatal(err)
	}
	got, err := there.Get(img.ID)
	if err == nil {
		err = got.Verify(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(img.Manifest, got.Manifest); diff != "" {
		t.Error(diff)
	}
	if n, err := got.DiskUsage(); err != nil || n > 2<<20 {
		t.Errorf("a disk with holes takes %d bytes, %v", n, err)
	}
	if size, err := img.Size(nil); err != nil || size < 600_000 || size > 2<<20 || whole > 2<<20 {
		t.Errorf("%d bytes were announced, %d sent, %v", size, whole, err)
	}
	if r, err := there.Receive(t.Context(), img.Manifest); r != nil || err != nil {
		t.Errorf("it is wanted again: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(there.dir, "incoming")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestTransferGoesOn cuts a transfer off at many places; the next sends less.
func TestTransferGoesOn(t *testing.T) {
	img := smallImage(t, openCache(t))
	for _, limit := range []int64{0, 1, 12, 70_000, 250_000, 400_000, 600_000, 614_000} {
		there := openCache(t)
		whole, err := receive(t, there, img, limit, unchanged)
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: %v", limit, err)
		}
		if _, err := there.Get(img.ID); err == nil {
			t.Errorf("cut after %d bytes, it is there", limit)
		}
		rest, err := receive(t, there, img, 1<<40, unchanged)
		if err != nil {
			t.Errorf("after %d bytes: %v", limit, err)
		}
		if saved := whole - rest; saved < limit-2*sparseBlock {
			t.Errorf("after %d bytes, %d of %d were sent", limit, rest, whole)
		}
		if got, err := there.Get(img.ID); err != nil || got.Verify(t.Context()) != nil {
			t.Errorf("after %d bytes: %v", limit, err)
		}
	}
}

func TestTransferRefuses(t *testing.T) {
	img := smallImage(t, openCache(t))
	there := openCache(t)
	flipped := func(b []byte) []byte { b = bytes.Clone(b); b[1000] ^= 1; return b }
	if _, err := receive(t, there, img, 1<<40, flipped); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a changed byte: %v", err)
	}
	if _, err := receive(t, there, img, 1<<40, unchanged); err != nil {
		t.Errorf("and then: %v", err)
	}
	for name, change := range map[string]func(*Manifest){
		"an id that is a path":   func(m *Manifest) { m.ID = "../x" },
		"another format":         func(m *Manifest) { m.Format++ },
		"another architecture":   func(m *Manifest) { m.Arch = "sparc" },
		"a file elsewhere":       func(m *Manifest) { m.Files[0].Name = "../../x" },
		"the manifest as a file": func(m *Manifest) { m.Files[0].Name = manifestName },
		"a negative size":        func(m *Manifest) { m.Files[0].Size = -1 },
		"no files":               func(m *Manifest) { m.Files = nil },
		"many files":             func(m *Manifest) { m.Files = make([]File, 1000) },
	} {
		m := img.Manifest
		m.Files = append([]File{}, m.Files...)
		m.ID = "debian-13-ba9876543210"
		change(&m)
		if r, err := there.Receive(t.Context(), m); err == nil || r != nil {
			t.Errorf("%s is taken", name)
		}
	}
	for name, head := range map[string][]byte{
		"beyond the end": binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, 1<<40), 10),
		"too long":       binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, 0), 1<<31),
		"before it":      binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, 1<<63), 10),
	} {
		there := openCache(t)
		if _, err := receive(t, there, img, 1<<40, func([]byte) []byte { return append(head, make([]byte, 100)...) }); err == nil || !strings.Contains(err.Error(), "a stretch of") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTransferEnds(t *testing.T) {
	img := smallImage(t, openCache(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := img.Send(ctx, nil, io.Discard, func(int64) {}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
