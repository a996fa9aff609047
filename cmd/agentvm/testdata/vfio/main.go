// Vfio asks the kernel of a VFIO group, by its number (include/uapi/linux/vfio.h).
//
//	vfio viable GROUP        can the group be given away?
//	vfio hide GROUP ADDRESS  have a device of it open, where no process is seen to, until killed
package main

import (
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the kernel is asked.
const (
	setIOMMU = ';'<<8 | 100 + iota + 2
	groupStatus
	setContainer
	unsetContainer
	openDevice

	viable = 1 // a flag of groupStatus
	type1  = 1 // an IOMMU's driver
)

func main() {
	switch group, err := os.OpenFile("/dev/vfio/"+os.Args[2], os.O_RDWR, 0); {
	case err != nil:
		fmt.Println("no group of VFIO's")
	case os.Args[1] == "viable":
		fmt.Println(isViable(group))
	default:
		if err := hide(group, os.Args[3]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("hidden")
		for { // until it is killed
			time.Sleep(time.Hour)
		}
	}
}

func ioctl(f *os.File, request, arg uintptr) (uintptr, error) {
	value, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, arg)
	if errno != 0 {
		return 0, fmt.Errorf("request %d: %w", request&0xff, errno)
	}
	return value, nil
}

func isViable(group *os.File) string {
	status := struct{ argsz, flags uint32 }{argsz: 8}
	if _, err := ioctl(group, groupStatus, uintptr(unsafe.Pointer(&status))); err != nil {
		return err.Error()
	}
	if status.flags&viable == 0 {
		return "not viable"
	}
	return "viable"
}

// hide opens a device and leaves it in a socket that nobody reads: it is open,
// and in the list of no process's files.
func hide(group *os.File, address string) error {
	container, err := os.OpenFile("/dev/vfio/vfio", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	fd := int32(container.Fd())
	if _, err := ioctl(group, setContainer, uintptr(unsafe.Pointer(&fd))); err != nil {
		return err
	}
	if _, err := ioctl(container, setIOMMU, type1); err != nil {
		return err
	}
	name := append([]byte(address), 0)
	device, err := ioctl(group, openDevice, uintptr(unsafe.Pointer(&name[0])))
	if err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	rights := unix.UnixRights(int(device), int(group.Fd()), int(container.Fd()))
	if err := unix.Sendmsg(pair[0], []byte{0}, rights, nil, 0); err != nil {
		return err
	}
	runtime.KeepAlive(group)
	for _, fd := range []int{int(device), int(group.Fd()), int(container.Fd())} {
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}
