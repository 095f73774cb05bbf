package locker

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Tests of sessions: how they live, are suspended, reconnect, are lost and lose their keys to a
// successor.

// outage is a provider's path to the server, which can be closed and opened again.
type outage struct {
	t       testing.TB
	server  string
	address string
	px      *proxy
}

func newOutage(t testing.TB, server string) *outage {
	t.Helper()
	px := newProxy(t, "", server, nil)
	return &outage{t: t, server: server, address: px.listener.Addr().String(), px: px}
}

func (o *outage) uri() string { return throughAddress(o.t, o.server, o.address) }

// begin closes all connections, and accepts no new ones.
func (o *outage) begin() { o.px.close() }

func (o *outage) end() {
	o.t.Helper()
	o.px = newProxy(o.t, o.address, o.server, nil)
}

// pgSessions returns the number of rows of sessions with an ID.
func pgSessions(t testing.TB, db *sql.DB, id int64) int {
	t.Helper()
	return pgGet[int](t, db, `SELECT count(*) FROM env_lock_sessions WHERE id = $1`, id)
}

// pgSession returns a provider's session.
func pgSession(p *PostgresLockProvider) sessionRef {
	ref, _ := p.session.trust.current()
	return ref
}

// pgSaw returns when a provider has seen that a session's advisory lock is free.
func pgSaw(t testing.TB, p *PostgresLockProvider, lock int64) {
	t.Helper()
	pgUntil(t, "it is seen that the session is dead", func() bool {
		w := &p.session.watches
		w.mu.Lock()
		defer w.mu.Unlock()
		_, seen := w.ripe[lock]
		return seen
	})
}

// pgCutUnnoticed makes the server lose sight of a provider's session. The provider does not notice
// that before its next heartbeat fails.
func pgCutUnnoticed(t testing.TB, db *sql.DB, px *proxy, p *PostgresLockProvider) {
	t.Helper()
	pid := pgOwn(t, db, p.session)
	require.True(t, px.silenceBackend(pid))
	pgTerminate(t, db, pid)
	pgUnseen(t, "the server does not see the session", db, pid)
}

// pgFree returns when no claim holds a key.
func pgFree(t testing.TB, db *sql.DB, key int64) {
	t.Helper()
	pgUntil(t, "the key is free", func() bool {
		_, held := pgHolders(t, db)[key]
		return !held
	})
}

// C28: a session has a row from its first use on. Close deletes the row.
func TestSessionRow(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	pgExec(t, db, SchemaSQL)
	p := pgProvider(t, pgNamed(t, uri, "deployer"), WithSessionTimeout(90*time.Second))
	require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM env_lock_sessions`), "nothing has been asked for")
	l, _ := pgHold(t, p, 1, "first use")
	ref := pgSession(p)

	var id, lock int64
	var pid int
	var timeout, host, application string
	var age float64
	require.NoError(t, db.QueryRow(`SELECT id, lock, timeout::text, host, pid, application, date_part('epoch', now() - started_at) FROM env_lock_sessions`).
		Scan(&id, &lock, &timeout, &host, &pid, &application, &age))
	require.Equal(t, ref, sessionRef{1, id, lock})
	require.Equal(t, "00:01:30", timeout)
	require.Equal(t, hostName, host)
	require.Equal(t, os.Getpid(), pid)
	require.Equal(t, "deployer", application)
	require.Less(t, age, soon.Seconds())
	require.Equal(t, map[int64]int64{1: id}, pgHolders(t, db))
	require.Contains(t, pgAdvisory(t, db), lock)

	require.NoError(t, l.Unlock(pgBackground))
	require.Equal(t, 1, pgSessions(t, db, id))
	require.NoError(t, p.Close())
	require.Zero(t, pgSessions(t, db, id))
	pgUntil(t, "its advisory lock is gone", func() bool { return len(pgAdvisory(t, db)) == 0 })
}

// The row of a session that is dead is deleted by another provider, once that provider has watched
// the session for its timeout, and once no row names it as a holder.
func TestSessionSweep(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	way := newOutage(t, uri)
	const timeout = 5 * time.Second
	idle := pgProvider(t, way.uri(), WithSessionTimeout(timeout))
	l, _ := pgHold(t, idle, 1, "was used")
	require.NoError(t, l.Unlock(pgBackground))
	holds := pgProvider(t, way.uri(), WithSessionTimeout(timeout))
	pgHold(t, holds, 2, "is held")
	a, b := pgSession(idle), pgSession(holds)

	// The provider that deletes the rows has another timeout, and looks for them with every 20th
	// heartbeat.
	sweeper := pgProvider(t, uri, WithSessionTimeout(time.Second))
	pgHold(t, sweeper, 3, "in use")
	start := time.Now()
	way.begin()
	pgUntil(t, "the row of the idle session is deleted", func() bool { return pgSessions(t, db, a.id) == 0 })
	require.GreaterOrEqual(t, time.Since(start), timeout)
	require.Equal(t, 1, pgSessions(t, db, b.id), "it is still needed")
	require.Equal(t, 1, pgSessions(t, db, pgSession(sweeper).id))

	next, _ := pgHold(t, pgProvider(t, uri, WithLockTimeout(2*soon)), 2, "successor")
	require.NoError(t, next.Unlock(pgBackground))
	pgUntil(t, "the row of the other session is deleted", func() bool { return pgSessions(t, db, b.id) == 0 })
}

// C25: the key of a process that was killed, or cut off for good, is taken over once its session
// has been watched being dead for the session's own timeout. That timeout is in the session's row,
// and the waiter's does not matter. For a session without a row it is the waiter's.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	const long = time.Hour
	for _, c := range []struct {
		name           string
		holder, waiter time.Duration
		forget         bool // the session's row is deleted
		least          time.Duration
		waitsAlready   bool
	}{
		{name: "both have the same timeout", holder: 2 * time.Second, waiter: 2 * time.Second, least: 2 * time.Second, waitsAlready: true},
		{name: "the waiter comes later", holder: 2 * time.Second, waiter: 2 * time.Second, least: 2 * time.Second},
		{name: "the holder's is longer", holder: 5 * time.Second, waiter: time.Second, least: 5 * time.Second, waitsAlready: true},
		{name: "the waiter's is longer", holder: time.Second, waiter: long, least: time.Second, waitsAlready: true},
		{name: "without a row", holder: time.Second, waiter: 4 * time.Second, forget: true, least: 4 * time.Second, waitsAlready: true},
	} {
		t.Run("C11 "+c.name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			way := newOutage(t, uri)
			killed := pgProvider(t, way.uri(), WithSessionTimeout(c.holder))
			next := pgProvider(t, uri, WithSessionTimeout(c.waiter), WithLockTimeout(2*soon))
			pgHold(t, next, 2, "connects")
			l, ch := pgHold(t, killed, 1, "killed")
			old := pgSession(killed)
			var q *PostgresLock
			var granted <-chan error
			// The waiter was not announced, so the holder is not notified.
			if c.waitsAlready {
				q, granted = pgWait(t, next, 1, "successor")
			}
			start := time.Now()
			way.begin()
			if c.forget {
				pgExec(t, db, `DELETE FROM env_lock_sessions WHERE id = $1`, old.id)
			}
			if !c.waitsAlready {
				q, granted = pgWait(t, next, 1, "successor")
			}
			require.NoError(t, pgReceive(t, "the successor takes over", granted))
			require.GreaterOrEqual(t, time.Since(start), c.least)
			select {
			case n := <-ch:
				require.Equal(t, l.claim.id, n.ID, "C13")
			default:
				require.FailNow(t, "C24 the predecessor was not notified before")
			}
			require.ErrorIs(t, l.Cause(), ErrLockLost)
			require.Greater(t, q.Token(), l.Token(), "C15")
			require.Equal(t, pgSession(next).id, pgHolders(t, db)[1])

			// The predecessor comes back. Its calls have no effect on the successor.
			way.end()
			require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost, "C18")
			require.NoError(t, l.Unlock(pgBackground), "C18 once")
			again, _ := pgHold(t, killed, 3, "C26 the provider works again")
			require.NotEqual(t, old.id, pgSession(killed).id, "a session that was lost is abandoned")
			require.NoError(t, again.Unlock(pgBackground))
			pgQuiet(t, q.ch)
			require.NoError(t, q.Unlock(pgBackground))
		})
	}
}

// A successor need not wait for a lock that was lost and whose function has returned.
func TestLostHoldIsReleased(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	way := newOutage(t, uri)
	p := pgProvider(t, way.uri(), WithSessionTimeout(time.Second))
	l, ch := pgHold(t, p, 1, "lost")
	way.begin()
	pgReceive(t, "the holder is notified", ch)
	require.Contains(t, pgHolders(t, db), int64(1), "its function runs")
	require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost)
	way.end()
	pgFree(t, db, 1)
}

// C24: a session that reconnects in time keeps its holds. It has a new advisory lock, so a
// successor that has watched the old one has to watch again from the start.
func TestReconnectRestartsTheWatch(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	way := newOutage(t, uri)
	const timeout = 6 * time.Second
	var seen seenSessions
	p := pgProvider(t, way.uri(), WithSessionTimeout(timeout), WithObserver(seen.observe))
	q := pgProvider(t, uri, WithLockTimeout(4*soon))
	l, ch := pgHold(t, p, 1, "holder")
	first := pgSession(p)
	waiter, granted := pgWait(t, q, 1, "waiter")

	way.begin()
	pgSaw(t, q, first.lock)
	way.end()
	pgUntil(t, "the session is reconnected", func() bool { return len(seen.of(ObservedReconnected)) == 1 })
	second := pgSession(p)
	require.Equal(t, first.id, second.id)
	require.NotEqual(t, first.lock, second.lock)
	pgUntil(t, "the first watch is over", func() bool { return q.session.watches.expired(first.lock) })
	asked := func() string {
		return pgGet[string](t, db, `SELECT max(query_start)::text FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%want AS MATERIALIZED%'`)
	}
	// The waiter has to try twice.
	for range 2 {
		before := asked()
		pgUntil(t, "the waiter tries again", func() bool { return asked() != before })
	}
	require.Empty(t, granted, "it was taken over from a session that is connected")
	pgQuiet(t, ch)
	require.Equal(t, second.id, pgHolders(t, db)[1])

	start := time.Now()
	way.begin()
	pgReceive(t, "the holder is notified", ch)
	require.Empty(t, granted, "the second watch was not as long as the first")
	require.NoError(t, pgReceive(t, "the waiter takes over", granted))
	require.GreaterOrEqual(t, time.Since(start), timeout)
	require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost)
	pgUntil(t, "the loss is observed", func() bool { return len(seen.of(ObservedLost)) == 1 })
	require.NoError(t, waiter.Unlock(pgBackground))
}

