package locker

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/pkg/errors"
)

// statement carries out a batch and answers the results in its order.
func (ln *lane) statement(ctx context.Context, l *link, batch []*op) ([]result, error) {
	switch batch[0].kind {
	case opLookup:
		return ln.lookupKeys(ctx, l, batch)
	case opAnnounce:
		return ln.announceClaims(ctx, l, batch)
	case opAcquire:
		return ln.acquireKeys(ctx, l, batch)
	case opWithdraw:
		return ln.withdrawClaims(ctx, l, batch)
	default:
		return ln.releaseKeys(ctx, l, batch)
	}
}

// lookupKeys finds the keys of pull requests, and makes those that are missing.
func (ln *lane) lookupKeys(ctx context.Context, l *link, batch []*op) ([]result, error) {
	results := make([]result, len(batch))
	todo := make([]int, len(batch)) // indexes of the batch
	for i := range todo {
		todo[i] = i
	}
	for attempt := range 4 {
		var repos pq.StringArray
		var prs, keys pq.Int64Array
		for _, i := range todo {
			repos = append(repos, batch[i].repo)
			prs = append(prs, int64(batch[i].pr))
			keys = append(keys, randomKey())
		}
		if attempt > 0 { // the second time the rows are missing, later a random key was taken
			if _, err := l.addKeys.ExecContext(ctx, repos, prs, keys); err != nil {
				return nil, err
			}
		}
		found := make([]bool, len(batch))
		var ord int
		var key int64
		err := each(ctx, l.lookup, []any{repos, prs}, []any{&ord, &key}, func() {
			i := todo[ord-1]
			results[i].key, found[i] = key, true
		})
		if err != nil {
			return nil, err
		}
		todo = slices.DeleteFunc(todo, func(i int) bool { return found[i] })
		if len(todo) == 0 {
			return results, nil
		}
	}
	for _, i := range todo {
		results[i].err = errors.New("locker: env_locks did not take a new key")
	}
	return results, nil
}

// randomKey is a positive number: a key that no other pull request has, all but
// certainly.
func randomKey() int64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return int64(binary.BigEndian.Uint64(b[:])>>1) | 1
}

func (ln *lane) announceClaims(ctx context.Context, l *link, batch []*op) ([]result, error) {
	results := make([]result, len(batch))
	stmt, args, takes := ln.announceArgs(l, batch)
	announced := make([]bool, len(batch))
	var taken pq.Int64Array
	var unflushed bool
	var key, number int64
	var token sql.NullInt64
	var age sql.NullFloat64
	var noFlush sql.NullBool
	row := []any{&key, &number, &token, &age, &noFlush, discard}
	err := each(ctx, stmt, args, row, func() {
		i := find(batch, key)
		announced[i] = true
		a := &results[i].answer
		a.outcome, a.newest = again, standing{number, batch[i].req.id}
		if token.Valid {
			a.grant(token.Int64, age, l)
			taken = append(taken, key)
		}
		unflushed = unflushed || noFlush.Valid
	})
	if err != nil {
		return nil, err
	}
	// From here on an error fails only the keys that it is about.
	if len(taken) > 0 && unflushed {
		_, err = l.flush.ExecContext(ctx)
		err = l.failKeys(batch, results, taken, err) // and they are released
	}
	if slices.Contains(announced, false) && err == nil {
		err = ln.whyNot(ctx, l, batch, results, announced, takes)
	}
	return results, err
}

// announceArgs are the statement by which the batch is announced, its arguments, and
// which claims are to take their keys. An array that is too short goes on with NULLs,
// and hardly any claim needs the orders and the waits.
func (ln *lane) announceArgs(l *link, batch []*op) (stmt *sql.Stmt, args []any, takes []bool) {
	keys, ids := keysAndIDs(batch)
	n := len(batch)
	events, repos, pulls := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.Int64Array, n)
	takes = make([]bool, n)
	var orders []*int64
	var waits []*bool
	yes := true
	ln.session.mu.Lock()
	for i, o := range batch {
		events[i] = o.req.event
		repos[i], pulls[i] = o.pull.columns()
		if o.order != nil {
			orders = append(orders, make([]*int64, i-len(orders))...)
			orders = append(orders, o.order)
		}
		_, holds := ln.session.held[o.req.key] // advisory locks are re-entrant: never try what this session holds
		takes[i] = o.take && !holds
		if !takes[i] {
			waits = append(waits, make([]*bool, i-len(waits))...)
			waits = append(waits, &yes)
		}
	}
	ln.session.mu.Unlock()
	args = []any{keys, ids, events, repos, pulls, pq.Array(waits), l.number, hostName, processID}
	if orders == nil {
		return l.announce, args, takes
	}
	return l.announceOrdered, append(args, pq.Array(orders)), takes
}

