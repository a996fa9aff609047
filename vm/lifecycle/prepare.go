package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/renameio/v2"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// Files that Prepare makes in an instance's directory.
const (
	OverlayFile   = "root.qcow2"
	SeedFile      = "seed.iso"
	VarsFile      = "efivars.fd"
	ConsoleFile   = "console.log"
	ClientKeyFile = "client_key"
	HostKeyFile   = "host_key"
)

// prepare makes what the machine needs on disk and does not have yet: keys,
// the root disk's overlay, the seed. It is idempotent.
func prepare(ctx context.Context, inst *instance.Instance, spec instance.Spec, img *images.Image, disk int64, facts cloudinit.Facts, git cloudinit.Git) error {
	client, err := keyPair(inst.Path(ClientKeyFile), "agentvm client of "+spec.Name)
	if err != nil {
		return err
	}
	host, err := keyPair(inst.Path(HostKeyFile), "agentvm host key of "+spec.Name)
	if err != nil {
		return err
	}
	if _, err := os.Stat(inst.Path(OverlayFile)); errors.Is(err, fs.ErrNotExist) {
		if err := checkDisk(inst.Dir); err != nil {
			return err
		}
		if err := images.CreateOverlay(ctx, inst.Path(OverlayFile), img, disk); err != nil {
			return err
		}
	}
	seed, err := cloudinit.NewSeed(seedConfig(spec, img, client, host, facts, git))
	if err != nil {
		return fmt.Errorf("describe the guest to cloud-init: %w", err)
	}
	if err := seed.WriteISO(inst.Path(SeedFile)); err != nil {
		return err
	}
	if err := os.WriteFile(inst.Path(ConsoleFile), nil, 0o600); err != nil {
		return fmt.Errorf("empty the console log: %w", err)
	}
	return handOver(inst, spec)
}

// seedConfig is the guest in cloud-init's terms.
func seedConfig(spec instance.Spec, img *images.Image, client, host cloudinit.KeyPair, facts cloudinit.Facts, git cloudinit.Git) cloudinit.Config {
	cfg := cloudinit.Config{
		InstanceName:   spec.Name,
		User:           cloudinit.Account{Name: GuestUser, UID: GuestUID},
		AuthorizedKeys: []string{client.Public},
		HostKey:        host.Private,
		Timezone:       facts.Timezone,
		Locale:         facts.Locale,
		CAs:            facts.CAs,
		Git:            git,
		Network:        cloudinit.Network{MAC: guestMAC, Address: guestAddress, Gateway: gatewayAddress, DNS: []string{gatewayAddress}},
		Partitioned:    img.Kernel() == "",
	}
	if cfg.Partitioned {
		// What images of our own making have in their sshd_config.
		cfg.Files = append(cfg.Files, cloudinit.GuestFile{Path: "/etc/ssh/sshd_config.d/50-agentvm.conf", Content: []byte(sshdConfig)})
	}
	for _, s := range spec.Shares {
		cfg.Mounts = append(cfg.Mounts, cloudinit.ShareMount{Tag: s.Tag, Target: s.Target, ReadOnly: s.ReadOnly})
	}
	return cfg
}

// sshdConfig lets variables through that were asked for on the host, and many
// commands at once over one connection.
const sshdConfig = "AcceptEnv *\nMaxSessions 1024\n"

// The guest's place in its private network.
const (
	guestAddress   = "192.168.127.2/24"
	gatewayAddress = "192.168.127.1"
)

// keyPair reads the key at path, making it first when there is none.
func keyPair(path, comment string) (cloudinit.KeyPair, error) {
	private, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		pair, err := cloudinit.GenerateKey(comment)
		if err != nil {
			return pair, err
		}
		if err := renameio.WriteFile(path, pair.Private, 0o600); err != nil {
			return pair, fmt.Errorf("write key: %w", err)
		}
		return pair, nil
	}
	if err != nil {
		return cloudinit.KeyPair{}, fmt.Errorf("read key: %w", err)
	}
	public, err := cloudinit.PublicKey(bytes.TrimSpace(private))
	if err != nil {
		return cloudinit.KeyPair{}, vm.WithHint(fmt.Errorf("%s is damaged: %w", path, err), "agentvm down deletes the instance and keeps the workspace")
	}
	return cloudinit.KeyPair{Private: private, Public: public}, nil
}

// handOver gives the machine's own files to the user that it runs as.
func handOver(inst *instance.Instance, spec instance.Spec) error {
	o := spec.Machine.RunAs
	if o == nil {
		return nil
	}
	for _, name := range []string{OverlayFile, SeedFile, ConsoleFile, VarsFile} {
		if err := os.Lchown(inst.Path(name), o.UID, o.GID); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("hand over %s: %w", name, err)
		}
	}
	return nil
}
