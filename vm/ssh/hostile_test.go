package ssh

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pkg/sftp"
	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/testenv"
)

// hostile is an SFTP server that names its files as it likes.
type hostile []hostileFile

type hostileFile struct {
	name   string
	mode   fs.FileMode
	target string
}

func (f hostileFile) Name() string       { return f.name }
func (f hostileFile) Size() int64        { return 4 }
func (f hostileFile) Mode() fs.FileMode  { return f.mode }
func (f hostileFile) ModTime() time.Time { return time.Unix(1e9, 0) }
func (f hostileFile) IsDir() bool        { return f.mode.IsDir() }
func (f hostileFile) Sys() any           { return nil }

type hostileList []os.FileInfo

func (l hostileList) ListAt(to []os.FileInfo, offset int64) (int, error) {
	if offset >= int64(len(l)) {
		return 0, io.EOF
	}
	n := copy(to, l[offset:])
	if n < len(to) {
		return n, io.EOF
	}
	return n, nil
}

func (h hostile) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	switch {
	case r.Method == "Readlink":
		for _, f := range h {
			if f.name == filepath.Base(r.Filepath) && f.target != "" {
				return hostileList{hostileFile{name: f.target}}, nil
			}
		}
	case r.Method == "Stat" || r.Method == "Lstat":
		return hostileList{hostileFile{name: "tree", mode: fs.ModeDir | 0o755}}, nil
	case strings.HasSuffix(r.Filepath, "/tree"):
		var list hostileList
		for _, f := range h {
			list = append(list, f)
		}
		return list, nil
	}
	return hostileList{}, nil
}

func (h hostile) Fileread(*sftp.Request) (io.ReaderAt, error) { return strings.NewReader("evil"), nil }

// serve is an SSH server with that SFTP server, and a client of it.
func (h hostile) serve(t *testing.T) *Client {
	t.Helper()
	checkLeaks(t)
	hostKey, _ := testenv.NewKey(t)
	near, far, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer far.Close()
		config := &gossh.ServerConfig{NoClientAuth: true}
		config.AddHostKey(hostKey)
		_, opens, reqs, err := gossh.NewServerConn(far, config)
		if err != nil {
			return
		}
		go gossh.DiscardRequests(reqs)
		for open := range opens {
			ch, reqs, _ := open.Accept()
			go func() {
				for r := range reqs {
					r.Reply(true, nil)
				}
			}()
			go sftp.NewRequestServer(ch, sftp.Handlers{FileList: h, FileGet: h}).Serve()
		}
	}()
	c, err := handshake(timeout(t, time.Minute), near, Config{User: "agent", HostKey: hostKey.PublicKey(), KeepAlive: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func socketPair() (near, far net.Conn, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	if near, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		return nil, nil, err
	}
	far, err = ln.Accept()
	return near, far, err
}

func TestDownloadFromAHostileServer(t *testing.T) {
	for name, h := range map[string]hostile{
		"parent":             {{name: "..", mode: 0o644}, {name: "../evil", mode: 0o644}, {name: "a/../../evil", mode: 0o644}, {name: "/evil", mode: 0o644}, {name: "", mode: 0o644}, {name: ".", mode: 0o644}},
		"parent directories": {{name: "..", mode: fs.ModeDir | 0o755}, {name: "x/..", mode: fs.ModeDir | 0o755}},
		"link and directory": {{name: "d", mode: fs.ModeSymlink | 0o777, target: "../outside"}, {name: "d", mode: fs.ModeDir | 0o755}},
		"inner link first":   {{name: "d", mode: fs.ModeSymlink | 0o777, target: "e"}, {name: "e", mode: fs.ModeDir | 0o755}, {name: "d", mode: fs.ModeDir | 0o755}},
		"link and file":      {{name: "f", mode: fs.ModeSymlink | 0o777, target: "/outside"}, {name: "f", mode: 0o644}},
		"devices":            {{name: "n", mode: fs.ModeDevice | 0o666}, {name: "p", mode: fs.ModeNamedPipe | 0o666}, {name: "s", mode: 0o4755 | fs.ModeSetuid}},
	} {
		t.Run(name, func(t *testing.T) {
			c := h.serve(t)
			base := t.TempDir()
			dst := filepath.Join(base, "dst")
			for _, d := range []string{dst, filepath.Join(base, "outside")} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			err := c.Download(timeout(t, time.Minute), "tree", dst, CopyOptions{})
			if errors.Is(err, ErrConnection) {
				t.Fatal(err)
			}
			filepath.WalkDir(base, func(p string, d fs.DirEntry, err error) error {
				rel, _ := filepath.Rel(base, p)
				inside := rel == "." || rel == "outside" || rel == "dst" || strings.HasPrefix(rel, "dst/tree")
				info, _ := d.Info()
				if !inside || info.Mode()&(fs.ModeSetuid|fs.ModeDevice|fs.ModeNamedPipe) != 0 {
					t.Errorf("made %s, %v", rel, info.Mode())
				}
				if target, err := os.Readlink(p); err == nil && (strings.HasPrefix(target, "/") || strings.HasPrefix(target, "..")) {
					t.Errorf("made link %s to %s", rel, target)
				}
				return nil
			})
		})
	}
}
