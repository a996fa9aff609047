package sshd

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net"
	"os"

	gossh "golang.org/x/crypto/ssh"
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
	keys, err := os.CreateTemp("", "")
	if err != nil {
		return err
	}
	defer os.Remove(keys.Name())
	if _, err := keys.Write(gossh.MarshalAuthorizedKey(clientKey.PublicKey())); err != nil {
		return err
	}
	if err := keys.Close(); err != nil {
		return err
	}
	server := Server{HostKey: hostKey, User: User{Name: "nobody", AuthorizedKeys: keys.Name()}}
	here, there, err := socketPair()
	if err != nil {
		return err
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		server.ServeConn(there, nil)
	}()
	defer func() {
		here.Close()
		<-over
	}()
	conn, _, _, err := gossh.NewClientConn(here, "", &gossh.ClientConfig{
		User: "nobody", Auth: []gossh.AuthMethod{gossh.PublicKeys(clientKey)}, HostKeyCallback: gossh.FixedHostKey(hostKey.PublicKey()),
		Config: gossh.Config{KeyExchanges: []string{gossh.KeyExchangeCurve25519}}, // as package ssh has it
	})
	if err != nil {
		return fmt.Errorf("rehearse: %w", err)
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

func socketPair() (net.Conn, net.Conn, error) {
	l, err := net.Listen("unix", fmt.Sprintf("@agentvm-rehearsal-%d", os.Getpid()))
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	here, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	there, err := l.Accept()
	if err != nil {
		here.Close()
		return nil, nil, err
	}
	return here, there, nil
}
