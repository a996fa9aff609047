package gpu

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// queueFile is where root's children line up for a function: those that wait
// here can be killed, unlike the one that waits for the function's lock. Without it
// a user of the helper could fill the host with processes.
const queueFile = "/run/agentvm-gpu-queue.lock"

// queue is that file for root's children, and "" for others', which are bounded
// like all that a user starts.
func (h Host) queue() string {
	if os.Geteuid() != 0 {
		return ""
	}
	return h.at(queueFile)
}

var anyAddress = vm.Pattern(`([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])`)

// enqueue waits until no other child is at the function that text names last. It
// does nothing without a queue, or where no function is named.
func enqueue(queue, text string) (leave func(), err error) {
	named := anyAddress().FindAllStringSubmatch(text, -1)
	if queue == "" || len(named) == 0 {
		return func() {}, nil
	}
	f, err := os.OpenFile(queue, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	// A byte of the file for each function that there can be.
	place := unix.Flock_t{Type: unix.F_WRLCK, Start: placeOf(named[len(named)-1]), Len: 1}
	for {
		if err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &place); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// placeOf numbers a function by the parts of its address: domain, bus, device and
// function.
func placeOf(parts []string) (place int64) {
	for i, bits := range []int{32, 8, 5, 3} {
		n, _ := strconv.ParseInt(parts[i+1], 16, 64) // they are digits, and few
		place = place<<bits | n
	}
	return place
}
