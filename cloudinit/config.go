package cloudinit

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Config says what the guest shall be, in this project's terms. The zero
// value of a field leaves the image's own setting alone.
type Config struct {
	InstanceName   string // local-hostname; also the hostname unless that is set
	Hostname       string
	User           Account
	AuthorizedKeys []string // OpenSSH authorized_keys lines
	HostKey        []byte   // ed25519 private key, OpenSSH PEM
	Timezone       string   // tz database name, for example Europe/Berlin
	Locale         string   // wanted, for example de_DE.UTF-8
	Locales        []string // what a built image has beside C.UTF-8, its fallback
	CAs            []string // PEM certificates that the guest trusts besides its own
	Git            Git
	Mounts         []ShareMount
	Files          []GuestFile
	RunCmd         []string // shell lines run as root, once, at the end of the first boot
	Network        Network
	// Partitioned says that the image brings its own partitions and boot
	// loader, so that this project has not built it: the root partition has to
	// grow with the disk, and only the image's own tools know its CA store.
	Partitioned bool
}

// Account is the login that an agent works in.
type Account struct {
	Name string
	UID  int
}

// Home returns the account's home directory in the guest.
func (a Account) Home() string { return "/home/" + a.Name }

// ShareMount mounts the virtiofs device Tag at Target. ReadOnly only spares the guest
// a surprise: the host enforces it.
type ShareMount struct {
	Tag      string
	Target   string
	ReadOnly bool
}

// GuestFile is a file to write. Owner is root or the Account's name; empty
// means root.
type GuestFile struct {
	Path    string
	Content []byte
	Mode    uint32 // permission bits; 0 means 0644
	Owner   string
}

// NewSeed turns cfg into cloud-init's terms and validates the result.
func NewSeed(cfg Config) (*Seed, error) {
	hostname := cfg.Hostname
	if hostname == "" {
		hostname = cfg.InstanceName
	}
	keys, err := hostKeys(cfg.HostKey)
	if err != nil {
		return nil, err
	}
	files, err := cfg.Git.file()
	if err != nil {
		return nil, err
	}
	cas, err := canonicalCAs(cfg.CAs)
	if err != nil {
		return nil, err
	}
	s := &Seed{
		UserData: UserData{
			Hostname:          hostname,
			ManageEtcHosts:    "localhost",
			Timezone:          cfg.Timezone,
			Locale:            cfg.locale(),
			DisableRoot:       true,
			SSHKeys:           keys,
			NoSSHFingerprints: true,
			Users:             []User{cfg.user()},
			GrowPart:          GrowPart{Mode: "off"},
			ResizeRootFS:      true,
			Mounts:            cfg.mounts(),
			WriteFiles:        append(files, cfg.files()...),
			BootCmd:           cfg.prepareHome(),
		},
		LocalHostname: cfg.InstanceName,
		Network:       cfg.Network.config(),
	}
	if cfg.Partitioned {
		s.UserData.GrowPart = GrowPart{Mode: "auto", Devices: []string{"/"}}
		s.UserData.CACerts = caCerts(cas)
	} else {
		s.UserData.WriteFiles = append(s.UserData.WriteFiles, caFiles(cas)...)
	}
	for _, line := range cfg.RunCmd {
		s.UserData.RunCmd = append(s.UserData.RunCmd, Command{"sh", "-c", line})
	}
	if err := s.Validate(); err != nil {
		return nil, err
	}
	return s, nil
}

func (cfg Config) user() User {
	return User{
		Name:              cfg.User.Name,
		UID:               cfg.User.UID,
		Shell:             "/bin/bash",
		Sudo:              "ALL=(ALL) NOPASSWD:ALL",
		LockPasswd:        true,
		SSHAuthorizedKeys: cfg.AuthorizedKeys,
	}
}

// locale falls back to the locale that every Debian has. cloud-init would
// otherwise call locale-gen(8), which a built image has no need for and which
// takes long in an emulated machine.
func (cfg Config) locale() string {
	if cfg.Locale == "" || cfg.Partitioned || slices.Contains(cfg.Locales, cfg.Locale) {
		return cfg.Locale
	}
	return "C.UTF-8"
}

func (cfg Config) mounts() []Mount {
	var out []Mount
	for _, m := range cfg.Mounts {
		// nofail: a share that cannot be mounted must not cost the login that
		// is needed to find out why.
		options := "rw,nofail"
		if m.ReadOnly {
			options = "ro,nofail"
		}
		out = append(out, Mount{Spec: m.Tag, File: m.Target, VFSType: "virtiofs", Options: options})
	}
	return out
}

func (cfg Config) files() []File {
	var out []File
	for _, f := range cfg.Files {
		mode := f.Mode
		if mode == 0 {
			mode = 0o644
		}
		owner := f.Owner
		if owner == "" {
			owner = "root"
		}
		file := newFile(f.Path, f.Content, mode)
		file.Owner = owner + ":" + owner
		// Accounts are made after the first round of files.
		file.Defer = owner != "root"
		out = append(out, file)
	}
	return out
}

// newFile stores content as text when YAML can carry it as such, and else in
// base64.
func newFile(p string, content []byte, mode uint32) File {
	f := File{Path: p, Content: string(content), Permissions: fmt.Sprintf("%04o", mode)}
	if !utf8.Valid(content) || strings.ContainsRune(f.Content, 0) {
		f.setBase64(content)
	}
	return f
}

// prepareHome makes the home directory, and the directories in it that lead
// to a mount or a file, before cloud-init does: its mounts module runs ahead
// of its users module and makes missing directories root's, and useradd then
// leaves the home directory as it finds it.
func (cfg Config) prepareHome() []Command {
	home := cfg.User.Home()
	var dirs []string
	for _, m := range cfg.Mounts {
		dirs = append(dirs, parents(home, m.Target)...)
	}
	for _, f := range cfg.Files {
		dirs = append(dirs, parents(home, f.Path)...)
	}
	if len(dirs) == 0 {
		return nil
	}
	slices.Sort(dirs) // a parent sorts before its children
	dirs = slices.Compact(dirs)
	const script = `set -eu
owner=$1 home=$2
shift
[ -d "$home" ] || { cp -r /etc/skel "$home"; chown -R "$owner:$owner" "$home"; chmod 0700 "$home"; }
for dir; do [ -d "$dir" ] || install -d -o "$owner" -g "$owner" "$dir"; done`
	cmd := Command{"cloud-init-per", "instance", "agent-home", "sh", "-c", script, "sh", strconv.Itoa(cfg.User.UID), home}
	return []Command{append(cmd, dirs...)}
}

// parents returns home and every directory between home and p, or nothing
// when p is not below home.
func parents(home, p string) []string {
	var dirs []string
	for d := path.Dir(p); strings.HasPrefix(d+"/", home+"/"); d = path.Dir(d) {
		dirs = append(dirs, d)
	}
	return dirs
}
