package saved

import (
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// NewMemory makes the memory of a machine: size bytes of zeros without a name
// in any file system, which nobody can shrink or grow.
func NewMemory(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("guest-memory", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make guest memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "guest memory")
	if err = f.Truncate(size); err == nil {
		// A server that maps the memory would die of a part that goes missing.
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make guest memory: %w", err)
	}
	return f, nil
}

// LoadMemory fills memory, which must be all zeros, with what was saved. An
// error that wraps ErrDamaged means that the files are not what was written.
func (s *Saved) LoadMemory(memory *os.File) error {
	f, err := os.Open(filepath.Join(s.dir, memoryFile))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	defer f.Close()
	if info, err := memory.Stat(); err != nil || info.Size() != s.index.Size {
		return fmt.Errorf("%w: memory of %d bytes was saved", ErrDamaged, s.index.Size)
	}
	// By a buffer that stays in the processor's cache: mapping the memory
	// instead would save a copy and cost a page fault for each page.
	var got sum
	buf := make([]byte, block/4)
	for _, g := range s.index.Segments {
		for offset, end := g[0], g[0]+g[1]; offset < end; {
			part := buf[:min(int64(len(buf)), end-offset)]
			if _, err := io.ReadFull(f, part); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrDamaged, memoryFile, err)
			}
			got.CRC = crc32.Update(got.CRC, castagnoli, part)
			if _, err := memory.WriteAt(part, offset); err != nil {
				return fmt.Errorf("fill guest memory: %w", err)
			}
			offset += int64(len(part))
		}
	}
	if got.CRC != s.index.Memory.CRC {
		return fmt.Errorf("%w: %s has changed", ErrDamaged, memoryFile)
	}
	return nil
}

// State returns the saved state of the devices.
func (s *Saved) State() ([]byte, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, stateFile))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if int64(len(data)) != s.index.State.Bytes || crc32.Checksum(data, castagnoli) != s.index.State.CRC {
		return nil, fmt.Errorf("%w: %s has changed", ErrDamaged, stateFile)
	}
	return data, nil
}
