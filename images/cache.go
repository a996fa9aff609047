package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
)

// ErrInUse is wrapped by [Cache.Remove] for an image that something is built on.
var ErrInUse = errors.New("image is in use")

// Cache is a directory of images. Any number of processes may use one.
//
//	images/ID/   finished images; they appear and disappear by rename
//	build/ID/    work of the process that holds locks/ID.lock
//	locks/       one lock file for each ID, never removed
type Cache struct {
	dir     string
	mirror  string
	builder builder
	known   probes.Store
}

// Option changes how [Open] makes a Cache.
type Option func(*Cache)

// WithMirror makes builds use another Debian archive than the
// distribution's default: a URL, or anything that mmdebstrap(1) takes as MIRROR.
func WithMirror(mirror string) Option { return func(c *Cache) { c.mirror = mirror } }

// WithProbes remembers what takes long to find out about this program.
func WithProbes(known probes.Store) Option { return func(c *Cache) { c.known = known } }

// Open returns the cache in dir, which is made if it is not there. As root it is
// readable by all, so that a virtual machine's unprivileged process can open
// its disk; otherwise it is the user's alone.
func Open(dir string, options ...Option) (*Cache, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open image cache: %w", err)
	}
	mode := fs.FileMode(0o700)
	if os.Getuid() == 0 {
		mode = 0o755
	}
	c := &Cache{dir: abs, builder: debian{newSandbox(os.Getuid())}}
	for _, o := range options {
		o(c)
	}
	if err := os.MkdirAll(abs, mode); err != nil {
		return nil, fmt.Errorf("open image cache: %w", err)
	}
	// Overlays record where their image lies; a link on the way there may go.
	if c.dir, err = filepath.EvalSymlinks(abs); err != nil {
		return nil, fmt.Errorf("open image cache: %w", err)
	}
	for _, sub := range []string{"images", "build", "locks"} {
		if err := os.MkdirAll(filepath.Join(c.dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("open image cache: %w", err)
		}
	}
	return c, nil
}

func (c *Cache) imageDir(id string) string { return filepath.Join(c.dir, "images", id) }
func (c *Cache) workDir(id string) string  { return filepath.Join(c.dir, "build", id) }

// Resolve returns the image that the spec asks for if it can be had without
// building: a local file, when spec.Image is a path, or an image in the cache.
// The error wraps [vm.ErrNotFound] otherwise.
func (c *Cache) Resolve(ctx context.Context, spec Spec) (*Image, error) {
	if !IsPath(spec.Image) {
		return c.Find(ctx, spec)
	}
	if spec.layered() {
		return nil, vm.WithHint(
			invalid("image %s is a disk file: packages cannot be baked into it", spec.Image),
			"remove provision.packages, or use one of the built images (agentvm image ls)")
	}
	return Local(ctx, spec.Image)
}

// Find returns the image that the spec asks for. The error wraps
// [vm.ErrNotFound] when it is not built, and [ErrCorrupt] when it is damaged.
func (c *Cache) Find(_ context.Context, spec Spec) (*Image, error) {
	p, err := newPlan(spec, c.mirror, c.known)
	if err != nil {
		return nil, err
	}
	return c.load(p.id())
}

// Get returns an image by its ID, by a beginning of its ID that no other has, or
// by its catalogue name, which means the base image that Ensure would return.
func (c *Cache) Get(idOrName string) (*Image, error) {
	if p, err := newPlan(Spec{Image: idOrName}, c.mirror, c.known); err == nil {
		img, err := c.load(p.id())
		if errors.Is(err, vm.ErrNotFound) {
			return nil, vm.WithHint(fmt.Errorf("image %s is not built: %w", idOrName, vm.ErrNotFound),
				"agentvm image build "+idOrName)
		}
		return img, err
	}
	ids, err := c.ids()
	if err != nil {
		return nil, err
	}
	if slices.Contains(ids, idOrName) {
		return c.load(idOrName)
	}
	matches := slices.DeleteFunc(ids, func(id string) bool {
		return idOrName == "" || !strings.HasPrefix(id, idOrName)
	})
	switch len(matches) {
	case 1:
		return c.load(matches[0])
	case 0:
		return nil, vm.WithHint(fmt.Errorf("image %q: %w", idOrName, vm.ErrNotFound), "agentvm image ls")
	}
	return nil, invalid("%q is the beginning of %d images: %s", idOrName, len(matches), strings.Join(matches, ", "))
}

// List returns every image of the cache, by ID. A damaged one is in the list
// with its ID and directory only, and in the error, which wraps [ErrCorrupt].
func (c *Cache) List() ([]*Image, error) {
	ids, err := c.ids()
	if err != nil {
		return nil, err
	}
	var list []*Image
	var damaged []error
	for _, id := range ids {
		img, err := c.load(id)
		switch {
		case errors.Is(err, vm.ErrNotFound): // removed since
			continue
		case err != nil:
			damaged = append(damaged, err)
			img = &Image{ID: id, Dir: c.imageDir(id)}
		}
		list = append(list, img)
	}
	return list, errors.Join(damaged...)
}

// Remove deletes an image. It refuses, with [ErrInUse], one that a layer is
// built on, one that is being built or built upon, and one whose ID is in
// inUse: those that the caller's virtual machines have overlays on.
func (c *Cache) Remove(ctx context.Context, id string, inUse []string) error {
	if slices.Contains(inUse, id) {
		return fmt.Errorf("remove image %s: a virtual machine uses it: %w", id, ErrInUse)
	}
	list, err := c.List()
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	if !slices.ContainsFunc(list, func(i *Image) bool { return i.ID == id }) {
		return vm.WithHint(fmt.Errorf("remove image %q: %w", id, vm.ErrNotFound), "agentvm image ls")
	}
	for _, img := range list {
		if img.Manifest.Base == id {
			return vm.WithHint(fmt.Errorf("remove image %s: image %s is built on it: %w", id, img.ID, ErrInUse),
				"agentvm image rm "+img.ID)
		}
	}
	lock, ok, err := c.tryLock(id)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("remove image %s: it is being built or built upon: %w", id, ErrInUse)
	}
	defer lock.Close()
	return c.discard(ctx, id)
}

// discard removes a finished image. The caller holds its lock.
func (c *Cache) discard(ctx context.Context, id string) error {
	trash := c.workDir(id)
	if err := c.builder.removeTree(ctx, trash); err != nil {
		return fmt.Errorf("remove %s: %w", trash, err)
	}
	if err := os.Rename(c.imageDir(id), trash); err != nil {
		return fmt.Errorf("remove image %s: %w", id, err)
	}
	return c.builder.removeTree(ctx, trash)
}

func (c *Cache) ids() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(c.dir, "images"))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// load reads an image by its exact ID.
func (c *Cache) load(id string) (*Image, error) {
	dir := c.imageDir(id)
	m, err := readManifest(dir)
	if err != nil {
		return nil, err
	}
	return &Image{ID: id, Dir: dir, Manifest: m, disk: filepath.Join(dir, rootDiskName), format: "raw"}, nil
}
