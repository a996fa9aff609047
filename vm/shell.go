package vm

import "strings"

// plainBytes mean nothing to a shell at any place in a word. An equals sign
// does in the first word, a tilde at its start.
const plainBytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+:,./-"

// ShellQuote returns s as one word of a POSIX shell (XCU 2.2.2): within single
// quotes every byte but the single quote stands for itself.
func ShellQuote(s string) string { return quoteUnless(plainBytes, s) }

// ShellCommand returns words as a command of a POSIX shell.
func ShellCommand(words ...string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		plain := plainBytes
		if i > 0 && !strings.HasPrefix(w, "=") { // zsh looks for what =ls names
			plain += "="
		}
		quoted[i] = quoteUnless(plain, w)
	}
	return strings.Join(quoted, " ")
}

func quoteUnless(plain, s string) string {
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
