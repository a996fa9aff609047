package images

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// punchHoles gives back the blocks of a file that were allocated and never
// written. mke2fs reserves the inode tables that way when it promises that
// they are zero (-E lazy_itable_init=0); without that promise the guest's kernel
// would write them all, some 300 MB, into the overlay soon after its first boot.
func punchHoles(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	fd, size := int(f.Fd()), info.Size()
	for offset := int64(0); offset < size; {
		hole, err := unix.Seek(fd, offset, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("seek hole in %s: %w", path, err)
		}
		if hole >= size {
			break
		}
		data, err := unix.Seek(fd, hole, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // the rest is a hole
			data, err = size, nil
		}
		if err != nil {
			return fmt.Errorf("seek data in %s: %w", path, err)
		}
		err = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, hole, data-hole)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // costs room only
		}
		if err != nil {
			return fmt.Errorf("punch hole in %s: %w", path, err)
		}
		offset = data
	}
	return f.Close()
}
