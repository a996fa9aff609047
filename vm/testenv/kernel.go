package testenv

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// Vmlinux writes the kernel of Debian13 uncompressed into a file of its own,
// which QEMU starts by its PVH entry: to unpack itself takes a kernel half a
// minute where an emulated machine emulates another.
func Vmlinux(t testing.TB, debian string) (file string) {
	t.Helper()
	image, err := os.ReadFile(filepath.Join(debian, "boot/vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	// Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
	payload := image[(int(image[0x1f1])+1)*512+int(binary.LittleEndian.Uint32(image[0x248:])):]
	payload = payload[:binary.LittleEndian.Uint32(image[0x24c:])-4] // after it: the size when unpacked
	unpack, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer unpack.Close()
	kernel, err := unpack.DecodeAll(payload, nil)
	if err != nil {
		t.Fatalf("unpack the kernel: %v", err)
	}
	file = filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(file, kernel, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}
