package locker

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

// lateAfter is the age from which a claim does not count as new. Its place among the claims of its
// key is then that of the time at which it was asked for, not of its arrival.
const lateAfter = time.Second

// clockFor is how long a measurement of the server's clock is used. For that time after a step of
// that clock, claims may count as late.
const clockFor = 10 * time.Second

// serverTime returns the time t on the server's clock, in seconds since 1970. The result is not
// earlier than that. So a claim never counts as older than it is, and never older than one that had
// returned before its caller asked, however different the measurements of two connections are.
func (l *link) serverTime(ctx context.Context, t time.Time) (float64, error) {
	start := time.Now()
	if passed := start.Sub(l.clockAt); l.clockAt.IsZero() || passed > clockFor || suspendedFor(l.clockAt, start) > lateAfter/4 {
		if err := l.each(ctx, sqlTime, nil, []any{&l.clock}, func() {}); err != nil {
			return 0, err
		}
		l.clockAt = start
	}
	return l.clock + t.Sub(l.clockAt).Seconds(), nil
}

// statement runs a batch for the session ref. The results are stored in the operations. An error is
// that of all of them.
func (w *worker) statement(ctx context.Context, l *link, ref sessionRef, batch []*op) error {
	w.session.mu.Lock()
	w.quiet = w.session.mute
	w.session.mu.Unlock()
	switch batch[0].kind {
	case opLookup:
		return lookupKeys(ctx, l, batch)
	case opAnnounce:
		return w.announceClaims(ctx, l, ref, batch)
	case opAcquire:
		if w.session.conf.originalReplicas {
			return w.acquireWithKeyLocks(ctx, l, ref, batch)
		}
		return w.acquireKeys(ctx, l, ref, batch)
	case opWithdraw:
		return l.exec(ctx, sqlWithdraw, keysOf(batch), idsOf(batch))
	case opRelease:
		return w.releaseKeys(ctx, l, batch)
	case opExplain:
		return explainKeys(ctx, l, batch)
	}
	return batch[0].call(ctx, l)
}

// claimsOf returns the claims of a batch.
func claimsOf(batch []*op) []claim {
	claims := make([]claim, len(batch))
	for i, o := range batch {
		claims[i] = o.req.claim
	}
	return claims
}

// keysOf and idsOf return the keys and the IDs of the claims of a batch.
func keysOf(batch []*op) array { return column(batch, func(o *op) int64 { return o.req.key }) }
func idsOf(batch []*op) array  { return column(batch, func(o *op) uuid.UUID { return o.req.id }) }

// lookupKeys looks up the keys of pull requests, and creates those that are missing.
func lookupKeys(ctx context.Context, l *link, batch []*op) error {
	todo := slices.Clone(batch)
	for attempt := range 4 {
		repos, prs := pullsOf(todo)
		// In the second attempt the rows are missing. In a later one a random key was in use.
		if attempt > 0 {
			if err := l.exec(ctx, sqlAddKeys, repos, prs, randomKeys(len(todo))); err != nil {
				return err
			}
		}
		var ord int
		var key int64
		err := l.each(ctx, sqlLookup, []any{repos, prs}, []any{&ord, &key}, func() {
			o := todo[ord-1]
			if o.found {
				o.err = errors.Errorf("locker: env_locks has two rows for the pull request, with the keys %d and %d: see \"Two rows for one pull request\" in docs/operations.md", o.key, key)
			}
			o.key, o.found = key, true
		})
		if err != nil {
			return err
		}
		todo = slices.DeleteFunc(todo, func(o *op) bool { return o.found })
		if len(todo) == 0 {
			return nil
		}
	}
	for _, o := range todo {
		o.err = errors.New("locker: env_locks did not take a new key")
	}
	return nil
}

