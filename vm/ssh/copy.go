package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/pkg/sftp"
	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm"
)

const (
	copyWorkers = 8   // files under way at once: round trips overlap
	maxDepth    = 256 // directories below each other

	closeTime = 2 * time.Second // for the guest to close a cancelled copy
)

// CopyOptions are those of [Client.Upload] and [Client.Download].
type CopyOptions struct {
	// Progress, if set, is called after every piece, one call at a time.
	Progress func(CopyProgress)
}

// CopyProgress is the state of a copy.
type CopyProgress struct {
	Path  string // source of the file under way
	Files int    // files finished
	Bytes int64  // bytes copied, of all files
}

// SkippedError lists what was not copied while everything else was.
type SkippedError struct{ Entries []string }

func (e *SkippedError) Error() string {
	const shown = 5
	list := e.Entries
	more := ""
	if len(list) > shown {
		more = fmt.Sprintf(" and %d more", len(list)-shown)
		list = list[:shown]
	}
	return fmt.Sprintf("%d not copied: %s%s", len(e.Entries), strings.Join(list, "; "), more)
}

// transfer is one copy in either direction.
type transfer struct {
	sftp *sftp.Client

	mu       sync.Mutex
	progress CopyProgress
	report   func(CopyProgress)
	skipped  []string
}

// transfer runs copy with an SFTP session that ends with it or with ctx.
func (c *Client) transfer(ctx context.Context, o CopyOptions, copy func(*transfer) error) error {
	ch, reqs, err := c.openChannel(ctx, sessionChannel, nil)
	if err != nil {
		return err
	}
	go gossh.DiscardRequests(reqs)
	defer ch.Close()

	ok, err := c.request(ctx, ch, "subsystem", gossh.Marshal(&struct{ Name string }{"sftp"}))
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("the guest's sshd has no sftp subsystem")
	}
	t := &transfer{report: o.Progress}
	done := make(chan error, 1)
	go func() { done <- t.run(ch, copy) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		// Every call in copy fails once the guest has closed its side too. A
		// guest that hangs does not, and then copy ends with the connection.
		ch.Close()
		select {
		case <-done:
		case <-time.After(closeTime):
		}
		return context.Cause(ctx)
	}
	if reason := c.Err(); reason != nil && err != nil {
		return c.connectionError(reason)
	}
	if err == nil && len(t.skipped) > 0 {
		return &SkippedError{t.skipped}
	}
	return err
}

func (t *transfer) run(ch gossh.Channel, copy func(*transfer) error) (err error) {
	if t.sftp, err = sftp.NewClientPipe(ch, ch, sftp.UseConcurrentWrites(true)); err != nil {
		return fmt.Errorf("start sftp: %w", err)
	}
	defer t.sftp.Close()
	return copy(t)
}

func (t *transfer) skip(name, reason string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.skipped = append(t.skipped, fmt.Sprintf("%q: %s", name, reason))
}

func (t *transfer) moved(name string, n int) {
	t.update(func(p *CopyProgress) { p.Path, p.Bytes = name, p.Bytes+int64(n) })
}

func (t *transfer) finished(name string) {
	t.update(func(p *CopyProgress) { p.Path, p.Files = name, p.Files+1 })
}

func (t *transfer) update(change func(*CopyProgress)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.progress)
	if t.report != nil {
		t.report(t.progress)
	}
}

// ReadFile writes the content of a guest file to w.
func (c *Client) ReadFile(ctx context.Context, remote string, w io.Writer) error {
	return c.transfer(ctx, CopyOptions{}, func(t *transfer) error {
		f, err := t.sftp.Open(guestPath(remote))
		if err != nil {
			return remoteError("read", remote, err)
		}
		defer f.Close()
		// Concurrent reads would need w to be written in order anyway.
		if _, err := f.WriteTo(w); err != nil {
			return remoteError("read", remote, err)
		}
		return nil
	})
}

// WriteFile makes a guest file of what it reads from r, until its end.
func (c *Client) WriteFile(ctx context.Context, r io.Reader, remote string, perm fs.FileMode) error {
	return c.transfer(ctx, CopyOptions{}, func(t *transfer) error {
		return t.writeRemote(guestPath(remote), r, perm)
	})
}

// guestPath makes a path of SFTP's out of a user's: relative to the home
// directory, which ~ names too.
func guestPath(p string) string {
	switch {
	case p == "" || p == "~" || p == "~/":
		return "."
	case strings.HasPrefix(p, "~/"):
		return p[2:]
	}
	return p
}

// remoteError gives err the class that the command line knows.
func remoteError(verb, name string, err error) error {
	wrapped := fmt.Errorf("%s %s in the guest: %w", verb, name, err)
	if errors.Is(err, fs.ErrNotExist) {
		return vm.Classify(vm.ErrNotFound, wrapped)
	}
	return wrapped
}

// baseName is the name that a copy of p gets in a directory, or "".
func baseName(p string) string {
	switch b := path.Base(p); b {
	case ".", "..", "/":
		return ""
	default:
		return b
	}
}
