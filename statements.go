package locker

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq/oid"
	"github.com/pkg/errors"
)

// statement carries out a batch. The results are with the operations; an error is
// that of all.
func (ln *lane) statement(ctx context.Context, l *link, batch []*op) error {
	for _, o := range batch {
		o.result = result{}
	}
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
func (ln *lane) lookupKeys(ctx context.Context, l *link, batch []*op) error {
	todo := slices.Clone(batch)
	for attempt := range 4 {
		repos := newArray(oid.T_text, len(todo), 32)
		prs, keys := newArray(oid.T_int4, len(todo), 4), newArray(oid.T_int8, len(todo), 8)
		for _, o := range todo {
			repos.addText(o.pull.repo)
			prs.addInt32(int32(o.pull.pr))
			keys.addInt64(randomKey())
		}
		if attempt > 0 { // the second time the rows are missing, later a random key was taken
			if _, err := l.addKeys.ExecContext(ctx, repos, prs, keys); err != nil {
				return err
			}
		}
		var ord int
		var key int64
		err := each(ctx, l.lookup, []any{repos, prs}, []any{&ord, &key}, func() {
			o := todo[ord-1]
			o.key, o.answered = key, true
		})
		if err != nil {
			return err
		}
		todo = slices.DeleteFunc(todo, func(o *op) bool { return o.answered })
		if len(todo) == 0 {
			return nil
		}
	}
	for _, o := range todo {
		o.err = errors.New("locker: env_locks did not take a new key")
	}
	return nil
}

// randomKey is a positive number: a key that no other pull request has, all but
// certainly.
func randomKey() int64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return int64(binary.BigEndian.Uint64(b[:])>>1) | 1
}

func (ln *lane) announceClaims(ctx context.Context, l *link, batch []*op) error {
	stmt, args := ln.announceArgs(l, batch)
	var taken []int64
	var unflushed bool
	var key, number int64
	var token sql.NullInt64
	var age sql.NullFloat64
	var noFlush sql.NullString
	row := []any{&key, &number, &token, &age, &noFlush, discard}
	err := each(ctx, stmt, args, row, func() {
		o := find(batch, key)
		o.answered = true
		o.answer.outcome, o.answer.newest = again, standing{number, o.req.id}
		if token.Valid {
			o.answer.grant(token.Int64, age, l)
			taken = append(taken, key)
		}
		unflushed = unflushed || noFlush.Valid
	})
	if err != nil {
		return err
	}
	// From here on an error fails only the keys that it is about.
	if len(taken) > 0 && unflushed {
		_, err = l.flush.ExecContext(ctx)
		err = l.failKeys(batch, taken, err) // and they are released
	}
	if err == nil {
		err = ln.whyNot(ctx, l, batch)
	}
	return err
}

// announceArgs are the statement by which the batch is announced and its arguments.
// An array that is too short goes on with NULLs, and hardly any claim needs the
// orders and the waits.
func (ln *lane) announceArgs(l *link, batch []*op) (*sql.Stmt, []any) {
	n := len(batch)
	keys, ids := keysAndIDs(batch)
	events, repos := newArray(oid.T_text, n, 32), newArray(oid.T_text, n, 32)
	pulls := newArray(oid.T_int4, n, 4)
	var orders, waits array
	ln.session.mu.Lock()
	for _, o := range batch {
		_, holds := ln.session.held[o.req.key] // advisory locks are re-entrant: never try what this session holds
		o.tries = o.take && !holds
	}
	ln.session.mu.Unlock()
	for i, o := range batch {
		repo, pr := o.pull.columns()
		events.addText(o.req.event)
		repos.addText(repo)
		pulls.addInt32(pr)
		if o.order != nil {
			orders.addAt(i, oid.T_int8).addInt64(*o.order)
		}
		if !o.tries {
			waits.addAt(i, oid.T_bool).addBool(true)
		}
	}
	args := []any{keys, ids, events, repos, pulls, waits, l.number, hostName, processID}
	if orders == nil {
		return l.announce, args
	}
	return l.announceOrdered, append(args, orders)
}

// columns are the pull request as the statements take it; a pull request that is not
// given has a number below zero.
func (p *pullRequest) columns() (repo string, pr int32) {
	if p == nil {
		return "", -1
	}
	return p.repo, int32(p.pr)
}