// announceClaims runs the announcements of a batch, and creates the rows that are missing.
func (w *worker) announceClaims(ctx context.Context, l *link, ref sessionRef, batch []*op) error {
	// In the second attempt a row that was missing exists.
	for attempt := range 3 {
		now := time.Now()
		clock, err := l.serverTime(ctx, now)
		if err != nil {
			return err
		}
		text, args := announceArgs(ref, batch, w.quiet, w.session.conf.progress, l.encoding, func(t time.Time) float64 { return clock - now.Sub(t).Seconds() })
		var granted, unflushed, spared bool
		var key, number int64
		var token sql.NullInt64
		var noFlush sql.NullString
		err = l.each(ctx, text, args, []any{&key, &number, &token, &spared, &noFlush, discard}, func() {
			o := find(batch, key)
			o.found = true
			o.answer.outcome, o.answer.newest = again, standing{number, o.req.id}
			if token.Valid {
				o.answer.grant(token.Int64, ref, spared)
				granted = true
			}
			unflushed = unflushed || noFlush.Valid
		})
		if err != nil {
			return err
		}
		if granted && unflushed {
			err = l.exec(ctx, sqlFlush)
		}
		var missing bool
		if err == nil {
			missing, err = w.whyNot(ctx, l, batch, attempt == 0)
		}
		if err == nil && !missing {
			return nil
		}
		// What was announced is committed, whatever becomes of the rest.
		for _, o := range batch {
			o.doubt = o.doubt || o.found
		}
		if err != nil {
			return err
		}
	}
	for _, o := range batch {
		if !o.found {
			o.err = errRowChanged
		}
	}
	return nil
}

// notFound returns the operations of a batch that are not found yet.
func notFound(batch []*op) []*op {
	found := func(o *op) bool { return o.found }
	if !slices.ContainsFunc(batch, found) {
		return batch
	}
	return slices.DeleteFunc(slices.Clone(batch), found)
}

// eventsOf returns the events of the claims of a batch.
func eventsOf(batch []*op, encoding string) array {
	return column(batch, func(o *op) string { return storable(o.req.event, encoding) })
}

// pullsOf returns the pull requests of a batch. The number is negative if an operation has none.
func pullsOf(batch []*op) (repos, prs array) {
	repos = column(batch, func(o *op) string {
		if o.pull == nil {
			return ""
		}
		return o.pull.repo
	})
	prs = column(batch, func(o *op) int32 {
		if o.pull == nil {
			return -1
		}
		return int32(o.pull.pr)
	})
	return repos, prs
}

// randomKeys returns n random keys.
func randomKeys(n int) array {
	return column(make([]struct{}, n), func(struct{}) int64 { return randomKey() })
}

// announceArgs returns the statement that announces the claims of a batch which are not found yet,
// and its arguments.
func announceArgs(ref sessionRef, batch []*op, quiet bool, p progress, encoding string, serverTime func(time.Time) float64) (string, []any) {
	batch = notFound(batch)
	repos, pulls := pullsOf(batch)
	args := []any{
		keysOf(batch), idsOf(batch), eventsOf(batch, encoding), repos, pulls,
		column(batch, func(o *op) bool { return o.acquire }),
		column(batch, func(o *op) float64 { return serverTime(o.asked) }),
		ref.id, ref.lock, quiet, lateAfterInterval,
		sparse(batch, func(o *op) (bool, bool) { return true, o.doubt }),
	}
	sequences := sparse(batch, func(o *op) (int64, bool) {
		if o.terms.sequence == nil {
			return 0, false
		}
		return *o.terms.sequence, true
	})
	labels := sparse(batch, func(o *op) (string, bool) { return storable(o.terms.labels, encoding), o.terms.labels != "" })
	finishes := sparse(batch, func(o *op) (bool, bool) { return true, o.terms.mode == LetFinish })
	if sequences == nil && labels == nil && finishes == nil && p.n == 0 {
		return sqlAnnouncePlain, args
	}
	holds, max := p.args()
	return sqlAnnounceFull, append(args, sequences, labels, finishes, holds, max)
}

// args returns the arguments of the statements that grant keys: NULL if p is off.
func (p progress) args() (holds, max any) {
	if p.n == 0 {
		return nil, nil
	}
	return p.n, milliseconds(p.max)
}

var lateAfterInterval = milliseconds(lateAfter)

var sqlAnnouncePlain, sqlAnnounceFull = sqlAnnounce(false), sqlAnnounce(true)

