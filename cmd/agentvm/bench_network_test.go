package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

const transferMiB = 256

// BenchmarkNetwork sends bytes through the network in the supervisor, both
// ways, with the frames that it offers and with those of an Ethernet.
func BenchmarkNetwork(b *testing.B) {
	testenv.Require(b, "curl")
	block := make([]byte, 1<<20)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			_, _ = io.Copy(io.Discard, r.Body)
			return
		}
		for range transferMiB {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer server.Close()
	address := strings.TrimPrefix(server.URL, "http://")
	h := newHost(b)
	dir := h.machine("net", fmt.Sprintf("resources: {memory: 1GiB}\nnetwork: {services: [{name: sink.internal, port: 80, target: %q}]}\n", address))

	download := func(host string) string { return "curl -sSf -o /dev/null http://" + host }
	upload := func(host string) string {
		return "curl -sSf -T /dev/shm/agentvm-bench http://" + host
	}
	rate := func(run func(string), line string) float64 {
		begun := time.Now()
		run(line)
		return transferMiB / time.Since(begun).Seconds()
	}
	inGuest := func(line string) { h.guest(dir, line) }
	onHost := func(line string) { h.shell(dir, line) }
	file := fmt.Sprintf("head -c %dM /dev/zero >/dev/shm/agentvm-bench", transferMiB)
	inGuest(file)
	onHost(file)
	defer onHost("rm /dev/shm/agentvm-bench")
	nic := strings.TrimSpace(h.guest(dir, "ls /sys/class/net | grep -v lo"))
	mtu := strings.TrimSpace(h.guest(dir, "cat /sys/class/net/"+nic+"/mtu"))
	for b.Loop() {
		t := newTable(fmt.Sprintf("%d MiB over HTTP, MiB/s; host at load %s", transferMiB, load()), "", "host to guest", "guest to host")
		down, up := rate(inGuest, download("sink.internal")), rate(inGuest, upload("sink.internal"))
		b.ReportMetric(down, "down-MiB/s")
		b.ReportMetric(up, "up-MiB/s")
		t.add("guest, MTU "+mtu, down, up)
		inGuest("sudo ip link set mtu 1500 dev " + nic)
		down1500, up1500 := rate(inGuest, download("sink.internal")), rate(inGuest, upload("sink.internal"))
		t.add("guest, MTU 1500", down1500, up1500)
		inGuest("sudo ip link set mtu " + mtu + " dev " + nic)
		t.add("MTU "+mtu+" / MTU 1500", down/down1500, up/up1500)
		downHost, upHost := rate(onHost, download(address)), rate(onHost, upload(address))
		t.add("host's loopback", downHost, upHost)
		t.add("guest / loopback", down/downHost, up/upHost)
		t.print()
	}
	b.ReportMetric(0, "ns/op")
}
