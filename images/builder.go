package images

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/agentvm/agentvm/vm"
)

// job is one image to build. The work directory is the builder's alone; what
// is to become the image goes to the directory out in it.
type job struct {
	plan plan
	base *Image // nil: build the base
	work string
}

func (j job) out(name string) string { return filepath.Join(j.work, "out", name) }
func (j job) in(name string) string  { return filepath.Join(j.work, "in", name) }
func (j job) tree() string           { return filepath.Join(j.work, "tree") }

// builder makes the files of an image and the parts of its manifest that
// only a builder knows.
type builder interface {
	build(ctx context.Context, j job, p Progress) (Manifest, error)
	removeTree(ctx context.Context, dir string) error
}

// debian builds images with mmdebstrap.
type debian struct{ sandbox }

func (d debian) build(ctx context.Context, j job, p Progress) (Manifest, error) {
	if err := require(thisHost().check()); err != nil {
		return Manifest{}, err
	}
	for _, dir := range []string{j.in(""), j.out("")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return Manifest{}, err
		}
	}
	b := build{debian: d, job: j, to: p, net: probeHostNet(ctx, os.Getenv, "/")}
	b.output = &buildOutput{to: p}
	steps := []func(context.Context) error{b.prepare, b.bootstrap, b.readPackages, b.packTree, b.packDisk, b.takeKernel}
	if j.base != nil {
		steps = []func(context.Context) error{b.prepare, b.fetchNode, b.unpackBase, b.extend, b.readPackages, b.readNPM, b.packDisk, b.linkKernel}
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return Manifest{}, err
		}
	}
	b.manifest.Builder = builderVersions(ctx)
	return b.manifest, nil
}

// build is one run of a builder.
type build struct {
	debian
	job
	to       Progress
	output   *buildOutput
	net      hostNet
	manifest Manifest
}

// prepare writes what the programs of the build read.
func (b *build) prepare(ctx context.Context) error {
	for _, system := range []fs.FS{recipeFS, buildFS, driverFS} {
		if err := copyFS(b.in(""), system); err != nil {
			return err
		}
	}
	files := map[string]string{
		"apt.conf":    b.net.aptConf,
		"resolv.conf": string(b.net.resolv),
	}
	if b.base != nil {
		packages := b.plan.spec.Packages
		if b.plan.spec.Node == NodeDebian {
			packages = append(slices.Clone(packages), "nodejs")
		}
		if d := b.plan.driver; d != nil {
			packages = append(slices.Clone(packages), d.packages()...)
			files["driver-sources"] = d.sources()
		}
		files["packages"] = strings.Join(packages, "\n")
	}
	return b.writeInput(files)
}

