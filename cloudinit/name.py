def name_it():
    write("/etc/hostname", guest["hostname"] + "\n")
    socket.sethostname(guest["hostname"])
    if guest["gitconfig"]:
        write("/etc/gitconfig", guest["gitconfig"])
