package locker

import (
	"encoding/binary"
	"math"

	"github.com/google/uuid"
	"github.com/lib/pq/oid"
)

// array is an argument of a one-dimensional array type in PostgreSQL's binary format, as array_recv
// reads it. Compared with text, it saves the server the parsing, and this process the memory of a
// text that grows.
type array []byte

// newArray returns an empty array with capacity for n elements of size bytes.
func newArray(element oid.Oid, n, size int) array {
	const dimensions, flags, lower = 1, 0, 1
	a := make(array, 0, arrayHeader+n*(4+size))
	a = binary.BigEndian.AppendUint32(a, dimensions)
	a = binary.BigEndian.AppendUint32(a, flags)
	a = binary.BigEndian.AppendUint32(a, uint32(element))
	a = binary.BigEndian.AppendUint32(a, 0)
	return binary.BigEndian.AppendUint32(a, lower)
}

const (
	arrayLength = 12 // the offset of the number of elements in the header
	arrayHeader = 20
)

func (a *array) len() int { return int(binary.BigEndian.Uint32((*a)[arrayLength:])) }

// add appends the header of an element of size bytes. The caller appends the bytes.
func (a *array) add(size int) {
	binary.BigEndian.PutUint32((*a)[arrayLength:], uint32(a.len()+1))
	*a = binary.BigEndian.AppendUint32(*a, uint32(size))
}

// addAt appends NULLs until the array has n elements, and returns the array. It creates the array
// if that is nil.
func (a *array) addAt(n int, element oid.Oid) *array {
	const null = -1
	if *a == nil {
		*a = newArray(element, 0, 0)
	}
	for a.len() < n {
		a.add(null)
	}
	return a
}

func (a *array) addInt64(v int64) {
	a.add(8)
	*a = binary.BigEndian.AppendUint64(*a, uint64(v))
}

func (a *array) addInt32(v int32) {
	a.add(4)
	*a = binary.BigEndian.AppendUint32(*a, uint32(v))
}

func (a *array) addFloat64(v float64) { a.addInt64(int64(math.Float64bits(v))) }

func (a *array) addBool(v bool) {
	a.add(1)
	var b byte
	if v {
		b = 1
	}
	*a = append(*a, b)
}

func (a *array) addText(v string) {
	a.add(len(v))
	*a = append(*a, v...)
}

func (a *array) addUUID(v uuid.UUID) {
	a.add(len(v))
	*a = append(*a, v[:]...)
}

// elements returns the arguments of a statement for one row, and reports whether they are for one
// row only: all arrays have one element or none, and the first has one.
func elements(args []any) ([]any, bool) {
	only := make([]any, len(args))
	for i, arg := range args {
		only[i] = arg
		a, ok := arg.(array)
		switch {
		case !ok, a == nil && i > 0:
		case a.len() != 1:
			return nil, false
		case int32(binary.BigEndian.Uint32(a[arrayHeader:])) < 0:
			only[i] = nil
		default:
			only[i] = a[arrayHeader+4:]
		}
	}
	return only, true
}

func int64Array(values []int64) array {
	a := newArray(oid.T_int8, len(values), 8)
	for _, v := range values {
		a.addInt64(v)
	}
	return a
}
