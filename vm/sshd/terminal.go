package sshd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// terminal is a session's, if it has one.
type terminal struct {
	ours, theirs *os.File
	term         string
}

// openTerminal makes the terminal that a pty-req asks for.
func openTerminal(payload []byte) (*terminal, error) {
	var m struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}
	if err := gossh.Unmarshal(payload, &m); err != nil {
		return nil, err
	}
	t := &terminal{term: m.Term}
	var err error
	if t.ours, t.theirs, err = openPair(); err != nil {
		return nil, fmt.Errorf("make a terminal: %w", err)
	}
	if err := errors.Join(t.setModes([]byte(m.Modes)), t.setSize(m.Columns, m.Rows, m.Width, m.Height)); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// openPair opens both ends of a new terminal. Ours is opened non-blocking, so
// that closing it interrupts a read, and the terminal is hung up.
func openPair() (ours, theirs *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	ours = os.NewFile(uintptr(fd), "/dev/ptmx")
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		ours.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// drain ends a copy of the output, for whose end copied waits, and carries what
// is there still. Whoever has the terminal open after its program's end and is
// silent is not waited for.
func (t *terminal) drain(w io.Writer, copied func()) {
	t.ours.SetReadDeadline(time.Now())
	copied()
	t.ours.SetReadDeadline(time.Time{})
	raw, err := t.ours.SyscallConn()
	if err != nil {
		return
	}
	for buffer := make([]byte, 32<<10); ; {
		var n int
		var err error
		if e := raw.Read(func(fd uintptr) bool {
			n, err = unix.Read(int(fd), buffer)
			return true
		}); e != nil {
			return
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		if _, err := w.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func (t *terminal) close() {
	t.ours.Close()
	t.theirs.Close()
}

// resize follows a window-change.
func (t *terminal) resize(payload []byte) error {
	var m struct{ Columns, Rows, Width, Height uint32 }
	if err := gossh.Unmarshal(payload, &m); err != nil {
		return err
	}
	return t.setSize(m.Columns, m.Rows, m.Width, m.Height)
}

func (t *terminal) setSize(columns, rows, width, height uint32) error {
	return t.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(columns), Row: uint16(rows), Xpixel: uint16(width), Ypixel: uint16(height)})
	})
}

// control runs f with our end's descriptor.
func (t *terminal) control(f func(fd int) error) error {
	raw, err := t.ours.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// setModes sets the terminal as the client's is.
func (t *terminal) setModes(modes []byte) error {
	return t.control(func(fd int) error {
		state, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		applyModes(state, modes)
		return unix.IoctlSetTermios(fd, unix.TCSETS, state)
	})
}

// applyModes follows RFC 4254 section 8: an opcode, and for those below 160 its
// value, until opcode 0 or one that is unknown to all. What this system does not
// have is skipped.
func applyModes(state *unix.Termios, modes []byte) {
	for len(modes) >= 5 && modes[0] > 0 && modes[0] < 160 {
		opcode, value := modes[0], binary.BigEndian.Uint32(modes[1:])
		modes = modes[5:]
		if i, ok := characters[opcode]; ok {
			state.Cc[i] = byte(value)
			if value == 255 { // none
				state.Cc[i] = 0
			}
			continue
		}
		f, ok := flags[opcode]
		if !ok {
			continue
		}
		field := f.field(state)
		*field &^= f.mask
		if value != 0 {
			*field |= f.set
		}
	}
}

// characters are the places of control characters.
var characters = map[byte]int{
	1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL, 7: unix.VEOL2,
	8: unix.VSTART, 9: unix.VSTOP, 10: unix.VSUSP, 12: unix.VREPRINT, 13: unix.VWERASE, 14: unix.VLNEXT, 18: unix.VDISCARD,
}

// flag is a bit of a field, or one value of several bits.
type flag struct {
	field     func(*unix.Termios) *uint32
	mask, set uint32
}

func input(t *unix.Termios) *uint32   { return &t.Iflag }
func output(t *unix.Termios) *uint32  { return &t.Oflag }
func control(t *unix.Termios) *uint32 { return &t.Cflag }
func local(t *unix.Termios) *uint32   { return &t.Lflag }

func bit(field func(*unix.Termios) *uint32, mask uint32) flag { return flag{field, mask, mask} }

var flags = map[byte]flag{
	30: bit(input, unix.IGNPAR), 31: bit(input, unix.PARMRK), 32: bit(input, unix.INPCK), 33: bit(input, unix.ISTRIP),
	34: bit(input, unix.INLCR), 35: bit(input, unix.IGNCR), 36: bit(input, unix.ICRNL), 37: bit(input, unix.IUCLC),
	38: bit(input, unix.IXON), 39: bit(input, unix.IXANY), 40: bit(input, unix.IXOFF), 41: bit(input, unix.IMAXBEL),
	42: bit(input, unix.IUTF8), // RFC 8160
	50: bit(local, unix.ISIG), 51: bit(local, unix.ICANON), 52: bit(local, unix.XCASE), 53: bit(local, unix.ECHO),
	54: bit(local, unix.ECHOE), 55: bit(local, unix.ECHOK), 56: bit(local, unix.ECHONL), 57: bit(local, unix.NOFLSH),
	58: bit(local, unix.TOSTOP), 59: bit(local, unix.IEXTEN), 60: bit(local, unix.ECHOCTL), 61: bit(local, unix.ECHOKE),
	62: bit(local, unix.PENDIN),
	70: bit(output, unix.OPOST), 71: bit(output, unix.OLCUC), 72: bit(output, unix.ONLCR), 73: bit(output, unix.OCRNL),
	74: bit(output, unix.ONOCR), 75: bit(output, unix.ONLRET),
	90: {control, unix.CSIZE, unix.CS7}, 91: {control, unix.CSIZE, unix.CS8},
	92: bit(control, unix.PARENB), 93: bit(control, unix.PARODD),
}
