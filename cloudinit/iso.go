package cloudinit

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/renameio/v2"
	"github.com/kdomanski/iso9660"

	"github.com/agentvm/agentvm/vm"
)

// volumeLabel is how cloud-init finds the seed among the guest's disks.
const volumeLabel = "cidata"

// WriteISO renders the seed and puts it at path, mode 0600, in one step: a
// reader sees the old file or the whole new one.
func (s *Seed) WriteISO(path string) error {
	files, err := s.Render()
	if err != nil {
		return err
	}
	image, err := files.ISO()
	if err != nil {
		return err
	}
	if err := vm.WriteFile(path, image, 0o600, renameio.WithStaticPermissions(0o600)); err != nil {
		return fmt.Errorf("write seed %s: %w", path, err)
	}
	return nil
}

// ISO packs the files into an ISO 9660 image.
func (f Files) ISO() (image []byte, err error) {
	w, err := iso9660.NewWriter()
	if err != nil {
		return nil, fmt.Errorf("build seed: %w", err)
	}
	defer func() { err = errors.Join(err, w.Cleanup()) }()

	for name, data := range map[string][]byte{
		"user-data":      f.UserData,
		"meta-data":      f.MetaData,
		"network-config": f.NetworkConfig,
	} {
		if data == nil {
			continue
		}
		if err := w.AddFile(bytes.NewReader(data), name); err != nil {
			return nil, fmt.Errorf("build seed: add %s: %w", name, err)
		}
	}
	var buf bytes.Buffer
	if err := w.WriteTo(&buf, volumeLabel); err != nil {
		return nil, fmt.Errorf("build seed: %w", err)
	}
	return clearTimes(buf.Bytes()), nil
}

// clearTimes overwrites the primary volume descriptor's creation, modification
// and effective times, which the library takes from the clock, with "not
// specified" (ECMA-119, 8.4.26.1: sixteen digits 0 and a zero byte).
func clearTimes(image []byte) []byte {
	const descriptor = 16 * 2048 // sector of the primary volume descriptor
	unspecified := append(bytes.Repeat([]byte{'0'}, 16), 0)
	for _, offset := range []int{813, 830, 864} {
		copy(image[descriptor+offset:], unspecified)
	}
	return image
}
