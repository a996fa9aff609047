// Package probes remembers what programs of this host answered when they were
// asked what they can do. It only saves time: whatever goes wrong with what is
// kept, the question is asked again.
package probes

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/agentvm/agentvm/vm"
)

// Store is the directory that answers are kept in. The empty one keeps nothing.
type Store string

// Build names the exact build of a program by path, times and size. path must
// be absolute and is followed to the file.
func Build(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	return path + " " + Version(info), nil
}

// Version differs when a file has been written or replaced. Installers preserve
// the time of its last modification, and none can that of its last change.
func Version(info fs.FileInfo) string {
	version := fmt.Sprint(info.ModTime().UnixNano(), info.Size())
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		version += fmt.Sprint(" ", s.Ctim.Nano(), s.Ino)
	}
	return version
}

// Read fills in the answer that was kept for a kind of question under a key,
// and says whether there was one.
func (s Store) Read(kind, key string, answer any) bool {
	if s == "" {
		return false
	}
	b, err := os.ReadFile(s.file(kind, key))
	return err == nil && json.Unmarshal(b, answer) == nil
}

// Write keeps an answer.
func (s Store) Write(kind, key string, answer any) {
	if s == "" {
		return
	}
	b, err := json.Marshal(answer)
	if err != nil || os.MkdirAll(string(s), 0o700) != nil {
		return
	}
	_ = vm.WriteFile(s.file(kind, key), b, 0o600)
}

func (s Store) file(kind, key string) string {
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(string(s), kind+"-"+hex.EncodeToString(sum[:8])+".json")
}
