// Package ssh reaches into the guest over one SSH connection.
//
// What it promises:
//
//   - Only the pinned host key is accepted; there is no trust on first use.
//   - One connection to the guest serves everybody. A [Proxy] hands every
//     channel of its local clients, ours and stock OpenSSH alike, to that
//     connection, so that a command costs a channel and not a handshake.
//   - Data is never lost or reordered between the ends of a proxied channel,
//     and a slow reader slows its own writer and nobody else.
//   - A command gets exactly the arguments it was given, and its exit status
//     comes back exactly.
//   - A command whose client goes away gets SIGHUP, terminal or not.
//   - Environment values travel as SSH env requests, never as arguments.
//   - Files copied out of the guest stay below the destination, whatever the
//     guest says, and never get setuid, setgid or sticky bits.
//   - Nothing that the guest opens towards the host is accepted unless a
//     local client asked for it; agent forwarding is refused unless allowed.
//
// The wire is RFC 4251-4254 and OpenSSH's PROTOCOL document.
package ssh
