package lifecycle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/agentvm/agentvm/cloudinit"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/line"
	"github.com/agentvm/agentvm/vm/saved"
	"github.com/agentvm/agentvm/vm/template"
)

// templateFor finds the template that the machine can go on from, making it
// when it is lacking, and holds it. Without an error it is nil where the machine
// has to boot.
func (m *Manager) templateFor(ctx context.Context, plan plan, opt UpOptions, report Report) (*template.Template, error) {
	switch {
	case opt.Cold || !plan.newDisk:
		return nil, nil
	case plan.spec.Backend == config.BackendLibvirt:
		report.Note("the machine boots: libvirt cannot go on from a template")
		return nil, nil
	case noTemplate(plan.spec.Machine) != "":
		report.Note("the machine boots: %s", noTemplate(plan.spec.Machine))
		return nil, nil
	case plan.image.Kernel() == "":
		report.Note("the machine boots: images with a boot loader of their own have no templates")
		return nil, nil
	}
	t, err := m.ensureTemplate(ctx, plan, report)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		// Slower is better than not at all.
		report.Note("the machine boots, because there is no template for it: %v", err)
		return nil, nil
	}
	if err := t.Touch(); err != nil {
		t.Release()
		return nil, nil // deleted this moment, by an older agentvm or by hand
	}
	return t, nil
}

// ensureTemplate finds the template for the plan's environment, or makes it. The
// caller must release it.
func (m *Manager) ensureTemplate(ctx context.Context, plan plan, report Report) (*template.Template, error) {
	cfg := templateConfig(plan)
	key, err := m.templateKey(ctx, plan, cfg)
	if err != nil {
		return nil, err
	}
	if t, err := m.Templates.Hold(key); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return t, err
	}
	if err := m.Templates.Make(); err != nil {
		return nil, err
	}
	release, err := m.Templates.Lock(ctx, key, func() { report.Note("another command makes the template; waiting for it") })
	if err != nil {
		return nil, err
	}
	defer release()
	if t, err := m.Templates.Hold(key); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return t, err
	}
	report.Note("making a template of this environment, once: machines then start from it in a moment")
	t, err := m.makeTemplate(ctx, key, plan, cfg, report)
	if err != nil {
		t.Release() // made, and its machine not cleared away
		return nil, err
	}
	m.tidyTemplates(ctx, t, report)
	return t, nil
}

// tidyTemplates keeps the store within its bound. What it cannot delete is no
// reason to do without the template that has just been made.
func (m *Manager) tidyTemplates(ctx context.Context, made *template.Template, report Report) {
	err := m.SweepTemplates(ctx)
	removed, pruneErr := m.Templates.Prune(made)
	for _, r := range removed {
		switch r.Fault {
		case "":
			report.Note("deleted template %s (%s), the least recently used, to make room", r.ID, r.Name)
		case template.Foreign:
			report.Note("deleted template %s of another agentvm, the least recently used, to make room", r.ID)
		default:
			report.Note("deleted template %s, which was %s", r.ID, r.Fault)
		}
	}
	if err = errors.Join(err, pruneErr); err != nil {
		report.Note("old templates could not be deleted: %v", err)
	}
}

// BuildTemplate finds or makes the template for a project's environment, and
// its image, without a machine for the project.
func (m *Manager) BuildTemplate(ctx context.Context, p Project, opt UpOptions, report Report) (*template.Template, error) {
	ws, err := CheckDirectory(p.Workspace(), m.Home, true) // nothing of it is shared
	if err != nil {
		return nil, err
	}
	_, t, err := m.environment(ctx, p, ws, opt, report)
	t.Release()
	return t, err
}

// environment decides on nobody's machine for a project, and finds or makes
// its template, which the caller must release.
func (m *Manager) environment(ctx context.Context, p Project, ws Directory, opt UpOptions, report Report) (plan, *template.Template, error) {
	fail := func(err error) (plan, *template.Template, error) { return plan{}, nil, err }
	nobody := m.Store.Open(m.Templates.Workshop("environment-"))
	pl, err := m.plan(ctx, p, ws, nobody, instance.Spec{}, opt, report)
	if err != nil {
		return fail(err)
	}
	if err := m.Store.Dirs.Reachable(); err != nil {
		return fail(err)
	}
	if pl.spec.Backend == config.BackendLibvirt {
		return fail(vm.WithHint(vm.Classify(vm.ErrUsage, errors.New("machines that libvirt runs cannot go on from a template")), "backend: qemu has templates"))
	}
	if pl.image.Kernel() == "" {
		return fail(vm.Classify(vm.ErrUsage, fmt.Errorf("image %s brings its own boot loader; such machines always boot", p.Config.Image)))
	}
	if why := noTemplate(pl.spec.Machine); why != "" {
		return fail(vm.Classify(vm.ErrUsage, fmt.Errorf("machines of this project boot: %s", why)))
	}
	if err := checkMemory(pl.spec.Machine.Memory); err != nil {
		return fail(err)
	}
	t, err := m.ensureTemplate(ctx, pl, report)
	return pl, t, err
}

