"""Says as JSON, as root in a guest, who the guest is and what is random in it."""

import json
import random
import secrets
import socket
import struct
import subprocess
import time


def read(path):
    with open(path) as f:
        return f.read().strip()


def run(*argv):
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()


def offset(port):
    """What the kernel's secret adds to the sequence numbers of one connection.

    The first number is a hash of addresses, ports and the secret, and the clock
    in units of 64 ns (RFC 6528, net/core/secure_seq.c). The connection is always
    the same one; what is left when the clock is taken off is the hash, later by
    the time that the call took.
    """
    with socket.socket() as server, socket.socket() as client:
        for s in server, client:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        client.bind(("127.0.0.1", port + 1))
        now = time.time_ns()
        client.connect(server.getsockname())
        # tcp(7) leaves them out: TCP_REPAIR, TCP_REPAIR_QUEUE (2: what is sent), TCP_QUEUE_SEQ.
        client.setsockopt(socket.IPPROTO_TCP, 19, 1)
        client.setsockopt(socket.IPPROTO_TCP, 20, 2)
        first = client.getsockopt(socket.IPPROTO_TCP, 21)
        client.close()  # without a word, so that nothing keeps the ports
        other, _ = server.accept()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.close()
    return (first - (now >> 6)) % 2**32


def served_key():
    """The host key that sshd shows."""
    scan = subprocess.run(["ssh-keyscan", "-T", "120", "-t", "ed25519", "127.0.0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not scan.stdout.strip():
        raise RuntimeError(scan.stderr)
    return scan.stdout.strip().split("\n")[-1].removeprefix("127.0.0.1 ")


with open("/dev/urandom", "rb") as f:
    urandom = f.read(32).hex()
print(json.dumps({
    "random": {
        "urandom": urandom,
        "uuid": read("/proc/sys/kernel/random/uuid"),
        "secrets": secrets.token_hex(16),
        "random": str(random.getrandbits(128)),
    },
    "clock": time.time(),
    "tcp": [[offset(port) for _ in range(2)] for port in range(40000, 40008, 2)],
    "hostname": run("hostname"),
    "hostnameFile": read("/etc/hostname"),
    "machineID": read("/etc/machine-id"),
    "bootID": read("/proc/sys/kernel/random/boot_id"),
    "hostKey": read("/etc/ssh/ssh_host_ed25519_key.pub"),
    "servedKey": served_key(),
    "authorizedKeys": read("/home/agent/.ssh/authorized_keys").split("\n"),
}))
