package sshd

import (
	"crypto/ed25519"
	"crypto/rand"
	"net"
	"os"

	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Rehearse logs in to a server of its own, by keys that nobody else ever has.
// What the first login would have to load and compute is in memory then, and in
// a guest that is saved before it is anybody's.
func Rehearse() error {
	hostKey, err := throwaway()
	if err != nil {
		return err
	}
	clientKey, err := throwaway()
	if err != nil {
		return err
	}
	here, there, err := socketPair()
	if err != nil {
		return err
	}
	defer here.Close()
	server := Server{
		User: User{Name: "nobody"}, HostKey: hostKey,
		AuthorizedKeys: func() ([]byte, error) { return gossh.MarshalAuthorizedKey(clientKey.PublicKey()), nil },
	}
	go server.ServeConn(there, nil) // ends with here
	conn, _, _, err := gossh.NewClientConn(here, "", &gossh.ClientConfig{
		User: "nobody", Auth: []gossh.AuthMethod{gossh.PublicKeys(clientKey)}, HostKeyCallback: gossh.FixedHostKey(hostKey.PublicKey()),
		Config: gossh.Config{KeyExchanges: []string{gossh.KeyExchangeCurve25519}}, // as package ssh has it
	})
	if err != nil {
		return err
	}
	return conn.Close()
}

func throwaway() (gossh.Signer, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return gossh.NewSignerFromKey(key)
}

func socketPair() (here, there net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "rehearsal")
		defer f.Close()
		if ends[i], err = net.FileConn(f); err != nil {
			return nil, nil, err
		}
	}
	return ends[0], ends[1], nil
}
