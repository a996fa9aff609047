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

libc = ctypes.CDLL(None, use_errno=True)


def unmount(target):
    if libc.umount2(os.fsencode(target), 0) != 0:
        return ctypes.get_errno()
    return 0


def holders(target):
    """Everything that keeps target busy, a line each."""
    device = os.stat(target).st_dev
    number = f"{os.major(device):02x}:{os.minor(device):02x}"
    for directory in sorted(glob.glob("/proc/[0-9]*"), key=lambda d: int(d[6:])):
        try:
            with open(directory + "/maps", errors="replace") as f:
                held = any(line.split()[3] == number for line in f)
            for link in [directory + "/cwd", directory + "/root"] + glob.glob(directory + "/fd/*"):
                if held:
                    break
                try:
                    held = os.stat(link).st_dev == device
                except OSError:
                    pass
            if held:
                with open(directory + "/cmdline", "rb") as f:
                    command = f.read().replace(b"\0", b" ").decode(errors="replace").strip()
                yield f"process {directory[6:]} ({command[:100]})"
        except OSError:
            pass  # it has ended
    with open("/proc/mounts") as f:
        for line in f:
            below = line.split()[1].encode().decode("unicode_escape")
            if below.startswith(target + "/"):
                yield f"a mount at {below}"


def stopped(process):
    try:
        with open(f"/proc/{process}/status") as f:
            return "\nState:\tT" in f.read()
    except OSError:
        return False


unmounted = []
for tag, target, readonly in reversed(told["shares"]):
    if not os.path.ismount(target):
        continue
    error = unmount(target)
    if error == 0:
        unmounted.append((tag, target, readonly))
        continue
    why = list(holders(target)) if error == errno.EBUSY else [os.strerror(error)]
    for again in reversed(unmounted):
        subprocess.run(["mount", "-t", "virtiofs", "-o", "ro" if again[2] else "rw", again[0], again[1]])
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
