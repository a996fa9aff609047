// Package mirror keeps two copies of a directory in step, one of which a guest
// may change as it likes.
//
// [Scan] describes a directory, [Compare] decides from both descriptions, and
// from what was last the same on both sides, what has to be copied where, and
// [Apply] does it. What changed on both sides is a conflict and stays as it
// is. Nothing is replaced or deleted that is not what the decision was made on.
//
// Links are copied and never followed; whatever else is neither a file nor a
// directory, what is mounted, and names that are not UTF-8, stay where they are.
// Permissions are copied, owners and the setuid, setgid and sticky bits are not.
// Files at guarded paths are written to instead of replaced. Every access
// goes through an [os.Root], so that a directory that turns into a link leads
// nowhere else.
package mirror
