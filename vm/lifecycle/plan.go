package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
)

// plan is a decision: what to run, and what it is made from.
type plan struct {
	spec     instance.Spec
	image    *images.Image
	host     Host
	facts    cloudinit.Facts
	git      cloudinit.Git
	newDisk  bool   // there is none, or the old one has to go
	emulated string // why there is no hardware virtualization; empty: there is

	roms map[string]string // option ROMs to copy into the machine's directory, from where
}

// plan decides what to run, building the image when it is lacking.
func (m *Manager) plan(ctx context.Context, p Project, ws Directory, inst *instance.Instance, old instance.Spec, opt UpOptions, report Report) (plan, error) {
	fail := func(err error) (plan, error) { return plan{}, err }
	facts, cancel := m.hostFacts(ctx)
	defer cancel()
	chosen := opt.Agent
	if chosen == "" {
		chosen = old.AgentChosen
	}
	if chosen != "" {
		p.Config.Agent.Use = chosen
	}
	profile, err := m.Agents.Get(p.Config.Agent.Use)
	if err != nil {
		return fail(err)
	}
	if p.Config.Backend == config.BackendLibvirt {
		if p.Config.URI, err = m.Libvirt(ctx, p.Config.URI, opt.connect); err != nil {
			return fail(err)
		}
	}
	in := Inputs{Name: inst.Name, ID: old.ID, Created: old.Created, Project: p, Workspace: ws, Profile: profile, Dir: inst.Dir, View: old.View}
	if in.Mounts, err = m.mounts(p, opt); err != nil {
		return fail(err)
	}
	if in.ID == "" {
		in.ID, in.Created = uuid.NewString(), time.Now().UTC().Truncate(time.Second)
	}
	in.Run = inst.RunDir(in.ID)
	in.Host = Host{UID: os.Getuid(), GID: os.Getgid(), Home: m.Home, AgentConfig: m.agentConfig(profile, p.Config.Agent.Config == "credentials")}
	runAs := in.Host.runAs(in.ID)
	devices, err := m.devices(ctx, p, inst, old, runAs)
	if err != nil {
		return fail(err)
	}
	for _, note := range devices.Notes {
		report.Note("%s", note)
	}
	if in.Image, err = m.image(ctx, p, profile, old, opt, report); err != nil {
		return fail(err)
	}
	var why string
	if in.Host.Accel, why, err = m.Accel(ctx, in.Image, runAs); err != nil {
		return fail(err)
	}
	if in.Image.Kernel() != "" && p.Config.Firmware != "" {
		return fail(vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("firmware: %s is for disk files; image %s is started without any", p.Config.Firmware, p.Config.Image)), "remove firmware from agentvm.yaml"))
	}
	spec := Resolve(in)
	spec.AgentChosen = chosen
	if old.Disk != 0 && old.Disk != spec.Disk && !opt.Recreate {
		report.Note("resources.disk has changed, and this machine keeps its disk; agentvm up --recreate gives it a new one (the workspace is kept)")
		spec.Disk = old.Disk
	}
	found := <-facts
	if len(found.CAs) > 0 {
		// Programs with a list of their own trust the host's extra CAs only so.
		for name, value := range cloudinit.CAEnv() {
			if _, set := spec.Guest.Env[name]; !set {
				spec.Guest.Env[name] = value
			}
		}
	}
	git := found.Git
	git.SharedWorktrees = true
	git.Name = cmp.Or(p.Config.Git.Name, git.Name)
	git.Email = cmp.Or(p.Config.Git.Email, git.Email)
	roms, err := withDevices(&spec, p.Config.GPU, devices, inst.Path)
	if err != nil {
		return fail(err)
	}
	if opt.BootTimeout > 0 {
		spec.BootTimeout = opt.BootTimeout
	}
	pl := plan{spec: spec, roms: roms, image: in.Image, host: in.Host, facts: found, git: git}
	_, err = os.Stat(inst.Path(OverlayFile))
	pl.newDisk = opt.Recreate || old.ImageID != spec.ImageID || errors.Is(err, fs.ErrNotExist)
	if in.Host.Accel == vm.AccelTCG {
		pl.emulated = why
	}
	return pl, nil
}

// hostFacts looks at the host while the rest is looked at: Git is a process.
func (m *Manager) hostFacts(ctx context.Context) (<-chan cloudinit.Facts, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	facts := make(chan cloudinit.Facts, 1)
	go func() { facts <- cloudinit.HostProbe(m.Probes).Facts(ctx) }()
	return facts, cancel
}

// mounts looks at the directories that are shared beside the workspace.
func (m *Manager) mounts(p Project, opt UpOptions) (list []Directory, err error) {
	for _, mount := range p.Config.Mounts {
		d, err := CheckDirectory(absolute(p.Dir, m.Home, mount.Source), m.Home, opt.AllowWide)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", mount.Target, err)
		}
		list = append(list, d)
	}
	return list, nil
}

// image finds or builds the image. An instance keeps the one that its disk
// lies on, until it is recreated: a new base below an old overlay would tear
// the guest's file system apart.
func (m *Manager) image(ctx context.Context, p Project, profile agent.Profile, old instance.Spec, opt UpOptions, report Report) (*images.Image, error) {
	cache, err := m.Images()
	if err != nil {
		return nil, err
	}
	want := ImageSpec(p, m.Home, profile)
	if old.ImageID == "" || opt.Recreate {
		return cache.Ensure(ctx, want, report)
	}
	if img, err := cache.Resolve(ctx, want); err == nil && img.ID == old.ImageID {
		return img, nil
	}
	kept, err := keptImage(ctx, cache, old.ImageID)
	if err != nil {
		return nil, vm.WithHint(fmt.Errorf("the image below the machine's disk: %w", err), "agentvm up --recreate gives it a new disk; the workspace is kept")
	}
	report.Note("the environment has changed, and this machine keeps its disk; agentvm up --recreate gives it a new one (the workspace is kept)")
	return kept, nil
}

// keptImage finds an image by the id that an instance remembers; that of a
// disk file is its path.
func keptImage(ctx context.Context, cache *images.Cache, id string) (*images.Image, error) {
	if filepath.IsAbs(id) {
		return images.Local(ctx, id)
	}
	return cache.Get(id)
}

// agentConfig lists the profile's configuration paths that the host has.
// Those with credentials go along only when the project asks for it.
func (m *Manager) agentConfig(profile agent.Profile, credentials bool) []string {
	var have []string
	for _, c := range profile.Config {
		if _, err := os.Stat(absolute("/", m.Home, c.Path)); err == nil && (credentials || !c.Secret) {
			have = append(have, c.Path)
		}
	}
	return have
}
