package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// goFiles parses the project's source, either its tests or the rest.
func goFiles(t *testing.T, tests bool) map[string]*ast.File {
	t.Helper()
	files := map[string]*ast.File{}
	err := filepath.WalkDir(repo, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && path != repo && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") != tests:
			return nil
		}
		name, err := filepath.Rel(repo, path)
		if err != nil {
			return err
		}
		files[filepath.ToSlash(name)], err = parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// testFunc is a test of the project, with the strings that name its subtests.
type testFunc struct {
	scripts bool // each of testdata/script is a subtest
	strings map[string]bool
}

func testFuncs(t *testing.T) map[string]testFunc {
	found := map[string]testFunc{}
	tables := map[string]map[string]bool{} // strings of a package's tables of cases
	files := goFiles(t, true)
	for path, file := range files {
		for _, decl := range file.Decls {
			if d, ok := decl.(*ast.GenDecl); ok && d.Tok == token.VAR {
				for _, spec := range d.Specs {
					v := spec.(*ast.ValueSpec)
					table := map[string]bool{}
					ast.Inspect(v, func(n ast.Node) bool {
						if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
							if s, err := strconv.Unquote(lit.Value); err == nil {
								table[s] = true
							}
						}
						return true
					})
					tables[filepath.Dir(path)+"."+v.Names[0].Name] = table
				}
			}
		}
	}
	for path, file := range files {
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || f.Recv != nil || !strings.HasPrefix(f.Name.Name, "Test") && !strings.HasPrefix(f.Name.Name, "Fuzz") {
				continue
			}
			tf := testFunc{strings: map[string]bool{}}
			ast.Inspect(f, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					if s, err := strconv.Unquote(n.Value); err == nil && n.Kind == token.STRING {
						tf.strings[s] = true
					}
				case *ast.Ident:
					tf.scripts = tf.scripts || n.Name == "testscript"
					maps.Copy(tf.strings, tables[filepath.Dir(path)+"."+n.Name])
				}
				return true
			})
			found[filepath.ToSlash(filepath.Dir(path))+"."+f.Name.Name] = tf
		}
	}
	return found
}

// TestSecurityPromisesAreTested keeps the promises honest: each names tests,
// and each test that it names exists.
func TestSecurityPromisesAreTested(t *testing.T) {
	tests := testFuncs(t)
	promises := 0
	for _, row := range tableRows(section(t, readDoc(t, "docs/security.md"), "## What is promised")) {
		if len(row) != 3 {
			t.Errorf("want promise, mechanism, test: %q", row)
			continue
		}
		promises++
		named := spans(row[2])
		if len(named) == 0 {
			t.Errorf("%q names no test", row[0])
		}
		for _, name := range named {
			testExists(t, tests, row[0], name)
		}
	}
	if promises < 20 {
		t.Errorf("only %d promises were read", promises)
	}
}

// testExists wants a test, or a subtest, that a promise names.
func testExists(t *testing.T, tests map[string]testFunc, promise, name string) {
	t.Helper()
	full, sub := name, ""
	if at := strings.LastIndexByte(name, '/'); strings.Contains(name[:max(at, 0)], ".Test") {
		full, sub = name[:at], name[at+1:]
	}
	test, ok := tests[full]
	if !ok {
		t.Errorf("%q: there is no test %s", promise, full)
		return
	}
	if sub == "" {
		return
	}
	script := filepath.Join(repo, strings.SplitN(full, ".", 2)[0], "testdata/script", sub+".txtar")
	if _, err := os.Stat(script); test.scripts && err == nil {
		return
	}
	if !test.strings[sub] && !test.strings[strings.ReplaceAll(sub, "_", " ")] {
		t.Errorf("%q: %s has no subtest %s", promise, full, sub)
	}
}

// TestBackendsAreCompared holds the comparison of the backends to the same.
func TestBackendsAreCompared(t *testing.T) {
	tests := testFuncs(t)
	rows := tableRows(section(t, readDoc(t, "docs/libvirt.md"), "## Each promise, by each backend"))
	if len(rows) < 10 {
		t.Errorf("only %d promises were read", len(rows))
	}
	for _, row := range rows {
		if len(row) != 4 || len(spans(row[3])) == 0 {
			t.Errorf("want promise, two mechanisms, tests: %q", row)
			continue
		}
		for _, name := range spans(row[3]) {
			testExists(t, tests, row[0], name)
		}
	}
}

// documents lists the Markdown files of the project.
func documents(t *testing.T) (list []string) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/decisions/*.md", "examples/*/*.md"} {
		paths, err := filepath.Glob(filepath.Join(repo, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			name, err := filepath.Rel(repo, path)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, name)
		}
	}
	return list
}

// TestLinks follows the documents' links to files and headings of the project.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, doc := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(readDoc(t, doc), -1) {
			target, heading, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, ":") {
				continue // of the web
			}
			path := filepath.Join(filepath.Dir(doc), target)
			if target == "" {
				path = doc
			}
			if _, err := os.Stat(filepath.Join(repo, path)); err != nil {
				t.Errorf("%s: link to %s: %v", doc, m[1], err)
				continue
			}
			if heading != "" && !slices.Contains(headings(readDoc(t, path)), heading) {
				t.Errorf("%s: %s has no heading %s", doc, path, heading)
			}
		}
	}
}

// headings returns the anchors that a document's headings get.
func headings(doc string) (list []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(doc, -1) {
		anchor := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		list = append(list, strings.ReplaceAll(anchor, " ", "-"))
	}
	return list
}
