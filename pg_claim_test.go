package locker

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/preemptable/locker/internal/pgserver"
)

// Tests of claims that announce and acquire in one statement, on a key that the provider remembers.

// C1: the rows belong to the operator, who can change them between two claims.
func TestPostgresKeyMoved(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	// If the row of a key was deleted, or was changed to a key that never had a row, a claim waits
	// for the session timeout.
	p := pgProvider(t, uri, WithSessionTimeout(time.Second))
	f := pgLocker(t, p)
	// cycle locks and releases a pull request and returns the key that was held in between.
	cycle := func(pr uint) (key int64) {
		l := f("org/repo", pr, "push")
		_, err := l.Lock(pgBackground)
		require.NoError(t, err)
		held := pgHolders(t, db)
		require.Len(t, held, 1, "one key, and nothing left of another")
		for key = range held {
		}
		require.NoError(t, l.Release(pgBackground))
		require.Empty(t, pgHolders(t, db))
		fromTable := pgGet[int64](t, db, `SELECT lock_key FROM env_locks WHERE repo = 'org/repo' AND pull_request = $1`, int64(pr))
		require.Equal(t, fromTable, key)
		return key
	}
	one, two := cycle(1), cycle(2)
	require.Equal(t, one, cycle(1))
	require.NotEqual(t, one, two)

	pgExec(t, db, `UPDATE env_locks SET lock_key = 777 WHERE pull_request = 1`)
	require.Equal(t, int64(777), cycle(1))
	pgExec(t, db, `DELETE FROM env_locks WHERE pull_request = 1`)
	require.NotEqual(t, int64(777), cycle(1))

	// The remembered key belongs to another pull request.
	one = cycle(1)
	pgExec(t, db, `UPDATE env_locks SET lock_key = 778 WHERE pull_request = 1`)
	pgExec(t, db, `UPDATE env_locks SET lock_key = $1 WHERE pull_request = 2`, one)
	require.Equal(t, one, cycle(2))
	require.Equal(t, int64(778), cycle(1))

	// The row of the key is deleted, and then all rows.
	pgExec(t, db, `DELETE FROM env_lock_state WHERE lock_key = 778`)
	cycle(1)
	pgExec(t, db, `TRUNCATE env_locks, env_lock_state`)
	cycle(1)
	cycle(2)
}

// A claim that comes too late by its sequence number acquires nothing.
func TestPostgresLateClaimTakesNothing(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	require.NoError(t, goRound(f("org/repo", 1, "new").Sequence(5)))
	_, err := f("org/repo", 1, "old").Sequence(3).Lock(pgBackground)
	require.ErrorIs(t, err, ErrClaimOutdated)
	require.Empty(t, pgHolders(t, db))
	require.NoError(t, goRound(f("org/repo", 1, "newer").Sequence(6)))
}

// C21, C22: during an outage of the server a claim on a key that is remembered ends for the same
// reasons as any other.
func TestPostgresClaimDuringOutage(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	px := newProxy(t, "", uri, nil)
	p := pgProvider(t, px.uri(t, uri), WithLockTimeout(time.Second))
	q := pgProvider(t, px.uri(t, uri))
	var lockers []*PreemptiveLocker
	for i, f := range []PreemptiveLockerFactory{pgLocker(t, p), pgLocker(t, q)} {
		// One lock timeout may be too short for the first connections.
		pgUntil(t, "the provider is open", func() bool {
			return goRound(f("org/repo", uint(i), "before")) == nil
		})
		lockers = append(lockers, f("org/repo", uint(i), "during"))
	}
	px.close()
	for _, provider := range []*PostgresLockProvider{p, q} {
		pgUntil(t, "the session is suspended", func() bool {
			st := provider.Stats()
			return !st.Connected && !st.Suspended.IsZero()
		})
	}
	_, err := lockers[0].Lock(pgBackground)
	require.ErrorIs(t, err, ErrLockTimeout)
	require.ErrorContains(t, err, "connect to postgres", "and the reason is in it")

	failed := make(chan error, 1)
	go func() {
		_, err := lockers[1].Lock(pgBackground)
		failed <- err
	}()
	pgUntil(t, "it has been tried", func() bool {
		q.session.mu.Lock()
		defer q.session.mu.Unlock()
		return q.session.trouble != nil && q.session.queuedLocked() == 1
	})
	require.NoError(t, q.Close())
	require.ErrorIs(t, pgReceive(t, "the claim", failed), ErrProviderClosed)
}

