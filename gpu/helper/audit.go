package helper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/gpu"
)

// AuditLog has a line when a request comes and one when it is done.
const AuditLog = "/var/log/agentvm/gpu.jsonl"

// maxAudit is the size in bytes beyond which the log becomes gpu.jsonl.1.
const maxAudit = 16 << 20

// entry is a line of the log.
type entry struct {
	Time     time.Time     `json:"time"`
	Request  string        `json:"request"` // the same in both lines
	UID      int           `json:"uid"`
	User     string        `json:"user,omitempty"`
	Via      string        `json:"via,omitempty"`
	PID      int           `json:"pid"` // of the helper
	Do       string        `json:"do,omitempty"`
	Devices  []string      `json:"devices,omitempty"`
	Plain    bool          `json:"plain,omitempty"` // vfio-pci itself was asked for
	Owner    string        `json:"owner,omitempty"`
	OwnerPID int           `json:"ownerPID,omitempty"`
	Result   string        `json:"result"` // asked, done, refused or failed
	Error    string        `json:"error,omitempty"`
	Outcomes []gpu.Outcome `json:"outcomes,omitempty"`
}

// audit appends a line and returns when it is on the disk.
func audit(root string, e entry) error {
	e.Time = time.Now().UTC()
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	path := filepath.Join(root, AuditLog)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	if err := trusted(root, filepath.Dir(AuditLog), os.Geteuid()); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Size() > maxAudit {
		if err := os.Rename(path, path+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) { // another was faster
			return fmt.Errorf("write the audit log: %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	return nil
}
