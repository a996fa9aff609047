package saved

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Checksum is the CRC-32C of a file, for noticing decay.
func Checksum(path string) (uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	crc := crc32.New(castagnoli)
	_, err = io.Copy(crc, f)
	return crc.Sum32(), err
}

// Move gives dst, a directory that it makes, what was saved in src, and nothing
// else that is there.
func Move(dst, src string) error {
	if err := os.MkdirAll(dst, 0o700); err != nil {
		return fmt.Errorf("move a saved machine: %w", err)
	}
	for _, name := range []string{memoryFile, stateFile, ImageFile, indexFile} { // the index last, as ever
		err := os.Rename(filepath.Join(src, name), filepath.Join(dst, name))
		if err != nil && (name == indexFile || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("move a saved machine: %w", err)
		}
	}
	return nil
}

// Copy copies a disk, which nobody may be writing to, to a new file of the
// caller's: in the kernel, and without copying where the file system can share
// blocks. What a failed copy leaves is removed.
func Copy(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("copy a disk: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("copy a disk: %w", err)
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		os.Remove(dst)
		return fmt.Errorf("copy a disk: %w", err)
	}
	return nil
}
