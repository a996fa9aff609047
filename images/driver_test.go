package images

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

// TestDriverScripts shows what finishes each driver's layer, as a shell takes it.
func TestDriverScripts(t *testing.T) {
	drivers, err := Drivers()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range drivers {
		names = append(names, d.Name)
		script := installScript(Spec{Image: "debian-13", Run: d.commands()}, hostNet{})
		golden(t, "driver-"+d.Name+".sh", script)
		for _, text := range append(d.commands(), script) {
			check := exec.Command("sh", "-n")
			check.Stdin = strings.NewReader(text)
			if out, err := check.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", d.Name, err, out)
			}
		}
		for _, image := range d.Images {
			if _, err := Known(image); err != nil {
				t.Error(d.Name, err)
			}
		}
	}
	if diff := cmp.Diff([]string{"amd", "intel", "nvidia"}, names); diff != "" {
		t.Error(diff)
	}
}

// TestLicence: a driver under a licence is had by who accepts it, and by
// nobody else, also where the image is there already.
func TestLicence(t *testing.T) {
	for _, tt := range []struct {
		spec  Spec
		class error
		hint  string
	}{
		{Spec{Image: "debian-13", Driver: "nvidia", Accept: []string{"nvidia"}}, nil, ""},
		{Spec{Image: "debian-13", Driver: "intel"}, nil, ""},
		{Spec{Image: "debian-13", Driver: "nvidia"}, vm.ErrPolicy, "accept: [nvidia]"},
		{Spec{Image: "debian-13", Driver: "nvidia", Accept: []string{"intel"}}, vm.ErrPolicy, "accept: [nvidia]"},
		{Spec{Image: "debian-12", Driver: "nvidia", Accept: []string{"nvidia"}}, vm.ErrUsage, ""},
		{Spec{Image: "debian-13", Driver: "voodoo"}, vm.ErrNotFound, "amd, intel, nvidia"},
	} {
		_, err := newPlan(tt.spec, "", "")
		if tt.class == nil && err != nil || tt.class != nil && !errors.Is(err, tt.class) || !strings.Contains(vm.Hint(err), tt.hint) {
			t.Errorf("%+v: %v, %q", tt.spec, err, vm.Hint(err))
		}
		if errors.Is(tt.class, vm.ErrPolicy) && !strings.Contains(err.Error(), "https://www.nvidia.com/") {
			t.Error(err)
		}
	}
}

// TestDriverKey: who accepted does not change the image, the driver does, and a
// layer without one has the key that it ever had.
func TestDriverKey(t *testing.T) {
	id := func(s Spec) string {
		t.Helper()
		p, err := newPlan(s, "", "")
		if err != nil {
			t.Fatal(err)
		}
		return p.id()
	}
	nvidia := id(Spec{Image: "debian-13", Driver: "nvidia", Accept: []string{"nvidia"}})
	if id(Spec{Image: "debian-13", Driver: "nvidia", Accept: []string{"x", "nvidia"}}) != nvidia {
		t.Error("who accepts is part of the key")
	}
	seen := map[string]bool{nvidia: true}
	for _, s := range []Spec{{Image: "debian-13"}, {Image: "debian-13", Driver: "intel"}, {Image: "debian-13", Driver: "amd"}, {Image: "debian-13", Driver: "intel", Packages: []string{"jq"}}, {Image: "debian-13", Packages: []string{"jq"}}} {
		if seen[id(s)] {
			t.Errorf("%+v has the key of another", s)
		}
		seen[id(s)] = true
	}
}

func TestParseDriver(t *testing.T) {
	const good = "name: x\ndescription: d\nimages: [debian-13]\npackages: [jq]\nmodules: [x]\nstatus: [x]\n"
	if _, err := parseDriver([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "name: x\n", good + "modprobe: x\n", strings.Replace(good, "jq", `"jq; reboot"`, 1), strings.Replace(good, "modules: [x]", `modules: ["x y"]`, 1),
		good + "dkms: ../x\n", good + "services: [x]\n", good + "kernel: -x\n", good + "sources: [{suite: \"a b\", components: [main]}]\n"} {
		if d, err := parseDriver([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, d)
		}
	}
}

// TestSourcesScript adds to the archive that the image has, whichever that is.
func TestSourcesScript(t *testing.T) {
	script, err := driverFS.ReadFile("drivers/sources.sh")
	if err != nil {
		t.Fatal(err)
	}
	for list, archive := range map[string]string{
		"deb http://deb.debian.org/debian trixie main\ndeb http://deb.debian.org/debian-security trixie-security main\n":   "http://deb.debian.org/debian",
		"# mine\ndeb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] https://mirror.example/debian trixie main contrib\n": "https://mirror.example/debian",
		"deb-src http://x.example/ trixie main\n": "",
	} {
		dir := t.TempDir()
		writeFiles(t, dir, map[string]string{"root/etc/apt/sources.list": list, "root/etc/apt/sources.list.d/x": "", "in/driver-sources": "trixie contrib non-free\ntrixie-backports contrib\n",
			"in/drivers/sources.sh": string(script), "bin/apt-get": "#!/bin/sh\necho \"$APT_CONFIG $*\" >" + dir + "/asked\n"})
		if err := os.Chmod(filepath.Join(dir, "bin/apt-get"), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", filepath.Join(dir, "in/drivers/sources.sh"), filepath.Join(dir, "root"), filepath.Join(dir, "in"))
		cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"), "MMDEBSTRAP_APT_CONFIG=/the/config")
		out, err := cmd.CombinedOutput()
		got, _ := os.ReadFile(filepath.Join(dir, "root/etc/apt/sources.list.d/driver.list"))
		asked, _ := os.ReadFile(filepath.Join(dir, "asked"))
		if archive == "" {
			if err == nil || len(asked) > 0 {
				t.Errorf("%q: %s", list, out)
			}
			continue
		}
		want := "deb " + archive + " trixie contrib non-free\ndeb " + archive + " trixie-backports contrib\n"
		if err != nil || string(got) != want || string(asked) != "/the/config update\n" {
			t.Errorf("%q: %v %q %q\n%s", list, err, got, asked, out)
		}
		if _, err := os.Stat(filepath.Join(dir, "root/etc/dkms/no-autoinstall")); err != nil {
			t.Error(err)
		}
	}
}
