package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// What a build needs on the disk, at most, for a base image and for a layer: the
// tree, the root disk and, of a base, the tree again, compressed; with room for what
// apt and npm download.
const (
	baseSpace  = 2 << 30
	layerSpace = 3 << 30

	driverSpace = 6 << 30 // of a layer with a driver, whose modules may have to be built
)

const (
	lockRetry    = 200 * time.Millisecond
	cleanTimeout = 2 * time.Minute
)

// Ensure returns the image that the spec asks for, and builds it, and the base
// under it, when they are not there or are damaged. When another process builds
// the same image, it waits for that one's result. When ctx ends, the build's
// programs are killed and its files removed before Ensure returns.
func (c *Cache) Ensure(ctx context.Context, spec Spec, p Progress) (*Image, error) {
	if IsPath(spec.Image) {
		return c.Resolve(ctx, spec)
	}
	if p == nil {
		p = Discard
	}
	plan, err := newPlan(spec, c.mirror, c.known)
	if err != nil {
		return nil, err
	}
	if plan.layerID == "" {
		return c.ensure(ctx, plan.baseID, job{plan: plan}, p)
	}
	// A finished layer needs no base.
	if img, err := c.load(plan.layerID); err == nil {
		return img, nil
	}
	base, release, err := c.holdBase(ctx, plan, p)
	if err != nil {
		return nil, err
	}
	defer release()
	return c.ensure(ctx, plan.layerID, job{plan: plan, base: base}, p)
}

// holdBase makes sure of the base and keeps it from being removed until
// release is called.
func (c *Cache) holdBase(ctx context.Context, plan plan, p Progress) (*Image, func(), error) {
	for {
		if _, err := c.ensure(ctx, plan.baseID, job{plan: plan}, p); err != nil {
			return nil, nil, err
		}
		lock := c.newLock(plan.baseID)
		if _, err := lock.TryRLockContext(ctx, lockRetry); err != nil {
			return nil, nil, fmt.Errorf("lock image %s: %w", plan.baseID, err)
		}
		base, err := c.load(plan.baseID)
		if err == nil {
			return base, func() { lock.Close() }, nil
		}
		lock.Close() // removed in between: once more
		if !errors.Is(err, vm.ErrNotFound) {
			return nil, nil, err
		}
	}
}

// ensure returns the image id, building it by the job if need be.
func (c *Cache) ensure(ctx context.Context, id string, j job, p Progress) (*Image, error) {
	img, err := c.load(id)
	if err == nil || !buildable(err) {
		return img, err
	}
	lock, err := c.lock(ctx, id, p)
	if err != nil {
		return nil, err
	}
	defer lock.Close()

	img, err = c.load(id) // another process may have built it meanwhile
	if err == nil || !buildable(err) {
		return img, err
	}
	if errors.Is(err, ErrCorrupt) {
		p.Line(err.Error() + "; building it anew")
		if err := c.discard(ctx, id); err != nil {
			return nil, err
		}
	}
	if err := c.sweep(ctx, id); err != nil {
		return nil, err
	}
	space := int64(baseSpace)
	if j.base != nil {
		space = layerSpace
	}
	if j.plan.driver != nil {
		space = driverSpace
	}
	if err := requireSpace(c.dir, space); err != nil {
		return nil, fmt.Errorf("build image %s: %w", id, err)
	}
	if err := c.build(ctx, id, j, p); err != nil {
		return nil, fmt.Errorf("build image %s: %w", id, err)
	}
	return c.load(id)
}

func buildable(err error) bool {
	return errors.Is(err, vm.ErrNotFound) || errors.Is(err, ErrCorrupt)
}

// build builds in the work directory and publishes by rename. The caller
// holds the lock.
func (c *Cache) build(ctx context.Context, id string, j job, p Progress) (err error) {
	start := time.Now()
	j.work = c.workDir(id)
	if err := os.Mkdir(j.work, 0o755); err != nil {
		return err
	}
	defer func() {
		// Also after a cancelled build, so not by its context.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		err = errors.Join(err, c.builder.removeTree(clean, j.work))
	}()

	m, err := c.builder.build(ctx, j, p)
	if err != nil {
		return err
	}
	p.Phase("compute digests")
	m.Format, m.ID = formatVersion, id
	m.Name, m.Suite, m.Arch = j.plan.entry.Name, j.plan.entry.Suite, j.plan.arch
	m.Recipe, m.Key = j.plan.recipe, j.plan.baseKey
	m.Spec = Spec{Image: j.plan.spec.Image}
	if j.base != nil {
		m.Base, m.Key, m.Spec = j.base.ID, j.plan.layerKey, j.plan.spec
	}
	if m.Files, err = digestDir(j.out("")); err != nil {
		return err
	}
	m.Created = start.UTC().Truncate(time.Second)
	m.BuildSeconds = time.Since(start).Seconds()
	if err := writeManifest(j.out(""), m); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return publish(j.out(""), c.imageDir(id))
}

// publish makes the files of from durable and readable and renames it to to.
func publish(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(from, e.Name())
		if err := os.Chmod(path, 0o644); err != nil {
			return err
		}
		if err := syncPath(path); err != nil {
			return err
		}
	}
	if err := syncPath(from); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncPath(filepath.Dir(to))
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, diskFull("", err))
	}
	return nil
}

// sweep removes what killed builds left: every work directory whose lock is
// free, and that of id, whose lock the caller holds.
func (c *Cache) sweep(ctx context.Context, id string) error {
	entries, err := os.ReadDir(filepath.Join(c.dir, "build"))
	if err != nil {
		return fmt.Errorf("list unfinished builds: %w", err)
	}
	for _, e := range entries {
		if e.Name() != id {
			lock, ok, err := c.tryLock(e.Name())
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			defer lock.Close()
		}
		if err := c.builder.removeTree(ctx, c.workDir(e.Name())); err != nil {
			return fmt.Errorf("remove unfinished build %s: %w", e.Name(), err)
		}
	}
	return nil
}

// lock takes the exclusive lock of an ID; it reports when it has to wait.
func (c *Cache) lock(ctx context.Context, id string, p Progress) (*flock.Flock, error) {
	lock, ok, err := c.tryLock(id)
	if err != nil || ok {
		return lock, err
	}
	p.Phase("wait for another build of " + id)
	lock = c.newLock(id)
	if _, err := lock.TryLockContext(ctx, lockRetry); err != nil {
		return nil, fmt.Errorf("wait for another build of %s: %w", id, err)
	}
	return lock, nil
}

func (c *Cache) tryLock(id string) (*flock.Flock, bool, error) {
	lock := c.newLock(id)
	ok, err := lock.TryLock()
	if err != nil {
		return nil, false, fmt.Errorf("lock image %s: %w", id, err)
	}
	return lock, ok, nil
}

// newLock returns the lock of an ID, not yet taken. The kernel drops it with
// the process that holds it.
func (c *Cache) newLock(id string) *flock.Flock {
	name := strings.ReplaceAll(id, string(filepath.Separator), "_") + ".lock"
	return flock.New(filepath.Join(c.dir, "locks", name), flock.SetPermissions(fs.FileMode(0o600)),
		flock.SetFlag(unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC))
}