// However often a session's connection is cut, its holds continue as long as it reconnects in time.
func TestFlapping(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	const timeout = 4 * time.Second
	p := pgProvider(t, uri, WithSessionTimeout(timeout))
	q := pgProvider(t, uri, WithSessionTimeout(time.Second), WithLockTimeout(4*soon))
	l, ch := pgHold(t, p, 1, "holder")
	waiter, granted := pgWait(t, q, 1, "waiter")
	cuts := 0
	for start := time.Now(); time.Since(start) < 2*timeout; cuts++ {
		pid := pgOwn(t, db, p.session)
		_, err := db.Exec(`SELECT pg_terminate_backend($1)`, pid)
		require.NoError(t, err)
		pgUntil(t, "the connection has ended", func() bool {
			return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE pid = $1`, pid) == 0
		})
		require.Empty(t, granted)
	}
	t.Logf("%d cuts", cuts)
	pgQuiet(t, ch)
	require.NoError(t, l.Unlock(pgBackground))
	require.NoError(t, pgReceive(t, "the waiter gets the key", granted))
	require.NoError(t, waiter.Unlock(pgBackground))
}

// loser is a proxy's filter that loses the response to one statement. The server has run and
// committed the statement.
type loser struct {
	mu     sync.Mutex // guards everything below
	marked []byte     // part of the statement's arguments, or nil to lose no more responses
	after  func()     // called when the response is lost, before the connection is cut
	on     *proxied   // the connection of that statement
	lost   int
}

// lose makes the filter lose the response to the next statement that names a claim.
func (f *loser) lose(c claim, after func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.marked, f.after = append([]byte(nil), c.id[:]...), after
}

func (f *loser) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lost
}

func (f *loser) filter(c *proxied, to direction, kind byte, body []byte) verdict {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case to == toServer && kind == 'B' && f.marked != nil && bytes.Contains(body, f.marked): // Bind
		f.on, f.marked = c, nil
	case to == toClient && f.on == c && kind == 'Z': // ReadyForQuery follows the commit
		f.on = nil
		f.lost++
		if f.after != nil {
			f.after()
		}
		return cut
	case to == toClient && f.on == c:
		return drop
	}
	return pass
}

// pgAudit makes the database record every committed state of a key's row: claims, tokens and
// holders. It returns a function that returns how many different values a column had.
func pgAudit(t testing.TB, db *sql.DB) (values func(column string, key int64) int) {
	t.Helper()
	pgExec(t, db, `CREATE TABLE audit AS SELECT * FROM env_lock_state WHERE false;
		CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit SELECT NEW.*; RETURN NULL; END $$;
		CREATE TRIGGER audit AFTER INSERT OR UPDATE ON env_lock_state FOR EACH ROW EXECUTE FUNCTION audit()`)
	return func(column string, key int64) int {
		t.Helper()
		return pgGet[int](t, db, `SELECT count(DISTINCT `+column+`) FROM audit WHERE lock_key = $1`, key)
	}
}

// A statement whose response was lost is repeated on another connection. If it had taken effect,
// the repeat changes nothing.
func TestLostAnswers(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var f loser
	px := newProxy(t, "", uri, f.filter)
	var log pgLog
	// The session timeout is so long that no check of rows comes in between.
	p := pgProvider(t, px.uri(t, uri), WithSessionTimeout(10*time.Minute), WithLockTimeout(2*soon), log.option())
	q := pgProvider(t, uri, WithLockTimeout(2*soon))
	for key := range int64(10) {
		l, _ := pgHold(t, p, key, "creates the row")
		require.NoError(t, l.Unlock(pgBackground))
	}
	values := pgAudit(t, db)
	losses := 0
	lost := func(t *testing.T) {
		t.Helper()
		losses++
		require.Equal(t, losses, f.count(), "no answer was lost: the test is void")
	}

	t.Run("of a claim", func(t *testing.T) {
		l := pgNew(t, p, 1, "claim")
		f.lose(l.claim, nil)
		require.NoError(t, l.Notify(pgBackground))
		lost(t)
		require.Equal(t, 1, values("claim", 1), "it was announced twice")
		require.Equal(t, l.standing.number, pgGet[int64](t, db, `SELECT claim FROM env_lock_state WHERE lock_key = 1`))
		_, err := l.Lock(pgBackground)
		require.NoError(t, err)
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("of a claim that takes", func(t *testing.T) {
		l := pgNew(t, p, 2, "claim that takes")
		f.lose(l.claim, nil)
		ch, err := l.lockKey(pgBackground, lockCall{asked: time.Now(), announce: true})
		require.NoError(t, err)
		lost(t)
		require.Equal(t, 1, values("claim", 2), "it was announced twice")
		require.Equal(t, 1, values("token", 2), "it was taken twice")
		require.Equal(t, l.Token(), pgGet[int64](t, db, `SELECT token FROM env_lock_state WHERE lock_key = 2`))
		pgQuiet(t, ch)
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("of an acquire", func(t *testing.T) {
		l := pgNew(t, p, 3, "acquire")
		f.lose(l.claim, nil)
		ch, err := l.Lock(pgBackground)
		require.NoError(t, err)
		lost(t)
		require.Equal(t, 1, values("token", 3), "it was taken twice")
		require.Equal(t, l.Token(), pgGet[int64](t, db, `SELECT token FROM env_lock_state WHERE lock_key = 3`))
		pgQuiet(t, ch)
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("of an acquire whose caller has left", func(t *testing.T) {
		l := pgNew(t, p, 4, "acquire")
		ctx, cancel := context.WithCancel(pgBackground)
		defer cancel()
		f.lose(l.claim, cancel)
		// The lock may be granted nevertheless.
		if _, err := l.Lock(ctx); err != nil {
			require.ErrorIs(t, err, context.Canceled)
		}
		lost(t)
		require.Equal(t, 1, values("token", 4))
		require.NoError(t, l.Unlock(pgBackground))
		pgFree(t, db, 4)
	})

	t.Run("of a release", func(t *testing.T) {
		l, _ := pgHold(t, p, 5, "release")
		f.lose(l.claim, nil)
		require.NoError(t, l.Unlock(pgBackground))
		lost(t)
		require.NotContains(t, pgHolders(t, db), int64(5))
	})

	t.Run("of a release with a successor", func(t *testing.T) {
		l, _ := pgHold(t, p, 6, "release")
		next, granted := pgWait(t, q, 6, "successor")
		f.lose(l.claim, nil)
		require.NoError(t, l.Unlock(pgBackground))
		lost(t)
		require.NoError(t, pgReceive(t, "the successor", granted))
		require.Equal(t, pgSession(q).id, pgHolders(t, db)[6], "the repeat has freed the successor's hold")
		pgQuiet(t, next.ch)
		require.NoError(t, next.Unlock(pgBackground))
	})

	t.Run("of a claim, and a newer one comes before the repeat", func(t *testing.T) {
		l := pgNew(t, p, 7, "older")
		f.lose(l.claim, func() {
			_, err := db.ExecContext(pgBackground, `UPDATE env_lock_state SET claim = claim + 1, claim_id = gen_random_uuid(),
				claim_event = 'newer', claimed_at = clock_timestamp() WHERE lock_key = 7`)
			assert.NoError(t, err)
		})
		// The claim counts as asked for long before. Otherwise the newer claim could come within
		// the time that a message takes to arrive.
		_, err := l.lockKey(pgBackground, lockCall{asked: time.Now().Add(-5 * time.Second), announce: true})
		require.ErrorIs(t, err, ErrLockPreempted)
		require.ErrorContains(t, err, "newer")
		lost(t)
		require.Equal(t, 2, values("claim", 7), "the older claim was announced once more")
	})

	require.NotContains(t, log.String(), "session suspended", "the session's own connection was cut: the test is void")
}

// Claims that are delayed by an outage keep the order in which they were asked for.
func TestDelayedClaims(t *testing.T) {
	t.Parallel()
	setup := func(t *testing.T) (way *outage, cutOff, direct *PostgresLockProvider) {
		t.Helper()
		uri := newDatabase(t)
		way = newOutage(t, uri)
		cutOff = pgProvider(t, way.uri(), WithSessionTimeout(time.Minute), WithLockTimeout(2*soon))
		direct = pgProvider(t, uri, WithLockTimeout(2*soon))
		for _, p := range []*PostgresLockProvider{cutOff, direct} {
			l, _ := pgHold(t, p, 1, "before")
			require.NoError(t, l.Unlock(pgBackground))
		}
		way.begin()
		return way, cutOff, direct
	}
	// claims announces a claim and begins to lock.
	claims := func(t *testing.T, p *PostgresLockProvider, event string) (*PostgresLock, <-chan error) {
		t.Helper()
		l := pgNew(t, p, 1, event)
		asked := time.Now()
		done := make(chan error, 1)
		go func() {
			_, err := l.lockKey(pgBackground, lockCall{asked: asked, announce: true})
			done <- err
		}()
		pgUntil(t, "the claim waits for the outage to end", func() bool { return p.Stats().Queued == 1 })
		pgUntil(t, "it is late", func() bool { return time.Since(asked) > lateAfter+100*time.Millisecond })
		return l, done
	}

	t.Run("the one that arrives later was asked for before", func(t *testing.T) {
		t.Parallel()
		way, cutOff, direct := setup(t)
		_, failed := claims(t, cutOff, "older")
		newer := pgNew(t, direct, 1, "newer")
		require.NoError(t, newer.Notify(pgBackground))
		_, err := newer.Lock(pgBackground)
		require.NoError(t, err)
		way.end()
		err = pgReceive(t, "the older claim", failed)
		require.ErrorIs(t, err, ErrLockPreempted)
		require.ErrorContains(t, err, "newer")
		pgQuiet(t, newer.ch)
		require.NoError(t, newer.Unlock(pgBackground))
	})

	t.Run("the one that arrives later was asked for later", func(t *testing.T) {
		t.Parallel()
		way, cutOff, direct := setup(t)
		older := pgNew(t, direct, 1, "older")
		require.NoError(t, older.Notify(pgBackground))
		_, err := older.Lock(pgBackground)
		require.NoError(t, err)
		newer, done := claims(t, cutOff, "newer")
		way.end()
		require.Equal(t, "newer", pgReceive(t, "the holder is notified", older.ch).Message)
		require.NoError(t, older.Unlock(pgBackground))
		require.NoError(t, pgReceive(t, "the newer claim", done))
		require.NoError(t, newer.Unlock(pgBackground))
	})
}

// A release is not flushed. If a crash of the server forgets it, the row names a live session as
// the holder, and none of the session's locks has that hold. The row is released after the
// reconnect.
func TestForgottenRelease(t *testing.T) {
	t.Parallel()
	server := pgCluster(t, pgserver.Options{Config: map[string]string{
		"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "bgwriter_delay": "10s", "autovacuum": "off"}})
	uri := server.URI("postgres")
	db := pgDB(t, uri)
	db.SetMaxIdleConns(0)
	way := newOutage(t, uri)
	p := pgProvider(t, way.uri(), WithSessionTimeout(5*time.Minute), WithLockTimeout(2*soon))
	pgHold(t, p, 2, "still held")
	l, _ := pgHold(t, p, 1, "released")
	require.NoError(t, l.Unlock(pgBackground))
	require.NotContains(t, pgHolders(t, db), int64(1))
	way.begin()
	require.NoError(t, server.Restart(pgBackground, pgserver.Immediate))
	id := pgSession(p).id
	require.Equal(t, map[int64]int64{1: id, 2: id}, pgHolders(t, db), "the crash has forgotten nothing: the test is void")

	q := pgProvider(t, uri, WithLockTimeout(2*soon))
	next, granted := pgWait(t, q, 1, "successor")
	way.end()
	require.NoError(t, pgReceive(t, "the successor gets the key", granted))
	require.Equal(t, id, pgHolders(t, db)[2])
	require.NoError(t, next.Unlock(pgBackground))
}

// The row of a held key is deleted. The holder is notified by the next check of rows, and a
// successor waits for the session timeout.
func TestRowDeletedWhileHeld(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, query string
		announced   bool
	}{
		{"and there is no newer claim", `DELETE FROM env_lock_state`, false},
		{"and the successor has a claim", `DELETE FROM env_lock_state`, true},
		{"and the table is truncated", `TRUNCATE env_lock_state`, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			const timeout = 3 * time.Second
			p := pgProvider(t, uri, WithSessionTimeout(timeout))
			q := pgProvider(t, uri, WithSessionTimeout(timeout), WithLockTimeout(2*soon))
			pgHold(t, q, 99, "connects")
			key, err := p.LockKey(pgBackground, "org/repo", 1)
			require.NoError(t, err)
			l, ch := pgHold(t, p, key, "holder")
			next := pgNew(t, q, key, "successor")

			start := time.Now()
			pgExec(t, db, c.query)
			if c.announced {
				require.NoError(t, next.Notify(pgBackground))
			}
			granted := pgWaits(t, next)
			pgReceive(t, "the holder is notified", ch)
			require.Empty(t, granted, "the successor did not wait")
			if !c.announced {
				require.ErrorIs(t, l.Cause(), ErrLockLost)
				require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost)
			}
			require.NoError(t, pgReceive(t, "the successor gets the key", granted))
			require.GreaterOrEqual(t, time.Since(start), timeout)
			require.Greater(t, next.Token(), l.Token(), "C15 also without the row")
			require.NoError(t, next.Unlock(pgBackground))
		})
	}
}

// An operator removes a hold from its row. The holder is notified by the next check of rows, and
// the key is free.
func TestHoldTakenAway(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var seen seenSessions
	p := pgProvider(t, uri, WithSessionTimeout(3*time.Second), WithObserver(seen.observe))
	l, ch := pgHold(t, p, 1, "holder")
	_, other := pgHold(t, p, 2, "is not concerned")
	pgExec(t, db, `UPDATE env_lock_state SET holder_id = NULL, holder_session = NULL, holder_event = NULL, held_since = NULL WHERE lock_key = 1`)
	next, _ := pgHold(t, pgProvider(t, uri), 1, "successor")
	n := pgReceive(t, "the holder is notified", ch)
	require.Equal(t, l.claim.id, n.ID)
	require.ErrorIs(t, l.Cause(), ErrLockLost)
	_, open := <-ch
	require.False(t, open)
	require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost)
	pgUntil(t, "the loss is observed", func() bool { return len(seen.of(ObservedLost)) == 1 })
	pgQuiet(t, other)
	pgQuiet(t, next.ch)
	require.Contains(t, pgHolders(t, db), int64(1))
	require.NoError(t, next.Unlock(pgBackground))
}

// An operator deletes a session's row while the session lives. The session reconnects in time and
// writes the row again.
func TestSessionRowDeleted(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	const timeout = 5 * time.Second
	var seen seenSessions
	p := pgProvider(t, uri, WithSessionTimeout(timeout), WithObserver(seen.observe))
	_, ch := pgHold(t, p, 1, "holder")
	q := pgProvider(t, uri, WithSessionTimeout(timeout), WithLockTimeout(4*soon))
	_, granted := pgWait(t, q, 1, "waiter")
	id := pgSession(p).id
	start := time.Now()
	pgExec(t, db, `DELETE FROM env_lock_sessions WHERE id = $1`, id)
	pgUntil(t, "the row is there again", func() bool { return pgSessions(t, db, id) == 1 })
	pgUntil(t, "the session is reconnected", func() bool { return len(seen.of(ObservedReconnected)) > 0 })
	pgUntil(t, "whoever watched it would take over", func() bool { return time.Since(start) > 2*timeout })
	pgQuiet(t, ch)
	require.Empty(t, granted)
	require.Equal(t, id, pgHolders(t, db)[1])
}

//go:embed testdata/schema_before.sql
var schemaBefore string

// C28: the tables of the previous version are upgraded with their contents, by the first provider
// that comes, by several concurrently, and by hand.
func TestSchemaUpgrade(t *testing.T) {
	t.Parallel()
	columns := func(t *testing.T, db *sql.DB) string {
		t.Helper()
		return pgGet[string](t, db, `SELECT string_agg(table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable || ' ' || coalesce(column_default, ''), ', ' ORDER BY table_name, column_name)
			FROM information_schema.columns WHERE table_schema = 'public' AND table_name IN ('env_lock_state', 'env_lock_sessions', 'env_locks', 'env_lock_overview')`)
	}
	fresh := pgDB(t, newDatabase(t))
	pgExec(t, fresh, SchemaSQL)
	want := columns(t, fresh)

	for name, upgrade := range map[string]func(t *testing.T, db *sql.DB, uri string) error{
		"by eight providers": func(t *testing.T, db *sql.DB, uri string) error {
			errs := make(chan error, 8)
			for range cap(errs) {
				p := pgProvider(t, uri, WithSessionTimeout(2*time.Second), WithLockTimeout(2*soon))
				go func() {
					_, err := p.LockKey(pgBackground, "org/repo", 1)
					errs <- err
				}()
			}
			var all []error
			for range cap(errs) {
				all = append(all, pgReceive(t, "a provider", errs))
			}
			return errors.Join(all...)
		},
		"by hand, twice": func(t *testing.T, db *sql.DB, _ string) error {
			pgExec(t, db, SchemaSQL)
			pgExec(t, db, SchemaSQL)
			return nil
		},
		"by hand, twice, concurrently": func(t *testing.T, db *sql.DB, _ string) error {
			errs := make(chan error, 2)
			for range cap(errs) {
				go func() {
					_, err := db.ExecContext(pgBackground, SchemaSQL)
					errs <- err
				}()
			}
			return errors.Join(pgReceive(t, "one", errs), pgReceive(t, "the other", errs))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			pgExec(t, db, schemaBefore)
			pgExec(t, db, `INSERT INTO env_locks VALUES (77, 'org/repo', 1), (-5, 'org/repo', 2), (78, 'org/repo', 3);
				INSERT INTO env_lock_state (lock_key, claim, claim_id, claim_event, claimed_at, claim_order, top_order, claim_open, claim_session, claim_host, claim_pid,
					token, holder_id, holder_event, holder_host, holder_pid, held_since, unclean_at) VALUES
				(77, 8000000000000000, gen_random_uuid(), 'free', now(), 5, 7, false, 1, 'host', 1, 8000000000000001, NULL, NULL, NULL, NULL, NULL, now()),
				(-5, 8000000000000002, '11111111-1111-1111-1111-111111111111', 'held', now(), NULL, NULL, true, 2, 'host', 2,
					8000000000000003, '11111111-1111-1111-1111-111111111111', 'held', 'host', 2, now(), NULL)`)
			require.NoError(t, upgrade(t, db, uri))
			require.Equal(t, want, columns(t, db))
			require.Equal(t, 3, pgGet[int](t, db, `SELECT count(*) FROM env_locks`))
			require.Equal(t, 3, pgGet[int](t, db, `SELECT count(*) FROM env_lock_state`), "a key of the original library starts free")

			p := pgProvider(t, uri, WithSessionTimeout(2*time.Second), WithLockTimeout(2*soon))
			f := pgLocker(t, p)
			late := f("org/repo", 1, "late").Sequence(6)
			_, err := late.Lock(pgBackground)
			require.ErrorIs(t, err, ErrClaimOutdated, "the orders are kept")
			// The sessions of the former holders have ended, so a successor waits for the session
			// timeout.
			for pr := range uint(3) {
				l := f("org/repo", pr+1, "successor").Sequence(100)
				_, err := l.Lock(pgBackground)
				require.NoError(t, err)
				if pr < 2 {
					require.Greater(t, l.Token(), int64(8000000000000000), "C15")
				}
				require.NoError(t, l.Release(pgBackground))
			}
			holders, err := p.ListLocks(pgBackground)
			require.NoError(t, err)
			require.Empty(t, holders)
		})
	}
}

// A synchronous standby that does not respond makes commits wait forever. Claims wait for it within
// their bound, no holder is notified, and nothing accumulates on the server, whatever providers do
// meanwhile.
func TestStalledCommit(t *testing.T) {
	t.Parallel()
	server := pgCluster(t, pgserver.Options{})
	uri, err := server.CreateDatabase(pgBackground, "stall")
	require.NoError(t, err)
	db := pgDB(t, uri)
	const timeout = 6 * time.Second
	var seen seenSessions
	p := pgProvider(t, uri, WithSessionTimeout(timeout), WithLockTimeout(4*soon), WithObserver(seen.observe))
	f := pgLocker(t, p)
	held := f("r", 1, "held before")
	notified, err := held.Lock(pgBackground)
	require.NoError(t, err)
	released := f("r", 3, "released meanwhile")
	_, err = released.Lock(pgBackground)
	require.NoError(t, err)
	require.NoError(t, goRound(f("r", 2, "before")))
	other := pgProvider(t, uri, WithSessionTimeout(timeout))
	require.NoError(t, goRound(pgLocker(t, other)("r", 2, "before")))

	require.NoError(t, server.Set(pgBackground, "synchronous_standby_names", "absent"))
	flushes := make(chan error, 1)
	flush := func() {
		go func() {
			_, err := db.ExecContext(pgBackground, sqlFlush)
			flushes <- err
		}()
	}
	flush()
	// The setting takes effect a moment later.
	pgUntil(t, "commits wait", func() bool {
		select {
		case err := <-flushes:
			require.NoError(t, err)
			flush()
		default:
		}
		return pgGet[bool](t, db, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep')`)
	})
	stalled := func() int {
		return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep' AND application_name <> 'test'`)
	}
	for start := time.Now(); time.Since(start) < 2*timeout; {
		ctx, cancel := context.WithTimeout(pgBackground, 3*time.Second)
		_, err := f("r", 2, "meanwhile").Lock(ctx)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.LessOrEqual(t, stalled(), 1)
	}
	require.NoError(t, released.Release(pgBackground), "a release does not wait for the standby")
	require.NoError(t, other.Close(), "nor does the end of a session")
	require.LessOrEqual(t, stalled(), 1)
	// Further providers come and go.
	for range 3 {
		passing := pgProvider(t, uri, WithSessionTimeout(timeout), WithLockTimeout(2*time.Second))
		_, err := pgNew(t, passing, 5, "passes").Lock(pgBackground)
		require.ErrorIs(t, err, ErrLockTimeout)
		require.NoError(t, passing.Close())
	}
	require.LessOrEqual(t, pgConnections(t, db), 4+1, "those of the first provider, and one that ends")
	pgQuiet(t, notified)
	require.Empty(t, seen.of(ObservedSuspended))

	// A session that is cut now cannot record that it lives in a way that survives a crash of the
	// server. It is lost after 0.9 T, and another one follows.
	old := pgSession(p)
	pgTerminate(t, db, pgOwn(t, db, p.session))
	pgReceive(t, "the holder is notified", notified)
	require.ErrorIs(t, held.Release(pgBackground), ErrLockLost)
	waits := f("r", 2, "waits for the standby")
	granted := make(chan error, 1)
	go func() {
		_, err := waits.Lock(pgBackground)
		granted <- err
	}()
	pgUntil(t, "the next session is connected", func() bool {
		now, connected := p.session.trust.current()
		return connected && now.id != old.id
	})
	pgUntil(t, "nothing has accumulated, and the attempts to reconnect have ended", func() bool {
		return stalled() <= 1 && pgConnections(t, db) <= 4 && pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event = 'SyncRep' AND query LIKE '%INTO env_lock_sessions%' AND pid <> pg_backend_pid()`) == 0
	})
	pgUntil(t, "the claim has been repeated", func() bool {
		w := p.session.disk
		w.session.mu.Lock()
		defer w.session.mu.Unlock()
		for _, q := range w.queues {
			for _, o := range q {
				if o.attempts > 0 {
					return true
				}
			}
		}
		return false
	})
	require.NoError(t, server.Set(pgBackground, "synchronous_standby_names", ""))
	require.NoError(t, pgReceive(t, "the test's own commit", flushes))
	require.NoError(t, pgReceive(t, "the claim that has waited", granted))
	require.NoError(t, waits.Release(pgBackground))
	require.NoError(t, goRound(f("r", 2, "afterwards")))
	pgUntil(t, "nothing is held", func() bool { return len(pgHolders(t, db)) == 0 })
}

// A statement that the server cancels is repeated. No claim and no release fails because of it.
func TestCanceledStatements(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri, WithLockTimeout(2*soon))
	f := pgLocker(t, p)
	_, ch := pgHold(t, p, 1, "holder")
	require.NoError(t, goRound(f("org/repo", 1, "before")))
	stop := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_, err := db.ExecContext(pgBackground, `SELECT pg_cancel_backend(pid) FROM pg_stat_activity
					WHERE datname = current_database() AND application_name <> 'test' AND state = 'active'`)
				assert.NoError(t, err)
			}
		}
	})
	for i := range 10 {
		assert.NoError(t, goRound(f("org/repo", 1, fmt.Sprint("cycle ", i))))
	}
	close(stop)
	running.Wait()
	pgQuiet(t, ch)
	require.NotContains(t, pgHolders(t, db), int64(2))
}

// C26, C28: tables that vanish while a provider works are created again. If its role does not have
// the privilege, an operator has to create them, and no claim fails meanwhile, because the provider
// has worked before.
func TestTablesVanish(t *testing.T) {
	t.Parallel()
	for _, privileged := range []bool{true, false} {
		t.Run(fmt.Sprintf("the role may create them: %v", privileged), func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			pgExec(t, db, `REVOKE CREATE ON SCHEMA public FROM PUBLIC;`+SchemaSQL)
			role := pgRole(t, db)
			grant := func() {
				pgExec(t, db, `GRANT SELECT, INSERT, UPDATE, DELETE ON env_locks, env_lock_state, env_lock_sessions, env_lock_overview TO `+role)
				if privileged {
					pgExec(t, db, `GRANT CREATE ON SCHEMA public TO `+role)
				}
			}
			grant()
			u, err := url.Parse(uri)
			require.NoError(t, err)
			u.User = url.UserPassword(role, role)
			p := pgProvider(t, u.String(), WithLockTimeout(2*soon), WithSessionTimeout(5*time.Second))
			f := pgLocker(t, p)
			require.NoError(t, goRound(f("org/repo", 1, "before")))
			before := pgSession(p)

			own := pgOwn(t, db, p.session)
			pgExec(t, db, `DROP VIEW env_lock_overview; DROP TABLE env_locks, env_lock_state, env_lock_sessions`)
			done := make(chan error, 1)
			go func() { done <- goRound(f("org/repo", 1, "meanwhile")) }()
			if !privileged {
				// The claim may have ended the session's connection already.
				pgExec(t, db, `SELECT pg_terminate_backend($1)`, own)
				pgUntil(t, "it has been tried to connect the session again", func() bool {
					p.session.mu.Lock()
					defer p.session.mu.Unlock()
					return p.session.trouble != nil && isRefusal(p.session.trouble)
				})
				require.Empty(t, done, "a claim has failed")
				pgExec(t, db, SchemaSQL)
				grant()
			}
			require.NoError(t, pgReceive(t, "the claim", done))
			now := pgSession(p)
			require.NotEqual(t, before, now)
			pgUntil(t, "the session has its row again", func() bool { return pgSessions(t, db, pgSession(p).id) == 1 })
		})
	}
}

// C8: a check of rows that was queued when the session lost its connection is not carried out. The
// next heartbeats check again.
func TestChecksGoOnAfterReconnect(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var seen seenSessions
	p := pgProvider(t, uri, WithSessionTimeout(2*time.Second), WithObserver(seen.observe))
	_, ch := pgHold(t, p, 1, "holder")
	s, ref := p.session, pgSession(p)

	blocked, unblock := make(chan struct{}), make(chan struct{})
	o := newOp(pgBackground, opCall, claim{})
	o.call = func(context.Context, *link) error {
		close(blocked)
		<-unblock
		return nil
	}
	s.mu.Lock()
	s.enqueueLocked(o)
	s.mu.Unlock()
	<-blocked
	pgUntil(t, "a check is queued", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.checking == ref && len(s.swift.queues[opCall]) > 0
	})
	pgTerminate(t, db, pgOwn(t, db, s))
	pgUntil(t, "the session has another connection", func() bool {
		now, connected := s.trust.current()
		return connected && now != ref
	})
	close(unblock)
	pgUntil(t, "the session is reconnected", func() bool { return len(seen.of(ObservedReconnected)) == 1 })

	pgExec(t, db, `UPDATE env_lock_state SET claim = claim + 1, claim_id = gen_random_uuid(), claim_event = 'without a notification', holder_stop = true`)
	require.Equal(t, "without a notification", pgReceive(t, "the holder is notified by its row", ch).Message)
}

// A provider with an idle timeout ends its session when it is idle, and only then.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var log pgLog
	var seen seenSessions
	const idle = time.Second
	p := pgProvider(t, pgNamed(t, uri, "idle"), WithSessionTimeout(2*time.Second), WithIdleTimeout(idle), log.option(), WithObserver(seen.observe))
	other := pgProvider(t, uri)
	// beats returns when a heartbeat has begun after all timeouts, so that the session would have
	// had time to end.
	beats := func() {
		start := time.Now()
		pgUntil(t, "the session has its heartbeats", func() bool { return p.Stats().LastHeartbeat.After(start.Add(2 * idle)) })
	}
	ends := func() {
		pgUntil(t, "all connections have ended", func() bool {
			return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE application_name = 'idle'`) == 0
		})
		require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM env_lock_sessions WHERE application = 'idle'`))
		require.Equal(t, Stats{}, p.Stats())
	}

	l, ch := pgHold(t, p, 1, "a hold keeps the session")
	first := pgSession(p)
	beats()
	require.Equal(t, first, pgSession(p))
	pgQuiet(t, ch)
	require.NoError(t, l.Unlock(pgBackground))
	ends()
	require.Contains(t, log.String(), "locker: idle: the session has ended until the next call")

	theirs, _ := pgHold(t, other, 2, "theirs")
	waiter, granted := pgWait(t, p, 2, "a waiter keeps the session")
	second := pgSession(p)
	require.NotEqual(t, first.id, second.id)
	beats()
	require.Equal(t, second, pgSession(p))
	require.NoError(t, theirs.Unlock(pgBackground))
	require.NoError(t, pgReceive(t, "the waiter has the key", granted))
	require.NoError(t, waiter.Unlock(pgBackground))
	ends()

	// Notifications arrive again after any call that begins a session.
	require.NoError(t, p.Ping(pgBackground))
	ends()
	l, ch = pgHold(t, p, 3, "older")
	newer := pgNew(t, other, 3, "newer")
	require.NoError(t, newer.Notify(pgBackground))
	require.Equal(t, "newer", pgReceive(t, "the holder is notified", ch).Message)
	require.NoError(t, l.Unlock(pgBackground))
	ends()

	require.NotContains(t, log.String(), "suspended")
	require.NotContains(t, log.String(), "lost")
	require.Empty(t, seen.of(ObservedSuspended))
	require.NoError(t, p.Close())
}

// Close cannot give a key back, because its row is locked. The session's row says how long a
// successor waits, so it stays.
func TestCloseLeavesHold(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri, WithSessionTimeout(2*time.Second), WithPreemptionTimeout(100*time.Millisecond))
	pgHold(t, p, 1, "holder")
	id := pgSession(p).id
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(pgBackground, `SELECT FROM env_lock_state WHERE lock_key = 1 FOR UPDATE`)
	require.NoError(t, err)
	require.NoError(t, p.Close())
	require.Equal(t, id, pgGet[int64](t, db, `SELECT id FROM env_lock_sessions`))
	require.NoError(t, tx.Rollback())
	require.Equal(t, map[int64]int64{1: id}, pgHolders(t, db))
}

// A logger may ask the provider for its state, also when an idle session ends.
func TestIdleTimeoutLogs(t *testing.T) {
	t.Parallel()
	asked := make(chan Stats, 1)
	var p *PostgresLockProvider
	p = pgProvider(t, newDatabase(t), WithSessionTimeout(2*time.Second), WithIdleTimeout(time.Second), WithLogger(slog.New(handlerFunc(func(r slog.Record) {
		if strings.Contains(r.Message, "idle") {
			asked <- p.Stats()
		}
	}))))
	fieldWorks(t, p, 1)
	require.False(t, pgReceive(t, "the logger has asked", asked).Connected)
}

// handlerFunc is a slog.Handler that calls a function for each record.
type handlerFunc func(slog.Record)

func (f handlerFunc) Enabled(context.Context, slog.Level) bool      { return true }
func (f handlerFunc) Handle(_ context.Context, r slog.Record) error { f(r); return nil }
func (f handlerFunc) WithAttrs([]slog.Attr) slog.Handler            { return f }
func (f handlerFunc) WithGroup(string) slog.Handler                 { return f }

// A release counts as use, so the idle timeout begins with the end of a hold.
func TestIdleTimeoutAfterRelease(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t), WithSessionTimeout(2*time.Second), WithIdleTimeout(time.Minute))
	l, _ := pgHold(t, p, 1, "holder")
	released := time.Now()
	require.NoError(t, l.Unlock(pgBackground))
	p.session.mu.Lock()
	defer p.session.mu.Unlock()
	require.False(t, p.session.used.Before(released))
}

// Calls that come at the moment when an idle session ends are carried out.
func TestIdleTimeoutMeetsCalls(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri, WithSessionTimeout(time.Second), WithIdleTimeout(time.Second))
	s := p.session
	for round := range 20 {
		l, ch := pgHold(t, p, 1, "round")
		pgQuiet(t, ch)
		require.NoError(t, l.Unlock(pgBackground))
		before := pgSession(p)
		// The next heartbeat finds the provider idle.
		s.mu.Lock()
		s.used = time.Now().Add(-time.Hour)
		s.mu.Unlock()
		if round%2 == 0 {
			pgUntil(t, "the session ends", func() bool { return pgSession(p) != before })
		}
	}
}

// C49: the server no longer sees the session, and the provider does not know that yet. No claim is
// granted a key then, but a key that is free is not busy.
func TestSkipWhileSessionIsCut(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	px := newProxy(t, "", uri, nil)
	p := pgProvider(t, px.uri(t, uri))
	kept, notified := pgHold(t, p, 1, "connects")
	skips := ContextWithMode(pgBackground, SkipIfBusy)

	pgCutUnnoticed(t, db, px, p)
	l := pgNew(t, p, 2, "skips")
	_, err := l.Lock(skips)
	require.NoError(t, err, "the key is free")
	require.NoError(t, l.Unlock(pgBackground))

	pgCutUnnoticed(t, db, px, p)
	_, err = pgNew(t, p, 1, "skips").Lock(skips)
	require.ErrorIs(t, err, ErrLockBusy, "the key is held")
	require.Empty(t, notified, "C24 the hold is kept")
	require.NoError(t, kept.Unlock(pgBackground))
}

// A claim that was granted a key, but whose session was lost before it knew, finds the key held by
// itself. The next session takes that hold, and a late attempt of the old one does not take it back.
func TestGrantOfALostSession(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	way := newOutage(t, uri)
	p := pgProvider(t, way.uri(), WithSessionTimeout(3*time.Second))
	s := p.session
	var locks []*PostgresLock
	for key := range int64(2) {
		l, _ := pgHold(t, p, key, "creates the row")
		require.NoError(t, l.Unlock(pgBackground))
		locks = append(locks, pgNew(t, p, key, "granted"))
	}
	skips := locks[0].request(terms{mode: SkipIfBusy}, 0)
	announced := announcement{claim: locks[1].claim, asked: time.Now(), acquire: true}
	take := func(a answer, err error) answer {
		t.Helper()
		require.NoError(t, err)
		require.Equal(t, granted, a.outcome)
		return a
	}

	old := pgSession(p)
	skipped := take(s.acquire(pgBackground, nil, skips))
	pushed := take(s.announce(pgBackground, nil, announced))
	way.begin()
	pgUntil(t, "the session is lost", func() bool { return pgSession(p).generation > old.generation })
	require.Equal(t, map[int64]int64{0: old.id, 1: old.id}, pgHolders(t, db))
	way.end()

	_, err := locks[0].Lock(ContextWithMode(pgBackground, SkipIfBusy))
	require.NoError(t, err, "the key is held by the claim itself")
	require.Equal(t, skipped.token, locks[0].Token())
	_, err = locks[1].lockKey(pgBackground, lockCall{asked: announced.asked, announce: true})
	require.NoError(t, err)
	require.Equal(t, pushed.token, locks[1].Token())
	now := pgSession(p)
	require.Equal(t, map[int64]int64{0: now.id, 1: now.id}, pgHolders(t, db))

	// The server has not noticed yet that the connection of the old session is gone.
	conn, err := db.Conn(pgBackground)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	_, err = conn.ExecContext(pgBackground, `SELECT pg_advisory_lock($1)`, old.lock)
	require.NoError(t, err)
	late := &op{kind: opAcquire, req: skips}
	require.NoError(t, onWorker(t, s.swift, func(ctx context.Context, l *link) error {
		return s.swift.acquireKeys(ctx, l, old, []*op{late})
	}))
	require.Equal(t, busy, late.answer.outcome)
	late = &op{kind: opAnnounce, req: request{claim: announced.claim}, asked: announced.asked, acquire: true}
	require.NoError(t, onWorker(t, s.swift, func(ctx context.Context, l *link) error {
		return s.swift.announceClaims(ctx, l, old, []*op{late})
	}))
	require.Equal(t, again, late.answer.outcome)
	require.Equal(t, map[int64]int64{0: now.id, 1: now.id}, pgHolders(t, db))
	for _, l := range locks {
		require.NoError(t, l.Unlock(pgBackground))
	}
}

// A batch may need several statements. If a later one fails, a key that an earlier one has taken is
// not forgotten: its claim may be superseded before the batch is repeated.
func TestGrantBeforeAnError(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	l, _ := pgHold(t, p, 1, "creates the row")
	require.NoError(t, l.Unlock(pgBackground))
	held, _ := pgHold(t, q, 2, "holds")
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(pgBackground, `UPDATE env_lock_state SET waiting = waiting WHERE lock_key = 2`)
	require.NoError(t, err)

	free, waits := pgNew(t, p, 1, "granted"), pgNew(t, p, 2, "waits")
	require.NoError(t, free.Notify(pgBackground))
	next := pgNew(t, q, 1, "next")
	granted, waited := make(chan error, 1), make(chan error, 1)
	s := p.session
	begun, ready, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	begin := sync.OnceFunc(func() { close(begun) })
	goOn := sync.OnceFunc(func() { close(ready) })
	defer goOn()
	go func() {
		done <- onWorker(t, s.disk, func(context.Context, *link) error {
			begin()
			<-ready
			s.mu.Lock()
			batch := s.disk.queues[opAcquire]
			s.disk.queues[opAcquire] = nil
			s.mu.Unlock()
			assert.Len(t, batch, 2)
			slices.SortFunc(batch, func(a, b *op) int { return cmp.Compare(a.req.key, b.req.key) })
			// The request for a notification of key 2 fails, because its row is locked.
			s.disk.execute(pgSession(p), batch)
			assert.Equal(t, map[int64]int64{1: pgSession(p).id, 2: pgSession(q).id}, pgHolders(t, db), "key 1 was not taken: the test is void")
			return next.Notify(pgBackground)
		})
	}()
	// Before that the call itself is one of the operations that are queued.
	pgReceive(t, "the worker has begun", begun)
	go func() {
		_, err := free.Lock(pgBackground)
		granted <- err
	}()
	go func() {
		_, err := waits.Lock(pgBackground)
		waited <- err
	}()
	queued(t, s.disk, 2)
	goOn()
	require.NoError(t, pgReceive(t, "the worker", done))
	require.ErrorIs(t, pgReceive(t, "the older claim", granted), ErrLockPreempted)
	_, err = next.Lock(pgBackground)
	require.NoError(t, err, "the key of the older claim was not given back")
	require.NoError(t, tx.Rollback())
	require.NoError(t, held.Unlock(pgBackground))
	require.NoError(t, pgReceive(t, "the waiter", waited))
	require.NoError(t, waits.Unlock(pgBackground))
	require.NoError(t, next.Unlock(pgBackground))
}

// pgHoldUnknown makes the row of a key name a hold of a session that no lock of the session has.
func pgHoldUnknown(t *testing.T, db *sql.DB, key int64, ref sessionRef) {
	t.Helper()
	pgExec(t, db, `UPDATE env_lock_state SET holder_id = gen_random_uuid(), holder_session = $2, holder_event = 'unknown', held_since = now()
		WHERE lock_key = $1`, key, ref.id)
}

// An acquire may be carried out long after its reply was lost and its claim has left. A provider
// that holds nothing finds that, too.
func TestForgottenAcquireIsFound(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	l, _ := pgHold(t, p, 1, "creates the row")
	require.NoError(t, l.Unlock(pgBackground))
	s := p.session
	s.mu.Lock()
	s.unsure = time.Now().Add(-unsureFor)
	s.mu.Unlock()
	pgHoldUnknown(t, db, 1, pgSession(p))
	s.lookAfterRows(pgSession(p), sweepBeats)
	pgFree(t, db, 1)
}

// C18: that a release was rejected, and repeated, does not hide that the hold is gone.
func TestRejectedReleaseOfALostHold(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	l, _ := pgHold(t, p, 1, "holds")
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(pgBackground, `DELETE FROM env_lock_state WHERE lock_key = 1`)
	require.NoError(t, err)
	released := l.backend.release(pgBackground, l.claim)
	pgUntil(t, "the release was rejected", func() bool {
		p.session.mu.Lock()
		defer p.session.mu.Unlock()
		return released.trouble != nil
	})
	require.NoError(t, tx.Commit())
	pgReceive(t, "the release", released.done)
	require.ErrorIs(t, released.err, ErrLockLost)
}

// C33: a redelivery that reaches the process of the claim itself is outdated, even if the server does
// not see the session at this moment.
func TestRedeliveryWhileSessionIsCut(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	px := newProxy(t, "", uri, nil)
	p := pgProvider(t, px.uri(t, uri))
	f := pgLocker(t, p)
	first := f("org/repo", 1, "first").Sequence(5)
	notified, err := first.Lock(pgBackground)
	require.NoError(t, err)
	pgCutUnnoticed(t, db, px, p)
	_, err = f("org/repo", 1, "again").Sequence(5).Lock(pgBackground)
	require.ErrorIs(t, err, ErrClaimOutdated)
	require.Empty(t, notified)
	require.NoError(t, first.Release(pgBackground))
}

// With WithOriginalReplicas: a claim that skips is not told busy because the advisory lock of the key
// could not be tried.
func TestSkipWhileKeyLockCannotBeTried(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	px := newProxy(t, "", uri, nil)
	p := pgProvider(t, px.uri(t, uri), WithOriginalReplicas())
	kept, notified := pgHold(t, p, 1, "connects")
	require.True(t, px.silenceBackend(pgOwn(t, db, p.session)))
	l := pgNew(t, p, 2, "skips")
	_, err := l.Lock(ContextWithMode(pgBackground, SkipIfBusy))
	require.NoError(t, err, "the key is free")
	require.NoError(t, l.Unlock(pgBackground))
	require.Empty(t, notified, "C24 the hold is kept")
	require.NoError(t, kept.Unlock(pgBackground))
}

// With WithOriginalReplicas: a key that was taken from its holder by hand is free for others, even
// if the holder never returns.
func TestTakenHoldGivesKeyLockBack(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri, WithOriginalReplicas())
	holder, ch := pgHold(t, p, 1, "never returns")
	require.NotZero(t, pgAdvisory(t, db)[1], "the key's own lock")
	pgExec(t, db, `UPDATE env_lock_state SET holder_id = NULL, holder_session = NULL, holder_event = NULL, held_since = NULL WHERE lock_key = 1`)
	pgReceive(t, "the holder is notified", ch)
	pgUntil(t, "the key's own lock is given back", func() bool { return pgAdvisory(t, db)[1] == 0 })
	next, _ := pgHold(t, p, 1, "next")
	require.NoError(t, next.Unlock(pgBackground))
	require.ErrorIs(t, holder.Unlock(pgBackground), ErrLockLost)
}

// announceOps returns announcements of claims on keys, as they wait in a worker's queue.
func announceOps(asked time.Time, keys ...int64) (batch []*op) {
	for _, key := range keys {
		o := newOp(pgBackground, opAnnounce, claim{key: key, id: uuid.New(), event: "old"})
		o.asked = asked
		batch = append(batch, o)
	}
	return batch
}

// A claim that was delayed arrives with a statement that begins before a later claim is announced,
// and ends after that.
func TestDelayedClaimInSlowStatement(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	for _, key := range []int64{1, 2} {
		l, _ := pgHold(t, p, key, "creates the row")
		require.NoError(t, l.Unlock(pgBackground))
	}
	// round reports whether the delayed claims were in one statement. On a slow machine that statement
	// does not wait long enough for its row, and is repeated.
	round := func() bool {
		newer := pgNew(t, q, 2, "newer")
		tx, err := db.BeginTx(pgBackground, nil)
		require.NoError(t, err)
		defer func() { _ = tx.Rollback() }()
		_, err = tx.ExecContext(pgBackground, `UPDATE env_lock_state SET waiting = waiting WHERE lock_key = 1`)
		require.NoError(t, err)
		batch := announceOps(time.Now().Add(-5*time.Second), 1, 2)
		done := make(chan error, 1)
		go func() {
			done <- onWorker(t, p.session.disk, func(context.Context, *link) error {
				p.session.disk.execute(pgSession(p), slices.Clone(batch))
				return nil
			})
		}()
		pgBlocked(t, db)
		require.NoError(t, newer.Notify(pgBackground))
		require.NoError(t, tx.Rollback())
		require.NoError(t, pgReceive(t, "the worker", done))
		for _, o := range batch {
			pgReceive(t, "the delayed claim", o.done)
		}
		require.Equal(t, lockOf(newer).claim.id.String(), pgGet[string](t, db, `SELECT claim_id FROM env_lock_state WHERE lock_key = 2`))
		return batch[1].attempts == 0
	}
	pgUntil(t, "the delayed claims are in one statement", round)
}

// Another session creates the missing row of a key after a claim was announced in vain, and before
// the reason is asked for.
func TestRowCreatedMeanwhile(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	l, _ := pgHold(t, p, 2, "connects")
	require.NoError(t, l.Unlock(pgBackground))
	var asked atomic.Int32
	ctx := context.WithValue(pgBackground, tracerKey{}, Tracer(func(ctx context.Context, o Operation) (context.Context, func(OperationEnd)) {
		if o.Statement == statementNames[sqlWhyNot] && asked.Add(1) == 1 {
			pgExec(t, db, `INSERT INTO env_lock_state (lock_key) VALUES (1)`)
		}
		return ctx, nil
	}))
	l = pgNew(t, p, 1, "claim")
	require.NoError(t, l.Notify(ctx))
	require.Equal(t, int32(1), asked.Load(), "the test is void")
	_, err := l.Lock(pgBackground)
	require.NoError(t, err)
	require.NoError(t, l.Unlock(pgBackground))
}

// The caller of an announcement leaves while the worker connects. The announcement is not sent.
func TestCallerLeavesWhileWorkerConnects(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var slow atomic.Bool
	asked, goOn := make(chan struct{}, 1), make(chan struct{})
	made, err := NewLockProvider(PostgresLockProviderKind, WithPostgresURI(func(context.Context) (string, error) {
		if slow.CompareAndSwap(true, false) {
			asked <- struct{}{}
			<-goOn
		}
		return uri, nil
	}))
	require.NoError(t, err)
	p := made.(*PostgresLockProvider)
	t.Cleanup(func() { _ = p.Close() })
	holder, ch := pgHold(t, p, 1, "holder")
	require.NoError(t, onWorker(t, p.session.swift, func(context.Context, *link) error { return nil }), "it is connected")
	// The function hangs up its own worker, which connects again for the next operation.
	require.NoError(t, onWorker(t, p.session.disk, func(context.Context, *link) error {
		slow.Store(true)
		p.session.disk.hangUp()
		return nil
	}))
	ctx, cancel := context.WithCancel(pgBackground)
	failed := make(chan error, 1)
	left := pgNew(t, p, 1, "has left")
	go func() { failed <- left.Notify(ctx) }()
	pgReceive(t, "the worker connects", asked)
	cancel()
	require.ErrorIs(t, pgReceive(t, "the caller", failed), context.Canceled)
	close(goOn)
	require.NoError(t, onWorker(t, p.session.disk, func(context.Context, *link) error { return nil }))
	pgQuiet(t, ch)
	require.NotEqual(t, "has left", pgGet[string](t, db, `SELECT claim_event FROM env_lock_state WHERE lock_key = 1`))
	require.NoError(t, holder.Unlock(pgBackground))
}

// The caller of a claim has left, and the claim was withdrawn, when its last attempt records that it
// waits.
func TestAttemptAfterWithdraw(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	holder, _ := pgHold(t, q, 1, "holder")
	left := pgNew(t, p, 1, "has left")
	require.NoError(t, left.Notify(pgBackground))
	pgExec(t, db, `UPDATE env_lock_state SET claim_open = false WHERE lock_key = 1`)
	o := newOp(pgBackground, opAcquire, claim{})
	o.req = left.request(terms{}, 0)
	o.state = opAbandoned
	require.NoError(t, onWorker(t, p.session.disk, func(context.Context, *link) error {
		p.session.disk.execute(pgSession(p), []*op{o})
		return nil
	}))
	pgReceive(t, "the attempt", o.done)
	require.True(t, o.found, "the row does not say that the claim waits: the test is void")
	pgUntil(t, "the claim is withdrawn", func() bool {
		return !pgGet[bool](t, db, `SELECT claim_open FROM env_lock_state WHERE lock_key = 1`)
	})
	require.NoError(t, holder.Unlock(pgBackground))
}

// A worker's connection leads to a server that does not have the session's lock, where every
// session seems dead. No watch begins there.
func TestWorkerOnAnotherServer(t *testing.T) {
	t.Parallel()
	uri, other := newDatabase(t), newDatabase(t)
	p, q := pgProvider(t, uri), pgProvider(t, other)
	for _, provider := range []*PostgresLockProvider{p, q} {
		l, _ := pgHold(t, provider, 1, "connects")
		require.NoError(t, l.Unlock(pgBackground))
	}
	pgExec(t, pgDB(t, other), `INSERT INTO env_lock_sessions (id, lock, timeout) VALUES (1, 1, '1 s'), ($1, $2, '1 s')`,
		pgSession(p).id, pgSession(p).lock)
	watched := func(s *session) int {
		s.watches.mu.Lock()
		defer s.watches.mu.Unlock()
		return len(s.watches.ripe)
	}
	require.NoError(t, onWorker(t, q.session.swift, func(ctx context.Context, on *link) error {
		return q.session.sweep(ctx, on, pgSession(q))
	}))
	require.Equal(t, 2, watched(q.session), "the test is void")
	require.NoError(t, onWorker(t, q.session.swift, func(ctx context.Context, on *link) error {
		return p.session.sweep(ctx, on, pgSession(p))
	}))
	require.Zero(t, watched(p.session))
	var elsewhere error
	require.NoError(t, onWorker(t, q.session.swift, func(ctx context.Context, on *link) error {
		_, elsewhere = p.session.checkRows(ctx, on, pgSession(p), true)
		return nil
	}))
	require.Equal(t, errElsewhere, elsewhere)
}

// While the check of rows fails, no further one is queued.
func TestChecksDoNotPileUp(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	holder, ch := pgHold(t, p, 1, "holder")
	s := p.session
	checks := func() (n int, failed bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, o := range s.swift.queues[opCall] {
			failed = failed || o.trouble != nil
		}
		return len(s.swift.queues[opCall]), failed
	}
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(pgBackground, `LOCK TABLE env_lock_state`)
	require.NoError(t, err)
	s.lookAfterRows(pgSession(p), 1)
	pgUntil(t, "the check has failed", func() bool {
		_, failed := checks()
		return failed
	})
	for range 3 {
		s.lookAfterRows(pgSession(p), 1)
	}
	n, _ := checks()
	require.LessOrEqual(t, n, 1)
	require.NoError(t, tx.Rollback())
	pgUntil(t, "the check has succeeded", func() bool {
		n, _ := checks()
		return n == 0
	})
	pgQuiet(t, ch)
	require.NoError(t, holder.Unlock(pgBackground))
}

// A session is lost while a check of its rows is in flight. Its holders release their keys
// themselves, when they have stopped.
func TestSessionLostDuringCheck(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri)
	db := pgDB(t, uri)
	l, _ := pgHold(t, p, 1, "creates the row")
	require.NoError(t, l.Unlock(pgBackground))
	now := pgSession(p)
	pgHoldUnknown(t, db, 1, now)
	forgotten := func(ref sessionRef) {
		require.NoError(t, onWorker(t, p.session.swift, func(ctx context.Context, on *link) error {
			return p.session.releaseForgotten(ctx, on, ref)
		}))
		// Releases run before this.
		require.NoError(t, onWorker(t, p.session.swift, func(context.Context, *link) error { return nil }))
	}
	old := now
	old.generation--
	forgotten(old)
	require.Len(t, pgHolders(t, db), 1)
	forgotten(now)
	pgFree(t, db, 1)
}

// A session that was lost while its connection was opened sends no heartbeats on it.
func TestSessionLostWhileItConnects(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t))
	l, _ := pgHold(t, p, 1, "connects")
	require.NoError(t, l.Unlock(pgBackground))
	old := pgSession(p)
	old.generation--
	own := p.session.own
	var err error
	own.do(func() { err = p.session.beat(own, old, time.Now(), 1) })
	require.Equal(t, errSessionLost, err)
}

// C4: a waiter that was announced is superseded by its holder's next announcement immediately: the
// server sends a notification.
func TestHolderAnnouncesAgain(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	holder, _ := pgHold(t, p, 1, "holder")
	waiter := pgNew(t, q, 1, "waiter")
	require.NoError(t, waiter.Notify(pgBackground))
	out := pgWaits(t, waiter)
	listener := pq.NewListener(uri, time.Second, time.Second, nil)
	t.Cleanup(func() { _ = listener.Close() })
	require.NoError(t, listener.Listen(notifyChannel))
	require.NoError(t, holder.Notify(pgBackground))
	for {
		n := pgReceive(t, "a notification of the holder's claim", listener.Notify)
		if n != nil && strings.Contains(n.Extra, lockOf(holder).claim.id.String()) {
			break
		}
	}
	require.ErrorIs(t, pgReceive(t, "the waiter", out), ErrLockPreempted)
	require.NoError(t, holder.Unlock(pgBackground))
}
