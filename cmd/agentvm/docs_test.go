package main

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/network"
)

// The tests here hold the documents to the code, so that neither says what
// the other does not.

const repo = "../.."

func readDoc(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(repo, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// tableRows returns the cells of every row of Markdown tables, without the
// headings.
func tableRows(doc string) (rows [][]string) {
	lines := strings.Split(doc, "\n")
	for i, line := range lines {
		heading := i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|--")
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|--") || heading {
			continue
		}
		var cells []string
		for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(cell))
		}
		rows = append(rows, cells)
	}
	return rows
}

var codeSpan = regexp.MustCompile("`([^`]+)`")

// spans returns the code spans of a text.
func spans(text string) (list []string) {
	for _, m := range codeSpan.FindAllStringSubmatch(text, -1) {
		list = append(list, m[1])
	}
	return list
}

// section returns the text below a heading, up to the next of its level.
func section(t *testing.T, doc, heading string) string {
	t.Helper()
	_, text, ok := strings.Cut("\n"+doc, "\n"+heading+"\n")
	if !ok {
		t.Fatalf("there is no heading %q", heading)
	}
	level, _, _ := strings.Cut(heading, " ")
	text, _, _ = strings.Cut(text, "\n"+level+" ")
	return text
}

// yamlKeys lists the keys of a type, as a.b for sections and a[].b for lists of them.
func yamlKeys(t reflect.Type, prefix string) (keys []string) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch ft := f.Type; {
		case ft.Kind() == reflect.Struct:
			keys = append(keys, yamlKeys(ft, prefix+name+".")...)
		case ft.Kind() == reflect.Slice && ft.Elem().Kind() == reflect.Struct:
			keys = append(keys, yamlKeys(ft.Elem(), prefix+name+"[].")...)
		default:
			keys = append(keys, prefix+name)
		}
	}
	slices.Sort(keys)
	return keys
}

func TestConfigurationIsDocumented(t *testing.T) {
	doc := section(t, readDoc(t, "docs/configuration.md"), "## Keys")
	data, err := yaml.Marshal(config.Default())
	if err != nil {
		t.Fatal(err)
	}
	var defaults map[string]any
	if err := yaml.Unmarshal(data, &defaults); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, row := range tableRows(doc) {
		key := strings.Trim(row[0], "`")
		keys = append(keys, key)
		var value any = defaults
		for part := range strings.SplitSeq(key, ".") {
			m, _ := value.(map[string]any)
			value = m[part]
		}
		if documented := strings.Trim(row[2], "`"); value != nil && key != "version" && fmt.Sprint(value) != documented {
			t.Errorf("%s: the default is %v, documented is %s", key, value, documented)
		}
	}
	slices.Sort(keys)
	if diff := cmp.Diff(yamlKeys(reflect.TypeFor[config.Config](), ""), keys); diff != "" {
		t.Errorf("keys (-code +docs/configuration.md):\n%s", diff)
	}
	var own []string
	for _, row := range tableRows(section(t, readDoc(t, "docs/configuration.md"), "## Your own settings")) {
		own = append(own, strings.Trim(row[0], "`"))
	}
	if diff := cmp.Diff(yamlKeys(reflect.TypeFor[config.User](), ""), own); diff != "" {
		t.Errorf("keys of config.yaml (-code +docs/configuration.md):\n%s", diff)
	}
}

// TestDocumentedMistakes makes each mistake of the table.
func TestDocumentedMistakes(t *testing.T) {
	rows := tableRows(section(t, readDoc(t, "docs/configuration.md"), "## Mistakes and what is said about them"))
	if len(rows) == 0 {
		t.Error("no mistakes")
	}
	for _, row := range rows {
		mistake, message := strings.Trim(row[0], "`"), strings.Trim(row[1], "`")
		if _, err := config.Parse(config.FileName, []byte("version: 1\n"+mistake+"\n")); err == nil || !strings.HasPrefix(err.Error(), message) {
			t.Errorf("%s\nsays       %v\ndocumented %s", mistake, err, message)
		}
	}
}

