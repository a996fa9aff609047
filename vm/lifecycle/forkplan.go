package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// quiet is a Report without notes, of what is decided only to be compared.
type quiet struct{ Report }

func (quiet) Note(string, ...any) {}

// checkFork refuses, before anything is done, what forkPlan would refuse. The
// guest may still change its configuration; forkPlan looks at what was copied.
func (m *Manager) checkFork(ctx context.Context, inst *instance.Instance, spec instance.Spec, view bool, report Report) error {
	here := forkTarget{name: inst.Name, dir: spec.Workspace, config: spec.Config, view: view}
	_, err := m.forkPlan(ctx, here, inst, spec.ID, spec, quiet{report})
	return err
}

// forkPlan decides on the machine of a fork, with an id or a new one, and
// refuses one that would be anything else than what it is forked from. What runs
// in the fork's memory may have written the configuration in its workspace: it
// must not give itself what nobody has started a machine with.
func (m *Manager) forkPlan(ctx context.Context, t forkTarget, inst *instance.Instance, id string, from instance.Spec, report Report) (plan, error) {
	fail := func(err error) (plan, error) { return plan{}, err }
	p := defaultProject(t.dir)
	var err error
	if t.config != "" {
		if p, err = LoadProject(t.config); err != nil {
			return fail(err)
		}
	}
	if p.Workspace() != t.dir {
		return fail(vm.Classify(vm.ErrUsage, fmt.Errorf("workspace.path in %s names another directory than %s", t.config, t.dir)))
	}
	ws, err := CheckDirectory(t.dir, m.Home, true)
	if err != nil {
		return fail(err)
	}
	// Looked for and not built, because a build runs what the configuration says.
	if err := m.sameImage(ctx, p, from); err != nil {
		return fail(err)
	}
	old := instance.Spec{ID: id, View: t.view, ImageID: from.ImageID, Disk: from.Disk}
	pl, err := m.plan(ctx, p, ws, inst, old, UpOptions{Name: t.name, Agent: from.AgentChosen}, report)
	if err != nil {
		return fail(err)
	}
	fork := pl.spec
	if fork.Hardware, err = m.Hardware(ctx, fork.Machine); err != nil {
		return fail(err)
	}
	parts, err := differences(asFork(from, fork, inst, pl.host), fork)
	if err != nil {
		return fail(err)
	}
	if len(parts) > 0 {
		return fail(changed(from, parts, "agentvm restart "+from.Name+" comes first"))
	}
	return pl, nil
}

// sameImage refuses a project that asks for another image than the machine has.
func (m *Manager) sameImage(ctx context.Context, p Project, from instance.Spec) error {
	chosen := p.Config.Agent.Use
	if from.AgentChosen != "" {
		chosen = from.AgentChosen
	}
	profile, err := m.Agents.Get(chosen)
	if err != nil {
		return err
	}
	cache, err := m.Images()
	if err != nil {
		return err
	}
	img, err := cache.Resolve(ctx, ImageSpec(p, m.Home, profile))
	if err != nil && !errors.Is(err, vm.ErrNotFound) {
		return err
	}
	if err != nil || img.ID != from.ImageID {
		return changed(from, []string{"image"}, "agentvm stop "+from.Name+", then agentvm up --recreate, which gives it a new disk, come first")
	}
	return nil
}

// changed is the refusal of a fork that would be another machine.
func changed(from instance.Spec, parts []string, remedy string) error {
	hint := remedy
	if from.Config != "" {
		hint = "the guest may have written " + from.Config + ": look at it; " + remedy
	}
	return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("the environment has changed since %q started: %s", from.Name, strings.Join(parts, ", "))), hint)
}

// asFork is what the machine of from is where fork is: whatever is named here may
// differ, and nothing else.
func asFork(from, fork instance.Spec, inst *instance.Instance, host Host) instance.Spec {
	dir := from.Workspace
	from.Format, from.Created, from.BootTimeout, from.RestoreTimeout = fork.Format, fork.Created, fork.BootTimeout, fork.RestoreTimeout
	from.Workspace, from.View, from.Config = fork.Workspace, fork.View, fork.Config
	from.Machine.Saved = fork.Machine.Saved
	from.Shares = slices.Clone(from.Shares)
	for i, s := range from.Shares {
		// What lies in the workspace is copied with it, to whoever copies.
		moved := fork.Workspace + strings.TrimPrefix(s.Source, dir)
		if within(s.Source, dir) && i < len(fork.Shares) && fork.Shares[i].Source == moved {
			s.Source, s.Owner = moved, fork.Shares[i].Owner
		}
		s.ReadOnly = s.ReadOnly || fork.View
		from.Shares[i] = s
	}
	from = place(from, fork.Name, fork.ID, inst.Dir, inst.RunDir(fork.ID), host)
	if from.Machine.Boot.VarsFile != "" {
		from.Machine.Boot.VarsFile = inst.Path(VarsFile)
	}
	return from
}

// differences names what differs between two specs, by the names that it has in
// their files. All that is in those is compared, whatever it is.
func differences(a, b instance.Spec) ([]string, error) {
	fields := func(s instance.Spec) (map[string]any, error) {
		data, err := json.Marshal(s)
		if err != nil {
			return nil, fmt.Errorf("compare machines: %w", err)
		}
		var f map[string]any
		return f, json.Unmarshal(data, &f)
	}
	one, err := fields(a)
	if err != nil {
		return nil, err
	}
	two, err := fields(b)
	if err != nil {
		return nil, err
	}
	var parts []string
	for _, name := range names(one, two) {
		in, out := asMap(one[name]), asMap(two[name])
		if in == nil || out == nil {
			if !reflect.DeepEqual(one[name], two[name]) {
				parts = append(parts, strings.ToLower(name))
			}
			continue
		}
		for _, below := range names(in, out) {
			if !reflect.DeepEqual(in[below], out[below]) {
				parts = append(parts, strings.ToLower(name+"."+below))
			}
		}
	}
	return parts, nil
}

func asMap(v any) map[string]any { m, _ := v.(map[string]any); return m }

// names are the keys of both maps, in order.
func names(a, b map[string]any) []string {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return slices.Sorted(maps.Keys(all))
}