// columns are the pull request as the statements take it; a pull request that is not
// given has a number below zero.
func (p *pullRequest) columns() (repo string, pr int64) {
	if p == nil {
		return "", -1
	}
	return p.repo, int64(p.pr)
}

// whyNot gives the claims that were not announced their errors, makes the rows that
// are missing, and gives back the keys that were tried all the same.
func (ln *lane) whyNot(ctx context.Context, l *link, batch []*op, results []result, announced, takes []bool) error {
	var keys, pulls, missing, tried pq.Int64Array
	var repos pq.StringArray
	for i, o := range batch {
		if announced[i] {
			continue
		}
		results[i].err = errRowChanged
		repo, pr := o.pull.columns()
		keys, repos, pulls = append(keys, o.req.key), append(repos, repo), append(pulls, pr)
		if takes[i] {
			tried = append(tried, o.req.key)
		}
	}
	var key int64
	var moved, absent bool
	var event sql.NullString
	var top sql.NullInt64
	err := each(ctx, l.whyNot, []any{keys, repos, pulls}, []any{&key, &moved, &absent, &event, &top}, func() {
		i := find(batch, key)
		switch {
		case moved:
			results[i].err = errKeyMoved
		case absent:
			missing = append(missing, key)
		case batch[i].order != nil && top.Valid && *batch[i].order <= top.Int64:
			results[i].err = outdated(*batch[i].order, top.Int64, event.String)
		}
	})
	err = l.failKeys(batch, results, keys, err)
	if len(missing) > 0 && err == nil {
		_, err = l.ensure.ExecContext(ctx, missing)
		err = l.failKeys(batch, results, missing, err)
	}
	if len(tried) > 0 && err == nil {
		err = l.free(ctx, tried)
	}
	return err
}

var (
	errKeyMoved   = errors.New("locker: the pull request has another key")
	errRowChanged = errors.New("locker: somebody deletes or changes the key's row in env_lock_state again and again")
)

// grant says that the link holds the key since the statement that made the
// token; age is how long ago, in seconds, a predecessor was found dead.
func (a *answer) grant(token int64, age sql.NullFloat64, l *link) {
	a.outcome, a.token, a.session = granted, token, l.generation
	if age.Valid {
		a.drain = min(uncleanDelay, max(0, uncleanDelay-time.Duration(age.Float64*float64(time.Second))))
	}
}

func (ln *lane) withdrawClaims(ctx context.Context, l *link, batch []*op) ([]result, error) {
	keys, ids := keysAndIDs(batch)
	_, err := l.withdraw.ExecContext(ctx, keys, ids)
	return make([]result, len(batch)), err
}

func keysAndIDs(batch []*op) (pq.Int64Array, uuidArray) {
	keys, ids := make(pq.Int64Array, len(batch)), make(uuidArray, len(batch))
	for i, o := range batch {
		keys[i], ids[i] = o.req.key, o.req.id
	}
	return keys, ids
}

// uuidArray is an argument of type uuid[].
type uuidArray []uuid.UUID

func (a uuidArray) Value() (driver.Value, error) {
	const width = 2 * len(uuid.UUID{})
	text := make([]byte, 1, 2+(width+1)*len(a))
	text[0] = '{'
	for i, id := range a {
		if i > 0 {
			text = append(text, ',')
		}
		text = hex.AppendEncode(text, id[:])
	}
	return string(append(text, '}')), nil
}

