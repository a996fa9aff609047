package images

import (
	"fmt"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// installScript is the script that runs inside the tree of a layer, at
// /run/build/install.sh, with its input beside it:
//
//	ca.pem    every authority that the host trusts
//	npmrc     npm's registry and credentials
//	npm.tgz   npm itself
//	node.tgz  Node.js, when it does not come from the distribution
//
// It writes npm-ls.json there, the tree of what npm installed. Nothing that it
// leaves in the image names the host.
func installScript(spec Spec, n hostNet) string {
	if spec.Node == "" && len(spec.Run) == 0 {
		return ""
	}
	var b scriptBuilder
	b.add(`set -eu`, `umask 022`, `cd /`)
	b.add(`export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`)
	b.add(`export HOME=/run/build/home LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive`)
	if len(n.cas) > 0 {
		for _, name := range []string{"SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "GIT_SSL_CAINFO"} {
			b.add(`export ` + name + `=/run/build/ca.pem`)
		}
	}
	for _, p := range n.proxies {
		name, value, _ := strings.Cut(p, "=")
		b.add(`export ` + name + `=` + vm.ShellQuote(value))
	}
	b.add(`mkdir -p "$HOME"`)
	if spec.Node != "" {
		b.node(spec)
	}
	if len(spec.NPM) > 0 {
		b.npm(spec)
	}
	for i, run := range spec.Run {
		b.add(fmt.Sprintf(`echo 'PHASE: run command %d of %d'`, i+1, len(spec.Run)))
		b.add(`sh -c ` + vm.ShellQuote(run) + fmt.Sprintf(` || { echo "E: run command %d failed with status $?"; exit 1; }`, i+1))
	}
	return b.String()
}

type scriptBuilder struct{ strings.Builder }

func (b *scriptBuilder) add(lines ...string) {
	for _, l := range lines {
		b.WriteString(l + "\n")
	}
}

// node puts Node.js and npm under /usr/local. Debian's own npm package is
// not used: with what it depends on it is larger than all the rest of the image.
func (b *scriptBuilder) node(spec Spec) {
	b.add(`echo 'PHASE: install Node.js and npm'`)
	if spec.Node != NodeDebian {
		b.add(`tar -xzf /run/build/node.tgz --no-same-owner -C /usr/local --strip-components=1 package/bin`,
			`chmod 755 /usr/local/bin/node`)
	}
	b.add(`mkdir -p /usr/local/bin /usr/local/lib/node_modules/npm`,
		`tar -xzf /run/build/npm.tgz --no-same-owner -C /usr/local/lib/node_modules/npm --strip-components=1`,
		`rm -rf /usr/local/lib/node_modules/npm/man /usr/local/lib/node_modules/npm/docs`,
		`for tool in npm npx; do`,
		`	chmod 755 "/usr/local/lib/node_modules/npm/bin/$tool-cli.js"`,
		`	ln -sf "../lib/node_modules/npm/bin/$tool-cli.js" "/usr/local/bin/$tool"`,
		`done`)
}

// npm installs the packages, with scripts only for those that may run them.
func (b *scriptBuilder) npm(spec Spec) {
	b.add(`echo 'PHASE: install npm packages'`,
		`export NPM_CONFIG_USERCONFIG=/run/build/npmrc NPM_CONFIG_GLOBALCONFIG=/run/build/no-npmrc`,
		`export NPM_CONFIG_CACHE=/run/build/npm-cache NPM_CONFIG_LOGS_MAX=0 NPM_CONFIG_PREFIX=/usr/local`,
		`export NPM_CONFIG_AUDIT=false NPM_CONFIG_FUND=false NPM_CONFIG_UPDATE_NOTIFIER=false`)
	var names, scripts []string
	for _, p := range spec.NPM {
		names = append(names, vm.ShellQuote(p.Name+"@"+p.Version))
		if p.Scripts {
			scripts = append(scripts, vm.ShellQuote(p.Name))
		}
	}
	b.add(`npm install --global --ignore-scripts --loglevel=http ` + strings.Join(names, " "))
	b.add(`rm /run/build/npmrc`) // no script needs to see a credential
	if len(scripts) > 0 {
		b.add(`npm rebuild --global --ignore-scripts=false --foreground-scripts ` + strings.Join(scripts, " "))
	}
	// Optional dependencies that do not fit make ls fail; what it prints is right.
	b.add(`npm ls --global --all --json >/run/build/npm-ls.json || true`,
		`unset NPM_CONFIG_USERCONFIG NPM_CONFIG_GLOBALCONFIG NPM_CONFIG_LOGS_MAX NPM_CONFIG_PREFIX`)
}
