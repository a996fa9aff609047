// Package saved keeps what a paused machine is, so that one can go on from it:
// the guest's memory and the state of its devices. A directory holds it.
//
// It promises that a directory which opens is complete: its index is written
// last, and what it indexes is checked against it as it is read. Memory that
// holds nothing but zeros takes no room.
package saved

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Format is the version of the files.
const Format = 2

// Files of the directory.
const (
	indexFile  = "saved.json"
	memoryFile = "memory" // segments, one after the other
	stateFile  = "state"  // QEMU's own format

	// ImageFile is all of a machine in the format of another, libvirt, in place
	// of the other two.
	ImageFile = "image"
)

// ErrDamaged is a directory whose files do not fit together.
var ErrDamaged = errors.New("saved machine is damaged")

// index is the content of indexFile.
type index struct {
	Format   int       `json:"format"`
	Size     int64     `json:"size"`     // bytes of guest memory
	Segments []segment `json:"segments"` // in memory's order
	Memory   sum       `json:"memory"`
	State    sum       `json:"state"`
	Image    int64     `json:"image,omitempty"` // bytes of ImageFile; 0: there is none
}

// segment is a stretch of guest memory that is not zero, in bytes.
type segment [2]int64 // offset, length

// sum guards against truncation and decay, not against malice: whoever can
// write the files can write the index.
type sum struct {
	Bytes int64  `json:"bytes"`
	CRC   uint32 `json:"crc32c"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli) // the processor has an instruction for it

// Saved is a directory that holds a machine.
type Saved struct {
	dir   string
	index index
}

// Open reads the index. It fails with fs.ErrNotExist when dir holds none.
func Open(dir string) (*Saved, error) {
	data, err := os.ReadFile(filepath.Join(dir, indexFile))
	if err != nil {
		return nil, fmt.Errorf("saved machine: %w", err)
	}
	s := &Saved{dir: dir}
	if err := json.Unmarshal(data, &s.index); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, indexFile, err)
	}
	if s.index.Format != Format {
		return nil, fmt.Errorf("%w: format %d, and this program knows %d", ErrDamaged, s.index.Format, Format)
	}
	if s.index.Image != 0 {
		return nil, fmt.Errorf("%w: libvirt has saved it", ErrDamaged)
	}
	var total, end int64
	for _, g := range s.index.Segments {
		if g[0] < end || g[1] <= 0 || g[0] > s.index.Size-g[1] {
			return nil, fmt.Errorf("%w: segments overlap or leave the memory", ErrDamaged)
		}
		total, end = total+g[1], g[0]+g[1]
	}
	if total != s.index.Memory.Bytes {
		return nil, fmt.Errorf("%w: segments of %d bytes, and a memory of %d", ErrDamaged, total, s.index.Memory.Bytes)
	}
	return s, nil
}

// Exists reports whether a machine was saved in dir, whole or not.
func Exists(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, indexFile))
	return err == nil
}

// MemorySize is the guest's memory in bytes.
func (s *Saved) MemorySize() int64 { return s.index.Size }

// Bytes is the room that the files take.
func (s *Saved) Bytes() int64 { return s.index.Memory.Bytes + s.index.State.Bytes }

// Write saves the guest memory in memory, a file with holes, and the state
// that r gives into dir.
func Write(dir string, memory *os.File, r io.Reader) error {
	ix := index{Format: Format}
	var err error
	if ix.State, err = writeState(filepath.Join(dir, stateFile), r); err != nil {
		return fmt.Errorf("save the machine's state: %w", err)
	}
	if err := ix.writeMemory(filepath.Join(dir, memoryFile), memory); err != nil {
		return fmt.Errorf("save the machine's memory: %w", err)
	}
	return ix.write(dir)
}

// write makes the directory one that opens.
func (ix *index) write(dir string) error {
	data, err := json.Marshal(ix)
	if err != nil {
		return err
	}
	if err := vm.WriteFile(filepath.Join(dir, indexFile), data, 0o600); err != nil {
		return fmt.Errorf("save the machine: %w", err)
	}
	return nil
}

// SealImage makes dir one in which a machine was saved, whose ImageFile is whole.
// That need not be readable: libvirt's is root's.
func SealImage(dir string) error {
	size, err := imageSize(dir)
	if err != nil {
		return fmt.Errorf("save the machine: %w", err)
	}
	return (&index{Format: Format, Image: size}).write(dir)
}

// imageSize is that of the ImageFile in dir, in bytes.
func imageSize(dir string) (int64, error) {
	fi, err := os.Lstat(filepath.Join(dir, ImageFile))
	if err != nil {
		return 0, err
	}
	if fi.Size() == 0 || !fi.Mode().IsRegular() {
		return 0, fmt.Errorf("%w: %s is empty", ErrDamaged, ImageFile)
	}
	return fi.Size(), nil
}

// CheckImage returns the ImageFile in dir, if it is as long as it was. What else
// may have happened to it, whoever reads it has to see. One that could not be
// sealed is returned as it is: for commands nothing is saved there ([Exists]), and
// the process that tried can go on from it.
func CheckImage(dir string) (path string, err error) {
	size, err := imageSize(dir)
	data, unsealed := os.ReadFile(filepath.Join(dir, indexFile))
	var ix index
	switch {
	case errors.Is(unsealed, fs.ErrNotExist):
		ix = index{Format: Format, Image: size}
	case unsealed != nil:
		return "", fmt.Errorf("saved machine: %w", unsealed)
	case err != nil:
		return "", fmt.Errorf("%w: %w", ErrDamaged, err)
	default:
		if err := json.Unmarshal(data, &ix); err != nil {
			return "", fmt.Errorf("%w: %s: %w", ErrDamaged, indexFile, err)
		}
	}
	if err != nil {
		return "", fmt.Errorf("saved machine: %w", err)
	}
	if ix.Format != Format || size != ix.Image {
		return "", fmt.Errorf("%w: %s has %d bytes, and had %d", ErrDamaged, ImageFile, size, ix.Image)
	}
	return filepath.Join(dir, ImageFile), nil
}

func writeState(path string, r io.Reader) (s sum, err error) {
	f, err := create(path)
	if err != nil {
		return s, err
	}
	defer f.Close()
	crc := crc32.New(castagnoli)
	if s.Bytes, err = io.Copy(io.MultiWriter(f, crc), r); err != nil {
		return s, err
	}
	s.CRC = crc.Sum32()
	return s, f.Sync()
}

func create(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
}

const (
	page  = 4096
	block = 1 << 20 // bytes looked at in one go
)

func (ix *index) writeMemory(path string, memory *os.File) error {
	info, err := memory.Stat()
	if err != nil {
		return err
	}
	ix.Size = info.Size()
	f, err := create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, block)
	for offset := int64(0); offset < ix.Size; {
		if offset, err = seek(memory, offset, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			break // nothing but a hole follows
		} else if err != nil {
			return err
		}
		hole, err := seek(memory, offset, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for offset < hole {
			part := buf[:min(block, hole-offset)]
			if _, err := memory.ReadAt(part, offset); err != nil {
				return err
			}
			if err := ix.append(f, part, offset); err != nil {
				return err
			}
			offset += int64(len(part))
		}
	}
	return f.Sync()
}

func seek(f *os.File, offset int64, whence int) (int64, error) {
	return unix.Seek(int(f.Fd()), offset, whence)
}

// append writes the pages of part, which lies at offset, that hold anything.
func (ix *index) append(w io.Writer, part []byte, offset int64) error {
	for i := 0; i < len(part); {
		n := min(page, len(part)-i)
		if zero(part[i : i+n]) {
			i += n
			continue
		}
		j := i + n
		for j < len(part) && !zero(part[j:min(j+page, len(part))]) {
			j = min(j+page, len(part))
		}
		if _, err := w.Write(part[i:j]); err != nil {
			return err
		}
		ix.Memory.CRC = crc32.Update(ix.Memory.CRC, castagnoli, part[i:j])
		ix.Memory.Bytes += int64(j - i)
		at := offset + int64(i)
		if last := len(ix.Segments) - 1; last >= 0 && ix.Segments[last][0]+ix.Segments[last][1] == at {
			ix.Segments[last][1] += int64(j - i)
		} else {
			ix.Segments = append(ix.Segments, segment{at, int64(j - i)})
		}
		i = j
	}
	return nil
}

var zeros [page]byte

func zero(b []byte) bool { return string(b) == string(zeros[:len(b)]) }
