package locker

import (
	"math"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/lib/pq/oid"
	"github.com/stretchr/testify/require"
)

// PostgreSQL decodes the binary arrays to the same values as lib/pq's text arrays.
func TestPostgresArrays(t *testing.T) {
	t.Parallel()
	db := pgDB(t, pgWith(t, newDatabase(t), "binary_parameters", "yes"))
	texts := []string{"", "a", "null", "NULL", `{"x",}\`, "\u2028ü\n", strings.Repeat("long ", 2000)}
	numbers := []int64{0, 1, -1, math.MaxInt64, math.MinInt64}
	ids := []uuid.UUID{uuid.Nil, uuid.Max, uuid.New()}
	// size is the expected length of an element. It does not affect the result.
	for _, size := range []int{0, 1, 100} {
		for n := range 8 {
			text, id := newArray(oid.T_text, n, size), newArray(oid.T_uuid, n, size)
			number, small, yes := newArray(oid.T_int8, n, size), newArray(oid.T_int4, n, size), newArray(oid.T_bool, n, size)
			age := newArray(oid.T_float8, n, size)
			wantText, wantID := []string{}, []string{}
			wantNumber, wantSmall, wantYes := []int64{}, []int64{}, []bool{}
			wantAge := []float64{}
			for i := range n {
				s, k, u := texts[i%len(texts)], numbers[i%len(numbers)], ids[i%len(ids)]
				text.addText(s)
				number.addInt64(k)
				small.addInt32(int32(k))
				id.addUUID(u)
				yes.addBool(i%3 == 0)
				wantText, wantID = append(wantText, s), append(wantID, u.String())
				wantNumber, wantSmall = append(wantNumber, k), append(wantSmall, int64(int32(k)))
				wantYes = append(wantYes, i%3 == 0)
				age.addFloat64(float64(k) / 3)
				wantAge = append(wantAge, float64(k)/3)
			}
			require.Equal(t, n, text.len())
			for _, c := range []struct {
				element string
				ours    array
				theirs  any
			}{
				{"text", text, wantText}, {"uuid", id, wantID}, {"bigint", number, wantNumber},
				{"integer", small, wantSmall}, {"boolean", yes, wantYes},
				{"float8", age, wantAge},
			} {
				equal := pgGet[bool](t, db, `SELECT $1::`+c.element+`[] = $2::`+c.element+`[]`, c.ours, pq.Array(c.theirs))
				require.True(t, equal, "%d of %s", n, c.element)
			}
		}
	}

	var none array
	none.addAt(3, oid.T_bool).addBool(true)
	require.Equal(t, "{NULL,NULL,NULL,t}", pgGet[string](t, db, `SELECT $1::boolean[]`, none))
	none.addAt(4, oid.T_bool).addBool(false)
	none.addAt(6, oid.T_bool).addBool(true)
	require.Equal(t, "{NULL,NULL,NULL,t,f,NULL,t}", pgGet[string](t, db, `SELECT $1::boolean[]`, none))
	require.True(t, pgGet[bool](t, db, `SELECT $1::boolean[] IS NULL`, array(nil)))
}

// The form of a statement for one row gets the only element of each array, and is used
// for nothing else.
func TestPostgresForOne(t *testing.T) {
	t.Parallel()
	for _, text := range []string{sqlAnnouncePlain, sqlAnnounceFull, sqlAcquire, sqlRelease} {
		one := sqlForOne[text]
		require.NotContains(t, one, "unnest")
		require.NotContains(t, one, "[]")
		require.NotEqual(t, text, one)
	}
	db := pgDB(t, pgWith(t, newDatabase(t), "binary_parameters", "yes"))
	text, flag, padded := newArray(oid.T_text, 1, 0), newArray(oid.T_bool, 1, 0), array(nil)
	text.addText("")
	flag.addBool(true)
	args, ok := elements([]any{int64Array([]int64{math.MinInt64}), text, flag, array(nil), "as it is"})
	require.True(t, ok)
	var number int64
	var empty, same string
	var yes bool
	var missing *int64
	require.NoError(t, db.QueryRow(forOne(`SELECT u.* FROM unnest($1::bigint[], $2::text[], $3::boolean[], $4::bigint[], $5::text) AS u(a, b, c, d, e)`), args...).
		Scan(&number, &empty, &yes, &missing, &same))
	require.Equal(t, int64(math.MinInt64), number)
	require.Equal(t, "", empty)
	require.True(t, yes)
	require.Nil(t, missing)
	require.Equal(t, "as it is", same)

	padded.addAt(1, oid.T_int8) // has the element NULL
	args, ok = elements([]any{int64Array([]int64{1}), padded})
	require.True(t, ok)
	require.Nil(t, args[1])
	for _, several := range [][]any{
		{int64Array(nil)}, {int64Array([]int64{1, 2})}, {int64Array([]int64{1}), int64Array([]int64{1, 2})},
	} {
		_, ok = elements(several)
		require.False(t, ok)
	}
}
