package locker

import (
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

// The form of a statement for one row does what the form for many does: rows of all kinds, claims
// of all kinds, and a row that another transaction changes or deletes while the statement waits for
// it.
func TestPostgresForOneIsTheSame(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	uri := newDatabase(t)
	dsn, err := sessionDSN(uri)
	require.NoError(t, err)
	l, err := openLink(ctx, func(context.Context) (string, error) { return dsn, nil }, nil, time.Minute)
	require.NoError(t, err)
	t.Cleanup(l.close)
	var pid int
	require.NoError(t, l.conn.QueryRowContext(ctx, `SELECT pg_backend_pid()`).Scan(&pid))
	db := pgDB(t, uri)
	pgExec(t, db, SchemaSQL)
	pgExec(t, db, `INSERT INTO env_locks VALUES (1, 'repo', 1)`)
	pgExec(t, db, `INSERT INTO env_lock_sessions (id, lock, timeout) SELECT n, n * 10, '10 s' FROM generate_series(1, 3) AS n`)
	other, err := db.Conn(ctx)
	require.NoError(t, err)
	t.Cleanup(func() { _ = other.Close() })
	pgExec(t, other, `SET synchronous_commit = off`)

	g := forOneGenerator{Rand: rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))}
	rows, blocked := 0, 0
	for range 150 {
		g.now = time.Now()
		// The sessions 1 and 2 live, 3 is dead, and 4 has no row.
		pgExec(t, other, `SELECT pg_advisory_unlock_all(), pg_advisory_lock(20)`)
		if g.IntN(5) > 0 {
			pgExec(t, other, `SELECT pg_advisory_lock(10)`)
		}
		if g.IntN(5) == 0 {
			pgExec(t, other, `SELECT pg_advisory_lock(1)`)
		}
		before, after, concurrent, deleted := g.row(), g.row(), g.IntN(2) == 0, g.IntN(10) == 0
		text, args := g.statement()
		only, ok := elements(args)
		require.True(t, ok)
		var effects [2]string
		for i, form := range []string{text, sqlForOne[text]} {
			pgExec(t, other, forOneSetRow, before...)
			committed := make(chan struct{})
			done := make(chan string, 2)
			var tx *sql.Tx
			if concurrent {
				tx, err = other.BeginTx(ctx, nil)
				require.NoError(t, err)
				if deleted {
					pgExec(t, tx, `DELETE FROM env_lock_state`)
				} else {
					pgExec(t, tx, forOneSetRow, after...)
				}
			} else {
				close(committed)
			}
			go func() {
				effect, err := forOneEffect(ctx, l.conn, form, [][]any{args, only}[i], g.now, done, committed)
				done <- fmt.Sprint(effect, err)
			}()
			if concurrent {
				pgUntil(t, "the statement has ended or waits", func() bool {
					var waits bool
					require.NoError(t, tx.QueryRowContext(ctx, `SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)`, pid).Scan(&waits))
					blocked += map[bool]int{true: 1}[waits]
					return waits || len(done) > 0
				})
				require.NoError(t, tx.Commit())
				close(committed)
			}
			require.Equal(t, "executed", pgReceive(t, "the statement", done))
			effects[i] = pgReceive(t, "its effect", done)
		}
		require.Equal(t, effects[0], effects[1], "%s of %v\nrow %v\nthen %v (%v, deleted %v)", statementNames[text], only, before, after, concurrent, deleted)
		rows += strings.Count(effects[0], ";")
	}
	require.Positive(t, rows)
	require.Positive(t, blocked)
}

const forOneSetRow = `
INSERT INTO env_lock_state (lock_key, claim, claim_id, claim_event, claim_labels, claimed_at, claim_order, top_order, claim_open, claimer_session,
    waiting, token, holder_id, holder_session, holder_event, held_since, holder_labels, holder_stop, spared_until, streak)
VALUES (1, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
ON CONFLICT (lock_key) DO UPDATE SET (claim, claim_id, claim_event, claim_labels, claimed_at, claim_order, top_order, claim_open, claimer_session,
    waiting, token, holder_id, holder_session, holder_event, held_since, holder_labels, holder_stop, spared_until, streak)
    = ROW ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)`

// forOneGenerator generates rows and claims.
type forOneGenerator struct {
	*rand.Rand
	now time.Time
}

// forOneID returns the ID of one of a few claims. That of claim 0 is the ID of no claim.
func forOneID(n int) uuid.UUID { return uuid.UUID{15: byte(n)} }

func pick[T any](g forOneGenerator, values ...T) T { return values[g.IntN(len(values))] }

// row returns the arguments of forOneSetRow.
func (g forOneGenerator) row() []any {
	past, future := g.now.Add(-time.Hour), g.now.Add(time.Hour)
	labels := pick[any](g, nil, `{"a":"b"}`)
	row := []any{
		pick(g, 0, 5, 6, future.UnixMicro()), forOneID(g.IntN(4)).String(), pick(g, "", "claim"), labels,
		pick[any](g, nil, past, g.now.Add(-2*time.Second), future), pick[any](g, nil, 5, 6), pick[any](g, nil, 5, 6, 7),
		g.IntN(2) == 0, pick[any](g, nil, 1, 2, 3, 4), g.IntN(3) == 0, pick(g, 0, 7, future.UnixMicro()),
	}
	if g.IntN(2) == 0 {
		// The columns of the hold do not count while the key is free.
		return append(row, nil, nil, nil, nil, nil, g.IntN(4) == 0, pick[any](g, nil, nil, future), g.IntN(3))
	}
	return append(row, forOneID(1+g.IntN(3)).String(), pick(g, 1, 2, 3, 4), "hold", past, labels, g.IntN(2) == 0, pick[any](g, nil, past, future), g.IntN(3))
}