// onWorker has a worker call f on its connection, and returns f's error.
func onWorker(t *testing.T, w *worker, f func(context.Context, *link) error) error {
	t.Helper()
	o := newOp(pgBackground, opCall, claim{})
	o.call, o.once = f, true
	s := w.session
	s.mu.Lock()
	s.startLocked()
	w.queues[opCall] = append(w.queues[opCall], o)
	s.mu.Unlock()
	s.wakeUp()
	pgReceive(t, "the worker has called", o.done)
	return o.err
}

// A claim that was not announced waits behind a holder, and another claim is announced while it asks
// for a notification: it is superseded (C6).
func TestAnnouncedWhileAnotherAsks(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	pgHold(t, q, 1, "holder")
	newer := pgNew(t, q, 1, "newer")
	var once sync.Once
	ctx := context.WithValue(t.Context(), tracerKey{}, Tracer(func(ctx context.Context, op Operation) (context.Context, func(OperationEnd)) {
		return ctx, func(OperationEnd) {
			if op.Statement == "wait" {
				once.Do(func() { assert.NoError(t, newer.Notify(pgBackground)) })
			}
		}
	}))
	older := pgNew(t, p, 1, "older")
	r := pgReceive(t, "the older claim leaves", fieldGo(func() error { _, err := older.Lock(ctx); return err }))
	require.ErrorIs(t, r.err, ErrLockPreempted)
}

// An operator's index does not accept long events, with the state of a full NOTIFY queue. Such a claim
// does not keep others from the database.
func TestClaimThatAnIndexRejects(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri, WithLockTimeout(2*soon))
	for key := range int64(4) {
		l, _ := pgHold(t, p, key, "creates the row")
		require.NoError(t, l.Unlock(pgBackground))
	}
	pgExec(t, pgDB(t, uri), `CREATE INDEX ON env_lock_state (claim_event)`)
	long := make([]byte, 3000)
	_, _ = rand.Read(long)
	rejected := pgNew(t, p, 0, hex.EncodeToString(long))
	goOn := occupy(t, p.session.disk)
	ctx, cancel := context.WithCancel(t.Context())
	waits := fieldGo(func() error { return rejected.Notify(ctx) })
	var others []<-chan fieldResult
	for key := range int64(3) {
		others = append(others, fieldGo(func() error { return pgNew(t, p, key+1, "fits").Notify(pgBackground) }))
	}
	queued(t, p.session.disk, 4)
	goOn()
	for _, done := range others {
		require.NoError(t, pgReceive(t, "a claim that fits", done).err)
	}
	cancel()
	r := pgReceive(t, "the claim that does not fit", waits)
	require.ErrorIs(t, r.err, context.Canceled)
	require.ErrorContains(t, r.err, "index row")
}

// A traced and an untraced claim share a statement: it is in the trace of the first.
func TestTracedCallInBatch(t *testing.T) {
	t.Parallel()
	var log traceLog
	p := pgProvider(t, newDatabase(t))
	traced, untraced := pgLocker(t, p, WithTracer(log.tracer)), pgLocker(t, p)
	for pr := range uint(8) {
		require.NoError(t, untraced("repo", pr, "has a key").Do(pgBackground, func(context.Context) error { return nil }))
	}
	goOn := occupy(t, p.session.disk)
	var all []<-chan fieldResult
	for pr := range uint(8) {
		f := untraced
		if pr == 3 {
			f = traced
		}
		all = append(all, fieldGo(func() error {
			return f("repo", pr, "claim").Do(pgBackground, func(context.Context) error { return nil })
		}))
	}
	queued(t, p.session.disk, 8)
	goOn()
	for _, done := range all {
		require.NoError(t, pgReceive(t, "a claim ends", done).err)
	}
	var names []string
	for _, s := range log.of(OperationStatement) {
		names = append(names, s.Statement)
	}
	require.Contains(t, names, "announce")
	require.Contains(t, names, "release keys")
}

// occupy keeps a worker busy until the caller calls the function that occupy returns. The caller
// has to do so soon, because the call is treated like any other statement.
func occupy(t *testing.T, w *worker) (goOn func()) {
	t.Helper()
	begun, end, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	begin := sync.OnceFunc(func() { close(begun) })
	go func() {
		done <- onWorker(t, w, func(context.Context, *link) error {
			begin()
			<-end
			return nil
		})
	}()
	pgReceive(t, "the worker is busy", begun)
	goOn = sync.OnceFunc(func() {
		close(end)
		assert.NoError(t, pgReceive(t, "the worker goes on", done))
	})
	t.Cleanup(goOn)
	return goOn
}

