package lifecycle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/line"
)

// Files that Prepare makes in an instance's directory.
const (
	OverlayFile   = "root.qcow2"
	SeedFile      = "seed.iso"
	VarsFile      = "efivars.fd"
	ConsoleFile   = "console.log"
	ClientKeyFile = instance.ClientKeyFile
	HostKeyFile   = instance.HostKeyFile
)

// prepare makes what the machine needs on disk and does not have yet: keys,
// the root disk's overlay, the seed. It is idempotent.
func prepare(ctx context.Context, inst *instance.Instance, spec instance.Spec, plan plan, from source) error {
	client, err := keyPair(inst.Path(ClientKeyFile), "agentvm client of "+spec.Name)
	if err != nil {
		return err
	}
	host, err := keyPair(inst.Path(HostKeyFile), "agentvm host key of "+spec.Name)
	if err != nil {
		return err
	}
	cfg := seedConfig(spec, plan)
	cfg.AuthorizedKeys, cfg.HostKey = []string{client.Public}, host.Private
	return makeFiles(ctx, inst, spec, cfg, plan, from)
}

// makeFiles makes what the machine of spec opens, and what tells its guest who
// it is. A disk that is there stays.
func makeFiles(ctx context.Context, inst *instance.Instance, spec instance.Spec, cfg cloudinit.Config, plan plan, from source) error {
	if _, err := os.Stat(inst.Path(OverlayFile)); errors.Is(err, fs.ErrNotExist) {
		if err := checkDisk(inst.Dir); err != nil {
			return err
		}
		if err := makeDisk(ctx, inst.Path(OverlayFile), plan, from); err != nil {
			return err
		}
	}
	if err := writeSeed(inst, cfg); err != nil {
		return err
	}
	if spec.Machine.Saved != "" {
		call, err := cloudinit.Clone(cfg, strings.ReplaceAll(spec.ID, "-", ""))
		if err := writeCall(inst, call, err); err != nil {
			return err
		}
	}
	if err := emptyConsole(inst); err != nil {
		return err
	}
	return handOver(inst, spec)
}

// emptyConsole begins the log of another run.
func emptyConsole(inst *instance.Instance) error {
	if err := os.WriteFile(inst.Path(ConsoleFile), nil, 0o600); err != nil {
		return fmt.Errorf("empty the console log: %w", err)
	}
	return nil
}

// source is a saved machine whose disk others begin with.
type source interface {
	CopyDisk(dst string) error
}

// makeDisk makes the machine's disk, which lies over the image's. One that
// goes on from a saved one begins with a copy of its disk, which is small.
func makeDisk(ctx context.Context, path string, plan plan, from source) error {
	if from == nil {
		return images.CreateOverlay(ctx, path, plan.image, plan.spec.Disk)
	}
	return from.CopyDisk(path)
}

func writeSeed(inst *instance.Instance, cfg cloudinit.Config) error {
	seed, err := cloudinit.NewSeed(cfg)
	if err != nil {
		return fmt.Errorf("describe the guest to cloud-init: %w", err)
	}
	return seed.WriteISO(inst.Path(SeedFile))
}

// writeCall writes what makes a guest that goes on from a saved state this
// machine, unless err says that it could not be described. A clone's host key is
// in it.
func writeCall(inst *instance.Instance, call line.Call, err error) error {
	if err != nil {
		return fmt.Errorf("describe the guest: %w", err)
	}
	data, err := json.Marshal(call)
	if err != nil {
		return fmt.Errorf("describe the guest: %w", err)
	}
	return vm.WriteFile(inst.Path(instance.CallFile), data, 0o600)
}

// seedConfig is the guest in cloud-init's terms, without its keys.
func seedConfig(spec instance.Spec, plan plan) cloudinit.Config {
	cfg := cloudinit.Config{
		InstanceName: spec.Name,
		User:         cloudinit.Account{Name: GuestUser, UID: GuestUID},
		Timezone:     plan.facts.Timezone,
		Locale:       plan.facts.Locale,
		CAs:          plan.facts.CAs,
		Git:          plan.git,
		Network:      cloudinit.Network{MAC: guestMAC, Address: guestAddress, Gateway: gatewayAddress, DNS: []string{gatewayAddress}},
		Partitioned:  plan.image.Kernel() == "",
	}
	if cfg.Partitioned {
		// What the SSH server of our own images does unasked.
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
		if err := vm.WriteFile(path, pair.Private, 0o600); err != nil {
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
	names := []string{OverlayFile, SeedFile, ConsoleFile, VarsFile}
	for i := range spec.Machine.Slots {
		names = append(names, romFile(i))
	}
	for _, name := range names {
		if err := os.Lchown(inst.Path(name), o.UID, o.GID); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("hand over %s: %w", name, err)
		}
	}
	return nil
}
