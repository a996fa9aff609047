"""Lets go of the shares, and starts the listener of the serial line, so that
the machine can be saved. Where programs hold a share open, it says which,
mounts again what it had unmounted, and ends with 3.

told (mounts and the listener's text) comes before this text.
"""

import ctypes
import errno
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile

libc = ctypes.CDLL(None, use_errno=True)


def unmount(target):
    if libc.umount2(os.fsencode(target), 0) != 0:
        return ctypes.get_errno()
    return 0


def mount(tag, target, readonly):
    if libc.mount(tag.encode(), os.fsencode(target), b"virtiofs", ctypes.c_ulong(1 if readonly else 0), None) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


def left(tag, readonly):
    """The device number of a share that is in use although it is unmounted:
    bound to another place, in another namespace, or unmounted lazily. What the
    kernel has not let go of it mounts once more as it was, whatever is asked
    for: so the opposite is asked for."""
    with tempfile.TemporaryDirectory(dir="/run") as place:
        try:
            mount(tag, place, not readonly)
        except OSError:
            return None  # what is in use can be mounted
        device = os.stat(place).st_dev
        options = [options for _, at, options, _ in mounts("/proc/self") if at == place]
        unmount(place)
    return device if options[-1].split(",")[0] == ("ro" if readonly else "rw") else None


def holders(device, target):
    """Everything that has the share of this device in use, a line each."""
    own = f"{os.major(device)}:{os.minor(device)}"
    mapped = f"{os.major(device):02x}:{os.minor(device):02x}"
    namespaces = {os.stat("/proc/self/ns/mnt").st_ino: ("/proc/self", "")}
    for directory in sorted(glob.glob("/proc/[0-9]*"), key=lambda d: int(d[6:])):
        try:
            with open(directory + "/cmdline", "rb") as f:
                command = f.read().replace(b"\0", b" ").decode(errors="replace").strip()
            process = f"process {directory[6:]} ({command[:100]})"
            namespaces.setdefault(os.stat(directory + "/ns/mnt").st_ino, (directory, " of " + process))
            with open(directory + "/maps", errors="replace") as f:
                held = any(line.split()[3] == mapped for line in f)
            for link in [directory + "/cwd", directory + "/root"] + glob.glob(directory + "/fd/*"):
                if held:
                    break
                try:
                    held = os.stat(link).st_dev == device
                except OSError:
                    pass
            if held:
                yield process
        except OSError:
            pass  # it has ended
    ours = {place: groups for _, place, _, groups in mounts("/proc/self")}
    for directory, whose in namespaces.values():
        for number, place, _, groups in mounts(directory):
            below = not whose and place.startswith(target + "/")
            # What a namespace has that follows ours, as services' do, goes with ours.
            goes = ours.get(place, set()) & groups if whose else place == target
            if below or number == own and not goes:
                yield f"a mount at {place}{whose}"


def mounts(directory):
    """The mounts that a process sees: device number, place, options of the file
    system, and the groups of mounts that change together (mount_namespaces(7))."""
    try:
        with open(directory + "/mountinfo") as f:
            for line in f:
                fields = line.split()
                groups = {field.partition(":")[2] for field in fields[6 : fields.index("-")] if field.startswith(("shared:", "master:"))}
                yield fields[2], fields[4].encode().decode("unicode_escape"), fields[-1], groups
    except OSError:
        pass  # it has ended


def stopped(process):
    try:
        with open(f"/proc/{process}/status") as f:
            return "\nState:\tT" in f.read()
    except OSError:
        return False


unmounted = []
for tag, target, readonly in reversed(told["shares"]):
    device, why = None, []
    if os.path.ismount(target):
        device = os.stat(target).st_dev
        error = unmount(target)
        if error == 0:
            unmounted.append((tag, target, readonly))
            device = None
        elif error != errno.EBUSY:
            why = [os.strerror(error)]
    if device is None:
        device = left(tag, readonly)
    if device is None:
        continue
    why = why or list(holders(device, target))
    for again in reversed(unmounted):
        mount(*again)
    print(f"{target} is in use by " + (", ".join(why[:10]) or "something that cannot be seen"))
    sys.exit(3)

os.sync()
with open("/run/agentvm-listen", "w") as f:
    f.write(told["listener"])
for verb in "stop", "reset-failed":  # one that nobody came to talk to
    subprocess.run(["systemctl", verb, "agentvm-line"], stderr=subprocess.DEVNULL)
# What a listener that was killed has left held is not to be saved.
subprocess.run(["udevadm", "control", "--start-exec-queue"], stderr=subprocess.DEVNULL)
journal = subprocess.run(["systemctl", "show", "-P", "MainPID", "systemd-journald"], stdout=subprocess.PIPE, text=True).stdout.strip()
if stopped(journal):
    shutil.rmtree("/run/log/journal", ignore_errors=True)
    os.kill(int(journal), signal.SIGKILL)
subprocess.run(["systemd-run", "--quiet", "--collect", "--unit=agentvm-line", "python3", "/run/agentvm-listen"], check=True)
