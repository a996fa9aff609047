package qemu

import (
	"fmt"
	"os"
	"sync"
)

// A guest can make QEMU complain without end, so both copies of its standard
// error are bounded.
const (
	stderrTail   = 16 << 10
	stderrInFile = 1 << 20
)

// stderrLog keeps the end of what is written to it in memory, and the
// beginning in a file.
type stderrLog struct {
	mu   sync.Mutex
	tail []byte
	file *os.File // nil for none
	left int      // bytes that the file may still take
}

func openLog(path string) (*stderrLog, error) {
	l := &stderrLog{left: stderrInFile}
	if path == "" {
		return l, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open QEMU's log: %w", err)
	}
	l.file = f
	return l, nil
}

// Write never fails: a full disk must not end QEMU by a broken pipe.
func (l *stderrLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tail = append(l.tail, b...)
	if over := len(l.tail) - stderrTail; over > 0 {
		l.tail = append(l.tail[:0], l.tail[over:]...)
	}
	if l.file != nil && l.left > 0 {
		n, _ := l.file.Write(b[:min(len(b), l.left)])
		l.left -= n
	}
	return len(b), nil
}

func (l *stderrLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.tail)
}

func (l *stderrLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}