// whyNot gives the claims that were not announced their errors, makes the rows that
// are missing, and gives back the keys that were tried all the same.
func (ln *lane) whyNot(ctx context.Context, l *link, batch []*op) error {
	var keys, missing, tried []int64
	repos, pulls := newArray(oid.T_text, 0, 0), newArray(oid.T_int4, 0, 0)
	for _, o := range batch {
		if o.answered {
			continue
		}
		o.err = errRowChanged
		repo, pr := o.pull.columns()
		keys = append(keys, o.req.key)
		repos.addText(repo)
		pulls.addInt32(pr)
		if o.tries {
			tried = append(tried, o.req.key)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	var key int64
	var moved, absent bool
	var event sql.NullString
	var top sql.NullInt64
	err := each(ctx, l.whyNot, []any{int64Array(keys), repos, pulls}, []any{&key, &moved, &absent, &event, &top}, func() {
		o := find(batch, key)
		switch {
		case moved:
			o.err = errKeyMoved
		case absent:
			missing = append(missing, key)
		case o.order != nil && top.Valid && *o.order <= top.Int64:
			o.err = outdated(*o.order, top.Int64, event.String)
		}
	})
	err = l.failKeys(batch, keys, err)
	if len(missing) > 0 && err == nil {
		_, err = l.ensure.ExecContext(ctx, int64Array(missing))
		err = l.failKeys(batch, missing, err)
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

func (ln *lane) withdrawClaims(ctx context.Context, l *link, batch []*op) error {
	keys, ids := keysAndIDs(batch)
	_, err := l.withdraw.ExecContext(ctx, keys, ids)
	return err
}

func keysAndIDs(batch []*op) (keys, ids array) {
	keys, ids = newArray(oid.T_int8, len(batch), 8), newArray(oid.T_uuid, len(batch), len(uuid.UUID{}))
	for _, o := range batch {
		keys.addInt64(o.req.key)
		ids.addUUID(o.req.id)
	}
	return keys, ids
}

func (ln *lane) acquireKeys(ctx context.Context, l *link, batch []*op) error {
	n := len(batch)
	keys, ids := keysAndIDs(batch)
	claims, claimIDs := newArray(oid.T_int8, n, 8), newArray(oid.T_uuid, n, len(uuid.UUID{}))
	firsts, tryables := newArray(oid.T_bool, n, 1), newArray(oid.T_bool, n, 1)
	events := newArray(oid.T_text, n, 32)
	for _, o := range batch {
		claims.addInt64(o.req.standing.number)
		claimIDs.addUUID(o.req.standing.id)
		firsts.addBool(o.req.first)
		events.addText(o.req.event)
	}
	ln.session.mu.Lock()
	for _, o := range batch {
		_, holds := ln.session.held[o.req.key] // as above
		tryables.addBool(!holds)
	}
	ln.session.mu.Unlock()

	var missing, refused, unheard []int64
	unheardIDs := newArray(oid.T_uuid, 0, 0)
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
		o := find(batch, key)
		a := &o.answer
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
				unheardIDs.addUUID(o.req.id)
			}
		}
	})
	if err != nil {
		return err
	}
	for key := range got {
		refused = append(refused, key)
	}
	if len(refused) > 0 { // a newer claim came in between
		if err := l.free(ctx, refused); err != nil {
			return err
		}
	}
	if len(missing) > 0 {
		_, err = l.ensure.ExecContext(ctx, int64Array(missing))
		err = l.failKeys(batch, missing, err)
	}
	if len(unheard) > 0 && err == nil {
		// Try once more after asking to be told: the release may have been just before.
		var asked bool
		err = each(ctx, l.wait, []any{int64Array(unheard), unheardIDs, l.number}, []any{&key, &asked, discard, discard}, func() {
			if asked {
				find(batch, key).answer.outcome = again
			}
		})
		err = l.failKeys(batch, unheard, err)
	}
	return err
}

// failKeys gives the operations on keys the error of a statement that was about
// them alone; the others keep their results. It answers an error if the link is
// gone.
func (l *link) failKeys(batch []*op, keys []int64, err error) error {
	if err == nil || l.broken(err) {
		return err
	}
	for _, key := range keys {
		find(batch, key).err = statementError(err)
	}
	return nil
}

func (ln *lane) releaseKeys(ctx context.Context, l *link, batch []*op) error {
	keys, ids := keysAndIDs(batch)
	var shared array
	ln.session.mu.Lock()
	for i, o := range batch {
		if ln.session.held[o.req.key].shared {
			shared.addAt(i, oid.T_bool).addBool(true)
		}
	}
	ln.session.mu.Unlock()
	var key int64
	err := each(ctx, l.release, []any{keys, ids, shared}, []any{&key, discard, discard, discard}, func() {
		find(batch, key).answered = true
	})
	if err != nil {
		return err
	}
	var rest []int64
	for _, o := range batch {
		if !o.answered {
			rest = append(rest, o.req.key)
		}
	}
	if len(rest) > 0 { // somebody deleted the rows
		return l.free(ctx, rest)
	}
	return nil
}

// find is key's operation in a batch that is sorted by key.
func find(batch []*op, key int64) *op {
	i, _ := slices.BinarySearchFunc(batch, key, func(o *op, key int64) int { return cmp.Compare(o.req.key, key) })
	return batch[i]
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
