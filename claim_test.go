package locker

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/preemptable/locker/internal/pgserver"
)

// What follows is about claims that announce and take at once, on a key that is
// remembered.

// C1: the rows belong to the operator, who may change them between two claims.
func TestPostgresKeyMoved(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	// cycle answers the key that is held meanwhile.
	cycle := func(pr uint) (key int64) {
		l := f("org/repo", pr, "push")
		_, err := l.Lock(pgBackground)
		require.NoError(t, err)
		held := pgAdvisory(t, db)
		require.Len(t, held, 1, "one key, and nothing left of another")
		for key = range held {
		}
		require.NoError(t, l.Release(pgBackground))
		require.Empty(t, pgAdvisory(t, db))
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

	// Another pull request has the key that is remembered.
	one = cycle(1)
	pgExec(t, db, `UPDATE env_locks SET lock_key = 778 WHERE pull_request = 1`)
	pgExec(t, db, `UPDATE env_locks SET lock_key = $1 WHERE pull_request = 2`, one)
	require.Equal(t, one, cycle(2))
	require.Equal(t, int64(778), cycle(1))

	// The row of the key is gone, then all of them.
	pgExec(t, db, `DELETE FROM env_lock_state WHERE lock_key = 778`)
	cycle(1)
	pgExec(t, db, `TRUNCATE env_locks, env_lock_state`)
	cycle(1)
	cycle(2)
}

// A claim that comes too late by its order gives back the key that it may have got.
func TestPostgresLateClaimTakesNothing(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	require.NoError(t, goRound(f("org/repo", 1, "new").Order(5)))
	_, err := f("org/repo", 1, "old").Order(3).Lock(pgBackground)
	require.ErrorIs(t, err, ErrClaimOutdated)
	require.Empty(t, pgAdvisory(t, db))
	require.NoError(t, goRound(f("org/repo", 1, "newer").Order(6)))
}

// Where it cannot be given back, the session ends with it: a key that nobody holds must
// not stay locked.
func TestPostgresLateClaimCannotGiveBack(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	require.NoError(t, goRound(f("org/repo", 1, "new").Order(5)))
	require.NoError(t, onLane(t, p.session, 0, func(l *link) (err error) {
		l.giveBack, err = l.conn.PrepareContext(pgBackground, `SELECT 1 / (cardinality($1::bigint[]) * 0)`)
		return err
	}))
	_, err := f("org/repo", 1, "old").Order(3).Lock(pgBackground)
	require.ErrorContains(t, err, "give keys back")
	pgUntil(t, "nothing stays locked", func() bool { return len(pgAdvisory(t, db)) == 0 })
}

// C21, C22: while the server is away a claim on a key that is remembered ends for the same
// reasons as any other.
func TestPostgresClaimDuringOutage(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	px := newProxy(t, "", uri, nil)
	p := pgProvider(t, px.uri(t, uri), WithLockTimeout(time.Second))
	q := pgProvider(t, px.uri(t, uri))
	var lockers []*PreemptiveLocker
	for i, f := range []PreemptiveLockerFactory{pgLocker(t, p), pgLocker(t, q)} {
		require.NoError(t, goRound(f("org/repo", uint(i), "before")))
		lockers = append(lockers, f("org/repo", uint(i), "during"))
	}
	px.close()
	for _, provider := range []*PostgresLockProvider{p, q} {
		pgUntil(t, "the session is lost", func() bool { return !provider.Stats().Connected })
	}
	_, err := lockers[0].Lock(pgBackground)
	require.ErrorIs(t, err, ErrLockTimeout)
	require.ErrorContains(t, err, "not available", "and the reason is told")

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

// inOneBatch has the worker wait until number operations have been queued by f.
func inOneBatch(t *testing.T, s *session, number int, f func()) {
	t.Helper()
	ready, done := make(chan struct{}), make(chan struct{})
	s.mu.Lock()
	s.lanes[0].choreLocked(func(*link) error {
		close(ready)
		pgUntil(t, "the operations are queued", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.lanes[0].queuedLocked() == number
		})
		close(done)
		return nil
	})
	s.mu.Unlock()
	<-ready
	f()
	<-done
}

// C15: a token is durable before it is given out, also if another claim of its batch
// notifies and the batch is not flushed. Where that fails, what was taken is not
// given out, and is free.
func TestPostgresTakenAndNotified(t *testing.T) {
	t.Parallel()
	for name, flush := range map[string]string{
		"it is flushed": sqlFlush,
		"it fails":      `SELECT 1 / (random() * 0)::integer`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			p, q := pgProvider(t, uri), pgProvider(t, uri)
			fp, fq := pgLocker(t, p), pgLocker(t, q)
			for pr := range uint(2) { // makes the rows, and the provider remembers the keys
				require.NoError(t, goRound(fp("org/repo", pr, "before")))
			}
			holder := fq("org/repo", 0, "holder")
			told, err := holder.Lock(pgBackground)
			require.NoError(t, err)

			require.NoError(t, onLane(t, p.session, 0, func(l *link) (err error) {
				l.flush, err = l.conn.PrepareContext(pgBackground, flush)
				return err
			}))
			errs := [2]chan error{make(chan error, 1), make(chan error, 1)}
			locks := [2]*PreemptiveLocker{fp("org/repo", 0, "waits"), fp("org/repo", 1, "takes")}
			inOneBatch(t, p.session, 2, func() {
				for i, l := range locks {
					go func() {
						_, err := l.Lock(pgBackground)
						errs[i] <- err
					}()
				}
			})
			err = pgReceive(t, "the one that takes", errs[1])
			require.Equal(t, "waits", pgReceive(t, "the holder is told", told).Message)
			if name == "it fails" {
				require.ErrorContains(t, err, "division by zero")
				key, err := q.LockKey(pgBackground, "org/repo", 1)
				require.NoError(t, err)
				pgUntil(t, "the key is free", func() bool { return pgAdvisory(t, db)[key] == 0 })
			} else {
				require.NoError(t, err)
				require.NoError(t, locks[1].Release(pgBackground))
			}
			require.NoError(t, holder.Release(pgBackground))
			require.NoError(t, pgReceive(t, "the one that waits", errs[0]))
			require.NoError(t, locks[0].Release(pgBackground))
		})
	}
}

