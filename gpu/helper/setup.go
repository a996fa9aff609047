package helper

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"os/user"
	"strings"
	"text/template"

	"github.com/agentvm/agentvm/vm"
)

//go:embed setup/*.tmpl
var setupFS embed.FS

var (
	plainPath = vm.Pattern(`^/[A-Za-z0-9._/+-]+$`) // needs no quoting in sudoers, XML or a shell
	plainUser = vm.Pattern(`^[A-Za-z_][A-Za-z0-9._-]*\$?$`)
)

// Setup is the shell script that root runs once so that a user may run the
// program exe as the helper, for these devices (none: every card).
func Setup(exe, userName string, devices []string) (string, error) {
	if !plainPath().MatchString(exe) {
		return "", vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%q is no path for a program that root runs", exe)), "make install puts agentvm into /usr/local/bin")
	}
	if !plainUser().MatchString(userName) {
		return "", vm.Classify(vm.ErrUsage, fmt.Errorf("%q is not the name of a user", userName))
	}
	if len(devices) == 0 {
		devices = []string{anyCard}
	}
	templates, err := template.ParseFS(setupFS, "setup/*.tmpl")
	if err != nil {
		return "", err
	}
	var policy, out bytes.Buffer
	if err := templates.ExecuteTemplate(&policy, "policy.xml.tmpl", map[string]string{"Exe": exe}); err != nil {
		return "", err
	}
	err = templates.ExecuteTemplate(&out, "setup.sh.tmpl", map[string]string{"User": userName, "Devices": `"` + strings.Join(devices, `", "`) + `"`,
		"Sudoers": sudoersLine(userName, exe), "Policy": policy.String()})
	return out.String(), err
}

// sudoersLine is what lets a user run the helper, and nothing else, as root.
func sudoersLine(userName, exe string) string {
	return fmt.Sprintf("%s ALL=(root) NOPASSWD: %s %s", userName, exe, Arg)
}

// Self is the name of the user who runs this program.
func Self() (string, error) {
	u, err := user.Current()
	if err != nil {
		return "", fmt.Errorf("find the user's name: %w", err)
	}
	if u.Username == "" {
		return "", errors.New("the user has no name")
	}
	return u.Username, nil
}
