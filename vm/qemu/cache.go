package qemu

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// The caches here only save time: whatever goes wrong with them, the question
// is asked again.

// cacheFile names the file for one key; "" means that nothing is cached.
func cacheFile(dir, kind, key string) string {
	if dir == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(dir, kind+"-"+hex.EncodeToString(sum[:8])+".json")
}

func readCache(file string, value any) bool {
	if file == "" {
		return false
	}
	b, err := os.ReadFile(file)
	return err == nil && json.Unmarshal(b, value) == nil
}

func writeCache(file string, value any) {
	if file == "" {
		return
	}
	b, err := json.Marshal(value)
	if err != nil || os.MkdirAll(filepath.Dir(file), 0o700) != nil {
		return
	}
	_ = renameio.WriteFile(file, b, 0o600)
}