// C15: what grants a key is flushed before it is answered, and nothing else is.
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
			return l.wake != nil // it sleeps, or has slept
		})
		return failed
	}
	quiet := pgNew(t, q, key, "never announced")
	failed := waits(quiet.Lock)
	flushed(false, "a wait that asks to be told")
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

// Advisory locks are re-entrant: a key that this session holds is not taken by another
// claim of the same provider, also if the row does not say so any more.
func TestPostgresHeldIsNotTaken(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	holder := f("org/repo", 1, "holder")
	told, err := holder.Lock(pgBackground)
	require.NoError(t, err)
	pgExec(t, db, `DELETE FROM env_lock_state`)
	next := f("org/repo", 1, "next")
	got := make(chan error, 1)
	go func() {
		_, err := next.Lock(pgBackground)
		got <- err
	}()
	require.Equal(t, "next", pgReceive(t, "the holder is told", told).Message)
	require.Len(t, pgAdvisory(t, db), 1, "the holder's lock is still there")
	require.Empty(t, got, "the holder has not released yet")
	require.NoError(t, holder.Release(pgBackground))
	require.NoError(t, pgReceive(t, "the next", got))
	require.NoError(t, next.Release(pgBackground))
	require.Empty(t, pgAdvisory(t, db))
}

// What a batch answered before it failed does not count.
func TestPostgresHalfAnswered(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	for pr := range uint(2) {
		require.NoError(t, goRound(f("org/repo", pr, "before")))
	}
	// Two claims are granted, and then it fails; for one claim it answers nothing.
	require.NoError(t, onLane(t, p.session, 0, func(l *link) (err error) {
		l.announce, err = l.conn.PrepareContext(pgBackground, `
			SELECT k, 1::bigint, 2::bigint, NULL::float8, NULL::text, NULL::text
			FROM unnest($1::bigint[]) k WHERE cardinality($1::bigint[]) = 2
			UNION ALL
			SELECT 1 / (cardinality($1::bigint[]) - 2), 0, 0, 0, $8::text, NULL WHERE cardinality($1::bigint[]) = 2
				AND num_nulls($2::uuid[], $3::text[], $4::text[], $5::integer[], $6::boolean[], $7::integer, $9::integer) >= 0`)
		return err
	}))
	errs := make(chan error, 2)
	inOneBatch(t, p.session, 2, func() {
		for pr := range uint(2) {
			go func() {
				_, err := f("org/repo", pr, "during").Lock(pgBackground)
				errs <- err
			}()
		}
	})
	for range 2 {
		require.ErrorContains(t, pgReceive(t, "a claim", errs), "again and again")
	}
	require.Zero(t, p.Stats().Held)
	require.Empty(t, pgAdvisory(t, db))
}

