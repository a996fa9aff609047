package images

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/agentvm/agentvm/vm"
)

// Names of the files of an image.
const (
	manifestName = "manifest.json"
	rootDiskName = "root.img"
	kernelName   = "vmlinuz"
	initrdName   = "initrd.img"
	treeName     = "tree.tar.zst" // of a base image only: what layers start from
)

// formatVersion is raised when what the files of an image mean changes. It is
// part of every key, so that images of another format are built anew.
const formatVersion = 1

// ErrCorrupt marks an image whose manifest cannot be read or whose files are
// not those that the manifest describes. [Cache.Ensure] builds it anew.
var ErrCorrupt = errors.New("image is damaged")

// Manifest describes an image completely. Digests name their algorithm.
type Manifest struct {
	Format  int       `json:"format"`
	ID      string    `json:"id"`
	Key     string    `json:"key"` // sha256 of everything that decides the content, in hex
	Name    string    `json:"name"`
	Suite   string    `json:"suite"`
	Arch    string    `json:"arch"`           // Debian's name of the architecture
	Base    string    `json:"base,omitempty"` // ID of the image that a layer is built on
	Spec    Spec      `json:"spec"`
	Recipe  string    `json:"recipe"` // digest of the recipe's files
	Created time.Time `json:"created"`

	BuildSeconds float64           `json:"build_seconds"`
	Builder      map[string]string `json:"builder,omitempty"` // program or mode → version or value

	Kernel  string `json:"kernel"`  // release, as uname -r prints it
	Cmdline string `json:"cmdline"` // recommended kernel command line

	RootSize int64          `json:"root_size"` // size of the root disk as the guest sees it, in bytes
	Files    []File         `json:"files"`
	Packages []Package      `json:"packages"`
	NPM      []NPMPackage   `json:"npm,omitempty"`      // those asked for, resolved
	NPMTree  []NPMInstalled `json:"npm_tree,omitempty"` // everything under node_modules
}

// File is one file of an image.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Digest string `json:"digest"` // see [Digest]
}

// Package is one installed Debian package.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Arch    string `json:"arch"`
}

// NPMInstalled is one npm package found in an image.
type NPMInstalled struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// readManifest reads the manifest of the image in dir. The error wraps
// [vm.ErrNotFound] or [ErrCorrupt].
func readManifest(dir string) (Manifest, error) {
	var m Manifest
	path := filepath.Join(dir, manifestName)
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, statErr := os.Stat(dir); statErr == nil {
			return m, fmt.Errorf("%s: no manifest: %w", dir, ErrCorrupt)
		}
		return m, fmt.Errorf("image %s: %w", filepath.Base(dir), vm.ErrNotFound)
	case err != nil:
		return m, err
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("read %s: %w: %w", path, ErrCorrupt, err)
	}
	if err := m.check(dir); err != nil {
		return m, fmt.Errorf("%s: %w: %w", path, ErrCorrupt, err)
	}
	return m, nil
}

// check compares what can be compared without reading the files' content.
func (m Manifest) check(dir string) error {
	if m.Format != formatVersion {
		return fmt.Errorf("format %d, not %d", m.Format, formatVersion)
	}
	if m.ID != filepath.Base(dir) {
		return fmt.Errorf("describes image %q", m.ID)
	}
	if len(m.Files) == 0 {
		return errors.New("lists no files")
	}
	for _, f := range m.Files {
		info, err := os.Lstat(filepath.Join(dir, f.Name))
		if err != nil {
			return err
		}
		if info.Size() != f.Size {
			return fmt.Errorf("%s has %d bytes, not %d", f.Name, info.Size(), f.Size)
		}
	}
	return nil
}

func writeManifest(dir string, m Manifest) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("encode manifest of %s: %w", m.ID, err)
	}
	return vm.WriteFile(filepath.Join(dir, manifestName), append(data, '\n'), 0o644,
		renameio.IgnoreUmask())
}