// queued returns when a worker has at least the given number of operations in its queues.
func queued(t *testing.T, w *worker, number int) {
	t.Helper()
	pgUntil(t, "the operations are queued", func() bool {
		w.session.mu.Lock()
		defer w.session.mu.Unlock()
		return w.queuedLocked() >= number
	})
}

// instead has a worker run another statement in place of one of its prepared ones.
func instead(t *testing.T, w *worker, of, text string) {
	t.Helper()
	require.NoError(t, onWorker(t, w, func(ctx context.Context, l *link) error {
		s, err := l.conn.PrepareContext(ctx, text)
		l.statements[of] = s
		return err
	}))
}

// C15: a token is durable before it is returned, even if another claim of its batch notifies a
// holder and the batch is not flushed. If the separate flush fails, the claim is repeated, and then
// its own commit is flushed.
func TestPostgresTakenAndNotified(t *testing.T) {
	t.Parallel()
	for name, flush := range map[string]string{
		"it is flushed": sqlFlush,
		"it fails":      `SELECT 1 / (random() * 0)::integer`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			p, q := pgProvider(t, uri), pgProvider(t, uri)
			fp, fq := pgLocker(t, p), pgLocker(t, q)
			// These cycles create the rows, and the provider remembers the keys.
			for pr := range uint(2) {
				require.NoError(t, goRound(fp("org/repo", pr, "before")))
			}
			holder := fq("org/repo", 0, "holder")
			notified, err := holder.Lock(pgBackground)
			require.NoError(t, err)

			w := p.session.disk
			instead(t, w, sqlFlush, flush)
			goOn := occupy(t, w)
			errs := [2]chan error{make(chan error, 1), make(chan error, 1)}
			locks := [2]*PreemptiveLocker{fp("org/repo", 0, "waits"), fp("org/repo", 1, "takes")}
			for i, l := range locks {
				go func() {
					_, err := l.Lock(pgBackground)
					errs[i] <- err
				}()
			}
			queued(t, w, 2)
			goOn()
			require.NoError(t, pgReceive(t, "the one that takes", errs[1]))
			require.Equal(t, "waits", pgReceive(t, "the holder is notified", notified).Message)
			require.NoError(t, locks[1].Release(pgBackground))
			require.NoError(t, holder.Release(pgBackground))
			require.NoError(t, pgReceive(t, "the one that waits", errs[0]))
			require.NoError(t, locks[0].Release(pgBackground))
		})
	}
}

// The rows that a batch returned before it failed do not count.
func TestPostgresHalfAnswered(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	for pr := range uint(2) {
		require.NoError(t, goRound(f("org/repo", pr, "before")))
	}
	// For two claims the statement grants both and then fails. For one claim it returns nothing.
	w := p.session.disk
	const arguments = `num_nulls($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::integer[], $6::boolean[], $7::float8[], $8::bigint, $9::bigint, $10::boolean, $11::interval, $12::boolean[]) >= 0`
	instead(t, w, sqlAnnouncePlain, `
		SELECT k, 1::bigint, 2::bigint, false, NULL::text, NULL::text
		FROM unnest($1::bigint[]) k
		UNION ALL
		SELECT 1 / (cardinality($1::bigint[]) - 2), 0, 0, false, NULL::text, NULL WHERE `+arguments)
	instead(t, w, sqlForOne[sqlAnnouncePlain], `
		SELECT 1::bigint, 1::bigint, 2::bigint, false, NULL::text, NULL::text WHERE NOT `+strings.ReplaceAll(arguments, "[]", ""))
	goOn := occupy(t, w)
	errs := make(chan error, 2)
	for pr := range uint(2) {
		go func() {
			_, err := f("org/repo", pr, "during").Lock(pgBackground)
			errs <- err
		}()
	}
	queued(t, w, 2)
	goOn()
	for range 2 {
		require.ErrorIs(t, pgReceive(t, "a claim", errs), ErrLockPreempted)
	}
	require.Zero(t, p.Stats().Held)
	require.Empty(t, pgHolders(t, db))
}

