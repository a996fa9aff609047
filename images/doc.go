// Package images makes and keeps the disks that virtual machines start from.
//
// A base image is a Debian release built from the distribution's own packages
// by mmdebstrap: a root disk (raw, sparse, ext4), a kernel, an initial ram
// disk and a manifest that says what is in them. A layer is a base image with
// more packages, npm packages and commands baked in, so that a virtual
// machine needs no network to get them; it is built from the base's kept tree
// and not from the archive again. Any local disk file is an image too.
//
// What the package promises:
//
//   - Building needs root, or only a range of subordinate ids: both give the
//     same files. Every program of a build lives in its own mount and process
//     namespaces and dies with the build, so that nothing stays mounted.
//   - The cache is addressed by content: by the recipe, the package lists and
//     the [Spec]. Two builds of one image at once become one. An image appears
//     whole or not at all; what a killed build left is removed by the next.
//   - The host's proxies, certificate authorities and npm registry serve a
//     build and leave no trace in its result.
//   - A disk in the cache is never written again: virtual machines write to
//     overlays ([CreateOverlay]).
//
// The package prints nothing: a caller follows a build through [Progress].
package images
