package mirror

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode/utf8"
)

// Kind is what an Entry is.
type Kind string

// Kinds of entries.
const (
	File      Kind = "file"
	Directory Kind = "dir"
	Link      Kind = "link"
	Other     Kind = "other" // stays where it is
)

// Entry describes one path of a directory.
type Entry struct {
	Path   string      `json:"path"` // relative, with slashes
	Kind   Kind        `json:"kind"`
	Perm   fs.FileMode `json:"perm,omitempty"`   // of files and directories
	Size   int64       `json:"size,omitempty"`   // of a file, in bytes
	Hash   string      `json:"hash,omitempty"`   // of a file's content: SHA-256, in hex
	Target string      `json:"target,omitempty"` // of a link
	Time   int64       `json:"time,omitempty"`   // of a file's last change, in nanoseconds; the guest's to choose
	Stamp  *Stamp      `json:"stamp,omitempty"`  // on the side where it was read
}

// Stamp is what of a file changes with its content, whoever changes that: the
// kernel sets the time of the last change of its inode.
type Stamp struct {
	Inode  uint64 `json:"inode"`
	Change int64  `json:"change"` // nanoseconds
}

// same reports whether two paths hold the same; nil is nothing.
func same(a, b *Entry) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Kind == b.Kind && a.Perm == b.Perm && a.Size == b.Size && a.Hash == b.Hash && a.Target == b.Target && a.Kind != Other
}

// Bounds of what is looked at.
const (
	maxEntries = 500_000
	maxPaths   = 64 << 20 // bytes of all paths and targets
	maxPath    = 4096     // PATH_MAX

	// maxFile is how many bytes a file may have. One of holes takes nobody
	// anything to make, and must be read to its end.
	maxFile = 64 << 30
)

// ErrTooLarge marks a directory with more in it than can be kept in step.
var ErrTooLarge = errors.New("more files than can be kept in step")

// Manifest describes a directory, by path.
type Manifest map[string]*Entry

// add puts an entry in, within the bounds. paths counts their bytes.
func (m Manifest) add(e *Entry, paths *int) error {
	if *paths += len(e.Path) + len(e.Target); *paths > maxPaths || len(m) >= maxEntries {
		return fmt.Errorf("%w: at most %d, with paths of %d MiB", ErrTooLarge, maxEntries, maxPaths>>20)
	}
	m[e.Path] = e
	return nil
}

// Sum is the same for manifests that are the same on both sides: what stays
// where it is does not count.
func (m Manifest) Sum() string {
	h := sha256.New()
	for _, p := range slices.Sorted(maps.Keys(m)) {
		if e := m[p]; e.Kind != Other {
			fmt.Fprintf(h, "%q %s %o %d %q %q\n", e.Path, e.Kind, e.Perm, e.Size, e.Hash, e.Target)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Plain is the manifest without what only one side knows.
func (m Manifest) Plain() Manifest {
	all := make(Manifest, len(m))
	for p, e := range m {
		all[p] = plain(e)
	}
	return all
}

// Check looks at a manifest that came from elsewhere.
func (m Manifest) Check() error {
	paths := 0
	if len(m) > maxEntries {
		return fmt.Errorf("%w: at most %d", ErrTooLarge, maxEntries)
	}
	for key, e := range m {
		if e == nil || e.Path != key {
			return fmt.Errorf("entry %q is not what its key says", key)
		}
		if err := e.check(); err != nil {
			return err
		}
		if paths += len(key) + len(e.Target); paths > maxPaths {
			return ErrTooLarge
		}
		if dir := path.Dir(key); dir != "." && (m[dir] == nil || m[dir].Kind != Directory) {
			return fmt.Errorf("%q lies in no directory", key)
		}
	}
	return nil
}

func (e *Entry) check() error {
	digest, err := hex.DecodeString(e.Hash)
	switch {
	case !goodPath(e.Path):
		return fmt.Errorf("%q is not a path of a workspace", e.Path)
	case e.Perm&^fs.ModePerm != 0 || e.Size < 0 || e.Size > maxFile:
		return fmt.Errorf("%q: mode %o, %d bytes", e.Path, e.Perm, e.Size)
	case (e.Kind == File) != (err == nil && len(digest) == 32):
		return fmt.Errorf("%q: digest %q", e.Path, e.Hash)
	case (e.Kind == Link) != (e.Target != "") || len(e.Target) > maxPath || strings.ContainsRune(e.Target, 0):
		return fmt.Errorf("%q: target %q", e.Path, e.Target)
	case e.Kind == File || e.Kind == Link || e.Kind == Directory || e.Kind == Other:
		return nil
	}
	return fmt.Errorf("%q: kind %q", e.Path, e.Kind)
}

// goodPath accepts clean relative paths that stay where they start.
func goodPath(p string) bool {
	return p != "." && len(p) <= maxPath && utf8.ValidString(p) && !strings.ContainsRune(p, 0) && path.Clean(p) == p && !path.IsAbs(p) && p != ".." && !strings.HasPrefix(p, "../")
}
