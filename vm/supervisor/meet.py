"""Waits until the kernel lists the devices that were plugged in, with room for
their memory, and drivers have had their chance; says the numbers of those that
it does not list. What has failed in the template for want of them is started
again.

told (each device's id and the sizes of its memory, in bytes) comes before this
text, and package line's functions with the modules that it imports.
"""


def listed():
    for path in glob.glob("/sys/bus/pci/devices/*"):
        try:
            words = []
            for name in "vendor", "device", "resource":
                with open(os.path.join(path, name)) as f:
                    words.append(f.read())
        except OSError:
            continue  # on its way
        ends = [[int(n, 16) for n in line.split()[:2]] for line in words[2].splitlines()]
        yield words[0].strip()[2:] + ":" + words[1].strip()[2:], [last - first + 1 for first, last in ends if first]


def missing():
    there = list(listed())
    for number, (ident, sizes) in enumerate(told):
        for device in there:
            if device[0] == ident and all(device[1].count(s) >= sizes.count(s) for s in sizes):
                there.remove(device)
                break
        else:
            yield number


begin_journal()  # drivers and their services say more than its sockets hold
run("udevadm control --start-exec-queue || :")
for attempt in range(300):
    lost = list(missing())
    if not lost:
        break
    time.sleep(0.1)
for number in lost:
    say(f"missing {number}")
run("udevadm settle --timeout=60; systemctl --failed --plain --no-legend | awk '{ print $1 }' | xargs -r systemctl restart --no-block")
