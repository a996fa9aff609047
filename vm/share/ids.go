package share

import (
	"fmt"

	"github.com/agentvm/agentvm/vm"
)

// identity is who the daemon is and how owners are translated. The daemon's
// user namespace knows exactly one user and one group, so no other can be
// made to own anything; why, in docs/decisions/0020-share-ids.md.
type identity struct {
	Guest vm.Owner // the only ids inside the daemon's user namespace
	Host  vm.Owner // the daemon's ids on the host; never 0
	Disk  vm.Owner // owner of what it creates, as stored
}

// idmapped says whether disk and host ids differ, which takes an idmapped mount.
func (id identity) idmapped() bool { return id.Disk != id.Host }

// decideIdentity picks the daemon's ids. A caller that is not root can only
// be itself. Root acts as runAs through an idmapped mount, with files owned by
// the owner of the shared directory.
func decideIdentity(caller, owner, guest vm.Owner, runAs *vm.Owner) (identity, error) {
	if caller.UID != 0 {
		if runAs != nil && *runAs != caller {
			return identity{}, fmt.Errorf("run virtiofsd as uid %d: only root can: %w", runAs.UID, vm.ErrHost)
		}
		return identity{Guest: guest, Host: caller, Disk: caller}, nil
	}
	if runAs == nil || runAs.UID == 0 || runAs.GID == 0 {
		return identity{}, fmt.Errorf("run virtiofsd: root must name an unprivileged user for it: %w", vm.ErrHost)
	}
	return identity{Guest: guest, Host: *runAs, Disk: owner}, nil
}

// withoutIdmap is what remains on a file system that cannot be idmapped: to
// be the owner, unless the owner is root.
func (id identity) withoutIdmap(cause error) (identity, error) {
	if id.Disk.UID == 0 || id.Disk.GID == 0 {
		err := fmt.Errorf("share a directory of root's without being root: %w", cause)
		return identity{}, vm.WithHint(vm.Classify(vm.ErrHost, err),
			"its file system cannot be idmapped: give the directory to an ordinary user, or move it to ext4, xfs or btrfs")
	}
	id.Host = id.Disk
	return id, nil
}