// All deadlines of a provider share a timer: an observer that takes its time delays
// nobody else's.
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
		var told []<-chan NotificationPayload
		for key := range int64(3) {
			l, err := p.New(pgBackground, key+1, "push")
			require.NoError(t, err)
			ch, err := l.Lock(pgBackground)
			require.NoError(t, err)
			told = append(told, ch)
			time.Sleep(time.Second)
		}
		start := time.Now()
		for i, ch := range told {
			<-ch
			require.Equal(t, time.Minute-time.Duration(3-i)*time.Second, time.Since(start))
		}
		for _, ch := range told {
			_, ok := <-ch
			require.False(t, ok, "revoked")
		}
		close(observed)
	})
}

// Ten thousand callers at once: who came first is served first, on each of the two
// connections between which they are split, and who does something else, such as give
// back a key, does not wait for all of them.
func TestPostgresTenThousandCallers(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri)
	held, _ := pgHold(t, p, 1<<40, "gives back meanwhile")
	s := p.session
	const callers = 10_000
	pgExec(t, pgDB(t, uri), `INSERT INTO env_lock_state (lock_key) SELECT generate_series(1, $1)`, callers)
	goOn := occupy(t, s, 0)
	all := make([]*op, callers)
	s.mu.Lock()
	for i := range all {
		c := claim{key: int64((i*7919)%callers + 1), id: uuid.New(), event: "all at once"}
		all[i] = newOp(pgBackground, opAnnounce, c)
		s.enqueueLocked(all[i])
	}
	s.mu.Unlock()
	// answered counts who has an answer; they are those who came first of each half.
	answered := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		var came, served [2]int
		for _, o := range all {
			h := half(o.req.key)
			came[h]++
			if o.state == opDone {
				served[h]++
				require.Equal(t, came[h], served[h], "who came later was served before")
			}
		}
		return served[0] + served[1]
	}
	released := make(chan int, 1)
	go func() {
		assert.NoError(t, held.Unlock(pgBackground))
		released <- answered()
	}()
	queued(t, s, 0, opRelease, 1)
	goOn()
	pgUntil(t, "all are answered", func() bool { return answered() == callers })
	require.Less(t, pgReceive(t, "the release", released), callers, "it came last, but does not wait for all")
	for _, o := range all {
		<-o.done
		require.NoError(t, o.err)
	}
}

func TestFakeIDs(t *testing.T) {
	m := newMemory()
	seen := map[uuid.UUID]bool{}
	for range 1000 {
		id := m.newID()
		require.False(t, seen[id])
		seen[id] = true
		require.Equal(t, uuid.Version(4), id.Version())
		require.Equal(t, uuid.RFC4122, id.Variant())
	}
}