// whyNot sets the outcomes of the claims that were not announced, and creates the rows that are
// missing. It reports whether rows were missing. In the first attempt each of them may have been:
// another session may have created it since.
func (w *worker) whyNot(ctx context.Context, l *link, batch []*op, first bool) (missing bool, err error) {
	if batch = notFound(batch); len(batch) == 0 {
		return false, nil
	}
	repos, pulls := pullsOf(batch)
	var absentKeys []int64
	var key int64
	var moved, absent bool
	var newest sql.NullString
	var top sql.NullInt64
	var since sql.NullTime
	row := []any{&key, &moved, &absent, &newest, &top, &since}
	err = l.each(ctx, sqlWhyNot, []any{keysOf(batch), repos, pulls}, row, func() {
		o := find(batch, key)
		late := o.terms.sequence != nil && top.Valid && *o.terms.sequence <= top.Int64
		o.found = moved || !absent && !first || late && *o.terms.sequence < top.Int64
		missing = missing || !o.found
		switch {
		case moved:
			o.err = errKeyMoved
		case absent:
			absentKeys = append(absentKeys, key)
		case !o.found:
		case late:
			o.err = outdated(key, *o.terms.sequence, top.Int64, since.Time, decodeClaim(newest))
		default:
			// A claim that was asked for later was announced before.
			o.answer = answer{outcome: superseded, newest: standing{id: o.req.id}, winner: decodeClaim(newest)}
		}
	})
	if err == nil && len(absentKeys) > 0 {
		err = w.ensure(ctx, l, absentKeys)
	}
	return missing, err
}

// ensure creates missing rows.
func (w *worker) ensure(ctx context.Context, l *link, keys []int64) error {
	return l.exec(ctx, sqlEnsure, int64Array(keys), randomKeys(len(keys)), !w.session.conf.originalReplicas)
}

var (
	errKeyMoved   = errors.New("locker: the pull request has another key")
	errRowChanged = errors.New("locker: the key's row in env_lock_state is deleted or changed again and again")
)

// grant records that the session ref holds the key.
func (a *answer) grant(token int64, ref sessionRef, spared bool) {
	a.outcome, a.token, a.session, a.spared = granted, token, ref.generation, spared
}

// decodeClaim decodes the results of sqlNewest and sqlHolder. It returns nil for NULL. The labels
// may be any JSON, because an operator can have written them.
func decodeClaim(text sql.NullString) *ClaimInfo {
	if !text.Valid {
		return nil
	}
	info := &ClaimInfo{}
	if json.Unmarshal([]byte(text.String), info) != nil {
		info.Labels = nil
	}
	if !info.Since.IsZero() {
		info.Since = info.Since.Local()
	}
	return info
}

// deadOf returns the sessions that the claims of a batch may take over.
func (s *session) deadOf(batch []*op) array {
	return sparse(batch, func(o *op) (int64, bool) { return o.req.blocker, s.watches.expired(o.req.blocker) })
}

