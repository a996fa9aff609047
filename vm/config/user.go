package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// UserFile is the file with a user's own settings, which are of this host and
// of no project.
const UserFile = "config.yaml"

// maxPool keeps a slip of the finger from taking all of the host's memory.
const maxPool = 64

// User is a user's own settings. docs/configuration.md is its reference.
type User struct {
	Pool Count `yaml:"pool,omitempty"` // machines of the last environment that wait, restored and paused
}

// LoadUser reads the settings at path, strictly. Where there is no file the
// defaults hold.
func LoadUser(path string) (User, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return User{}, nil
	}
	if err != nil {
		return User{}, fmt.Errorf("read your settings: %w", err)
	}
	var u User
	d, err := decode(path, data, &u, "delete it, and the defaults hold")
	if err != nil {
		return User{}, err
	}
	if u.Pool < 0 || u.Pool > maxPool {
		return User{}, d.errorAt("$.pool", fmt.Sprintf("pool must be 0 to %d", maxPool), "each takes as much memory as a machine that runs")
	}
	return u, nil
}
