package locker

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/stretchr/testify/require"
)

// PostgreSQL decodes the binary arrays to the same values as lib/pq's text arrays.
func TestPostgresArrays(t *testing.T) {
	t.Parallel()
	db := pgDB(t, pgWith(t, newDatabase(t), "binary_parameters", "yes"))
	texts := []string{"", "a", "null", "NULL", `{"x",}\`, "\u2028ü\n", strings.Repeat("long ", 2000)}
	numbers := []int64{0, 1, -1, math.MaxInt64, math.MinInt64}
	ids := []uuid.UUID{uuid.Nil, uuid.Max, uuid.New()}
	for n := range 8 {
		rows := make([]int, n)
		for i := range rows {
			rows[i] = i
		}
		wantText, wantID := []string{}, []string{}
		wantNumber, wantSmall, wantYes := []int64{}, []int64{}, []bool{}
		wantAge := []float64{}
		for i := range n {
			number := numbers[i%len(numbers)]
			wantText, wantID = append(wantText, texts[i%len(texts)]), append(wantID, ids[i%len(ids)].String())
			wantNumber, wantSmall = append(wantNumber, number), append(wantSmall, int64(int32(number)))
			wantYes, wantAge = append(wantYes, i%3 == 0), append(wantAge, float64(number)/3)
		}
		for _, c := range []struct {
			element string
			ours    array
			theirs  any
		}{
			{"text", column(rows, func(i int) string { return texts[i%len(texts)] }), wantText},
			{"uuid", column(rows, func(i int) uuid.UUID { return ids[i%len(ids)] }), wantID},
			{"bigint", int64Array(wantNumber), wantNumber},
			{"integer", column(rows, func(i int) int32 { return int32(numbers[i%len(numbers)]) }), wantSmall},
			{"boolean", column(wantYes, func(v bool) bool { return v }), wantYes},
			{"float8", column(wantAge, func(v float64) float64 { return v }), wantAge},
		} {
			equal := pgGet[bool](t, db, `SELECT $1::`+c.element+`[] = $2::`+c.element+`[]`, c.ours, pq.Array(c.theirs))
			require.True(t, equal, "%d of %s", n, c.element)
		}
	}

	some := func(rows ...string) array {
		return sparse(rows, func(v string) (bool, bool) { return v == "t", v != "" })
	}
	require.Equal(t, "{NULL,NULL,NULL,t}", pgGet[string](t, db, `SELECT $1::boolean[]`, some("", "", "", "t")))
	require.Equal(t, "{NULL,NULL,NULL,t,f,NULL,t,NULL}", pgGet[string](t, db, `SELECT $1::boolean[]`, some("", "", "", "t", "f", "", "t", "")))
	require.True(t, pgGet[bool](t, db, `SELECT $1::boolean[] IS NULL`, some("", "")))
	require.Equal(t, array(nil), some())
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
	text, flag := column([]string{""}, func(v string) string { return v }), column([]bool{true}, func(v bool) bool { return v })
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

	args, ok = elements([]any{int64Array([]int64{1}), array(binary.BigEndian.AppendUint32(newArray[int64](1), math.MaxUint32))})
	require.True(t, ok)
	require.Nil(t, args[1])
	for _, several := range [][]any{
		{int64Array(nil)}, {int64Array([]int64{1, 2})}, {int64Array([]int64{1}), int64Array([]int64{1, 2})},
	} {
		_, ok = elements(several)
		require.False(t, ok)
	}
}
