package share

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// idmappedTree clones the mount that dir is on, from dir downwards and
// without what is mounted below, and translates owners: on disk id.Disk, to
// everyone else id.Host. The tree is attached nowhere, so that it vanishes
// with its last descriptor. See mount_setattr(2), ID-mapped mounts.
func idmappedTree(dir *os.File, id identity) (*os.File, error) {
	fd, err := unix.OpenTree(int(dir.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("clone the mount of %s: %w", dir.Name(), err)
	}
	tree := os.NewFile(uintptr(fd), dir.Name())
	ns, release, err := userNamespace(id)
	if err != nil {
		tree.Close()
		return nil, err
	}
	defer release()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		tree.Close()
		return nil, fmt.Errorf("idmap the mount of %s: %w", dir.Name(), err)
	}
	return tree, nil
}

// userNamespace makes the user namespace that describes the translation. A
// namespace needs a process while it is made.
func userNamespace(id identity) (ns *os.File, release func(), err error) {
	holder := selfCommand(context.Background(), holdArg)
	if _, err := holder.StdinPipe(); err != nil { // it lives until the end of its input
		return nil, nil, fmt.Errorf("make a user namespace: %w", err)
	}
	holder.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: id.Disk.UID, HostID: id.Host.UID, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: id.Disk.GID, HostID: id.Host.GID, Size: 1}},
	}
	if err := holder.Start(); err != nil {
		return nil, nil, fmt.Errorf("make a user namespace: %w", err)
	}
	stop := func() {
		_ = holder.Process.Kill() // sooner than it would come to see its input end
		_ = holder.Wait()         // which is all that it has to say
	}
	ns, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", holder.Process.Pid))
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("open the user namespace: %w", err)
	}
	return ns, func() { ns.Close(); stop() }, nil
}
