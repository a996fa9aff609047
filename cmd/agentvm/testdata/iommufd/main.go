// Iommufd says whether QEMU opens devices through /dev/iommu here: its arguments
// are a directory to remember in what QEMU can, and the user that QEMU runs as.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
	"github.com/agentvm/agentvm/vm/qemu"
)

func main() {
	user, err := strconv.Atoi(os.Args[2])
	if err != nil {
		fmt.Println(err)
		return
	}
	caps, err := qemu.Probe(context.Background(), "qemu-system-x86_64", probes.Store(os.Args[1]))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(qemu.CanIOMMUFD(caps, 1, &vm.Owner{UID: user, GID: user}))
}
