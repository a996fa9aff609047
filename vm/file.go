package vm

import (
	"io/fs"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// WriteFile replaces a file in one step: whoever reads it finds the old
// content or the new. Until then the new one lies beside it, and nowhere that
// others can look.
func WriteFile(path string, data []byte, mode fs.FileMode, opts ...renameio.Option) error {
	// Left to itself renameio tries out with two more files where that could be.
	return renameio.WriteFile(path, data, mode, append(opts, renameio.WithTempDir(filepath.Dir(path)))...)
}
