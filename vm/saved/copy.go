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
// else that is there. From the first moment on nothing is saved in src, whatever
// comes of it and of the host.
func Move(dst, src string) error {
	if err := os.MkdirAll(dst, 0o700); err != nil {
		return fmt.Errorf("move a saved machine: %w", err)
	}
	last := filepath.Join(dst, indexFile)
	if err := errors.Join(os.Rename(filepath.Join(src, indexFile), last+".moving"), syncDir(src)); err != nil {
		return fmt.Errorf("move a saved machine: %w", err)
	}
	for _, name := range []string{memoryFile, stateFile, ImageFile} {
		if err := os.Rename(filepath.Join(src, name), filepath.Join(dst, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("move a saved machine: %w", err)
		}
	}
	if err := os.Rename(last+".moving", last); err != nil {
		return fmt.Errorf("move a saved machine: %w", err)
	}
	return nil
}

// Discard removes dir, if it is there. When it returns nothing is saved there, even
// should the host lose its power: a memory that came back beside the disk of a
// guest that has run since would destroy it.
func Discard(dir string) error {
	err := os.Remove(filepath.Join(dir, indexFile))
	switch {
	case err == nil:
		err = syncDir(dir)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	}
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		return fmt.Errorf("discard a saved machine: %w", err)
	}
	return nil
}

// syncDir makes what has become of the names in a directory last (fsync(2)).
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
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
