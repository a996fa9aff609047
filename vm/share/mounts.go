package share

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The stage builds on a tmpfs over /sys: every Linux has that directory, and
// virtiofsd needs nothing in it.
const (
	stagePoint = "/sys"
	sharePoint = stagePoint + "/share"
	emptyDir   = stagePoint + "/empty-dir"
	emptyFile  = stagePoint + "/empty-file"
)

// Unprotected is a path that Start was asked to protect or hide and could not.
type Unprotected struct {
	Path   string
	Reason string
}

// mountShare makes, in a mount namespace of the caller's own, the tree that
// virtiofsd will serve, at sharePoint.
func mountShare(p plan) ([]Unprotected, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	tree, err := sourceTree(p) // before anything is mounted over it
	if err != nil {
		return nil, err
	}
	defer unix.Close(tree)
	if err := makeStage(); err != nil {
		return nil, err
	}
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	}
	if p.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return nil, fmt.Errorf("restrict the mount of %s: %w", p.Source, err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, sharePoint, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("mount %s for virtiofsd: %w", p.Source, err)
	}
	root, err := unix.Open(sharePoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the mount of %s: %w", p.Source, err)
	}
	defer unix.Close(root)
	if err := maskSubmounts(root); err != nil {
		return nil, err
	}
	return restrict(root, p)
}

// sourceTree returns a detached clone of the shared directory's mount.
func sourceTree(p plan) (int, error) {
	if p.Idmapped {
		return treeFD, nil
	}
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	dir, err := unix.Openat2(unix.AT_FDCWD, p.Source, &how)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", p.Source, err)
	}
	defer unix.Close(dir)
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return -1, fmt.Errorf("stat %s: %w", p.Source, err)
	}
	if uint64(st.Dev) != p.Dev || st.Ino != p.Ino {
		return -1, fmt.Errorf("open %s: it was replaced in the meantime", p.Source)
	}
	// In a user namespace the mounts below are locked to it; they cannot be
	// left out, and are masked instead.
	tree, err := unix.OpenTree(dir, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return -1, fmt.Errorf("clone the mount of %s: %w", p.Source, err)
	}
	return tree, nil
}

func makeStage() error {
	if err := unix.Mount("tmpfs", stagePoint, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755,size=64k"); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	return errors.Join(
		os.Mkdir(sharePoint, 0o755),
		os.Mkdir(emptyDir, 0o555),
		os.WriteFile(emptyFile, nil, 0o444))
}

// maskSubmounts covers what the host has mounted below the shared directory.
func maskSubmounts(root int) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	below, err := mountsBelow(f, sharePoint)
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, rel := range below {
		if err := mask(root, rel); err != nil {
			return fmt.Errorf("mask the mount at %s: %w", rel, err)
		}
	}
	return nil
}

// mountsBelow finds the uppermost mount points below dir, relative to it.
func mountsBelow(mountinfo io.Reader, dir string) ([]string, error) {
	points, err := mountPoints(mountinfo)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(points, byDepth)
	var top []string
	for _, p := range points {
		rel, below := strings.CutPrefix(p, dir+"/")
		if below && !slices.ContainsFunc(top, func(t string) bool { return within(rel, t) }) {
			top = append(top, rel)
		}
	}
	return top, nil
}

// mountPoints reads mountinfo, see proc_pid_mountinfo(5).
func mountPoints(mountinfo io.Reader) ([]string, error) {
	var points []string
	sc := bufio.NewScanner(mountinfo)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 5 {
			return nil, fmt.Errorf("malformed line %q", sc.Text())
		}
		points = append(points, unescape(f[4]))
	}
	return points, sc.Err()
}

// unescape undoes the kernel's octal escapes of space, tab, newline and backslash.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// restrict protects and hides paths, those nearer to the root first, so that
// what lies within is mounted on top.
func restrict(root int, p plan) (un []Unprotected, err error) {
	for _, s := range restrictions(p.Protect, p.Hide) {
		switch s.what {
		case pinned:
			err = bind(root, s.path, 0)
		case protected:
			err = bind(root, s.path, unix.MOUNT_ATTR_RDONLY)
		case hidden:
			err = mask(root, s.path)
		}
		switch {
		case err == nil:
		case errors.Is(err, errSymlink), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			if s.what != pinned {
				un = append(un, Unprotected{Path: s.path, Reason: reason(err)})
			}
		default:
			return nil, fmt.Errorf("restrict %s: %w", s.path, err)
		}
	}
	return un, nil
}

func reason(err error) string {
	if errors.Is(err, errSymlink) {
		return "is behind a symbolic link"
	}
	return "does not exist"
}

type restriction struct {
	path string
	what what
}

type what int

const (
	pinned    what = iota // a mount on itself: cannot be renamed or removed
	protected             // read-only
	hidden                // empty
)

// restrictions plans the mounts. A mount travels with a directory that is
// renamed, and would leave the way free for a new one at the old place; so
// each directory on the way to a protected path is pinned. A hidden path
// stays hidden wherever it goes.
func restrictions(protect, hide []string) []restriction {
	plan := map[string]what{}
	for _, p := range protect {
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			plan[dir] = max(plan[dir], pinned)
		}
		plan[p] = max(plan[p], protected)
	}
	for _, p := range hide {
		plan[p] = hidden
	}
	var list []restriction
	for p, w := range plan {
		covered := false
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			// Nothing in a hidden directory is left to restrict, nor to protect in a protected one.
			covered = covered || plan[dir] > pinned && plan[dir] >= w && hasKey(plan, dir)
		}
		if !covered {
			list = append(list, restriction{p, w})
		}
	}
	slices.SortFunc(list, func(a, b restriction) int { return byDepth(a.path, b.path) })
	return list
}

func hasKey(m map[string]what, k string) bool { _, ok := m[k]; return ok }

func byDepth(a, b string) int {
	return cmp.Or(strings.Count(a, "/")-strings.Count(b, "/"), strings.Compare(a, b))
}

func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

var errSymlink = errors.New("behind a symbolic link")

// openBelow opens a path without following any link, in the tree or out of it.
func openBelow(root int, rel string) (int, bool, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(root, rel, &how)
	if errors.Is(err, unix.ELOOP) {
		return -1, false, errSymlink
	}
	if err != nil {
		return -1, false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, false, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		unix.Close(fd)
		return -1, false, errSymlink
	}
	return fd, st.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}

// bind mounts a path on itself, with the attributes added.
func bind(root int, rel string, attrs uint64) error {
	at, _, err := openBelow(root, rel)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	return mountOn(at, at, "", attrs)
}

// mask mounts emptiness on a path.
func mask(root int, rel string) error {
	at, isDir, err := openBelow(root, rel)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	empty := emptyFile
	if isDir {
		empty = emptyDir
	}
	return mountOn(at, unix.AT_FDCWD, empty, unix.MOUNT_ATTR_RDONLY)
}

// mountOn clones the mount at fromDir and from, and mounts it on the open path at.
func mountOn(at, fromDir int, from string, attrs uint64) error {
	tree, err := unix.OpenTree(fromDir, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("clone the mount: %w", err)
	}
	defer unix.Close(tree)
	if attrs != 0 {
		attr := unix.MountAttr{Attr_set: attrs}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return fmt.Errorf("restrict the mount: %w", err)
		}
	}
	if err := unix.MoveMount(tree, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	return nil
}
