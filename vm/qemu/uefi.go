package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// UEFI is a firmware for virtual machines that the host has installed.
type UEFI struct {
	Code       string // executable image, shared and read-only
	CodeFormat string // raw or qcow2
	Vars       string // template for VarsFile; every machine has its own copy
	VarsFormat string
}

// Where firmware packages announce themselves, most important first; a file
// hides those of the same name after it.
// https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/firmware.json
var firmwareDirs = []string{"etc/qemu/firmware", "usr/share/qemu/firmware"}

type firmwareDescriptor struct {
	InterfaceTypes []string `json:"interface-types"`
	Mapping        struct {
		Device     string
		Executable struct{ Filename, Format string }
		NVRAM      struct{ Filename, Format string } `json:"nvram-template"`
	}
	Targets []struct {
		Architecture string
		Machines     []string
	}
	Features []string
}

// FindUEFI looks under root for firmware that fits the machine type, works
// without SMM and does not enforce Secure Boot, which would refuse what
// users build themselves. It returns nil where there is none.
func FindUEFI(root fs.FS, machine string) *UEFI {
	for _, file := range descriptorFiles(root) {
		b, err := fs.ReadFile(root, file)
		var d firmwareDescriptor
		if err != nil || json.Unmarshal(b, &d) != nil || !d.fits(machine) {
			continue
		}
		u := &UEFI{
			Code: d.Mapping.Executable.Filename, CodeFormat: d.Mapping.Executable.Format,
			Vars: d.Mapping.NVRAM.Filename, VarsFormat: d.Mapping.NVRAM.Format,
		}
		if exists(root, u.Code) && exists(root, u.Vars) {
			return u
		}
	}
	return nil
}

func descriptorFiles(root fs.FS) []string {
	byName := make(map[string]string)
	for _, dir := range firmwareDirs {
		entries, _ := fs.ReadDir(root, dir)
		for _, e := range entries {
			if _, hidden := byName[e.Name()]; !hidden && strings.HasSuffix(e.Name(), ".json") {
				byName[e.Name()] = path.Join(dir, e.Name())
			}
		}
	}
	files := make([]string, 0, len(byName))
	for _, f := range byName {
		files = append(files, f)
	}
	slices.SortFunc(files, func(a, b string) int { return strings.Compare(path.Base(a), path.Base(b)) })
	return files
}

func (d firmwareDescriptor) fits(machine string) bool {
	if !slices.Contains(d.InterfaceTypes, "uefi") || d.Mapping.Device != "flash" ||
		slices.Contains(d.Features, "requires-smm") || slices.Contains(d.Features, "enrolled-keys") {
		return false
	}
	for _, t := range d.Targets {
		if t.Architecture != "x86_64" {
			continue
		}
		for _, glob := range t.Machines {
			if ok, _ := path.Match(glob, machine); ok {
				return true
			}
		}
	}
	return false
}

func exists(root fs.FS, name string) bool {
	_, err := fs.Stat(root, strings.TrimPrefix(name, "/"))
	return err == nil
}

// NewVars makes a machine's private copy of the firmware's empty variables.
// An existing file is left alone: it holds that machine's boot entries.
func (u UEFI) NewVars(file string) error {
	template, err := os.ReadFile(u.Vars)
	if err != nil {
		return fmt.Errorf("read UEFI variables template: %w", err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make UEFI variables: %w", err)
	}
	if _, err = f.Write(template); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(file)
		return fmt.Errorf("make UEFI variables %s: %w", file, err)
	}
	return nil
}