// ofOne returns an array with one of the values, and rareOne one that is rarely needed: it is NULL, or
// has the element NULL or one of the values.
func ofOne[T element](g forOneGenerator, values ...T) array {
	return column([]T{pick(g, values...)}, func(v T) T { return v })
}

func rareOne[T element](g forOneGenerator, values ...T) array {
	null := binary.BigEndian.AppendUint32(newArray[T](1), math.MaxUint32)
	return pick(g, nil, null, ofOne(g, values...))
}

// statement returns a statement for many rows, and arguments for one.
func (g forOneGenerator) statement() (string, []any) {
	key, id := ofOne[int64](g, 1, 1, 1, 1, 1, 2), ofOne(g, forOneID(1), forOneID(2), forOneID(3))
	holds, max := progress{g.IntN(3), time.Hour}.args()
	quiet, event := g.IntN(3) == 0, ofOne(g, "", "new")
	switch g.IntN(4) {
	case 0:
		return sqlRelease, []any{key, id, quiet}
	case 1:
		return sqlAcquire, []any{key, id, ofOne[int64](g, 0, 4, 5, 6, 7), ofOne(g, forOneID(0), forOneID(1), forOneID(2), forOneID(3)),
			ofOne(g, true, false, false), event, rareOne[int64](g, 20, 30, 4), int64(1), int64(10), rareOne(g, true, false),
			rareOne(g, `{"x":"y"}`), rareOne(g, true, false), holds, max}
	}
	repo, pr := ofOne(g, "repo", "repo", "other"), ofOne(g, int32(1), int32(1), int32(-1))
	var asked []float64
	for _, age := range []time.Duration{0, 0, 1500 * time.Millisecond, 10 * time.Second, 2 * time.Hour, -time.Hour} {
		asked = append(asked, float64(time.Now().Add(-age).UnixMicro())/1e6)
	}
	args := []any{key, id, event, repo, pr, ofOne(g, true, true, false), ofOne(g, asked...), int64(1), int64(10), quiet, lateAfterInterval, rareOne(g, true)}
	if g.IntN(2) == 0 {
		return sqlAnnouncePlain, args
	}
	return sqlAnnounceFull, append(args, rareOne[int64](g, 4, 5, 6, 7, 8), rareOne(g, `{"x":"y"}`), rareOne(g, true, false), holds, max)
}

// forOneEffect runs a statement in a transaction, which it rolls back, and describes its effect:
// its result, the row, the advisory locks, and whether the commit is flushed. Times and numbers of
// the server's clock are replaced by their distance from now.
func forOneEffect(ctx context.Context, conn *sql.Conn, text string, args []any, now time.Time, executed chan<- string, committed <-chan struct{}) (effect []string, err error) {
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }()
	rows, err := tx.QueryContext(ctx, text, args...)
	if err == nil {
		values, targets := make([]any, 14), []any{}
		for i := range values {
			targets = append(targets, &values[i])
		}
		columns, _ := rows.Columns()
		for rows.Next() {
			err = rows.Scan(targets[:len(columns)]...)
			for _, v := range values[:len(columns)] {
				effect = append(effect, forOneText(v, now))
			}
			effect = append(effect, ";")
		}
		err = joinErrors(err, rows.Err())
	}
	executed <- "executed"
	<-committed
	if err != nil {
		return effect, err
	}
	var row, locks string
	err = tx.QueryRowContext(ctx, `SELECT coalesce((SELECT to_jsonb(s)::text FROM env_lock_state s), '{}'), current_setting('synchronous_commit') || coalesce((
		SELECT string_agg(objid::text || mode, ',' ORDER BY objid, mode) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()), '')`).Scan(&row, &locks)
	if err != nil {
		return effect, err
	}
	var columns map[string]any
	decoder := json.NewDecoder(strings.NewReader(row))
	decoder.UseNumber()
	if err := decoder.Decode(&columns); err != nil {
		return effect, err
	}
	state := []string{locks}
	for name, v := range columns {
		state = append(state, name+"="+forOneText(v, now))
	}
	slices.Sort(state)
	return append(effect, state...), nil
}

func forOneText(v any, now time.Time) string {
	if b, ok := v.([]byte); ok {
		v = string(b)
	}
	text := fmt.Sprint(v)
	at, err := time.Parse(time.RFC3339Nano, text)
	var number int64
	if n, _ := fmt.Sscan(text, &number); n == 1 && number > 1e15 {
		at, err = time.UnixMicro(number), nil
	}
	if err == nil {
		return fmt.Sprintf("now%+.0fmin", at.Sub(now).Minutes())
	}
	return text
}
