package sshd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"
)

// forward connects a channel to the port or socket that it names: RFC 4254
// section 7.2, and OpenSSH's PROTOCOL section 2.4.
func (c *connection) forward(open gossh.NewChannel) {
	var network, address string
	var err error
	if open.ChannelType() == "direct-tcpip" {
		var m struct {
			Host       string
			Port       uint32
			OriginHost string
			OriginPort uint32
		}
		err = gossh.Unmarshal(open.ExtraData(), &m)
		network, address = "tcp", net.JoinHostPort(m.Host, strconv.FormatUint(uint64(m.Port), 10))
	} else {
		var m struct {
			Path, Reserved string
			ReservedPort   uint32
		}
		err = gossh.Unmarshal(open.ExtraData(), &m)
		network, address = "unix", m.Path
	}
	if err != nil {
		open.Reject(gossh.ConnectionFailed, err.Error())
		return
	}
	there, err := net.DialTimeout(network, address, dialTimeout)
	if err != nil {
		open.Reject(gossh.ConnectionFailed, err.Error())
		return
	}
	ch, requests, err := open.Accept()
	if err != nil {
		there.Close()
		return
	}
	join(ch, requests, there)
}

// join carries everything both ways until both have ended, or until the client
// has closed the channel and what it sent before is delivered.
func join(ch gossh.Channel, requests <-chan *gossh.Request, nc net.Conn) {
	go func() {
		gossh.DiscardRequests(requests) // until the channel is closed
		nc.SetReadDeadline(time.Now())
		nc.SetWriteDeadline(time.Now().Add(flushTimeout))
	}()
	defer nc.Close()
	defer ch.Close()
	var in sync.WaitGroup
	in.Go(func() {
		io.Copy(nc, ch)
		if half, ok := nc.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
	})
	io.Copy(ch, nc)
	ch.CloseWrite()
	in.Wait()
}

// listened is what a client wants listened to.
type listened struct {
	channel string // type of the channels that connections come in
	host    string
	port    uint32
	path    string // of a socket; host and port are empty then
}

func listenedIn(r *gossh.Request) (l listened, err error) {
	switch r.Type {
	case "tcpip-forward", "cancel-tcpip-forward":
		var m struct {
			Host string
			Port uint32
		}
		err = gossh.Unmarshal(r.Payload, &m)
		if m.Port > 65535 {
			err = fmt.Errorf("there is no port %d", m.Port)
		}
		return listened{channel: "forwarded-tcpip", host: m.Host, port: m.Port}, err
	default:
		var m struct{ Path string }
		err = gossh.Unmarshal(r.Payload, &m)
		if err == nil && !filepath.IsAbs(m.Path) {
			err = fmt.Errorf("%q is no absolute path", m.Path)
		}
		return listened{channel: "forwarded-streamlocal@openssh.com", path: m.Path}, err
	}
}

func (l listened) key() string { return fmt.Sprintf("%s %q %d %q", l.channel, l.host, l.port, l.path) }

// extra is what a channel for a connection says of it.
func (l listened) extra(from net.Addr) []byte {
	if l.path != "" {
		return gossh.Marshal(&struct{ Path, Reserved string }{Path: l.path})
	}
	host, port, _ := net.SplitHostPort(from.String())
	number, _ := strconv.ParseUint(port, 10, 16)
	return gossh.Marshal(&struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}{l.host, l.port, host, uint32(number)})
}

// open listens. Ports are the guest's own alone, whatever address is asked
// for, as OpenSSH has it without GatewayPorts.
func (l *listened) open() ([]net.Listener, error) {
	if l.path != "" {
		ln, err := listenUnix(l.path)
		return []net.Listener{ln}, err
	}
	first, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.FormatUint(uint64(l.port), 10)))
	if err != nil {
		return nil, err
	}
	listeners := []net.Listener{first}
	l.port = uint32(first.Addr().(*net.TCPAddr).Port)
	if second, err := net.Listen("tcp", net.JoinHostPort("::1", strconv.FormatUint(uint64(l.port), 10))); err == nil {
		listeners = append(listeners, second)
	}
	return listeners, nil
}

// listenUnix makes a socket that nobody else may connect to.
func listenUnix(path string) (net.Listener, error) {
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// Connecting takes the right to write, which no usual umask gives to others.
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// listen begins to listen, and tells the port where it could be any.
func (c *connection) listen(r *gossh.Request) (ok bool, answer []byte) {
	l, err := listenedIn(r)
	if err != nil {
		return false, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.listeners[l.key()] != nil {
		return false, nil
	}
	anyPort := l.path == "" && l.port == 0
	listeners, err := l.open()
	if err != nil {
		fmt.Fprintln(os.Stderr, "forward:", err)
		return false, nil
	}
	c.listeners[l.key()] = func() {
		for _, ln := range listeners {
			ln.Close()
		}
	}
	for _, ln := range listeners {
		go c.accept(ln, l.channel, l.extra)
	}
	if anyPort {
		answer = gossh.Marshal(&struct{ Port uint32 }{l.port})
	}
	return true, answer
}

func (c *connection) unlisten(r *gossh.Request) bool {
	l, err := listenedIn(r)
	if err != nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	stop := c.listeners[l.key()]
	if stop == nil {
		return false
	}
	stop()
	delete(c.listeners, l.key())
	return true
}

// accept carries each connection to the client, in a channel of its own.
func (c *connection) accept(ln net.Listener, channel string, extra func(from net.Addr) []byte) {
	for {
		nc, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Second) // too many files open, say
			continue
		}
		go func() {
			ch, requests, err := c.conn.OpenChannel(channel, extra(nc.RemoteAddr()))
			if err != nil {
				nc.Close()
				return
			}
			join(ch, requests, nc)
		}()
	}
}
