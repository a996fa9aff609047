package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/agentvm/agentvm/vm"
)

// Procedures of libvirt's remote protocol that the tests' server knows
// (https://libvirt.org/internals/rpc.html).
const (
	procOpen       = 1
	procGetType    = 3
	procAuthList   = 66
	procLibVersion = 157
)

// fakeLibvirtd is a libvirt that says what it is told to.
type fakeLibvirtd struct {
	version uint64
	refuse  atomic.Uint32 // error code at opening; 0: none
	mute    atomic.Bool   // answers nothing about versions
	hangUp  atomic.Int32  // so often, ends the connection instead of answering about versions
	opened  atomic.Int32
}

// serve returns its address.
func (f *fakeLibvirtd) serve(t *testing.T) URI {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go f.talk(conn)
		}
	}()
	u, err := ParseURI("qemu:///system?socket=" + socket)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (f *fakeLibvirtd) talk(conn net.Conn) {
	defer conn.Close()
	for {
		head := make([]byte, 28)
		if _, err := io.ReadFull(conn, head); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(head))-28); err != nil {
			return
		}
		var payload []byte
		switch proc := binary.BigEndian.Uint32(head[12:]); proc {
		case procOpen:
			f.opened.Add(1)
			if code := f.refuse.Load(); code != 0 {
				binary.BigEndian.PutUint32(head[24:], 1)                             // status: error
				payload = binary.BigEndian.AppendUint32(payload, code)               // code
				payload = append(payload, 0, 0, 0, 7, 0, 0, 0, 1)                    // domain; a message follows
				payload = append(payload, "\x00\x00\x00\x04nope\x00\x00\x00\x02"...) // message, level
				payload = append(payload, make([]byte, 4*8)...)                      // nothing else
			}
		case procAuthList:
			payload = []byte{0, 0, 0, 1, 0, 0, 0, 0} // one kind: none
		case procGetType:
			payload = append([]byte{0, 0, 0, 4}, "QEMU"...)
		case procLibVersion:
			if f.mute.Load() {
				continue
			}
			if f.hangUp.Add(-1) >= 0 {
				return
			}
			payload = binary.BigEndian.AppendUint64(nil, f.version)
		}
		binary.BigEndian.PutUint32(head, uint32(28+len(payload)))
		binary.BigEndian.PutUint32(head[16:], 1) // a reply
		if _, err := conn.Write(append(head, payload...)); err != nil {
			return
		}
	}
}

func TestOpen(t *testing.T) {
	f := &fakeLibvirtd{version: 9_000_000}
	c, err := Open(t.Context(), f.serve(t))
	if err != nil {
		t.Fatal(err)
	}
	if v, err := c.Version(t.Context()); err != nil || v != "9.0.0" {
		t.Errorf("version %s, %v", v, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Version(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		make func(*testing.T) URI
		says string
	}{
		"too old": {func(t *testing.T) URI { return (&fakeLibvirtd{version: 7_010_002}).serve(t) }, "libvirt 7.10.2"},
		"not authorized": {func(t *testing.T) URI {
			f := &fakeLibvirtd{}
			f.refuse.Store(uint32(golibvirt.ErrAuthFailed))
			return f.serve(t)
		}, "nope"},
		"nobody there": {func(t *testing.T) URI { return URI{Text: SystemURI, Socket: filepath.Join(t.TempDir(), "none")} }, "no such file"},
		"forbidden": {func(t *testing.T) URI {
			if os.Getuid() == 0 {
				return URI{Text: SystemURI, Socket: "/proc/self/root/nonexistent"} // root may enter everywhere
			}
			f := &fakeLibvirtd{}
			u := f.serve(t)
			if err := os.Chmod(u.Socket, 0); err != nil {
				t.Fatal(err)
			}
			return u
		}, "connect to libvirt"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(t.Context(), tt.make(t))
			if err == nil || !strings.Contains(err.Error(), tt.says) || !errors.Is(err, vm.ErrHost) || vm.Hint(err) == "" {
				t.Errorf("%v (hint %q), want %q", err, vm.Hint(err), tt.says)
			}
		})
	}
}

// TestCallsEnd has a libvirt that hangs: the call ends at its deadline, and the
// next one has a new connection.
func TestCallsEnd(t *testing.T) {
	f := &fakeLibvirtd{version: 9_000_000}
	c, err := Open(t.Context(), f.serve(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f.mute.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, err := c.Version(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	f.mute.Store(false)
	if _, err := c.Version(t.Context()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if n := f.opened.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

// TestLostConnection has a libvirt that ends while it is asked.
func TestLostConnection(t *testing.T) {
	f := &fakeLibvirtd{version: 9_000_000}
	c, err := Open(t.Context(), f.serve(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f.hangUp.Store(2)
	if _, err := c.Version(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := persist(ctx, func() error { _, err := c.Version(ctx); return err }); err != nil {
		t.Errorf("trying again: %v", err)
	}
}

// TestSilentServer has something that is no libvirt at all behind the socket.
func TestSilentServer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, URI{Text: SystemURI, Socket: socket}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

// TestSessionIsStarted has a user's libvirt that does not run yet.
func TestSessionIsStarted(t *testing.T) {
	f := &fakeLibvirtd{version: 9_000_000}
	real := f.serve(t).Socket
	dir := t.TempDir()
	// Stands in for the daemon: makes its socket when it is started.
	script := "#!/bin/sh\n[ \"$*\" = '--timeout=120 --daemon' ] && [ -z \"$SECRET\" ] && mkdir -p \"$XDG_RUNTIME_DIR/libvirt\" && ln -s '" + real + "' \"$XDG_RUNTIME_DIR/libvirt/virtqemud-sock\"\n"
	if err := os.WriteFile(filepath.Join(dir, "virtqemud"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SECRET", "1")
	t.Setenv("XDG_RUNTIME_DIR", filepath.Join(dir, "run"))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	u, err := ParseURI(SessionURI)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Open(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if n := f.opened.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}