// C15: a commit that grants a key is flushed before the caller gets the token, and no other commit
// is flushed.
func TestPostgresDurable(t *testing.T) {
	t.Parallel()
	server := pgCluster(t, pgserver.Options{Config: map[string]string{
		"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "bgwriter_delay": "10s", "autovacuum": "off"}})
	uri := server.URI("postgres")
	db := pgDB(t, uri)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	fp, fq := pgLocker(t, p), pgLocker(t, q)
	require.NoError(t, goRound(fp("org/repo", 1, "before")))
	require.NoError(t, goRound(fq("org/repo", 1, "before")))
	flushed := func(want bool, what string) {
		t.Helper()
		require.Equal(t, want, pgGet[bool](t, db, `SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()`), what)
		pgExec(t, db, sqlFlush)
	}
	pgExec(t, db, sqlFlush)
	holder := fp("org/repo", 1, "holder")
	_, err := holder.Lock(pgBackground)
	require.NoError(t, err)
	flushed(true, "a claim that takes the key")

	waiter := fq("org/repo", 1, "waiter")
	key, err := q.LockKey(pgBackground, "org/repo", 1)
	require.NoError(t, err)
	waits := func(lock func(context.Context) (<-chan NotificationPayload, error)) chan error {
		t.Helper()
		failed := make(chan error, 1)
		go func() {
			_, err := lock(pgBackground)
			failed <- err
		}()
		pgUntil(t, "it waits", func() bool {
			q.session.hub.mu.Lock()
			l := q.session.hub.locks[key]
			q.session.hub.mu.Unlock()
			if l == nil {
				return false
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			// The lock sleeps, or has slept.
			return l.wake != nil
		})
		return failed
	}
	quiet := pgNew(t, q, key, "never announced")
	failed := waits(quiet.Lock)
	flushed(false, "a wait that asks to be notified")
	require.NoError(t, quiet.Unlock(pgBackground))
	require.Error(t, pgReceive(t, "the quiet waiter", failed))
	failed = waits(waiter.Lock)
	flushed(false, "a claim that waits")
	require.NoError(t, holder.Release(pgBackground))
	require.NoError(t, pgReceive(t, "the waiter", failed))
	flushed(true, "the waiter's acquire")
	require.NoError(t, waiter.Release(pgBackground))
	flushed(false, "a release")

	l := pgNew(t, p, key, "announced")
	require.NoError(t, l.Notify(pgBackground))
	flushed(false, "an announcement")
	_, err = l.Lock(pgBackground)
	require.NoError(t, err)
	flushed(true, "the acquire of a claim that was announced")
	require.NoError(t, l.Unlock(pgBackground))
}

// All deadlines of a provider share a timer. An observer that takes long delays no other deadline.
func TestDeadlinesDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		observed := make(chan struct{})
		p, err := NewLockProvider(FakeLockProviderKind, WithMaxLockDuration(time.Minute), WithPreemptionTimeout(time.Second),
			WithObserver(func(o Observation) {
				if o.Kind == ObservedNotified && o.Key == 1 {
					<-observed
				}
			}))
		require.NoError(t, err)
		var notified []<-chan NotificationPayload
		for key := range int64(3) {
			l, err := p.New(pgBackground, key+1, "push")
			require.NoError(t, err)
			ch, err := l.Lock(pgBackground)
			require.NoError(t, err)
			notified = append(notified, ch)
			time.Sleep(time.Second)
		}
		start := time.Now()
		for i, ch := range notified {
			<-ch
			require.Equal(t, time.Minute-time.Duration(3-i)*time.Second, time.Since(start))
		}
		for _, ch := range notified {
			_, ok := <-ch
			require.False(t, ok, "revoked")
		}
		close(observed)
	})
}

// With ten thousand concurrent callers, earlier ones are served first. An operation of another
// kind, such as a release, does not wait for all of them.
func TestPostgresTenThousandCallers(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri)
	held, _ := pgHold(t, p, 1<<40, "is released meanwhile")
	s := p.session
	const callers = 10_000
	pgExec(t, pgDB(t, uri), `INSERT INTO env_lock_state (lock_key) SELECT generate_series(1, $1)`, callers)
	goOn := occupy(t, s.disk)
	all := make([]*op, callers)
	s.mu.Lock()
	for i := range all {
		c := claim{key: int64((i*7919)%callers + 1), id: uuid.New(), event: "concurrently"}
		all[i] = newOp(pgBackground, opAnnounce, c)
		all[i].asked = time.Now()
		s.enqueueLocked(all[i])
	}
	s.mu.Unlock()
	// served counts the callers that have a result, and requires that they are the earliest ones.
	served := func() (n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for i, o := range all {
			if o.state == opDone {
				n++
				require.Equal(t, i+1, n, "who came later was served before")
			}
		}
		return n
	}
	released := make(chan int, 1)
	go func() {
		assert.NoError(t, held.Unlock(pgBackground))
		released <- served()
	}()
	queued(t, s.disk, callers)
	goOn()
	pgUntil(t, "all have a result", func() bool { return served() == callers })
	require.Less(t, pgReceive(t, "the release", released), callers, "it came last, but does not wait for all")
	for _, o := range all {
		<-o.done
		require.NoError(t, o.err)
	}
}

