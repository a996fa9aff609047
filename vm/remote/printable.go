package remote

import (
	"reflect"

	"github.com/agentvm/agentvm/vm/console"
)

// Printable makes the texts in what another host told fit for a terminal. told
// is a pointer; the names in maps stay as they are.
func Printable(told any) { printable(reflect.ValueOf(told)) }

func printable(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			printable(v.Elem())
		}
	case reflect.String:
		if v.CanSet() {
			v.SetString(console.Printable([]byte(v.String())))
		}
	case reflect.Slice, reflect.Array:
		for i := range v.Len() {
			printable(v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				printable(v.Field(i))
			}
		}
	case reflect.Map:
		for _, k := range v.MapKeys() { // what is in a map cannot be set in place
			x := reflect.New(v.Type().Elem()).Elem()
			x.Set(v.MapIndex(k))
			printable(x)
			v.SetMapIndex(k, x)
		}
	}
}
