// Viable asks the kernel whether a VFIO group, by its number, can be given away
// (VFIO_GROUP_GET_STATUS, include/uapi/linux/vfio.h).
package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	f, err := os.OpenFile("/dev/vfio/"+os.Args[1], os.O_RDWR, 0)
	if err != nil {
		fmt.Println("no group of VFIO's")
		return
	}
	status := struct{ argsz, flags uint32 }{argsz: 8}
	switch _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ';'<<8|103, uintptr(unsafe.Pointer(&status))); {
	case errno != 0:
		fmt.Println(errno)
	case status.flags&1 == 0:
		fmt.Println("not viable")
	default:
		fmt.Println("viable")
	}
}
