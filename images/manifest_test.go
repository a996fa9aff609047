package images

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

func writeFiles(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestManifestGolden(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "debian-13-0123456789ab")
	writeFiles(t, dir, map[string]string{rootDiskName: "disk", kernelName: "kernel", initrdName: ""})
	files, err := digestDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := Manifest{
		Format: formatVersion, ID: filepath.Base(dir), Key: "0123456789abcdef", Name: "debian-13", Suite: "trixie", Arch: "amd64",
		Base: "debian-13-ba9876543210", Recipe: "sha256:00",
		Spec:    Spec{Image: "debian-13", Packages: []string{"jq"}, Node: NodeDebian, NPM: []NPMPackage{{Name: "x", Version: "latest"}}},
		Created: time.Date(2025, 8, 9, 10, 11, 12, 0, time.UTC), BuildSeconds: 42.5,
		Builder: map[string]string{"mode": "unshare", "mmdebstrap": "1.3.5"},
		Kernel:  "6.12.0-cloud-amd64", Cmdline: "root=/dev/vda", RootSize: rootSize, Files: files,
		Packages: []Package{{"jq", "1.7.1-6", "amd64"}},
		NPM:      []NPMPackage{{Name: "x", Version: "1.0.0", Integrity: "sha512-AA=="}},
		NPMTree:  []NPMInstalled{{"x", "1.0.0"}},
	}
	if err := writeManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "manifest.json", string(data))
	back, err := readManifest(dir)
	if d := cmp.Diff(m, back); err != nil || d != "" {
		t.Error(err, d)
	}
}

func TestReadManifestErrors(t *testing.T) {
	good := `{"format":1,"id":"img","files":[{"name":"root.img","size":4}]}`
	for name, tt := range map[string]struct {
		files map[string]string
		want  error
	}{
		"absent":       {nil, vm.ErrNotFound},
		"no manifest":  {map[string]string{"root.img": "disk"}, ErrCorrupt},
		"truncated":    {map[string]string{"root.img": "disk", manifestName: good[:30]}, ErrCorrupt},
		"empty":        {map[string]string{"root.img": "disk", manifestName: ""}, ErrCorrupt},
		"no files":     {map[string]string{manifestName: `{"format":1,"id":"img"}`}, ErrCorrupt},
		"newer format": {map[string]string{"root.img": "disk", manifestName: `{"format":99,"id":"img"}`}, ErrCorrupt},
		"another's":    {map[string]string{"root.img": "disk", manifestName: `{"format":1,"id":"x"}`}, ErrCorrupt},
		"file missing": {map[string]string{manifestName: good}, ErrCorrupt},
		"file short":   {map[string]string{"root.img": "d", manifestName: good}, ErrCorrupt},
		"good":         {map[string]string{"root.img": "disk", manifestName: good}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "img")
			writeFiles(t, dir, tt.files)
			if _, err := readManifest(dir); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

// A hole and written zeros are the same content.
func TestSparseDigest(t *testing.T) {
	dir := t.TempDir()
	const size = 40<<20 + 123
	write := func(name string, zeros bool, at int64) string {
		path := filepath.Join(dir, name, rootDiskName)
		writeFiles(t, dir, map[string]string{name + "/" + rootDiskName: ""})
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if zeros {
			if _, err := f.WriteAt(make([]byte, 8<<20), 16<<20); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		digest, err := Digest(path)
		if err != nil {
			t.Fatal(err)
		}
		return digest
	}
	sparse, full := write("a", false, 1<<20+5), write("b", true, 1<<20+5)
	if sparse != full {
		t.Errorf("%s with holes, %s with zeros", sparse, full)
	}
	if moved := write("c", false, 30<<20); moved == sparse {
		t.Error("the place of the data does not change the digest")
	}
	if end := write("d", false, size-4); end == sparse {
		t.Error("the last block does not change the digest")
	}
	if err := punchHoles(filepath.Join(dir, "b", rootDiskName)); err != nil {
		t.Error(err)
	}
	if after, _ := Digest(filepath.Join(dir, "b", rootDiskName)); after != full {
		t.Error("punching holes changed the content")
	}
}
