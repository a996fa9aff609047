libc = ctypes.CDLL(None, use_errno=True)
lost = []  # is comfort, as in a boot: the guest is its own machine without it


def write(path, text, **how):
    with open(path, "w", **how) as f:
        f.write(text)


def mount(source, target, kind, flags=0):
    for attempt in range(200):
        if libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), None) == 0:
            return
        error = ctypes.get_errno()
        time.sleep(0.02)  # the device may still be on its way
    raise OSError(error, os.strerror(error))


def mount_shares():
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


def tell_lost():
    for text in lost:
        say("warning: " + " ".join(text.split()))
