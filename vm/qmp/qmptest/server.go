// Package qmptest is a QMP server for tests: it greets, negotiates and
// answers like QEMU, and can be told to misbehave.
package qmptest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Greeting is what QEMU 7.2 says first.
const Greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "test"}, "capabilities": ["oob"]}}`

// Command is one command as it arrived.
type Command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments"`
	ID        json.RawMessage `json:"id"`
}

// Server serves one client at a time, as QEMU does.
type Server struct {
	// Socket is the path to connect to.
	Socket string

	// Handle answers a command by writing to the connection; it runs in
	// the connection's own goroutine. Nil answers everything with {}.
	Handle func(*Conn, Command)

	// Negotiating, when set, runs before the reply to qmp_capabilities.
	Negotiating func(*Conn)

	// Silent withholds the greeting.
	Silent bool
}

// Start begins to serve until the test ends. Set the fields before.
func (s *Server) Start(t testing.TB) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	s.Socket = filepath.Join(dir, "qmp.sock")
	l, err := net.Listen("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		live net.Conn
		over bool
	)
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			if live = conn; over {
				conn.Close()
			}
			mu.Unlock()
			s.serve(&Conn{conn: conn})
			conn.Close()
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		over = true
		if live != nil {
			live.Close()
		}
		mu.Unlock()
		wg.Wait()
		os.RemoveAll(dir)
	})
	return s
}

func (s *Server) serve(c *Conn) {
	if !s.Silent {
		c.Write(Greeting + "\r\n")
	}
	r := bufio.NewReader(c.conn)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		var cmd Command
		if err := json.Unmarshal(line, &cmd); err != nil {
			c.Write(`{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\r\n")
			continue
		}
		switch {
		case cmd.Execute == "qmp_capabilities":
			if s.Negotiating != nil {
				s.Negotiating(c)
			}
			c.Return(cmd, struct{}{})
		case s.Handle != nil:
			s.Handle(c, cmd)
		default:
			c.Return(cmd, struct{}{})
		}
	}
}

// Conn is the server's end of a connection. Its methods are safe for
// concurrent use.
type Conn struct {
	mu   sync.Mutex
	conn net.Conn
}

// Write sends text as it is.
func (c *Conn) Write(text string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.conn.Write([]byte(text))
	return err
}

// Return answers a command.
func (c *Conn) Return(cmd Command, value any) error {
	b, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return c.Write(fmt.Sprintf(`{"return": %s, "id": %s}`+"\r\n", b, cmd.ID))
}

// Refuse answers a command with an error.
func (c *Conn) Refuse(cmd Command, class, desc string) error {
	return c.Write(fmt.Sprintf(`{"id": %s, "error": {"class": %q, "desc": %q}}`+"\r\n", cmd.ID, class, desc))
}

// Event sends an event; data is a JSON object.
func (c *Conn) Event(name, data string) error {
	return c.Write(fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": %q, "data": %s}`+"\r\n", name, data))
}

// Hangup ends the connection, as QEMU's death does.
func (c *Conn) Hangup() { c.conn.Close() }
