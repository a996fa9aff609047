package images

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
)

// fetchNode downloads what comes from the npm registry before npm itself runs,
// resolves the packages to exact versions and writes the script that installs.
func (b *build) fetchNode(ctx context.Context) error {
	spec := b.plan.spec
	spec.NPM = slices.Clone(spec.NPM)
	if spec.Node != "" {
		b.to.Phase("download Node.js and npm")
		reg := newRegistry(b.net, b.to.Line)
		if _, err := reg.download(ctx, NPMPackage{Name: "npm", Version: npmToolVersion}, b.in("npm.tgz")); err != nil {
			return err
		}
		if spec.Node != NodeDebian {
			// https://www.npmjs.com/package/node: the binaries are in packages of their own.
			p := NPMPackage{Name: "node-linux-" + npmArch(b.plan.arch), Version: spec.Node}
			if _, err := reg.download(ctx, p, b.in("node.tgz")); err != nil {
				return err
			}
		}
		for i, p := range spec.NPM {
			rel, err := reg.resolve(ctx, p)
			if err != nil {
				return err
			}
			spec.NPM[i].Version, spec.NPM[i].Integrity = rel.Version, rel.Dist.Integrity
		}
	}
	b.manifest.NPM = spec.NPM
	if b.plan.driver != nil {
		spec.Run = append(b.plan.driver.commands(), spec.Run...)
	}
	return b.writeInput(map[string]string{
		"install.sh": installScript(spec, b.net),
		"ca.pem":     string(b.net.cas),
		"npmrc":      b.net.npmrc,
	})
}

func npmArch(debian string) string {
	if debian == "amd64" {
		return "x64"
	}
	return debian
}

// readNPM lists what npm has installed.
func (b *build) readNPM(context.Context) error {
	data, err := os.ReadFile(b.in("npm-ls.json"))
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	b.manifest.NPMTree, err = parseNPMTree(data)
	return err
}

type npmNode struct {
	Version      string             `json:"version"`
	Dependencies map[string]npmNode `json:"dependencies"`
}

// parseNPMTree flattens npm ls --json. A dependency that is met elsewhere in
// the tree is listed again there, without children; those without a version
// are optional and absent.
func parseNPMTree(data []byte) ([]NPMInstalled, error) {
	var top npmNode
	if err := json.Unmarshal(data, &top); err != nil {
		return nil, fmt.Errorf("read the list of npm packages: %w", err)
	}
	seen := map[NPMInstalled]bool{}
	var walk func(npmNode)
	walk = func(n npmNode) {
		for name, dep := range n.Dependencies {
			if dep.Version != "" {
				seen[NPMInstalled{name, dep.Version}] = true
			}
			walk(dep)
		}
	}
	walk(top)
	return slices.SortedFunc(maps.Keys(seen), func(a, b NPMInstalled) int {
		return strings.Compare(a.Name+"@"+a.Version, b.Name+"@"+b.Version)
	}), nil
}
