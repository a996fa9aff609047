package images

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
)

// recipeFS holds what makes a Debian tree into the guest: package lists, the
// customize hook, the script that makes the initial ram disk.
//
//go:embed all:recipe
var recipeFS embed.FS

// guestProgram is the one file of the recipe that is built: see the Makefile.
const guestProgram = "recipe/rootfs/usr/lib/guest/sshd"

// buildFS holds the steps of a layer's build that are shell.
//
//go:embed build/*.sh
var buildFS embed.FS

// rootSize is the size of the root disk as the guest sees it. The file is
// sparse, so that it costs nothing; it is what a virtual machine gets by
// default, so that usually no file system has to be grown at boot.
const rootSize = 20 << 30

// npmToolVersion is the npm that installs packages and stays in the image.
// Release 10 runs on Node.js 18.17 and newer, so on that of every suite.
const npmToolVersion = "10.9.9"

// plan is everything that decides an image's content, and the names that
// follow from it.
type plan struct {
	entry    Entry
	spec     Spec // normal form
	driver   *Driver
	arch     string
	mirror   string
	recipe   string // digest
	baseID   string
	baseKey  string
	layerID  string // empty when the spec asks for a base only
	layerKey string
}

// id returns the ID of the image that the spec asks for.
func (p plan) id() string {
	if p.layerID != "" {
		return p.layerID
	}
	return p.baseID
}

func newPlan(spec Spec, mirror string, known probes.Store) (plan, error) {
	entry, err := Known(spec.Image)
	if err != nil {
		return plan{}, err
	}
	asked := spec
	spec, err = spec.normal()
	if err != nil {
		return plan{}, fmt.Errorf("image %s: %w", spec.Image, err)
	}
	p := plan{entry: entry, spec: spec, arch: debianArch(), mirror: mirror}
	if p.driver, err = driverOf(asked); err != nil {
		return plan{}, fmt.Errorf("image %s: %w", spec.Image, err)
	}
	if _, err := fs.Stat(recipeFS, guestProgram); err != nil {
		return plan{}, vm.WithHint(errors.New("this agentvm was built without the program that guests run"), "build it with make, in a clone of its repository")
	}
	if p.recipe, err = recipe(known); err != nil {
		return plan{}, err
	}
	p.baseKey = key("base", formatVersion, rootSize, p.recipe, entry.Suite, p.arch, mirror)
	p.baseID = entry.Name + "-" + p.baseKey[:12]
	if spec.layered() {
		steps, err := hashFS(buildFS)
		if err != nil {
			return plan{}, err
		}
		p.layerKey = key("layer", p.baseKey, steps, npmToolVersion, spec)
		if p.driver != nil {
			script, err := driverFS.ReadFile("drivers/sources.sh")
			if err != nil {
				return plan{}, err
			}
			p.layerKey = key("driver", p.layerKey, p.driver, p.driver.commands(), script)
		}
		p.layerID = entry.Name + "-" + p.layerKey[:12]
	}
	return p, nil
}

// key hashes the JSON form of its parts.
func key(parts ...any) string {
	data, err := json.Marshal(parts)
	if err != nil { // only strings, numbers and Specs come here
		data = []byte(err.Error())
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// recipe returns the digest of recipeFS. Every start asks for it, and the guest's
// program is large, so it is remembered for as long as this executable is the same.
func recipe(known probes.Store) (digest string, err error) {
	const kind = "recipe"
	build := ""
	if self, err := os.Executable(); err == nil {
		build, _ = probes.Build(self)
	}
	if build != "" && known.Read(kind, build, &digest) {
		return digest, nil
	}
	if digest, err = hashFS(recipeFS); err == nil && build != "" {
		known.Write(kind, build, digest)
	}
	return digest, err
}

// hashFS returns a digest of the names and contents of a system's files.
func hashFS(system fs.FS) (string, error) {
	h := sha256.New()
	err := fs.WalkDir(system, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		f, err := system.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		fmt.Fprintf(h, "%s\x00%d\x00", path, info.Size())
		_, err = io.Copy(h, f)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("hash recipe: %w", err)
	}
	return plainPrefix + hex.EncodeToString(h.Sum(nil)), nil
}

// packageList reads the recipe's package list for a suite: one package a line,
// # starts a comment.
func packageList(suite string) ([]string, error) {
	data, err := recipeFS.ReadFile("recipe/packages-" + suite + ".txt")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(data)) {
		line, _, _ = strings.Cut(line, "#")
		out = append(out, strings.Fields(line)...)
	}
	return out, nil
}

// cmdline reads the recipe's kernel command line.
func cmdline() (string, error) {
	data, err := recipeFS.ReadFile("recipe/cmdline.txt")
	return strings.TrimSpace(string(data)), err
}

func debianArch() string {
	if runtime.GOARCH == "386" {
		return "i386"
	}
	return runtime.GOARCH // amd64 and arm64 are called so by both
}