// TestExamplesParse reads every agentvm.yaml and agent profile that the
// documents and the examples show.
func TestExamplesParse(t *testing.T) {
	block := regexp.MustCompile("(?s)```yaml\n(.*?)```")
	for _, doc := range documents(t) {
		for _, m := range block.FindAllStringSubmatch(readDoc(t, doc), -1) {
			switch {
			case strings.HasPrefix(m[1], "version:"):
				if _, err := config.Parse(doc, []byte(m[1])); err != nil {
					t.Error(err)
				}
			case strings.HasPrefix(m[1], "name:"):
				dir := t.TempDir()
				if err := os.WriteFile(filepath.Join(dir, "myagent.yaml"), []byte(m[1]), 0o600); err != nil {
					t.Fatal(err)
				}
				if _, err := agent.Load(os.DirFS(dir)); err != nil {
					t.Errorf("%s: %v", doc, err)
				}
			}
		}
	}
	examples, err := filepath.Glob(filepath.Join(repo, "examples/*/project/agentvm.yaml"))
	if err != nil || len(examples) == 0 {
		t.Fatal(examples, err)
	}
	for _, path := range examples {
		if _, err := config.Load(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestExamplesNameCommandsAndFlags looks up each command line of agentvm that
// the documents and the examples' scripts hold. A script that looks for what
// is left once asked for a flag that there was not, and so found nothing.
func TestExamplesNameCommandsAndFlags(t *testing.T) {
	scripts, err := filepath.Glob(filepath.Join(repo, "examples/*/*.sh"))
	if err != nil || len(scripts) == 0 {
		t.Fatal(scripts, err)
	}
	texts := map[string]string{}
	for _, path := range scripts {
		name, err := filepath.Rel(repo, path)
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = readDoc(t, name)
	}
	block := regexp.MustCompile("(?s)```console\n(.*?)```")
	for _, doc := range documents(t) {
		for _, m := range block.FindAllStringSubmatch(readDoc(t, doc), -1) {
			texts[doc] += m[1]
		}
	}
	root := (&app{getenv: os.Getenv}).rootCommand()
	call := regexp.MustCompile(`(?m)(?:^|[|&;({$]|\bshow)[ \t]*agentvm ([a-z-].*)`) // where the shell expects a command
	calls := 0
	for name, text := range texts {
		for _, m := range call.FindAllStringSubmatch(text, -1) {
			var args []string
			for word := range strings.FieldsSeq(m[1]) {
				if word == "--" || strings.ContainsAny(word, "|&;()<>#\"'$\\") {
					break // the rest is another command's, or the shell's
				}
				args = append(args, word)
			}
			calls++
			cmd, rest, err := root.Find(args)
			if err != nil {
				t.Errorf("%s: agentvm %s: %v", name, m[1], err)
				continue
			}
			for _, word := range rest {
				flag, _, _ := strings.Cut(word, "=")
				if long, ok := strings.CutPrefix(flag, "--"); ok && cmd.Flag(long) == nil && long != "help" {
					t.Errorf("%s: agentvm %s: there is no %s", name, m[1], flag)
				} else if short := strings.TrimPrefix(flag, "-"); !ok && len(short) == 1 && short != flag &&
					cmd.Flags().ShorthandLookup(short) == nil && root.PersistentFlags().ShorthandLookup(short) == nil {
					t.Errorf("%s: agentvm %s: there is no %s", name, m[1], flag)
				}
			}
		}
	}
	if calls < 20 {
		t.Errorf("only %d command lines were read", calls)
	}
}

// schema is the part of a JSON schema that names keys.
type schema struct {
	Properties           map[string]schema
	Items                *schema
	AdditionalProperties any
}

func (s schema) keys(prefix string) (keys []string) {
	for name, p := range s.Properties {
		switch {
		case p.Properties != nil:
			keys = append(keys, p.keys(prefix+name+".")...)
		case p.Items != nil && p.Items.Properties != nil:
			keys = append(keys, p.Items.keys(prefix+name+"[].")...)
		default:
			keys = append(keys, prefix+name)
		}
	}
	slices.Sort(keys)
	return keys
}

// strict reports whether unknown keys are refused everywhere.
func (s schema) strict() bool {
	if s.Items != nil && !s.Items.strict() || s.Properties != nil && s.AdditionalProperties != false {
		return false
	}
	for p := range maps.Values(s.Properties) {
		if !p.strict() {
			return false
		}
	}
	return true
}

func TestSchemaHasEveryKey(t *testing.T) {
	var s schema
	if err := json.Unmarshal([]byte(readDoc(t, "docs/agentvm.schema.json")), &s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(yamlKeys(reflect.TypeFor[config.Config](), ""), s.keys("")); diff != "" {
		t.Errorf("keys (-code +docs/agentvm.schema.json):\n%s", diff)
	}
	if !s.strict() {
		t.Error("a section of the schema allows unknown keys")
	}
}

func TestAgentsAreDocumented(t *testing.T) {
	doc := readDoc(t, "docs/agents.md")
	set, err := agent.Load()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, row := range tableRows(section(t, doc, "## Shipped profiles")) {
		name := strings.Trim(row[0], "`")
		names = append(names, name)
		p, err := set.Get(name)
		if err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(p.Env, spans(row[3])); diff != "" {
			t.Errorf("%s, variables (-profile +docs):\n%s", name, diff)
		}
		if diff := cmp.Diff(p.Allow, spans(row[4])); diff != "" {
			t.Errorf("%s, names (-profile +docs):\n%s", name, diff)
		}
		for _, n := range p.Install.NPM {
			if !strings.Contains(row[2], n.Name) || !strings.Contains(row[2], n.Version) {
				t.Errorf("%s is installed from %s@%s, documented is %s", name, n.Name, n.Version, row[2])
			}
		}
	}
	slices.Sort(names)
	if diff := cmp.Diff(set.Names(), names); diff != "" {
		t.Errorf("profiles (-code +docs):\n%s", diff)
	}
	for f := range reflect.TypeFor[agent.Profile]().Fields() {
		key := f.Tag.Get("yaml")
		if !strings.Contains(doc, "`"+key+"`") && !strings.Contains(doc, "`"+key+".") {
			t.Errorf("docs/agents.md does not explain the key %s", key)
		}
	}
}

func TestCommandsAreDocumented(t *testing.T) {
	doc := readDoc(t, "docs/commands.md")
	root := (&app{getenv: os.Getenv}).rootCommand()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd("x")
	mentioned := strings.Join(spans(doc), "\n")
	word := func(s string) bool {
		return regexp.MustCompile(`(^|[\s,|])` + regexp.QuoteMeta(s) + `($|[\s,|])`).MatchString(mentioned)
	}
	flags := func(path string, set *pflag.FlagSet) {
		set.VisitAll(func(f *pflag.Flag) {
			if f.Shorthand != "" && !word("-"+f.Shorthand) {
				t.Errorf("docs/commands.md does not mention -%s of %s", f.Shorthand, path)
			}
			if !word("--" + f.Name) {
				t.Errorf("docs/commands.md does not mention --%s of %s", f.Name, path)
			}
		})
	}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		path := cmd.CommandPath()
		if !cmd.HasSubCommands() && !strings.HasPrefix(path, "agentvm completion") && !word(path) {
			t.Errorf("docs/commands.md does not mention %s", path)
		}
		for _, a := range cmd.Aliases {
			if !slices.ContainsFunc(spans(doc), func(s string) bool { return s == a || strings.HasSuffix(s, " "+a) }) {
				t.Errorf("docs/commands.md does not mention the alias %s of %s", a, path)
			}
		}
		cmd.InitDefaultHelpFlag()
		flags(path, cmd.LocalFlags())
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
	flags(root.CommandPath(), root.PersistentFlags())
	known := map[string]bool{}
	var collect func(*cobra.Command)
	collect = func(cmd *cobra.Command) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) { known["--"+f.Name] = true })
		cmd.PersistentFlags().VisitAll(func(f *pflag.Flag) { known["--"+f.Name] = true })
		for _, sub := range cmd.Commands() {
			collect(sub)
		}
	}
	collect(root)
	for _, name := range regexp.MustCompile(`--[a-z][a-z-]*`).FindAllString(mentioned, -1) {
		if !known[name] {
			t.Errorf("docs/commands.md mentions %s, which no command has", name)
		}
	}
	for name := range logFiles {
		if !word(name) {
			t.Errorf("docs/commands.md does not mention the log %s", name)
		}
	}
}

func TestExitCodesAreDocumented(t *testing.T) {
	var documented []string
	for _, row := range tableRows(section(t, readDoc(t, "docs/commands.md"), "## Exit codes")) {
		documented = append(documented, row[0])
	}
	var codes []string
	for _, c := range []int{exitOK, exitFailure, exitUsage, exitHost, exitNotFound, exitPolicy, exitTimeout, exitInterrupt, exitConnection} {
		codes = append(codes, strconv.Itoa(c))
	}
	if diff := cmp.Diff(codes, documented); diff != "" {
		t.Errorf("exit codes (-code +docs):\n%s", diff)
	}
}

func TestJSONIsDocumented(t *testing.T) {
	said := spans(section(t, readDoc(t, "docs/commands.md"), "## JSON"))
	for _, typ := range []reflect.Type{
		reflect.TypeFor[view](), reflect.TypeFor[instance.Share](), reflect.TypeFor[instance.Network](), reflect.TypeFor[instance.Service](),
		reflect.TypeFor[instance.Phase](), reflect.TypeFor[vm.Finding](), reflect.TypeFor[network.Decision](),
		reflect.TypeFor[spareView](),
	} {
		for f := range typ.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if !slices.Contains(said, name) {
				t.Errorf("docs/commands.md does not mention the field %s of %s", name, typ)
			}
		}
	}
}

