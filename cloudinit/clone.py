def new_boot():
    """The id of this boot is the template's, and the kernel never changes it."""
    with open("/proc/sys/kernel/random/uuid") as f:
        write("/run/boot_id", f.read())
    mount("/run/boot_id", "/proc/sys/kernel/random/boot_id", "", 4096)  # MS_BIND


# Who may log in. The files exist, so their owners and modes stay.
write("/etc/ssh/ssh_host_ed25519_key", guest["host_key"])
write("/etc/ssh/ssh_host_ed25519_key.pub", guest["host_key_public"] + "\n")
write(guest["authorized_keys_file"], guest["authorized_keys"])

# sshd starts itself over, and writes its file again when it listens.
with open("/run/sshd.pid") as f:
    sshd = int(f.read())
os.remove("/run/sshd.pid")
os.kill(sshd, 1)

# Who the guest is.
write("/etc/machine-id", guest["machine_id"] + "\n")
name_it()
new_boot()

mounting = threading.Thread(target=mount_shares)
mounting.start()
while not os.path.exists("/run/sshd.pid") or not os.path.getsize("/run/sshd.pid"):
    time.sleep(0.005)
say("login")
mounting.join()
# What the journal has is the template's, under its boot and its machine's ids.
shutil.rmtree("/run/log/journal", ignore_errors=True)
subprocess.Popen(["systemctl", "restart", "--no-block", "systemd-journald"])
tell_lost()