func TestFakeIDs(t *testing.T) {
	p := &FakeLockProvider{}
	p.init()
	defer func() { require.NoError(t, p.Close()) }()
	seen := map[uuid.UUID]bool{}
	for range 1000 {
		id := p.session.newID()
		require.False(t, seen[id])
		seen[id] = true
		require.Equal(t, uuid.Version(4), id.Version())
		require.Equal(t, uuid.RFC4122, id.Variant())
	}
}

// C4, C52: the error of a waiter that is superseded without a notification names the newer claim,
// even if the connection for everything but claims is not available, as after an outage.
func TestPostgresSupersededUnheard(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p, q := pgProvider(t, uri, WithPreemptionTimeout(time.Minute)), pgProvider(t, uri)
	holder, _ := pgHold(t, p, 1, "holder")
	waiter := pgNew(t, p, 1, "waiter")
	require.NoError(t, waiter.Notify(pgBackground))
	superseded := pgWaits(t, waiter)
	goOn := occupy(t, p.session.swift)
	q.session.muted(errors.New("muted"))
	newer := pgNew(t, q, 1, "newer")
	require.NoError(t, newer.Notify(pgBackground))
	err := pgReceive(t, "the waiter", superseded)
	goOn()
	var conflict *ConflictError
	require.ErrorAs(t, err, &conflict)
	require.ErrorIs(t, err, ErrLockPreempted)
	require.Nil(t, conflict.Holder)
	require.NotNil(t, conflict.Winner)
	require.Equal(t, newer.claim.id, conflict.Winner.ID)
	require.ErrorContains(t, err, `superseded by the newer claim "newer"`)
	require.NoError(t, holder.Unlock(pgBackground))
}

// The time at which a claim was asked for is not too early by the server's clock, however long the
// answer about that clock takes. Otherwise a claim that is repeated on another connection could be
// superseded by an earlier one of the same caller.
func TestServerTimeIsNotTooEarly(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	var slow atomic.Bool
	px := newProxy(t, "", uri, func(_ *proxied, to direction, _ byte, _ []byte) verdict {
		if to == toClient && slow.Load() {
			<-time.After(100 * time.Millisecond)
		}
		return pass
	})
	dsn, err := sessionDSN(px.uri(t, uri))
	require.NoError(t, err)
	l, err := openLink(pgBackground, func(context.Context) (string, error) { return dsn, nil }, nil, time.Minute)
	require.NoError(t, err)
	t.Cleanup(l.close)
	_, err = l.serverTime(pgBackground, time.Now())
	require.NoError(t, err)
	slow.Store(true)
	l.clockAt = time.Time{}
	before := pgGet[float64](t, pgDB(t, uri), `SELECT date_part('epoch', clock_timestamp())`)
	asked := time.Now()
	got, err := l.serverTime(pgBackground, asked)
	require.NoError(t, err)
	require.GreaterOrEqual(t, got, before)
}

// The labels of a row may be any JSON, and columns may be missing, because an operator can have
// written the row.
func TestDecodeClaim(t *testing.T) {
	id := uuid.New()
	for _, labels := range []string{"null", "1", `"text"`, "[]", `{"a":1}`, `{"a":{"b":"c"}}`} {
		text := `{"id" : "` + id.String() + `", "labels" : ` + labels + `, "event" : "push", "since" : null, "host" : null, "pid" : null, "token" : 7}`
		require.Equal(t, &ClaimInfo{ID: id, Event: "push", Token: 7}, decodeClaim(sql.NullString{String: text, Valid: true}), labels)
	}
	got := decodeClaim(sql.NullString{String: `{"labels" : {"a":"b"}, "since" : "2026-11-28T12:34:56.123456+02:00", "host" : "h", "pid" : 5}`, Valid: true})
	require.True(t, got.Since.Equal(time.Date(2026, 11, 28, 10, 34, 56, 123456000, time.UTC)))
	require.Equal(t, time.Local, got.Since.Location())
	require.Equal(t, map[string]string{"a": "b"}, got.Labels)
	require.Nil(t, decodeClaim(sql.NullString{}))
}
