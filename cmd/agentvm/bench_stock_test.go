package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/network"
	"github.com/agentvm/agentvm/vm/qemu"
	"github.com/agentvm/agentvm/vm/ssh"
)

//go:embed testdata/bench/stock.sh
var stockScript string

// stockImage builds the stock guest, or finds the one of an earlier run.
func stockImage(b *testing.B) (dir string) {
	b.Helper()
	cache := os.Getenv("AGENTVM_TEST_CACHE")
	if cache == "" {
		cache = b.TempDir()
	}
	dir = filepath.Join(cache, "stock-debian-13")
	if _, err := os.Stat(filepath.Join(dir, "disk.raw")); err == nil {
		return dir
	}
	cmd := exec.Command("sh", "-s", dir+".new")
	cmd.Stdin = strings.NewReader(stockScript)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("build the stock guest: %v\n%s", err, out)
	}
	if err := os.Rename(dir+".new", dir); err != nil {
		b.Fatal(err)
	}
	return dir
}

// stockTimes are what the stock guest takes.
type stockTimes struct {
	login, finished time.Duration // from the start of QEMU
	qemu            time.Duration // a QEMU with nothing to run, until its monitor answers
	handshake       time.Duration // of SSH, login included, when the boot is long over
	analyze         string
}

// bootStock boots the stock guest on the hardware of m, without its shares.
func bootStock(b *testing.B, image string, m vm.Machine) stockTimes {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
	defer cancel()
	dir := b.TempDir()
	key, hostKey := newKey(b), newKey(b)
	seed, err := cloudinit.NewSeed(cloudinit.Config{
		InstanceName: "stock", User: cloudinit.Account{Name: lifecycle.GuestUser, UID: lifecycle.GuestUID},
		AuthorizedKeys: []string{key.Public}, HostKey: hostKey.Private,
		Network: cloudinit.Network{MAC: m.NICs[0].MAC, Address: network.DefaultGuestIP + "/24", Gateway: network.DefaultGateway, DNS: []string{network.DefaultGateway}},
	})
	if err == nil {
		err = seed.WriteISO(filepath.Join(dir, "seed.iso"))
	}
	if err != nil {
		b.Fatal(err)
	}
	overlay := filepath.Join(dir, "root.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", filepath.Join(image, "disk.raw"), overlay).CombinedOutput(); err != nil {
		b.Fatalf("overlay: %v\n%s", err, out)
	}
	dial := serveNetwork(b, filepath.Join(dir, "net.sock"))

	m.Name, m.RunAs, m.Shares = "stock", nil, nil
	m.Boot = vm.Boot{Kernel: filepath.Join(image, "vmlinuz"), Initrd: filepath.Join(image, "initrd.img"), Cmdline: "root=LABEL=root ro console=ttyS0"}
	m.Disks = []vm.Disk{
		{ID: "root", Path: overlay, Format: "qcow2", Serial: "root"},
		{ID: "seed", Path: filepath.Join(dir, "seed.iso"), Format: "raw", Serial: "seed", ReadOnly: true},
	}
	m.NICs[0].Socket = filepath.Join(dir, "net.sock")
	m.Console, m.QMP, m.Line = filepath.Join(dir, "console.log"), filepath.Join(dir, "qmp.sock"), filepath.Join(dir, "line.sock")
	caps, err := probeQEMU(ctx, dir)
	if err != nil {
		b.Fatal(err)
	}
	argv, err := qemu.Argv(m, caps)
	if err != nil {
		b.Fatal(err)
	}
	var times stockTimes
	times.qemu = idleStart(b, m, caps)
	begun := time.Now()
	process, err := qemu.Start(ctx, argv, qemu.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer process.Kill()
	go func() { // a guest whose QEMU has ended never answers
		select {
		case <-process.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	signer, public := parseKey(b, key), parseKey(b, hostKey).PublicKey()
	cfg := ssh.Config{User: lifecycle.GuestUser, Key: signer, HostKey: public, Emulated: m.Accel == vm.AccelTCG}
	client, err := ssh.Connect(ctx, dial, cfg)
	if err != nil {
		console, _ := os.ReadFile(m.Console)
		b.Fatalf("stock guest: %v\n%s\n%s", err, process.Stderr(), console[max(0, len(console)-2000):])
	}
	defer client.Close()
	times.login = time.Since(begun)
	run := func(script string) string {
		var out bytes.Buffer
		if _, err := client.Run(ctx, ssh.Command{Argv: []string{"sh", "-c", script}, Stdout: &out}); err != nil {
			b.Fatal(err)
		}
		return strings.TrimSpace(out.String())
	}
	run("while [ ! -e /run/cloud-init/result.json ]; do sleep 0.2; done")
	times.finished = time.Since(begun)
	times.analyze = run("for i in 1 2 3 4 5 6 7 8 9; do systemd-analyze time 2>/dev/null && break; sleep 2; done | head -1")
	times.handshake = median(b, func() (end func()) {
		again, err := ssh.Connect(ctx, dial, cfg)
		if err != nil {
			b.Fatal(err)
		}
		return func() { again.Close() }
	})
	return times
}

// serveNetwork runs the guest's network and returns the way to its sshd.
func serveNetwork(b *testing.B, socket string) ssh.DialFunc {
	b.Helper()
	n, err := network.New(network.Config{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = n.Close() })
	l, err := net.Listen("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	go func() {
		if err := n.Serve(b.Context(), l); err != nil && !errors.Is(err, net.ErrClosed) {
			b.Log(err)
		}
	}()
	return func(ctx context.Context) (net.Conn, error) { return n.DialGuest(ctx, 22) }
}

func newKey(b *testing.B) cloudinit.KeyPair {
	b.Helper()
	pair, err := cloudinit.GenerateKey("stock")
	if err != nil {
		b.Fatal(err)
	}
	return pair
}

func parseKey(b *testing.B, pair cloudinit.KeyPair) gossh.Signer {
	b.Helper()
	signer, err := gossh.ParsePrivateKey(pair.Private)
	if err != nil {
		b.Fatal(err)
	}
	return signer
}