func (b *build) writeInput(files map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		// Only root of the build reads them; npmrc may hold a credential.
		if err := os.WriteFile(b.in(name), []byte(files[name]), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// env is the environment of mmdebstrap and apt.
func (b *build) env() []string { return append(baseEnv(), b.net.proxies...) }

// mmdebstrap runs it with the arguments that every use shares. Its mode is
// always root: in a user namespace the sandbox has made us so.
//
// The first hook lends the host's apt settings: mmdebstrap's own configuration
// file for apt is outside the tree and does not stay.
func (b *build) mmdebstrap(ctx context.Context, args ...string) error {
	args = append([]string{
		"mmdebstrap", "--verbose", "--mode=root", "--format=directory", "--architectures=" + b.plan.arch,
		`--setup-hook=cat ` + vm.ShellQuote(b.in("apt.conf")) + ` >>"$MMDEBSTRAP_APT_CONFIG"`,
	}, args...)
	return b.run(ctx, command{args: args, env: b.env(), line: b.output.line})
}

// bootstrap makes the base's tree and its initial ram disk.
func (b *build) bootstrap(ctx context.Context) error {
	packages, err := packageList(b.plan.entry.Suite)
	if err != nil {
		return err
	}
	var mirror []string
	if b.plan.mirror != "" {
		mirror = append(mirror, b.plan.mirror)
	}
	suite := b.plan.entry.Suite
	recipe := func(name string) string { return vm.ShellQuote(b.in("recipe/" + name)) }
	args := []string{
		"--variant=minbase", "--include=" + strings.Join(packages, ","),
		"--dpkgopt=" + b.in("recipe/dpkg.cfg"),
		// mmdebstrap has put the host's own there.
		`--customize-hook=echo 'PHASE: configure the guest'; rm -f "$1/etc/resolv.conf" "$1/etc/hostname"`,
		`--customize-hook=` + recipe("customize.sh") + ` "$1" ` + suite,
		`--customize-hook=` + recipe("initrd.sh") + ` "$1" ` + vm.ShellQuote(b.out(initrdName)),
		suite, b.tree(),
	}
	return b.mmdebstrap(ctx, append(args, mirror...)...)
}

// unpackBase makes the tree of a layer out of the base's.
func (b *build) unpackBase(ctx context.Context) error {
	b.to.Phase("unpack base image")
	f, err := os.Open(b.base.file(treeName))
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		return err
	}
	defer z.Close()
	if err := os.Mkdir(b.tree(), 0o755); err != nil {
		return err
	}
	return b.run(ctx, command{
		args:  []string{"tar", "-C", b.tree(), "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*"},
		env:   baseEnv(),
		stdin: z,
	})
}

// extend installs what the layer adds.
func (b *build) extend(ctx context.Context) error {
	args := []string{"--variant=custom", "--skip=check/empty"}
	driver := b.plan.driver
	if driver != nil {
		args = append(args, `--customize-hook=`+vm.ShellQuote(b.in("drivers/sources.sh"))+` "$1" `+vm.ShellQuote(b.in("")))
	}
	args = append(args, `--customize-hook=`+vm.ShellQuote(b.in("build/layer.sh"))+` "$1" `+vm.ShellQuote(b.in("")))
	if driver != nil && driver.Kernel != "" {
		args = append(args, `--customize-hook=`+vm.ShellQuote(b.in("recipe/initrd.sh"))+` "$1" `+vm.ShellQuote(b.out(initrdName)))
	}
	// mmdebstrap copies the host's where the tree has none.
	for _, name := range []string{"/etc/resolv.conf", "/etc/hostname"} {
		if _, err := os.Lstat(b.tree() + name); os.IsNotExist(err) {
			args = append(args, `--customize-hook=rm -f "$1`+name+`"`)
		}
	}
	if len(b.plan.spec.Packages) == 0 && b.plan.spec.Node != NodeDebian && driver == nil {
		args = append(args, "--skip=update")
	}
	return b.mmdebstrap(ctx, append(args, "", b.tree())...)
}

// packTree keeps the base's tree for layers. Device nodes stay out: only
// real root may make them, and no guest needs them.
func (b *build) packTree(ctx context.Context) error {
	b.to.Phase("keep the tree for layers")
	f, err := os.Create(b.out(treeName))
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return err
	}
	err = b.run(ctx, command{
		args:   []string{"tar", "-C", b.tree(), "-c", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--exclude=./dev/*", "."},
		env:    baseEnv(),
		stdout: z,
	})
	if closeErr := z.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("write %s: %w", f.Name(), diskFull("", closeErr))
	}
	return err
}

// packDisk makes the root disk. The journal is small because a guest's life
// is short; the inode tables are zero already, see punchHoles.
func (b *build) packDisk(ctx context.Context) error {
	b.to.Phase("make the root disk")
	b.manifest.RootSize = rootSize
	err := b.run(ctx, command{
		args: []string{"mke2fs", "-q", "-t", "ext4", "-L", "root", "-J", "size=32", "-E", "lazy_itable_init=0",
			"-d", b.tree(), b.out(rootDiskName), fmt.Sprintf("%dk", rootSize>>10)},
		env:  baseEnv(),
		line: b.to.Line,
	})
	if err != nil {
		return err
	}
	return punchHoles(b.out(rootDiskName))
}

// takeKernel copies the kernel out of the base's tree.
func (b *build) takeKernel(context.Context) error {
	found, err := filepath.Glob(filepath.Join(b.tree(), "boot/vmlinuz-*"))
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("the tree has %d kernels, one was expected", len(found))
	}
	_, b.manifest.Kernel, _ = strings.Cut(filepath.Base(found[0]), "vmlinuz-")
	if b.manifest.Cmdline, err = cmdline(); err != nil {
		return err
	}
	return copyFile(b.out(kernelName), found[0])
}

// linkKernel gives a layer the base's kernel and ram disk: the same files. A
// driver's own kernel comes from the tree.
func (b *build) linkKernel(ctx context.Context) error {
	if b.plan.driver != nil && b.plan.driver.Kernel != "" {
		return b.takeKernel(ctx)
	}
	b.manifest.Kernel, b.manifest.Cmdline = b.base.Manifest.Kernel, b.base.Manifest.Cmdline
	for _, name := range []string{kernelName, initrdName} {
		if err := os.Link(b.base.file(name), b.out(name)); err != nil {
			return err
		}
	}
	return nil
}

// readPackages lists what dpkg knows in the tree.
func (b *build) readPackages(ctx context.Context) error {
	var out bytes.Buffer
	err := b.run(ctx, command{
		args: []string{"dpkg-query", "--admindir=" + filepath.Join(b.tree(), "var/lib/dpkg"),
			"--show", "--showformat=${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\n"},
		env:    baseEnv(),
		stdout: &out,
	})
	if err != nil {
		return err
	}
	b.manifest.Packages = parsePackages(out.String())
	return nil
}

func parsePackages(text string) []Package {
	var list []Package
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) == 4 && strings.HasPrefix(f[0], "ii") {
			list = append(list, Package{Name: f[1], Version: f[2], Arch: f[3]})
		}
	}
	return list
}

// builderVersions says which tools made the image.
func builderVersions(ctx context.Context) map[string]string {
	v := map[string]string{"mode": "root"}
	if os.Getuid() != 0 {
		v["mode"] = "unshare"
	}
	if out, err := exec.CommandContext(ctx, "mmdebstrap", "--version").Output(); err == nil {
		v["mmdebstrap"] = strings.TrimSpace(strings.TrimPrefix(string(out), "mmdebstrap "))
	}
	if out, err := exec.CommandContext(ctx, "mke2fs", "-V").CombinedOutput(); err == nil {
		if f := strings.Fields(string(out)); len(f) > 1 {
			v["mke2fs"] = f[1]
		}
	}
	return v
}

// copyFS is os.CopyFS with scripts that can be run; an embed.FS keeps no modes.
func copyFS(dir string, system fs.FS) error {
	return fs.WalkDir(system, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		target := filepath.Join(dir, path)
		if e.IsDir() {
			return os.Mkdir(target, 0o755)
		}
		data, err := fs.ReadFile(system, path)
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if bytes.HasPrefix(data, []byte("#!")) {
			mode = 0o755
		}
		return os.WriteFile(target, data, mode)
	})
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return fmt.Errorf("copy %s to %s: %w", from, to, diskFull("", err))
	}
	return out.Close()
}