// TestEnvironmentIsDocumented finds the variables that the program asks for
// by name.
func TestEnvironmentIsDocumented(t *testing.T) {
	doc := readDoc(t, "docs/commands.md") + readDoc(t, "docs/internals.md")
	for path, file := range goFiles(t, false) {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			var called string
			switch f := call.Fun.(type) {
			case *ast.Ident:
				called = f.Name
			case *ast.SelectorExpr:
				called = f.Sel.Name
			}
			lit, ok := call.Args[0].(*ast.BasicLit)
			if ok && slices.Contains([]string{"getenv", "lookupenv"}, strings.ToLower(called)) && !strings.Contains(doc, strings.Trim(lit.Value, `"`)) {
				t.Errorf("%s reads %s, which no document mentions", path, lit.Value)
			}
			return true
		})
	}
}

func TestStatesAreDocumented(t *testing.T) {
	states := []instance.State{instance.Starting, instance.Booting, instance.Spare, instance.Ready, instance.Degraded, instance.Saving, instance.Paused, instance.Stopping, instance.Stopped, instance.Suspended, instance.Failed}
	want := map[string][]string{}
	for _, from := range states {
		for _, to := range states {
			if s := (&instance.Status{State: from}); s.To(to, "") == nil {
				want[string(from)] = append(want[string(from)], string(to))
			}
		}
	}
	got := map[string][]string{}
	for _, row := range tableRows(section(t, readDoc(t, "docs/internals.md"), "## States")) {
		if key := spans(row[0]); len(row) == 2 && len(key) == 1 {
			got[key[0]] = spans(row[1])
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("steps (-code +docs/internals.md):\n%s", diff)
	}
}
