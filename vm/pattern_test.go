package vm

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

func TestPattern(t *testing.T) {
	re := Pattern(`^a+$`)
	first := re()
	if !first.MatchString("aa") || first.MatchString("ab") || re() != first {
		t.Error("want one expression, and what it says")
	}
}

// What is compiled late would also be found wrong late.
func TestPatternsCompile(t *testing.T) {
	found := 0
	err := filepath.WalkDir("..", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !isPattern(call.Fun) {
				return true
			}
			found++
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				t.Errorf("%s: a pattern that is no literal", path)
				return true
			}
			expr, err := strconv.Unquote(literal.Value)
			if err == nil {
				_, err = regexp.Compile(expr)
			}
			if err != nil {
				t.Errorf("%s: %s: %v", path, literal.Value, err)
			}
			return true
		})
		return nil
	})
	if err != nil || found < 40 {
		t.Fatalf("%d patterns, %v", found, err)
	}
}

// isPattern tells whether a call is one of Pattern, within this package or not.
func isPattern(fun ast.Expr) bool {
	switch fun := fun.(type) {
	case *ast.Ident:
		return fun.Name == "Pattern"
	case *ast.SelectorExpr:
		pkg, ok := fun.X.(*ast.Ident)
		return ok && pkg.Name == "vm" && fun.Sel.Name == "Pattern"
	}
	return false
}
