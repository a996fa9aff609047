package cloudinit

import "encoding/base64"

// UserData is the part of cloud-init's cloud-config that this project uses,
// under cloud-init's own names.
type UserData struct {
	Hostname          string    `yaml:"hostname"`
	PreserveHostname  bool      `yaml:"preserve_hostname"`
	ManageEtcHosts    string    `yaml:"manage_etc_hosts,omitempty"`
	Timezone          string    `yaml:"timezone,omitempty"`
	Locale            string    `yaml:"locale,omitempty"`
	DisableRoot       bool      `yaml:"disable_root"`
	SSHDeleteKeys     bool      `yaml:"ssh_deletekeys"` // false: keep what SSHKeys wrote
	SSHKeys           *HostKeys `yaml:"ssh_keys,omitempty"`
	NoSSHFingerprints bool      `yaml:"no_ssh_fingerprints"`
	Users             []User    `yaml:"users"`
	GrowPart          GrowPart  `yaml:"growpart"`
	ResizeRootFS      bool      `yaml:"resize_rootfs"`
	Mounts            []Mount   `yaml:"mounts,omitempty"`
	CACerts           *CACerts  `yaml:"ca_certs,omitempty"`
	WriteFiles        []File    `yaml:"write_files,omitempty"`
	BootCmd           []Command `yaml:"bootcmd,omitempty"`
	RunCmd            []Command `yaml:"runcmd,omitempty"`
}

// HostKeys are the SSH server's keys. With them given, cloud-init generates
// none.
type HostKeys struct {
	ED25519Private string `yaml:"ed25519_private"`
	ED25519Public  string `yaml:"ed25519_public"`
}

// User is a login to create.
type User struct {
	Name              string   `yaml:"name"`
	UID               int      `yaml:"uid"`
	Shell             string   `yaml:"shell,omitempty"`
	Sudo              string   `yaml:"sudo,omitempty"`
	LockPasswd        bool     `yaml:"lock_passwd"`
	SSHAuthorizedKeys []string `yaml:"ssh_authorized_keys,omitempty"`
}

// GrowPart says whether the root partition grows to fill its disk.
type GrowPart struct {
	Mode    string   `yaml:"mode"` // auto or off
	Devices []string `yaml:"devices,omitempty"`
}

// Mount is one line of fstab(5).
type Mount struct {
	Spec, File, VFSType, Options string
}

// MarshalYAML gives the six fields of fstab(5) in order; virtiofs is neither
// dumped nor checked.
func (m Mount) MarshalYAML() (any, error) {
	return []string{m.Spec, m.File, m.VFSType, m.Options, "0", "0"}, nil
}

// CACerts are PEM certificates to add to the system's trusted ones.
type CACerts struct {
	Trusted []string `yaml:"trusted"`
}

// File is a file to write.
type File struct {
	Path        string `yaml:"path"`
	Content     string `yaml:"content"`
	Encoding    string `yaml:"encoding,omitempty"` // empty or b64
	Owner       string `yaml:"owner,omitempty"`    // user:group
	Permissions string `yaml:"permissions"`        // octal
	Append      bool   `yaml:"append,omitempty"`
	Defer       bool   `yaml:"defer,omitempty"` // write it when users exist
}

func (f *File) setBase64(content []byte) {
	f.Content, f.Encoding = base64.StdEncoding.EncodeToString(content), "b64"
}

// Command is an argument vector; no shell looks at it.
type Command []string
