package cloudinit

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"
)

// KeyPair is an ed25519 key as OpenSSH stores it.
type KeyPair struct {
	Private []byte // PEM, "OPENSSH PRIVATE KEY"
	Public  string // authorized_keys line without a newline
}

// GenerateKey makes a new key pair; comment ends up in both halves.
func GenerateKey(comment string) (KeyPair, error) {
	if err := noControl(comment); err != nil {
		return KeyPair{}, fmt.Errorf("generate ssh key: comment: %w", err)
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return KeyPair{}, fmt.Errorf("generate ssh key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return KeyPair{}, fmt.Errorf("generate ssh key: %w", err)
	}
	pair := KeyPair{Private: pem.EncodeToMemory(block)}
	pair.Public, err = PublicKey(pair.Private)
	if err == nil && comment != "" {
		pair.Public += " " + comment
	}
	return pair, err
}

// PublicKey derives the authorized_keys form of an ed25519 private key.
func PublicKey(private []byte) (string, error) {
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return "", fmt.Errorf("parse ssh private key: %w", err)
	}
	if t := signer.PublicKey().Type(); t != ssh.KeyAlgoED25519 {
		return "", fmt.Errorf("ssh key is %s, not %s", t, ssh.KeyAlgoED25519)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey()))), nil
}

func hostKeys(private []byte) (*HostKeys, error) {
	if len(private) == 0 {
		return nil, nil
	}
	public, err := PublicKey(private)
	if err != nil {
		return nil, fmt.Errorf("%w: host key: %w", ErrInvalid, err)
	}
	return &HostKeys{ED25519Private: string(private), ED25519Public: public}, nil
}
