package locker

import (
	"encoding/binary"
	"math"

	"github.com/google/uuid"
	"github.com/lib/pq/oid"
)

// array is an argument of a one-dimensional array type in PostgreSQL's binary format, as array_recv
// reads it. Compared with text, it saves the server the parsing, and this process the memory of a
// text that grows. A nil array is NULL.
type array []byte

// element is a type of which there are arrays.
type element interface {
	bool | int32 | int64 | float64 | string | uuid.UUID
}

// arrayHeader is the length of an array's header.
const arrayHeader = 20

// newArray returns the header of an array with n elements.
func newArray[T element](n int) array {
	const dimensions, flags, lower = 1, 0, 1
	id, size := oid.T_text, 32
	switch any(*new(T)).(type) {
	case bool:
		id, size = oid.T_bool, 1
	case int32:
		id, size = oid.T_int4, 4
	case int64:
		id, size = oid.T_int8, 8
	case float64:
		id, size = oid.T_float8, 8
	case uuid.UUID:
		id, size = oid.T_uuid, 16
	}
	a := make(array, 0, arrayHeader+n*(4+size))
	for _, word := range []int{dimensions, flags, int(id), n, lower} {
		a = binary.BigEndian.AppendUint32(a, uint32(word))
	}
	return a
}

// add returns the array with one more element.
func add[T element](a array, value T) array {
	size := func(n int) { a = binary.BigEndian.AppendUint32(a, uint32(n)) }
	switch v := any(value).(type) {
	case bool:
		size(1)
		if v {
			return append(a, 1)
		}
		return append(a, 0)
	case int32:
		size(4)
		return binary.BigEndian.AppendUint32(a, uint32(v))
	case int64:
		size(8)
		return binary.BigEndian.AppendUint64(a, uint64(v))
	case float64:
		size(8)
		return binary.BigEndian.AppendUint64(a, math.Float64bits(v))
	case string:
		size(len(v))
		return append(a, v...)
	case uuid.UUID:
		size(len(v))
		return append(a, v[:]...)
	}
	panic("no element")
}

// column returns the array of a value of each row.
func column[R any, T element](rows []R, value func(R) T) array {
	a := newArray[T](len(rows))
	for _, r := range rows {
		a = add(a, value(r))
	}
	return a
}

// sparse is column for a value that few rows have. The others have NULL. Without any value the
// array itself is NULL.
func sparse[R any, T element](rows []R, value func(R) (v T, ok bool)) (a array) {
	null := func() { a = binary.BigEndian.AppendUint32(a, math.MaxUint32) }
	for i, r := range rows {
		v, ok := value(r)
		switch {
		case !ok && a != nil:
			null()
		case ok:
			if a == nil {
				a = newArray[T](len(rows))
				for range i {
					null()
				}
			}
			a = add(a, v)
		}
	}
	return a
}

// int64Array returns the array of some numbers.
func int64Array(values []int64) array {
	return column(values, func(v int64) int64 { return v })
}

// elements returns the arguments of a statement for one row, and reports whether they are for one
// row only: all arrays have one element or are NULL, and the first has one.
func elements(args []any) ([]any, bool) {
	only := make([]any, len(args))
	for i, arg := range args {
		only[i] = arg
		a, ok := arg.(array)
		switch {
		case !ok, a == nil && i > 0:
		case binary.BigEndian.Uint32(a[12:]) != 1:
			return nil, false
		case int32(binary.BigEndian.Uint32(a[arrayHeader:])) < 0:
			only[i] = nil
		default:
			only[i] = a[arrayHeader+4:]
		}
	}
	return only, true
}
