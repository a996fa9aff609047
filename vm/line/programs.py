# What the host asks for by name. Compiling it takes a guest that has just
# been restored longer than running it, so that is done before it is saved. For an
# emulated guest all that runs for the first time is slow, so it is kept short:
# few and plain calls, and the login's part first.

libc = ctypes.CDLL(None, use_errno=True)


def write(path, text, mode=0o666):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    data = text.encode()
    while data:
        data = data[os.write(fd, data) :]
    os.close(fd)


def mount(source, target, kind, flags=0):
    for attempt in range(400):
        if libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), None) == 0:
            return
        error = ctypes.get_errno()
        time.sleep(0.01)  # the device may still be on its way
    raise OSError(error, os.strerror(error))


def mount_shares(guest):
    """Says what could not be had. That is comfort, as in a boot: the guest is
    its own machine without it."""
    lost = []
    try:
        if guest["home"]:
            run(guest["home"])
    except Exception as error:
        lost.append(f"directories in the home directory: {error}")
    for share in guest["shares"]:
        try:
            if not os.path.isdir(share["target"]):
                os.makedirs(share["target"])
            mount(share["tag"], share["target"], "virtiofs", 1 if share["readonly"] else 0)
        except Exception as error:
            lost.append(f"not mounted: {share['target']}: {error}")
    for text in lost:
        say("warning: " + " ".join(text.split()))


def name_it(guest):
    write("/etc/hostname", guest["hostname"] + "\n")
    socket.sethostname(guest["hostname"])
    if guest["gitconfig"]:
        write("/etc/gitconfig", guest["gitconfig"])


def new_boot():
    """The id of this boot is the template's, and the kernel never changes it."""
    fd = os.open("/proc/sys/kernel/random/uuid", os.O_RDONLY | os.O_CLOEXEC)
    write("/run/boot_id", os.read(fd, 64).decode())
    os.close(fd)
    mount("/run/boot_id", "/proc/sys/kernel/random/boot_id", "", 4096)  # MS_BIND


def restart_sshd():
    """sshd reads its host key again, and writes its file when it serves with it."""
    with open("/run/sshd.pid") as f:
        sshd = int(f.read())
    os.remove("/run/sshd.pid")
    os.kill(sshd, signal.SIGHUP)
    for attempt in range(6000):
        if os.path.exists("/run/sshd.pid") and os.path.getsize("/run/sshd.pid"):
            return
        time.sleep(0.01)
    raise TimeoutError("sshd does not serve with its new key")


# A boot finds sshd's host key in a file. A template's sshd reads it from a pipe.
host_key = "/etc/ssh/ssh_host_ed25519_key"
waiting_sshd = None


def meet_sshd(authorized_keys_file):
    """Opens what sshd lacks before the template is saved. Opening the pipe wakes
    sshd, which then waits in reading it."""
    global waiting_sshd
    waiting_sshd = (
        os.open(authorized_keys_file, os.O_WRONLY | os.O_CLOEXEC),
        os.open(host_key, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC),
    )


def begin_sshd(*texts):
    for fd, text in zip(waiting_sshd, texts):
        os.write(fd, text.encode())
        os.close(fd)


def keep_key(key, public):
    write(host_key + ".new", key, 0o600)
    os.rename(host_key + ".new", host_key)  # in place of the link to the pipe
    write(host_key + ".pub", public + "\n")


@functools.cache
def begin_journal():
    """What the journal has is the template's, under its boot and its machine's ids.
    The service has been stopped (SIGSTOP) in the template: the next one, which systemd
    starts at once, reads what has been logged since. In a fork it has not been, and
    what it has written goes, too."""
    shutil.rmtree("/run/log/journal", ignore_errors=True)
    subprocess.run(["systemctl", "kill", "--signal=KILL", "systemd-journald"])


def settle():
    """What can wait until the machine is in use, and its first command over: it is
    work for seconds in which nothing needs it."""
    signal.sigtimedwait([signal.SIGTERM], 2)
    begin_journal()
    subprocess.run(["udevadm", "control", "--start-exec-queue"])


def settle_later():
    """When the host hangs up. Whoever stops this program before waits for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    atexit.register(settle)


def clone(told, authorized_keys, key):
    """Makes the guest a machine of its own."""
    # Who may log in comes first: a login finds it. The file exists, so its owner
    # and mode stay.
    if waiting_sshd:
        begin_sshd(authorized_keys, key)
        say("login")
    guest = json.loads(told)
    if not waiting_sshd:
        write(guest["authorized_keys_file"], authorized_keys)
    keep_key(key, guest["host_key_public"])
    if not waiting_sshd:
        restart_sshd()
        say("login")

    # Who the guest is. No command runs before this is over.
    write("/etc/machine-id", guest["machine_id"] + "\n")
    name_it(guest)
    new_boot()
    mount_shares(guest)
    settle_later()


def claim(told):
    """Gives a clone that waited in the pool its name and its shares."""
    guest = json.loads(told)
    name_it(guest)
    mount_shares(guest)


def resume(told):
    """Gives a machine that goes on from what it was itself its shares."""
    say("login")  # its sshd has been its own all along
    mount_shares(json.loads(told))
