package share

import (
	"fmt"
	"os"
	"slices"
	"time"
)

// watchInterval is how late the loss of a protection may be noticed.
const watchInterval = time.Second

// watch notices protections, from those given, that end while the daemon runs. When the host
// removes a file or renames another over it, Linux also removes the mounts on
// it in other namespaces (detach_mounts() in fs/namespace.c, since 3.18).
//
// The kernel announces changes to those who poll a mount table, but only of
// the namespace that it was opened in, and virtiofsd moves to another; so
// this looks now and then.
func (s *Server) watch(before []string) {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	var gone []string
	for {
		select {
		case <-s.done:
			return
		case <-ticker.C:
		}
		now, err := restrictedPaths(s.PID(), s.spec)
		if err != nil {
			return // the daemon is gone, which others notice
		}
		for _, p := range gone {
			if !slices.Contains(now, p) { // not even on a second look
				s.lose(p)
			}
		}
		gone = slices.DeleteFunc(before, func(p string) bool { return slices.Contains(now, p) })
		before = now
	}
}

// lose records a path that is no longer protected.
func (s *Server) lose(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unprotected = append(s.unprotected, Unprotected{Path: path, Reason: "was replaced or removed on the host"})
}

// restrictedPaths lists the paths of spec that are mount points for the
// process, before or after it has made the share its root directory.
func restrictedPaths(pid int, spec Spec) ([]string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	points, err := mountPoints(f)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, r := range restrictions(spec.Protect, spec.Hide) {
		if slices.Contains(points, sharePoint+"/"+r.path) || slices.Contains(points, "/"+r.path) {
			paths = append(paths, r.path)
		}
	}
	return paths, nil
}
