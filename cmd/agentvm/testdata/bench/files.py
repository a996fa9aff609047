"""Times work on files in a directory and prints {"step": seconds} as JSON.

Usage: files.py DIRECTORY REPOSITORY SMALL LARGE_MIB DROP
REPOSITORY is a Git clone somewhere, or empty. With 0 for SMALL nothing else is
looked at. DROP is a command that empties the caches.
"""
import json
import os
import shutil
import subprocess
import sys
import time

base, repository, small, large, drop = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
work = os.path.join(base, "files")
names = [os.path.join(work, "f%05d" % i) for i in range(small)]
big = os.path.join(base, "large")
block = os.urandom(1 << 20)
times = {}


def step(name, act, cold=False):
    if cold:
        subprocess.run(["sh", "-c", drop], check=True)
    begun = time.monotonic()
    act()
    times[name] = time.monotonic() - begun


def create():
    os.mkdir(work)
    for name in names:
        fd = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
        os.write(fd, b"x" * 100)
        os.close(fd)


def stat():
    for name in names:
        os.stat(name)


def read():
    for name in names:
        fd = os.open(name, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)


def delete():
    for name in names:
        os.unlink(name)
    os.rmdir(work)


def write_large():
    fd = os.open(big, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for _ in range(large):
        os.write(fd, block)
    os.fsync(fd)
    os.close(fd)


def read_large():
    fd = os.open(big, os.O_RDONLY)
    while os.read(fd, 1 << 20):
        pass
    os.close(fd)


def status():
    subprocess.run(["git", "-C", repository, "status", "--porcelain"], check=True, stdout=subprocess.DEVNULL)


if small:
    step("create", create)
    step("stat, caches empty", stat, cold=True)
    step("stat again", stat)
    step("read", read, cold=True)
    step("delete", delete, cold=True)
    step("write large", write_large)
    step("read large", read_large, cold=True)
    os.unlink(big)
if repository:
    step("git status, first", status)
    step("git status, caches empty", status, cold=True)
    step("git status again", status)
json.dump(times, sys.stdout)
