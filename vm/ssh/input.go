package ssh

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// input is a program's standard input whose reading can be stopped. A plain
// Read of a terminal or a pipe would stay behind after the program has ended
// and swallow what the user types next.
type input struct {
	from io.Reader
	fd   int      // to wait on, or -1
	wake *os.File // readable once stopped
	end  *os.File // its other end
}

func newInput(from io.Reader) *input {
	in := &input{from: from, fd: -1}
	f, ok := from.(*os.File)
	if !ok || f == nil {
		if ok {
			in.from = nil
		}
		return in
	}
	wake, end, err := os.Pipe()
	if err != nil {
		return in // reads are then not interruptible
	}
	in.fd, in.wake, in.end = int(f.Fd()), wake, end
	return in
}

// Read waits until there is something to read or stop was called.
func (in *input) Read(p []byte) (int, error) {
	if in.from == nil {
		return 0, io.EOF
	}
	if in.fd < 0 {
		return in.from.Read(p)
	}
	fds := []unix.PollFd{
		{Fd: int32(in.fd), Events: unix.POLLIN},
		{Fd: int32(in.wake.Fd()), Events: unix.POLLIN},
	}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, os.NewSyscallError("poll", err)
		case fds[1].Revents != 0:
			return 0, os.ErrClosed
		}
		return in.from.Read(p)
	}
}

// stop ends a waiting Read, and every later one.
func (in *input) stop() {
	if in.end != nil {
		in.end.Close()
	}
}

// close gives the pipe back. The reader calls it, after its last Read.
func (in *input) close() {
	if in.wake != nil {
		in.wake.Close()
	}
}