// SweepTemplates clears what killed commands have left of templates that they made.
func (m *Manager) SweepTemplates(ctx context.Context) error {
	return m.Templates.Abandoned(func(dir string) error {
		return m.clear(ctx, m.Store.Open(dir))
	})
}

// templateConfig is a template's guest in cloud-init's terms, without its key.
func templateConfig(plan plan) cloudinit.Config {
	cfg := seedConfig(plan.spec, plan).Template()
	const listener = "/run/agentvm-listen"
	cfg.Files = []cloudinit.GuestFile{{Path: listener, Content: []byte(line.Listener), Mode: 0o700}}
	cfg.RunCmd = []string{"systemd-run --quiet --unit=agentvm-line python3 " + listener}
	return cfg
}

// templateKey stands for all that a guest can observe of its environment.
func (m *Manager) templateKey(ctx context.Context, plan plan, cfg cloudinit.Config) (string, error) {
	hardware, err := m.Hardware(ctx, plan.spec.Machine)
	if err != nil {
		return "", err
	}
	seed, err := cloudinit.NewSeed(cfg)
	if err != nil {
		return "", err
	}
	files, err := seed.Render()
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(map[string]any{
		"format": []int{template.Format, saved.Format}, "hardware": hardware,
		// The files' digests too: an image that was built anew has another disk
		// under the same id, and the template's memory remembers the old one.
		"image": plan.image.ID, "files": plan.image.Manifest.Files, "disk": plan.spec.Disk,
		"seed": files.InstanceID, "rest": template.Rest(plan.spec.Guest.User, plan.spec.Guest.Home),
	})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// makeTemplate boots a machine of nobody's, saves it and publishes it. The
// caller holds the key's lock.
func (m *Manager) makeTemplate(ctx context.Context, key string, plan plan, cfg cloudinit.Config, report Report) (_ *template.Template, err error) {
	inst := m.Store.Open(m.Templates.Workshop(key))
	if err := m.clear(ctx, inst); err != nil {
		return nil, err
	}
	defer func() {
		// After a failure its logs are of use to nobody but the one who asks now.
		err = errors.Join(err, m.clear(context.WithoutCancel(ctx), inst))
	}()
	if err := os.MkdirAll(inst.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	if os.Getuid() == 0 {
		if err := os.Chmod(inst.Dir, 0o711); err != nil { // the user that QEMU runs as passes through
			return nil, fmt.Errorf("make template: %w", err)
		}
	}
	spec := nobodys(plan, inst, uuid.NewString())
	spec.Template, spec.Machine.UUID = true, "" // machines that go on from it show none
	host, err := cloudinit.GenerateKey("template")
	if err != nil {
		return nil, err
	}
	cfg.HostKey = host.Private // sshd wants one to start with; each clone has its own
	if err := makeFiles(ctx, inst, spec, cfg, plan, nil); err != nil {
		return nil, err
	}
	if err := inst.WriteSpec(spec); err != nil {
		return nil, err
	}
	if _, err := m.start(ctx, inst, spec, report); err != nil {
		return nil, err
	}
	done := inst.Path(instance.SavedDir)
	disk := filepath.Join(done, template.DiskFile)
	if err := os.Rename(inst.Path(OverlayFile), disk); err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	if err := os.Chown(disk, os.Getuid(), os.Getgid()); err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	return m.Templates.Publish(done, template.Manifest{
		Key: key, Created: time.Now().UTC().Truncate(time.Second), Image: plan.image.ID, Name: plan.spec.Image,
		CPUs: spec.Machine.CPUs, Memory: spec.Machine.Memory,
	})
}

// clear ends a machine of nobody's, or what a killed command has left of one,
// and deletes its files.
func (m *Manager) clear(ctx context.Context, inst *instance.Instance) error {
	if _, err := m.stop(ctx, inst, 0); err != nil && vm.Hint(err) == "" {
		return err
	}
	return inst.Remove()
}

// nobodys is the plan's machine as nobody's: without shares, without a way
// out, and without anything of the project.
func nobodys(plan plan, inst *instance.Instance, id string) instance.Spec {
	s := plan.spec
	spec := instance.Spec{
		Created: time.Now().UTC(), Image: s.Image, ImageID: s.ImageID, Disk: s.Disk, BootTimeout: s.BootTimeout, RestoreTimeout: s.RestoreTimeout,
		Guest:   instance.Guest{User: s.Guest.User, Home: s.Guest.Home},
		Machine: s.Machine,
	}
	spec.Machine.Shares = nil
	_, spec.Machine.Slots = s.Machine.SlotsForLater()
	return place(spec, inst.Name, id, inst.Dir, inst.RunDir(id), plan.host)
}
