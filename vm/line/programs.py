# What the host asks for by name. Compiling it takes a guest that has just
# been restored longer than running it, so that is done before it is saved.

libc = ctypes.CDLL(None, use_errno=True)


def write(path, text):
    with open(path, "w") as f:
        f.write(text)


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
            os.makedirs(share["target"], exist_ok=True)
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
    with open("/proc/sys/kernel/random/uuid") as f:
        write("/run/boot_id", f.read())
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


def hand_over_key(path, key):
    """sshd has been waiting for its host key, which it reads from the pipe. A
    boot finds it in a file."""
    pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with open(os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(key)
    os.rename(path + ".new", path)  # in place of the link to the pipe
    os.write(pipe, key.encode())
    os.close(pipe)


def settle():
    """What can wait until the machine is in use, and its first command over: it is
    work for seconds in which nothing needs it. Its end is waited for by whoever
    stops this program."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.sigtimedwait([signal.SIGTERM], 2)
    subprocess.run(["udevadm", "control", "--start-exec-queue"])
    # What the journal has is the template's, under its boot and its machine's ids.
    shutil.rmtree("/run/log/journal", ignore_errors=True)
    subprocess.run(["systemctl", "restart", "--no-block", "systemd-journald"])


def clone(guest):
    """Makes the guest a machine of its own."""
    # Who may log in. The files exist, so their owners and modes stay.
    host_key = "/etc/ssh/ssh_host_ed25519_key"
    waits = stat.S_ISFIFO(os.stat(host_key).st_mode)
    if waits:
        say("login")  # connections wait too, until sshd has its key
    write(host_key + ".pub", guest["host_key_public"] + "\n")
    write(guest["authorized_keys_file"], guest["authorized_keys"])
    if waits:
        hand_over_key(host_key, guest["host_key"])
    else:
        write(host_key, guest["host_key"])
        restart_sshd()
        say("login")
    mounting = threading.Thread(target=mount_shares, args=[guest])
    mounting.start()

    # Who the guest is. No command runs before this is over.
    write("/etc/machine-id", guest["machine_id"] + "\n")
    name_it(guest)
    new_boot()
    mounting.join()
    atexit.register(settle)  # when the host hangs up


def claim(guest):
    """Gives a clone that waited in the pool its name and its shares."""
    name_it(guest)
    mount_shares(guest)


def resume(guest):
    """Gives a machine that goes on from what it was itself its shares."""
    say("login")  # its sshd has been its own all along
    mount_shares(guest)