// acquireKeys makes the attempts of a batch to acquire keys. For a key that is not free it asks for
// a notification of the release, unless the row has the request already.
func (w *worker) acquireKeys(ctx context.Context, l *link, ref sessionRef, batch []*op) error {
	s := w.session
	holds, longest := s.conf.progress.args()
	args := []any{
		keysOf(batch), idsOf(batch),
		column(batch, func(o *op) int64 { return o.req.standing.number }),
		column(batch, func(o *op) uuid.UUID { return o.req.standing.id }),
		column(batch, func(o *op) bool { return o.req.first }),
		eventsOf(batch, l.encoding), s.deadOf(batch), ref.id, ref.lock,
		sparse(batch, func(o *op) (bool, bool) { return o.keyLocked, s.conf.originalReplicas }),
		sparse(batch, func(o *op) (string, bool) { return storable(o.req.labels, l.encoding), o.req.labels != "" }),
		sparse(batch, func(o *op) (bool, bool) { return true, o.req.skip }),
		holds, longest,
	}
	var missing []int64
	var unheard []*op
	seen := true
	var key int64
	var absent, held, hidden, mine bool
	var valid, known, alive, spared sql.NullBool
	var number, token, blocker sql.NullInt64
	var id uuid.NullUUID
	var timeout sql.NullFloat64
	row := []any{&key, &token, &spared, &absent, &valid, &number, &id, &held, &hidden, &blocker, &known, &timeout, &alive, &mine}
	err := l.each(ctx, sqlAcquire, args, row, func() {
		o := find(batch, key)
		a := &o.answer
		if number.Valid {
			a.newest = standing{number.Int64, id.UUID}
		}
		switch {
		case token.Valid:
			a.grant(token.Int64, ref, spared.Bool)
			return
		case absent:
			a.outcome = again
			missing = append(missing, key)
			return
		case !valid.Bool:
			a.outcome = superseded
			return
		case !mine:
			// A session that the server does not see is granted no key. Its refusal says nothing about
			// the key.
			a.outcome, seen = again, false
			return
		}
		a.outcome = busy
		if held && !alive.Bool {
			watch := seconds(timeout.Float64)
			if !known.Bool {
				watch = max(watch, unknownTimeout(s.conf.sessionTimeout))
			}
			a.blocker, a.retryAt = blocker.Int64, s.watches.dead(blocker.Int64, watch)
		}
		if !o.req.skip && (hidden || o.req.first || o.req.standing.id != o.req.id) {
			unheard = append(unheard, o)
		}
	})
	if err != nil {
		return err
	}
	if !seen {
		s.suspect(ref, errElsewhere)
		defer w.hangUp()
	}
	if len(missing) > 0 {
		err = w.ensure(ctx, l, missing)
	}
	if len(unheard) > 0 && err == nil {
		// Try again after asking for a notification: the release may have happened just before.
		var asked bool
		finishes := column(unheard, func(o *op) bool { return o.req.finish })
		err = l.each(ctx, sqlWait, []any{keysOf(unheard), idsOf(unheard), ref.id, w.quiet, finishes}, []any{&key, &asked, discard, discard}, func() {
			if asked {
				o := find(batch, key)
				o.found, o.answer.outcome = true, again
			}
		})
	}
	if err != nil {
		// What was granted is committed, whatever becomes of the rest.
		for _, o := range batch {
			o.doubt = o.doubt || o.answer.outcome == granted
		}
	}
	return err
}

// releaseKeys runs the releases of a batch. The error of a release whose row does not name the hold
// matches ErrLockLost, unless an earlier attempt may have released it.
func (w *worker) releaseKeys(ctx context.Context, l *link, batch []*op) error {
	if w.session.conf.originalReplicas {
		w.session.unlockKeys(claimsOf(batch))
	}
	var key int64
	err := l.each(ctx, sqlRelease, []any{keysOf(batch), idsOf(batch), w.quiet}, []any{&key, discard, discard}, func() {
		find(batch, key).found = true
	})
	if err != nil {
		return err
	}
	for _, o := range batch {
		if !o.found && !o.doubt {
			o.err = errReleaseLost
		}
	}
	return nil
}

// explainKeys looks up the holders and the newest claims of keys.
func explainKeys(ctx context.Context, l *link, batch []*op) error {
	var key int64
	var newest, holder, application, user sql.NullString
	var age sql.NullFloat64
	var open, alive sql.NullBool
	var pid sql.NullInt64
	return l.each(ctx, sqlExplain, []any{keysOf(batch)}, []any{&key, &newest, &open, &holder, &age, &alive, &pid, &application, &user}, func() {
		k := &find(batch, key).keyState
		k.newest, k.open, k.holder, k.heldFor, k.alive = decodeClaim(newest), open.Bool, decodeClaim(holder), seconds(age.Float64), alive.Bool
		if pid.Valid {
			k.foreign = &ForeignLock{PID: int(pid.Int64), Application: application.String, User: user.String}
		}
	})
}

var errReleaseLost = errors.WithMessage(ErrLockLost, "the row of the key does not name the hold any longer")

// find returns the operation for key in a batch, which is sorted by key.
func find(batch []*op, key int64) *op {
	i, _ := slices.BinarySearchFunc(batch, key, func(o *op, key int64) int { return cmp.Compare(o.req.key, key) })
	return batch[i]
}
