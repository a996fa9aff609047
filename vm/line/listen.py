#!/usr/bin/python3
"""The guest's end of the machine's serial line.

Runs what the host asks for: a line with a length in bytes, the time in
seconds since 1970, 64 hexadecimal digits of entropy and perhaps the name of a
function and hexadecimal digits of texts for it, then so many bytes: what the
function is told besides, in JSON, or without a name a program in Python. Both
write text with say(). What they are likely to need is imported here, before the
guest is saved.
"""

import atexit
import ctypes
import fcntl
import functools
import glob
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import traceback

# random(4): credit the host's 256 bits, then use them at once.
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
random = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)


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
    fcntl.ioctl(random, RNDADDENTROPY, struct.pack("ii32s", 256, 32, entropy))
    fcntl.ioctl(random, RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, now)


line = io.BufferedRWPair(io.FileIO(fd := os.open(port(), os.O_RDWR), "rb"), io.FileIO(fd, "wb", closefd=False))


def say(text):
    line.write((text + "\n").encode())
    line.flush()


def run(script, *arguments):
    """Runs a shell script, says what it writes, and raises if it fails."""
    p = subprocess.run(["sh", "-c", script, "sh", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if p.stdout:
        say(p.stdout.decode(errors="replace").rstrip("\n"))
    if p.returncode != 0:
        raise RuntimeError(f"a shell script ended with exit code {p.returncode}")


# PROGRAMS

say("agentvm-ready")
while header := line.readline():
    length, now, entropy, *function = header.split()
    text = line.read(int(length))
    try:
        awake(float(now), bytes.fromhex(entropy.decode()))
        if function:
            globals()[function[0].decode()](text, *(bytes.fromhex(word.decode()).decode() for word in function[1:]))
        else:
            exec(compile(text, "line", "exec"))
        say("agentvm-done 0")
    except Exception as error:
        say(traceback.format_exc(limit=-1).rstrip("\n").replace("agentvm-done", ""))
        say("agentvm-done 1")
