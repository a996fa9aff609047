#!/usr/bin/python3
"""The guest's end of the machine's serial line.

Runs the programs that the host sends: a line with the program's length in
bytes, the time in seconds since 1970 and 64 hexadecimal digits of entropy,
then the program itself, in Python. A program writes text with say(). What a
program is likely to need is imported here, before the guest is saved.
"""

import ctypes
import fcntl
import glob
import io
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
import traceback

# random(4): credit the host's 256 bits, then use them at once.
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207


def port():
    # Debian 12 has the driver as a module, which nobody else asks for.
    subprocess.run(["modprobe", "-q", "virtio_console"])
    for attempt in range(200):
        for name in glob.glob("/sys/class/virtio-ports/*/name"):
            with open(name) as f:
                if f.read().strip() == "org.agentvm.line":
                    return "/dev/" + name.split("/")[-2]
        time.sleep(0.1)
    raise SystemExit("no serial line")


def awake(now, entropy):
    """Sets the clock and the kernel's random numbers right, first of all."""
    with open("/dev/urandom", "wb", buffering=0) as random:
        fcntl.ioctl(random, RNDADDENTROPY, struct.pack("ii32s", 256, 32, entropy))
        fcntl.ioctl(random, RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, now)


line = io.BufferedRWPair(io.FileIO(fd := os.open(port(), os.O_RDWR), "rb"), io.FileIO(fd, "wb", closefd=False))


def say(text):
    line.write((text + "\n").encode())
    line.flush()


def run(script):
    """Runs a shell script, says what it writes, and raises if it fails."""
    p = subprocess.run(["sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if p.stdout:
        say(p.stdout.decode(errors="replace").rstrip("\n"))
    if p.returncode != 0:
        raise RuntimeError(f"a shell script ended with exit code {p.returncode}")


say("agentvm-ready")
while header := line.readline():
    length, now, entropy = header.split()
    program = line.read(int(length))
    try:
        awake(float(now), bytes.fromhex(entropy.decode()))
        exec(compile(program, "line", "exec"))
        say("agentvm-done 0")
    except Exception as error:
        say(traceback.format_exc(limit=-1).rstrip("\n").replace("agentvm-done", ""))
        say("agentvm-done 1")
