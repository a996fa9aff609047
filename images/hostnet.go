package images

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm/hostca"
)

// hostNet is how the host reaches the network: what a build borrows.
type hostNet struct {
	proxies  []string // NAME=value, as in an environment
	aptConf  string   // apt's own proxy and certificate settings
	cas      []byte   // PEM: every authority that the host trusts
	resolv   []byte   // resolv.conf
	registry string   // of npm, without a slash at the end
	npmrc    string   // registry and its credentials, for npm's user configuration
}

// defaultRegistry is npm's own: https://docs.npmjs.com/cli/v10/using-npm/config#registry
const defaultRegistry = "https://registry.npmjs.org"

var proxyNames = []string{
	"http_proxy", "https_proxy", "no_proxy", "all_proxy",
	"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
}

// probeHostNet reads the host's settings; getenv and root make it testable.
func probeHostNet(ctx context.Context, getenv func(string) string, root string) hostNet {
	var n hostNet
	for _, name := range proxyNames {
		if v := getenv(name); v != "" {
			n.proxies = append(n.proxies, name+"="+v)
		}
	}
	if out, err := exec.CommandContext(ctx, "apt-config", "dump").Output(); err == nil {
		n.aptConf = aptNetwork(string(out))
	}
	n.cas = hostca.Host{Root: root, Getenv: getenv}.Bundle()
	n.resolv, _ = os.ReadFile(filepath.Join(root, "etc/resolv.conf")) // none: names resolve by other means or not at all
	n.registry, n.npmrc = npmSettings(getenv)
	return n
}

// See apt-transport-http(1) and apt-transport-https(1). Each may be followed by
// a host's name.
var aptNetworkSettings = []string{
	"proxy", "proxy-auto-detect", "cainfo", "sslcert", "sslkey", "verify-peer", "verify-host",
}

// aptNetwork keeps the lines of apt-config's dump that say how to reach an
// archive.
func aptNetwork(dump string) string {
	var b strings.Builder
	for line := range strings.Lines(dump) {
		name, _, _ := strings.Cut(strings.ToLower(line), " ")
		rest, ok := strings.CutPrefix(name, "acquire::http")
		if !ok {
			continue
		}
		for part := range strings.SplitSeq(rest, "::") {
			if slices.Contains(aptNetworkSettings, part) {
				b.WriteString(line)
				break
			}
		}
	}
	return b.String()
}

// npmSettings returns the registry that the host's npm uses and a
// configuration that holds only the registry and the credentials for it.
func npmSettings(getenv func(string) string) (registry, npmrc string) {
	path := getenv("NPM_CONFIG_USERCONFIG")
	if path == "" {
		path = filepath.Join(getenv("HOME"), ".npmrc")
	}
	var credentials []string
	registry = defaultRegistry
	data, _ := os.ReadFile(path) // most users have none
	for line := range strings.Lines(string(data)) {
		name, value, ok := strings.Cut(line, "=")
		name, value = strings.TrimSpace(name), strings.Trim(strings.TrimSpace(value), `"`)
		switch {
		case !ok || value == "":
		case name == "registry" || strings.HasPrefix(name, "@") && strings.HasSuffix(name, ":registry"):
			if name == "registry" {
				registry = value
			} else {
				credentials = append(credentials, name+"="+value)
			}
		case strings.HasPrefix(name, "//"):
			credentials = append(credentials, name+"="+os.Expand(value, getenv))
		}
	}
	for _, name := range []string{"NPM_CONFIG_REGISTRY", "npm_config_registry"} {
		if v := getenv(name); v != "" {
			registry = v
		}
	}
	registry = strings.TrimRight(registry, "/")
	lines := append([]string{"registry=" + registry + "/"}, credentials...)
	return registry, strings.Join(lines, "\n") + "\n"
}