func (ln *lane) acquireKeys(ctx context.Context, l *link, batch []*op) ([]result, error) {
	keys, ids := keysAndIDs(batch)
	n := len(batch)
	claims, claimIDs := make(pq.Int64Array, n), make(uuidArray, n)
	events := make(pq.StringArray, n)
	firsts, tryables := make(pq.BoolArray, n), make(pq.BoolArray, n)
	ln.session.mu.Lock()
	for i, o := range batch {
		_, holds := ln.session.held[o.req.key] // as above
		claims[i], claimIDs[i] = o.req.standing.number, o.req.standing.id
		firsts[i], tryables[i], events[i] = o.req.first, !holds, o.req.event
	}
	ln.session.mu.Unlock()

	results := make([]result, len(batch))
	var missing, refused, unheard pq.Int64Array
	var unheardIDs uuidArray
	got := map[int64]bool{} // the advisory lock, but not yet the row
	args := []any{keys, ids, claims, claimIDs, firsts, tryables, events, hostName, processID, l.number}
	var key int64
	var gone, hidden, have bool
	var valid sql.NullBool
	var number, token sql.NullInt64
	var id uuid.NullUUID
	var newestEvent sql.NullString
	var age sql.NullFloat64
	row := []any{&key, &gone, &hidden, &valid, &have, &number, &id, &newestEvent, &token, &age}
	err := each(ctx, l.acquire, args, row, func() {
		i := find(batch, key)
		o, a := batch[i], &results[i].answer
		if number.Valid {
			a.newest = standing{number.Int64, id.UUID}
		}
		switch {
		case token.Valid:
			a.grant(token.Int64, age, l)
			delete(got, key)
		case gone:
			a.outcome = again
			missing = append(missing, key)
		case have:
			a.outcome = again // unless its row follows
			got[key] = true
		case !valid.Bool:
			a.outcome = superseded
			a.event = newestEvent.String
		default:
			a.outcome = busy
			if hidden || o.req.first || o.req.standing.id != o.req.id {
				unheard = append(unheard, key)
				unheardIDs = append(unheardIDs, o.req.id)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	for key := range got {
		refused = append(refused, key)
	}
	if len(refused) > 0 { // a newer claim came in between
		if err := l.free(ctx, refused); err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		_, err = l.ensure.ExecContext(ctx, missing)
		err = l.failKeys(batch, results, missing, err)
	}
	if len(unheard) > 0 && err == nil {
		// Try once more after asking to be told: the release may have been just before.
		var asked bool
		err = each(ctx, l.wait, []any{unheard, unheardIDs, l.number}, []any{&key, &asked, discard, discard}, func() {
			if asked {
				results[find(batch, key)].answer.outcome = again
			}
		})
		err = l.failKeys(batch, results, unheard, err)
	}
	return results, err
}

// failKeys gives the operations on keys the error of a statement that was about
// them alone; the others keep their results. It answers an error if the link is
// gone.
func (l *link) failKeys(batch []*op, results []result, keys []int64, err error) error {
	if err == nil || l.broken(err) {
		return err
	}
	for _, key := range keys {
		results[find(batch, key)].err = statementError(err)
	}
	return nil
}

func (ln *lane) releaseKeys(ctx context.Context, l *link, batch []*op) ([]result, error) {
	keys, ids := keysAndIDs(batch)
	var shared []*bool
	yes := true
	ln.session.mu.Lock()
	for i, key := range keys {
		if ln.session.held[key].shared {
			shared = append(shared, make([]*bool, i-len(shared))...)
			shared = append(shared, &yes)
		}
	}
	ln.session.mu.Unlock()
	cleared := make([]bool, len(batch))
	var key int64
	err := each(ctx, l.release, []any{keys, ids, pq.Array(shared)}, []any{&key, discard, discard, discard}, func() {
		cleared[find(batch, key)] = true
	})
	if err != nil {
		return nil, err
	}
	var rest []int64
	for i, key := range keys {
		if !cleared[i] {
			rest = append(rest, key)
		}
	}
	if len(rest) > 0 { // somebody deleted the rows
		if err := l.free(ctx, rest); err != nil {
			return nil, err
		}
	}
	return make([]result, len(batch)), nil
}

// find is the place of key's operation in a batch that is sorted by key.
func find(batch []*op, key int64) int {
	i, _ := slices.BinarySearchFunc(batch, key, func(o *op, key int64) int { return cmp.Compare(o.req.key, key) })
	return i
}

// discard takes a column that only has a side effect.
var discard discardedColumn

type discardedColumn struct{}

func (discardedColumn) Scan(any) error { return nil }

// each scans every row of a prepared query into row, and then calls f.
func each(ctx context.Context, stmt *sql.Stmt, args, row []any, f func()) error {
	rows, err := stmt.QueryContext(ctx, args...)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }() // its error is that of Err
	for rows.Next() {
		if err := rows.Scan(row...); err != nil {
			return err
		}
		f()
	}
	return rows.Err()
}
