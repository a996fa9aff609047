package images

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/userns"
)

// require returns the first failed finding as an error.
func require(findings []vm.Finding) error {
	for _, f := range findings {
		if f.Status == vm.FindingFail {
			return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s: %s", f.Name, f.Detail)), f.Fix)
		}
	}
	return nil
}

// host is what Check looks at; tests bring their own.
type host struct {
	uid      int
	username string
	root     string // where etc, proc and usr are found
	look     func(program string) (path string, err error)
	free     func(dir string) (int64, error)
}

// Check says whether this host can build images into dir, with the command
// that mends each thing it lacks. It changes nothing.
func Check(dir string) []vm.Finding {
	h := thisHost()
	return append(h.check(), h.space(dir))
}

func thisHost() host {
	h := host{uid: os.Getuid(), root: "/", look: exec.LookPath, free: free}
	if u, err := user.Current(); err == nil {
		h.username = u.Username
	}
	return h
}

// check looks at everything but the disk.
func (h host) check() []vm.Finding {
	findings := append(h.programs(), h.keyring())
	if h.uid != 0 {
		findings = append(findings, h.subordinateIDs(), userns.Check(h.root, false))
	}
	return findings
}

// debianPackageOf names the Debian package of each program that a build runs.
func debianPackageOf(program string) string {
	switch program {
	case "mke2fs":
		return "e2fsprogs"
	case "newuidmap", "newgidmap":
		return "uidmap"
	case "unshare":
		return "util-linux"
	case "qemu-img":
		return "qemu-utils"
	}
	return program
}

func (h host) programs() []vm.Finding {
	needed := []string{"mmdebstrap", "mke2fs", "unshare", "tar", "qemu-img"}
	if h.uid != 0 {
		needed = append(needed, "newuidmap", "newgidmap")
	}
	var out []vm.Finding
	for _, program := range needed {
		path, err := h.look(program)
		if err != nil {
			// mke2fs is in /usr/sbin, which an ordinary user's PATH may lack;
			// builds have it in theirs.
			path, err = h.look("/usr/sbin/" + program)
		}
		f := vm.Finding{Name: program, Status: vm.FindingOK, Detail: path}
		if err != nil {
			f.Status = vm.FindingFail
			f.Detail = "not installed: images cannot be built"
			f.Fix = "sudo apt-get install " + debianPackageOf(program)
		}
		out = append(out, f)
	}
	return out
}

// keyring looks for the archive keys of every release in the catalogue. Older
// versions of debian-archive-keyring lack those of newer releases.
func (h host) keyring() vm.Finding {
	f := vm.Finding{Name: "Debian archive keys", Status: vm.FindingOK}
	var there, missing []string
	for _, e := range Catalogue() {
		found := false
		for _, dir := range []string{"usr/share/keyrings", "etc/apt/trusted.gpg.d"} {
			m, _ := filepath.Glob(filepath.Join(h.root, dir, "debian-archive-"+e.Suite+"-*")) // well-formed pattern
			found = found || len(m) > 0
		}
		if found {
			there = append(there, e.Suite)
		} else {
			missing = append(missing, e.Suite)
		}
	}
	f.Detail = "for " + strings.Join(there, ", ")
	if len(missing) > 0 {
		f.Status = vm.FindingFail
		f.Detail = "no keys for " + strings.Join(missing, ", ")
		f.Fix = "sudo apt-get update && sudo apt-get install debian-archive-keyring"
	}
	return f
}

// needIDs is how many subordinate ids a Debian tree needs: nobody is 65534.
const needIDs = 65534

// subordinateIDs looks for a range in /etc/subuid and /etc/subgid, see subuid(5).
func (h host) subordinateIDs() vm.Finding {
	f := vm.Finding{Name: "subordinate ids", Status: vm.FindingOK, Detail: fmt.Sprintf("%s has the %d that are needed", h.username, needIDs)}
	for _, name := range []string{"subuid", "subgid"} {
		data, _ := os.ReadFile(filepath.Join(h.root, "etc", name)) // missing means no range
		if n := subordinateCount(data, h.username, h.uid); n < needIDs {
			f.Status = vm.FindingFail
			f.Detail = fmt.Sprintf("/etc/%s gives %s %d ids, %d are needed", name, h.username, n, needIDs)
			f.Fix = fmt.Sprintf("sudo usermod --add-subuids 200000-265535 --add-subgids 200000-265535 %s", h.username)
			return f
		}
	}
	return f
}

// subordinateCount returns the size of the user's first range, which is the one
// that unshare --map-auto takes.
func subordinateCount(file []byte, username string, uid int) int {
	lines := bufio.NewScanner(bytes.NewReader(file))
	for lines.Scan() {
		f := strings.Split(lines.Text(), ":")
		if len(f) == 3 && (f[0] == username || f[0] == strconv.Itoa(uid)) {
			n, _ := strconv.Atoi(f[2]) // no number is no ids
			return n
		}
	}
	return 0
}

func (h host) space(dir string) vm.Finding {
	f := vm.Finding{Name: "disk space for images", Status: vm.FindingOK}
	at := dir // may not be there yet
	n, err := h.free(at)
	for err != nil && at != filepath.Dir(at) {
		at = filepath.Dir(at)
		n, err = h.free(at)
	}
	f.Detail = fmt.Sprintf("%d MiB free in %s", n>>20, at)
	switch {
	case err != nil:
		f.Status, f.Detail = vm.FindingWarn, err.Error()
	case n < baseSpace+layerSpace:
		f.Status = vm.FindingFail
		f.Detail += fmt.Sprintf(", a build needs up to %d MiB", (baseSpace+layerSpace)>>20)
		f.Fix = "free some space, or set AGENTVM_HOME to a directory on a larger disk"
	}
	return f
}
