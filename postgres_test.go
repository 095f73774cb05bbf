package locker

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// shared is the PostgreSQL server that all tests use, each with a separate database. The first test
// that needs it starts it, and TestMain ends it.
var (
	shared = sync.OnceValues(func() (*pgserver.Instance, error) {
		server, err := pgserver.Shared(context.Background())
		started.Store(server)
		return server, err
	})
	started atomic.Pointer[pgserver.Instance]
)

func TestMain(m *testing.M) {
	code := m.Run()
	if server := started.Load(); server != nil {
		if err := server.Close(); err != nil && code == 0 {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// sharedServer returns the shared server.
func sharedServer(t testing.TB) *pgserver.Instance {
	t.Helper()
	server, err := shared()
	require.NoError(t, err, "no PostgreSQL to test with")
	return server
}

// newDatabase creates an empty database on the shared server for one test and returns its URI.
func newDatabase(t testing.TB) string {
	t.Helper()
	uri, drop, err := sharedServer(t).NewDatabase(context.Background())
	require.NoError(t, err)
	t.Cleanup(drop)
	return uri
}

// soon bounds every wait of a test for an expected event. It is far longer than the event takes.
const soon = 30 * time.Second

// The tests in this file need a server. TestContract tests what both providers have in common.

var pgBackground = context.Background()

// pgProvider creates a provider that is closed at the end of the test.
func pgProvider(t testing.TB, uri string, options ...LockProviderOption) *PostgresLockProvider {
	t.Helper()
	p, err := NewLockProvider(PostgresLockProviderKind, append([]LockProviderOption{WithPostgresBackend(uri, "")}, options...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
	return p.(*PostgresLockProvider)
}

// pgLocker returns a factory of PreemptiveLockers on a provider.
func pgLocker(t testing.TB, p LockProvider, options ...PreemptiveLockerOption) PreemptiveLockerFactory {
	t.Helper()
	f, err := NewPreemptiveLockerFactory(p, options...)
	require.NoError(t, err)
	return f
}

// pgDB opens a database for the test itself.
func pgDB(t testing.TB, uri string) *sql.DB {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	q := u.Query()
	q.Set("application_name", "test")
	u.RawQuery = q.Encode()
	db, err := sql.Open("postgres", u.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func pgExec(t testing.TB, db interface {
	ExecContext(context.Context, string, ...any) (sql.Result, error)
}, query string, args ...any) {
	t.Helper()
	_, err := db.ExecContext(pgBackground, query, args...)
	require.NoError(t, err)
}

// pgGet returns a query's only value.
func pgGet[T any](t testing.TB, db *sql.DB, query string, args ...any) (v T) {
	t.Helper()
	require.NoError(t, db.QueryRowContext(pgBackground, query, args...).Scan(&v))
	return v
}

// pgUntil waits until a condition holds.
func pgUntil(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(soon)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			require.FailNow(t, "not in time: "+what)
		}
	}
}

// pgReceive waits for a value.
func pgReceive[T any](t testing.TB, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(soon):
		require.FailNow(t, "not in time: "+what)
		panic("unreachable")
	}
}

// pgQuiet requires that a holder has not been notified.
func pgQuiet(t testing.TB, ch <-chan NotificationPayload) {
	t.Helper()
	select {
	case n, ok := <-ch:
		require.FailNow(t, "holder was disturbed", "%v %v", n, ok)
	default:
	}
}

// pgNew creates a lock that is unlocked at the end of the test, at the latest.
func pgNew(t testing.TB, p LockProvider, key int64, event string) *PostgresLock {
	t.Helper()
	l, err := p.New(pgBackground, key, event)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Unlock(pgBackground) })
	return l.(*PostgresLock)
}

// pgHold locks a key without a claim.
func pgHold(t testing.TB, p LockProvider, key int64, event string) (*PostgresLock, <-chan NotificationPayload) {
	t.Helper()
	l := pgNew(t, p, key, event)
	ch, err := l.Lock(pgBackground)
	require.NoError(t, err)
	return l, ch
}

// pgWait begins to lock a key without a claim and returns when it waits.
func pgWait(t testing.TB, p *PostgresLockProvider, key int64, event string) (*PostgresLock, <-chan error) {
	t.Helper()
	l := pgNew(t, p, key, event)
	return l, pgWaits(t, l)
}

// pgWaits begins to lock and returns when the lock waits.
func pgWaits(t testing.TB, l *PostgresLock) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := l.Lock(pgBackground)
		done <- err
	}()
	pgUntil(t, "the lock waits", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.phase >= waiting && l.placed
	})
	return done
}

// pgOwn returns the process ID of the server's end of a session's own connection, which
// has the session's advisory lock.
func pgOwn(t testing.TB, db *sql.DB, s *session) (pid int) {
	t.Helper()
	pgUntil(t, "the session is connected", func() bool {
		ref, connected := s.trust.current()
		pid = pgAdvisory(t, db)[ref.lock]
		return connected && pid != 0
	})
	return pid
}

// pgUnseen waits until a server process has no advisory lock, so that its session is not seen.
func pgUnseen(t testing.TB, what string, db *sql.DB, pid int) {
	t.Helper()
	pgUntil(t, what, func() bool {
		return pgGet[int](t, db, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = $1`, pid) == 0
	})
}

// pgListener returns what pgOwn does, for the connection that listens. The provider must be the
// only one of its database with this application name.
func pgListener(t testing.TB, db *sql.DB, application string) (pid int) {
	t.Helper()
	pgUntil(t, "the listener is connected", func() bool {
		err := db.QueryRowContext(pgBackground, `SELECT pid FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = $1 AND state = 'idle'
				AND (query LIKE 'LISTEN %' OR query LIKE '%pg_listening_channels%')`, application).Scan(&pid)
		return err == nil
	})
	return pid
}

// pgBlocked returns the process ID of a statement that waits for another transaction.
func pgBlocked(t testing.TB, db *sql.DB) (pid int) {
	t.Helper()
	pgUntil(t, "a statement waits for another transaction", func() bool {
		err := db.QueryRowContext(pgBackground, `SELECT pid FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock' AND application_name <> 'test'`).Scan(&pid)
		return err == nil
	})
	return pid
}

// pgNamed returns a URI with an application name.
func pgNamed(t testing.TB, uri, application string) string {
	t.Helper()
	return pgWith(t, uri, "application_name", application)
}

// pgWith returns a URI with a parameter.
func pgWith(t testing.TB, uri, name, value string) string {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	q := u.Query()
	q.Set(name, value)
	u.RawQuery = q.Encode()
	return u.String()
}

// pgAs returns a URI with another user, who has no password.
func pgAs(t testing.TB, uri, user string) string {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	u.User = url.User(user)
	return u.String()
}

// pgConnections returns the number of connections to the database, except for the test's and those
// with the given application names.
func pgConnections(t testing.TB, db *sql.DB, except ...string) int {
	t.Helper()
	return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND backend_type = 'client backend' AND application_name <> ALL ($1)`, pq.Array(append(except, "test")))
}

// pgHolders returns, for each key that is held, the session that holds it.
func pgHolders(t testing.TB, db *sql.DB) map[int64]int64 {
	t.Helper()
	rows, err := db.QueryContext(pgBackground, `SELECT lock_key, holder_session FROM env_lock_state WHERE holder_id IS NOT NULL`)
	require.NoError(t, err)
	defer func() { _ = rows.Close() }()
	holders := map[int64]int64{}
	for rows.Next() {
		var key, session int64
		require.NoError(t, rows.Scan(&key, &session))
		holders[key] = session
	}
	require.NoError(t, rows.Err())
	return holders
}

// pgAdvisory returns the server process that has each advisory lock. There is one lock for each
// session.
func pgAdvisory(t testing.TB, db *sql.DB) map[int64]int {
	t.Helper()
	rows, err := db.QueryContext(pgBackground, `SELECT (classid::bigint << 32) | objid::bigint, pid FROM pg_locks
		WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	require.NoError(t, err)
	defer func() { _ = rows.Close() }()
	locks := map[int64]int{}
	for rows.Next() {
		var key int64
		var pid int
		require.NoError(t, rows.Scan(&key, &pid))
		locks[key] = pid
	}
	require.NoError(t, rows.Err())
	return locks
}

// pgTerminate ends a server session.
func pgTerminate(t testing.TB, db *sql.DB, pid int) {
	t.Helper()
	require.True(t, pgGet[bool](t, db, `SELECT pg_terminate_backend($1)`, pid))
}

// pgCluster starts a separate server for the test. It skips the test if a foreign server is used
// and the programs of PostgreSQL are missing.
func pgCluster(t testing.TB, options pgserver.Options) *pgserver.Server {
	t.Helper()
	s, err := pgserver.Start(pgBackground, options)
	if errors.Is(err, pgserver.ErrNoBinaries) && !sharedServer(t).Own() {
		t.Skip(err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s
}

// pgStandby creates a standby of a test's server.
func pgStandby(t testing.TB, primary *pgserver.Server, options pgserver.StandbyOptions) *pgserver.Server {
	t.Helper()
	s, err := primary.Standby(pgBackground, options)
	if errors.Is(err, pgserver.ErrNoBinaries) {
		t.Skip(err)
	}
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s
}

// pgLog collects what a provider logs.
type pgLog struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *pgLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *pgLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *pgLog) option() LockProviderOption {
	return WithLogger(slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})))
}

// C1: each pair has one key, for every caller. Asking for it again writes nothing.
func TestPostgresKeys(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	providers := []*PostgresLockProvider{pgProvider(t, uri), pgProvider(t, uri), pgProvider(t, uri), pgProvider(t, uri)}

	const pairs = 100
	type found struct {
		pr  uint
		key int64
		err error
	}
	results := make(chan found)
	for _, p := range providers {
		for pr := range uint(pairs) {
			go func() {
				key, err := p.LockKey(pgBackground, "repo", pr)
				results <- found{pr, key, err}
			}()
		}
	}
	keys := map[uint]int64{}
	of := map[int64]uint{}
	for range pairs * len(providers) {
		a := pgReceive(t, "LockKey returns", results)
		require.NoError(t, a.err)
		require.NotZero(t, a.key)
		if key, ok := keys[a.pr]; ok {
			require.Equal(t, key, a.key, "two keys for one pair")
		}
		keys[a.pr], of[a.key] = a.key, a.pr
	}
	require.Len(t, of, pairs, "two pairs share a key")

	// A trigger of the statement fires even if no row is added.
	pgExec(t, db, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'a write'; END $$;
		CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON env_locks FOR EACH STATEMENT EXECUTE FUNCTION refuse()`)
	for _, p := range append(providers, pgProvider(t, uri)) {
		key, err := p.LockKey(pgBackground, "repo", 7)
		require.NoError(t, err)
		require.Equal(t, keys[7], key)
	}
	ctx, cancel := context.WithTimeout(pgBackground, time.Second)
	defer cancel()
	_, err := providers[0].LockKey(ctx, "repo", pairs)
	require.ErrorIs(t, err, context.DeadlineExceeded, "it is repeated")
	require.ErrorContains(t, err, "a write", "the trigger does not see writes")
}

// C3: the statement that acquires rejects an older claim, even though its lock was never notified
// and no claim holds the key.
func TestPostgresOrder(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	a, b := pgProvider(t, uri), pgProvider(t, uri)
	older := pgNew(t, a, 1, "older")
	require.NoError(t, older.Notify(pgBackground))
	newer := pgNew(t, b, 1, "newer")
	require.NoError(t, newer.Notify(pgBackground))
	_, err := older.Lock(pgBackground)
	require.ErrorIs(t, err, ErrLockPreempted)
	require.ErrorContains(t, err, "newer")
	_, err = newer.Lock(pgBackground)
	require.NoError(t, err)

	// A newer claim is committed while the statement runs: the statement has checked the claim and
	// waits for the row.
	db := pgDB(t, uri)
	older = pgNew(t, a, 2, "older")
	require.NoError(t, older.Notify(pgBackground))
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	pgExec(t, tx, `UPDATE env_lock_state SET claim = claim + 1, claim_id = gen_random_uuid(), claim_event = 'in between' WHERE lock_key = 2`)
	done := make(chan error, 1)
	go func() {
		_, err := older.Lock(pgBackground)
		done <- err
	}()
	pgBlocked(t, db)
	require.NoError(t, tx.Commit())
	err = pgReceive(t, "Lock returns", done)
	require.ErrorIs(t, err, ErrLockPreempted)
	require.ErrorContains(t, err, "in between")
	require.NotContains(t, pgHolders(t, db), int64(2), "C20")
}

// C7: 24 claimants from four providers on each of 12 keys. Exactly one claim of each key is not
// preempted. It is the newest, and has the highest token.
func TestPostgresStorm(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	const keys, claimants = 12, 24
	var factories []PreemptiveLockerFactory
	for range 4 {
		factories = append(factories, pgLocker(t, pgProvider(t, uri, WithLockTimeout(time.Minute))))
	}
	type ended struct {
		pr        uint
		preempted bool // while it waited or held
		locker    *PreemptiveLocker
		err       error
	}
	ends := make(chan ended, keys*claimants)
	stop := make(chan struct{})
	start := make(chan struct{})
	var running sync.WaitGroup
	for pr := range uint(keys) {
		for i := range claimants {
			running.Add(1)
			go func() {
				defer running.Done()
				<-start
				p := factories[i%len(factories)]("repo", pr, fmt.Sprintf("claim %d", i))
				ch, err := p.Lock(pgBackground)
				if err != nil {
					if errors.Is(err, ErrLockPreempted) {
						err = nil
					}
					ends <- ended{pr, true, p, err}
					return
				}
				select {
				case <-ch:
					ends <- ended{pr, true, p, p.Release(pgBackground)}
				case <-stop:
					ends <- ended{pr, false, p, nil}
				}
			}()
		}
	}
	close(start)
	highest := map[uint]int64{}
	take := func() ended {
		e := pgReceive(t, "a claimant ends", ends)
		require.NoError(t, e.err)
		highest[e.pr] = max(highest[e.pr], e.locker.Token())
		return e
	}
	disturbed := map[uint]int{}
	for range keys * (claimants - 1) {
		e := take()
		require.True(t, e.preempted)
		disturbed[e.pr]++
	}
	for pr := range uint(keys) {
		require.Equal(t, claimants-1, disturbed[pr])
	}
	winners := map[uint]*PreemptiveLocker{}
	pgUntil(t, "the last claimant of every key holds it", func() bool {
		return pgGet[int](t, db, `SELECT count(*) FROM env_lock_state WHERE holder_id = claim_id`) == keys
	})
	close(stop)
	for range keys {
		e := take()
		require.False(t, e.preempted)
		winners[e.pr] = e.locker
	}
	running.Wait()
	require.Len(t, winners, keys)
	for pr, w := range winners {
		require.Equal(t, highest[pr], w.Token(), "the winner's token is not the highest")
		require.Equal(t, w.lock.(*PostgresLock).claim.id.String(),
			pgGet[string](t, db, `SELECT claim_id FROM env_lock_state WHERE lock_key = $1`, w.key), "the winner is not the newest")
		require.NoError(t, w.Release(pgBackground))
	}
}

// C8: claims reach holders and waiters although no notification does.
func TestPostgresDeaf(t *testing.T) {
	t.Parallel()
	// The bound is the time of a heartbeat, and more for a busy machine.
	const bound = defaultSessionTimeout*3/10 + 3*time.Second

	t.Run("C8 listener killed just before the claim", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		deaf := pgProvider(t, pgNamed(t, uri, "deaf"))
		l, ch := pgHold(t, deaf, 1, "holder")
		claimant := pgNew(t, pgProvider(t, uri), 1, "claim")
		pgTerminate(t, db, pgListener(t, db, "deaf"))
		start := time.Now()
		require.NoError(t, claimant.Notify(pgBackground))
		n := pgReceive(t, "the holder is notified", ch)
		require.Less(t, time.Since(start), bound)
		require.Equal(t, NotificationPayload{claimant.claim.id, "claim", 1}, n)
		require.ErrorIs(t, l.Cause(), ErrLockPreempted)
	})

	t.Run("C8 listener can never come back", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		var blocked atomic.Bool
		cuts := make(chan struct{}, 1000)
		px := newProxy(t, "", uri, func(_ *proxied, to direction, kind byte, body []byte) verdict {
			if to == toServer && kind == 'Q' && blocked.Load() && bytes.Contains(body, []byte("LISTEN")) {
				cuts <- struct{}{}
				return cut
			}
			return pass
		})
		var log pgLog
		deaf := pgProvider(t, pgNamed(t, px.uri(t, uri), "deaf"), WithLockTimeout(2*soon), log.option())
		_, ch := pgHold(t, deaf, 1, "holder")
		occupied := pgProvider(t, uri)
		pgHold(t, occupied, 2, "occupies the other key")
		waiter := pgNew(t, deaf, 2, "waiter")
		require.NoError(t, waiter.Notify(pgBackground))
		left := pgWaits(t, waiter)

		blocked.Store(true)
		pgTerminate(t, db, pgListener(t, db, "deaf"))
		pgReceive(t, "the listener tries to listen again", cuts)
		pgUntil(t, "the provider says that it does not listen", func() bool {
			return !deaf.Stats().Listening && strings.Contains(log.String(), "listener lost")
		})
		require.True(t, deaf.Stats().Connected)
		other := pgProvider(t, uri)
		start := time.Now()
		require.NoError(t, pgNew(t, other, 2, "newer waiter").Notify(pgBackground))
		require.NoError(t, pgNew(t, other, 1, "claim").Notify(pgBackground))
		err := pgReceive(t, "the waiter leaves", left)
		require.ErrorIs(t, err, ErrLockPreempted)
		require.ErrorContains(t, err, "newer waiter")
		require.Less(t, time.Since(start), bound)
		require.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)
		require.Less(t, time.Since(start), bound)

		// The provider can still acquire and release a key.
		l, _ := pgHold(t, deaf, 3, "deaf")
		require.NoError(t, l.Unlock(pgBackground))
		require.Equal(t, 1, strings.Count(log.String(), "cannot connect; trying again"), "it is logged once")

		blocked.Store(false)
		pgUntil(t, "it listens again", func() bool {
			return deaf.Stats().Listening && strings.Contains(log.String(), "listening again")
		})
	})

	t.Run("C8 listener is silent", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		px := newProxy(t, "", uri, nil)
		deaf := pgProvider(t, pgNamed(t, px.uri(t, uri), "deaf"))
		_, ch := pgHold(t, deaf, 1, "holder")
		claimant := pgNew(t, pgProvider(t, uri), 1, "claim")
		require.True(t, px.silenceBackend(pgListener(t, db, "deaf")))
		start := time.Now()
		require.NoError(t, claimant.Notify(pgBackground))
		require.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)
		require.Less(t, time.Since(start), bound)
	})
}

// C15, C26: tokens only grow, whatever happens to holders and server. A restart costs no hold,
// waiters acquire their keys afterwards, and the provider works.
func TestPostgresRestart(t *testing.T) {
	var uri string
	var restart func(mode string) error
	if sharedServer(t).Own() {
		t.Parallel()
		server := pgCluster(t, pgserver.Options{})
		var err error
		uri, err = server.CreateDatabase(pgBackground, "restart")
		require.NoError(t, err)
		restart = func(mode string) error { return server.Restart(pgBackground, mode) }
	} else {
		// The test does not run in parallel, because no other test may use the server during a
		// restart.
		uri = newDatabase(t)
		restart = func(mode string) error { return sharedServer(t).Restart(pgBackground, mode) }
	}
	db := pgDB(t, uri)
	// The server's restarts end idle connections.
	db.SetMaxIdleConns(0)
	var seen seenSessions
	options := []LockProviderOption{WithLockTimeout(2 * soon), WithSessionTimeout(time.Minute)}
	a := pgProvider(t, uri, append(options, WithObserver(seen.observe))...)
	b := pgProvider(t, uri, options...)
	lockers := []PreemptiveLockerFactory{pgLocker(t, a), pgLocker(t, b)}

	var last int64
	turn := 0
	next := func() (*PreemptiveLocker, <-chan NotificationPayload) {
		turn++
		p := lockers[turn%2]("repo", 1, "token")
		require.Zero(t, p.Token())
		ch, err := p.Lock(pgBackground)
		require.NoError(t, err)
		require.Greater(t, p.Token(), last, "a token did not grow")
		last = p.Token()
		return p, ch
	}
	clean := func() {
		p, _ := next()
		require.NoError(t, p.Release(pgBackground))
		require.Equal(t, last, p.Token())
	}
	clean()
	clean()
	const others = 200
	var held []<-chan NotificationPayload
	for key := range int64(others) {
		_, ch := pgHold(t, a, 1000+key, "kept")
		held = append(held, ch)
	}

	for i, mode := range []string{pgserver.Fast, pgserver.Immediate, pgserver.Immediate} {
		holder, notified := next()
		first, firstDone := pgWait(t, a, holder.key, "waiter of the same provider")
		second, secondDone := pgWait(t, b, holder.key, "waiter of the other provider")
		if err := restart(mode); errors.Is(err, pgserver.ErrCannotRestart) {
			t.Skip(err)
		} else {
			require.NoError(t, err)
		}
		pgUntil(t, "the session is reconnected", func() bool { return len(seen.of(ObservedReconnected)) == i+1 })
		pgQuiet(t, notified)
		require.Len(t, pgHolders(t, db), others+1)
		require.NoError(t, holder.Release(pgBackground))
		// Both hold the key, one after the other.
		for range 2 {
			var l *PostgresLock
			var err error
			select {
			case err = <-firstDone:
				l = first
			case err = <-secondDone:
				l = second
			case <-time.After(soon):
				require.FailNow(t, "waiters do not get through after a restart", mode)
			}
			require.NoError(t, err)
			require.Greater(t, l.Token(), last)
			last = l.Token()
			require.NoError(t, l.Unlock(pgBackground))
		}
		clean()
		clean()
	}
	for _, o := range seen.of(ObservedReconnected) {
		require.GreaterOrEqual(t, o.Kept, others)
		require.Zero(t, o.Lost)
		require.Positive(t, o.After)
	}
	require.Empty(t, seen.of(ObservedLost))
	for _, ch := range held {
		pgQuiet(t, ch)
	}
}

// C23: connections are counted while 200 locks are held and 200 wait, while they come and go, and
// when the provider is idle. The server keeps one advisory lock for all of them.
func TestPostgresConnections(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri, WithLockTimeout(2*soon), WithSessionTimeout(2*time.Second))
	const n = 200
	most := 0
	count := func() {
		most = max(most, pgConnections(t, db))
	}
	all := func(what string, locks []*PostgresLock) {
		t.Helper()
		errs := make(chan error, len(locks))
		for _, l := range locks {
			go func() {
				_, err := l.Lock(pgBackground)
				errs <- err
			}()
		}
		for range locks {
			require.NoError(t, pgReceive(t, what, errs))
			count()
		}
	}
	var holders []*PostgresLock
	for key := range int64(n) {
		holders = append(holders, pgNew(t, p, key, "holder"))
	}
	all("holders lock", holders)
	pgUntil(t, "three remain next to holds", func() bool {
		count()
		return pgConnections(t, db) == 3
	})
	var waiters []*PostgresLock
	done := make(chan error, n)
	for key := range int64(n) {
		l := pgNew(t, p, key, "waiter")
		waiters = append(waiters, l)
		go func() {
			_, err := l.Lock(pgBackground)
			done <- err
		}()
	}
	pgUntil(t, "all of them wait", func() bool {
		count()
		for _, l := range waiters {
			l.mu.Lock()
			placed := l.placed
			l.mu.Unlock()
			if !placed {
				return false
			}
		}
		return true
	})
	require.Len(t, pgHolders(t, db), n)
	require.Len(t, pgAdvisory(t, db), 1, "one entry in the server's lock table for all of them")
	for _, l := range holders {
		require.NoError(t, l.Unlock(pgBackground))
		count()
	}
	for range n {
		require.NoError(t, pgReceive(t, "waiters lock", done))
		count()
	}
	for _, l := range waiters {
		require.NoError(t, l.Unlock(pgBackground))
	}
	t.Logf("%d connections at the most", most)
	require.LessOrEqual(t, most, 4)
	pgUntil(t, "two remain without holds", func() bool { return pgConnections(t, db) == 2 })
	require.Len(t, pgAdvisory(t, db), 1)
	require.NoError(t, p.Close())
	pgUntil(t, "no connection remains after Close", func() bool { return pgConnections(t, db) == 0 })
}

// seenSessions collects an observer's observations.
type seenSessions struct {
	mu  sync.Mutex // guards all
	all []Observation
}

func (o *seenSessions) observe(ob Observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all = append(o.all, ob)
}

// kinds returns the kinds of all observations, in order.
func (o *seenSessions) kinds() (kinds []ObservationKind) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, ob := range o.all {
		kinds = append(kinds, ob.Kind)
	}
	return kinds
}

// of returns the observations of a kind.
func (o *seenSessions) of(kind ObservationKind) (found []Observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, ob := range o.all {
		if ob.Kind == kind {
			found = append(found, ob)
		}
	}
	return found
}

// C24: the server ends a session's connection. Its holds continue.
func TestPostgresSessionKilled(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var log pgLog
	var seen seenSessions
	mine := pgProvider(t, uri, log.option(), WithObserver(seen.observe))
	p := pgLocker(t, mine)("repo", 1, "holder")
	ch, err := p.Lock(pgBackground)
	require.NoError(t, err)
	kept, other := pgHold(t, mine, 4, "another hold")
	before, _ := mine.session.trust.current()
	token := p.Token()

	pgTerminate(t, db, pgOwn(t, db, mine.session))
	pgUntil(t, "the session is reconnected", func() bool { return len(seen.of(ObservedReconnected)) == 1 })
	after, connected := mine.session.trust.current()
	require.True(t, connected)
	require.Equal(t, before.id, after.id, "the session is the same")
	require.Equal(t, before.generation, after.generation)
	require.NotEqual(t, before.lock, after.lock, "its advisory lock is another one")
	require.Equal(t, after.lock, pgGet[int64](t, db, `SELECT lock FROM env_lock_sessions WHERE id = $1`, after.id))
	require.Equal(t, map[int64]int64{p.key: after.id, 4: after.id}, pgHolders(t, db))
	pgQuiet(t, ch)
	pgQuiet(t, other)
	require.Equal(t, token, p.Token())

	suspended := seen.of(ObservedSuspended)
	require.Len(t, suspended, 1)
	require.Equal(t, 2, suspended[0].Kept)
	require.Error(t, suspended[0].Err)
	reconnected := seen.of(ObservedReconnected)[0]
	require.Equal(t, 2, reconnected.Kept)
	require.Zero(t, reconnected.Lost)
	require.Positive(t, reconnected.After)
	require.Contains(t, log.String(), `msg="locker: session suspended" holds=2`)
	require.Contains(t, log.String(), `msg="locker: session reconnected"`)
	require.Contains(t, log.String(), "kept=2 lost=0")

	// A successor does not notice the reconnect.
	successor := pgProvider(t, uri, WithLockTimeout(2*soon))
	q := pgLocker(t, successor)("repo", 1, "successor")
	done := make(chan error, 1)
	go func() {
		_, err := q.Lock(pgBackground)
		done <- err
	}()
	n := pgReceive(t, "the holder is notified", ch)
	require.Equal(t, "successor", n.Message)
	require.NotEqual(t, p.lock.(*PostgresLock).claim.id, n.ID, "C5")
	require.NoError(t, p.Release(pgBackground), "C18 it was never lost")
	require.NoError(t, p.Release(pgBackground))
	require.NoError(t, pgReceive(t, "the successor gets the key", done))
	require.Greater(t, q.Token(), p.Token(), "C15")
	require.NoError(t, q.Release(pgBackground))

	l, _ := pgHold(t, mine, 5, "C26 the provider works")
	require.NoError(t, l.Unlock(pgBackground))
	require.Empty(t, seen.of(ObservedLost))
	pgQuiet(t, other)
	require.NoError(t, kept.Unlock(pgBackground))
	require.NoError(t, mine.Close())
	require.NoError(t, successor.Close())
	pgUntil(t, "no connection remains", func() bool { return pgConnections(t, db) == 0 })
}

// C26: a waiter's connection ends during each of its statements. The statement is repeated on the
// next connection.
func TestPostgresSessionKilledWhileWaiting(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri, WithLockTimeout(2*soon))
	other := pgProvider(t, uri)
	l, _ := pgHold(t, p, 1, "makes the row")
	require.NoError(t, l.Unlock(pgBackground))
	busy, _ := pgHold(t, other, 2, "holder")
	for _, c := range []struct {
		name, block string
		key         int64
	}{
		{"C26 taking the row", `SELECT FROM env_lock_state WHERE lock_key = 1 FOR UPDATE`, 1},
		{"C26 asking to be notified of a release", `SELECT FROM env_lock_state WHERE lock_key = 2 FOR UPDATE`, 2},
		{"C26 creating the row", `INSERT INTO env_lock_state (lock_key) VALUES (3)`, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			tx, err := db.BeginTx(pgBackground, nil)
			require.NoError(t, err)
			defer func() { _ = tx.Rollback() }()
			pgExec(t, tx, c.block)
			l := pgNew(t, p, c.key, "waiter")
			done := make(chan error, 1)
			go func() {
				_, err := l.Lock(pgBackground)
				done <- err
			}()
			pid := pgBlocked(t, db)
			pgTerminate(t, db, pid)
			pgUntil(t, "the connection has ended", func() bool {
				return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE pid = $1`, pid) == 0
			})
			require.NoError(t, tx.Rollback())
			if c.key == 2 {
				require.NoError(t, busy.Unlock(pgBackground))
			}
			require.NoError(t, pgReceive(t, "the waiter gets the key", done))
			require.NoError(t, l.Unlock(pgBackground))
		})
	}
}

// C24, C25: a network that goes silent. Nothing arrives, not even the end of a connection.
func TestPostgresSilentNetwork(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		ways []direction
	}{
		{"both ways", []direction{toServer, toClient}},
		{"only what the server sends is lost", []direction{toClient}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			px := newProxy(t, "", uri, nil)
			const timeout = 4 * time.Second
			mine := pgProvider(t, px.uri(t, uri), WithLockTimeout(2*soon), WithSessionTimeout(timeout))
			p := pgLocker(t, mine)("repo", 1, "holder")
			ch, err := p.Lock(pgBackground)
			require.NoError(t, err)
			released, _ := pgHold(t, mine, 1, "released during the silence")
			direct := pgProvider(t, uri, WithLockTimeout(2*soon))
			pgHold(t, direct, 2, "connects")
			pid := pgOwn(t, db, mine.session)
			old, _ := mine.session.trust.current()

			// order records the events in the order in which they happened.
			var mu sync.Mutex
			var order []string
			record := func(what string) {
				mu.Lock()
				defer mu.Unlock()
				order = append(order, what)
			}
			px.silence(c.ways...)
			start := time.Now()
			good := mine.Stats().LastHeartbeat
			notified := make(chan time.Time, 1)
			go func() {
				<-ch
				record("notified")
				notified <- time.Now()
			}()
			q := pgLocker(t, direct)("repo", 1, "successor")
			started := make(chan error, 1)
			go func() {
				_, err := q.Lock(pgBackground)
				record("started")
				started <- err
			}()
			begin := time.Now()
			require.Error(t, released.Unlock(pgBackground))
			require.Less(t, time.Since(begin), releaseTimeout+time.Second, "C18 a release into the silence is bounded")
			require.NoError(t, released.Unlock(pgBackground), "C18 a second one says nothing")

			// The last good heartbeat began before the silence, or is the one whose result was in
			// flight then.
			at := pgReceive(t, "C24 the holder is notified", notified)
			require.GreaterOrEqual(t, at.Sub(good), patience(timeout), "C24 not earlier")
			require.Less(t, at.Sub(start), patience(timeout)+2*time.Second, "C24")
			require.Less(t, time.Since(begin), releaseTimeout+timeout+2*time.Second)
			pgUnseen(t, "C25 the server ends the silent session", db, pid)
			require.NoError(t, pgReceive(t, "the successor starts", started))
			require.GreaterOrEqual(t, time.Since(good), timeout, "C11 it has watched the session being dead")
			mu.Lock()
			require.Equal(t, []string{"notified", "started"}, order)
			mu.Unlock()
			require.Greater(t, q.Token(), p.Token())
			begin = time.Now()
			require.ErrorIs(t, p.Release(pgBackground), ErrLockLost)
			require.Less(t, time.Since(begin), releaseTimeout)
			require.NoError(t, p.Release(pgBackground), "C18 once")
			require.NoError(t, q.Release(pgBackground))

			// The network works again.
			px.silence()
			l, _ := pgHold(t, mine, 3, "C26 the provider works again")
			now, _ := mine.session.trust.current()
			require.NotEqual(t, old.id, now.id, "a session that was lost is abandoned")
			require.NoError(t, l.Unlock(pgBackground))
			pgUntil(t, "the release during the silence has happened", func() bool {
				_, held := pgHolders(t, db)[1]
				return !held
			})
		})
	}
}

// C22: a Close into a silent network returns, however long the session may be cut off.
func TestPostgresCloseSilent(t *testing.T) {
	t.Parallel()
	for _, timeout := range []time.Duration{2 * time.Second, 10 * time.Second, time.Hour} {
		for _, holds := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v, holds %v", timeout, holds), func(t *testing.T) {
				t.Parallel()
				uri := newDatabase(t)
				px := newProxy(t, "", uri, nil)
				p := pgProvider(t, px.uri(t, uri), WithPreemptionTimeout(100*time.Millisecond), WithSessionTimeout(timeout))
				l, ch := pgHold(t, p, 1, "holder")
				if !holds {
					require.NoError(t, l.Unlock(pgBackground))
				}
				px.silence(toServer, toClient)
				closed := make(chan error, 1)
				go func() { closed <- p.Close() }()
				if holds {
					pgReceive(t, "the holder is notified", ch)
				}
				require.NoError(t, pgReceive(t, "Close returns", closed))
				// With a shorter timeout the session may be lost before.
				if holds && timeout > 2*time.Second {
					require.ErrorIs(t, l.Cause(), ErrProviderClosed)
				}
				_, err := p.New(pgBackground, 1, "late")
				require.ErrorIs(t, err, ErrProviderClosed)
			})
		}
	}
}

// C26: there is no server at first.
func TestPostgresServerComesLater(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	px := newProxy(t, "", uri, nil)
	address := px.listener.Addr().String()
	// No process listens at the address now.
	px.close()
	p := pgProvider(t, throughAddress(t, uri, address), WithLockTimeout(2*time.Second))
	l := pgNew(t, p, 1, "early")
	start := time.Now()
	_, err := l.Lock(pgBackground)
	require.ErrorIs(t, err, ErrLockTimeout)
	require.ErrorContains(t, err, "connect", "the error does not say what is wrong")
	require.NotErrorIs(t, err, ErrLockPreempted)
	require.Less(t, time.Since(start), soon)

	// The lock timeout bounds LockKey.
	_, err = p.LockKey(pgBackground, "repo", 1)
	require.ErrorIs(t, err, ErrLockTimeout)
	require.ErrorContains(t, err, "connect")

	newProxy(t, address, uri, nil)
	pgUntil(t, "the provider has connected", func() bool { _, err := p.LockKey(pgBackground, "repo", 1); return err == nil })
	l, _ = pgHold(t, p, 1, "later")
	require.NoError(t, l.Unlock(pgBackground))
}

// C27: servers and proxies that cannot carry a session are rejected.
func TestPostgresRefused(t *testing.T) {
	t.Parallel()
	refusal := func(t *testing.T, uri string, texts ...string) {
		t.Helper()
		p := pgProvider(t, uri)
		start := time.Now()
		for _, f := range []func() error{
			func() error { _, err := p.LockKey(pgBackground, "repo", 1); return err },
			func() error { return pgNew(t, p, 1, "claim").Notify(pgBackground) },
			func() error { _, err := pgNew(t, p, 1, "lock").Lock(pgBackground); return err },
		} {
			err := f()
			for _, text := range texts {
				require.ErrorContains(t, err, text)
			}
			require.NotErrorIs(t, err, ErrLockTimeout, "the error came by waiting only")
		}
		require.Less(t, time.Since(start), soon)
	}

	t.Run("C27 read-only by default_transaction_read_only", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		pgExec(t, db, `ALTER DATABASE `+pgGet[string](t, db, `SELECT current_database()`)+` SET default_transaction_read_only = on`)
		refusal(t, uri, "read-only", "primary")
	})

	t.Run("C27 standby, and the primary beside it", func(t *testing.T) {
		t.Parallel()
		primary := pgCluster(t, pgserver.Options{})
		standby := pgStandby(t, primary, pgserver.StandbyOptions{})
		refusal(t, standby.URI("postgres"), "read-only", "primary")

		for _, both := range []string{
			fmt.Sprintf("host=127.0.0.1,127.0.0.1 port=%d,%d user=postgres dbname=postgres sslmode=disable", standby.Port(), primary.Port()),
			fmt.Sprintf("postgres://postgres@/postgres?host=127.0.0.1,127.0.0.1&port=%d,%d&sslmode=disable", standby.Port(), primary.Port()),
		} {
			l, _ := pgHold(t, pgProvider(t, both), 1, "finds the primary")
			require.NoError(t, l.Unlock(pgBackground))
		}
	})

	t.Run("C27 pool in transaction mode", func(t *testing.T) {
		t.Parallel()
		server := sharedServer(t).Server()
		// The pool cannot log in with a password.
		if server == nil {
			server = pgCluster(t, pgserver.Options{})
		}
		uri, err := server.CreateDatabase(pgBackground, "pool")
		require.NoError(t, err)
		for _, lenient := range []bool{false, true} {
			refusal(t, throughAddress(t, uri, newPooler(t, uri, lenient)), "a proxy", "connect to PostgreSQL directly", "session mode")
		}
	})

	t.Run("C27 pool that happens to have one server session", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		deaf := newProxy(t, "", uri, func(_ *proxied, to direction, kind byte, _ []byte) verdict {
			if to == toClient && kind == 'A' { // NotificationResponse
				return drop
			}
			return pass
		})
		refusal(t, deaf.uri(t, uri), "NOTIFY", "transaction-pooling", "connect to PostgreSQL directly", "session mode")
	})

	t.Run("C27 PgBouncer in transaction mode", func(t *testing.T) {
		t.Parallel()
		program := pgBouncerProgram(t)
		server := sharedServer(t).Server()
		if server == nil {
			server = pgCluster(t, pgserver.Options{})
		}
		uri, err := server.CreateDatabase(pgBackground, "pgbouncer")
		require.NoError(t, err)
		refusal(t, throughAddress(t, uri, pgBouncer(t, program, uri, "transaction", "")), "a proxy", "connect to PostgreSQL directly", "session mode")
	})

	t.Run("C27 foreign tables", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		pgExec(t, db, `CREATE TABLE env_locks (lock_key bigint unique); CREATE TABLE env_lock_state (other int)`)
		refusal(t, uri, "SchemaSQL")
	})
}

// pgBouncerProgram returns the path of PgBouncer, or skips the test if it is not installed. The
// name of such a test has to contain PgBouncer, because scripts/test recognizes it by that.
func pgBouncerProgram(t testing.TB) string {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		t.Skip("pgbouncer is not in PATH")
	}
	return program
}

// pgBouncer starts PgBouncer in a pool mode, with further settings, and returns its address.
func pgBouncer(t testing.TB, program, uri, mode, settings string) string {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := free.Addr().(*net.TCPAddr)
	require.NoError(t, free.Close())
	target, err := url.Parse(uri)
	require.NoError(t, err)
	dir := t.TempDir()
	users, config := filepath.Join(dir, "users"), filepath.Join(dir, "config")
	require.NoError(t, os.WriteFile(users, []byte(`"postgres" ""`), 0o644))
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `[databases]
* = host=%s port=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = trust
auth_file = %s
pool_mode = %s
ignore_startup_parameters = extra_float_digits
%s
`, target.Hostname(), target.Port(), address.Port, users, mode, settings), 0o644))
	args := []string{config}
	// PgBouncer does not run as root.
	if os.Geteuid() == 0 {
		args = append([]string{"-u", "nobody"}, args...)
	}
	cmd := exec.Command(program, args...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	pgUntil(t, "PgBouncer listens", func() bool {
		conn, err := net.Dial("tcp", address.String())
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return address.String()
}

// C28: the schema.
func TestPostgresSchema(t *testing.T) {
	t.Parallel()

	t.Run("C28 sixteen first uses concurrently", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		keys := make(chan int64, 16)
		errs := make(chan error, 16)
		for range 16 {
			p := pgProvider(t, uri)
			go func() {
				key, err := p.LockKey(pgBackground, "repo", 1)
				errs <- err
				keys <- key
			}()
		}
		all := map[int64]bool{}
		for range 16 {
			require.NoError(t, pgReceive(t, "LockKey returns", errs))
			all[<-keys] = true
		}
		require.Len(t, all, 1)
	})

	t.Run("C28 without the privilege", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		pgExec(t, db, `REVOKE CREATE ON SCHEMA public FROM PUBLIC`)
		role := pgRole(t, db)
		user, err := url.Parse(uri)
		require.NoError(t, err)
		user.User = url.UserPassword(role, role)
		p := pgProvider(t, user.String())
		_, err = p.LockKey(pgBackground, "repo", 1)
		require.ErrorContains(t, err, "SchemaSQL")
		require.ErrorContains(t, err, role, "the error does not say who lacks the privilege")

		// The provider tries again a moment later.
		pgExec(t, db, SchemaSQL)
		for _, c := range []struct{ grant, want string }{
			{`SELECT, INSERT ON env_locks`, "SELECT, INSERT and UPDATE on env_lock_state"},
			{`SELECT, INSERT, UPDATE ON env_lock_state`, "SELECT, INSERT, UPDATE and DELETE on env_lock_sessions"},
			{`SELECT, INSERT, UPDATE, DELETE ON env_lock_sessions`, ""},
		} {
			pgUntil(t, "what is missing is named", func() bool {
				_, err = p.LockKey(pgBackground, "repo", 1)
				return err != nil && strings.Contains(err.Error(), "needs SELECT and INSERT on env_locks") && strings.Contains(err.Error(), c.want)
			})
			pgExec(t, db, `GRANT `+c.grant+` TO `+role)
		}
		pgUntil(t, "the role has all that it needs", func() bool {
			_, err = p.LockKey(pgBackground, "repo", 1)
			return err == nil
		})
		l, _ := pgHold(t, p, 1, "unprivileged")
		require.NoError(t, pgNew(t, p, 1, "claim").Notify(pgBackground))
		require.NoError(t, l.Unlock(pgBackground))

		// SchemaSQL runs again, on tables that are in use.
		pgExec(t, db, SchemaSQL)
		require.NoError(t, p.Close())
	})

	t.Run("C28 an env_locks table that was there before", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		pgExec(t, db, `CREATE TABLE env_locks (lock_key bigint unique, repo text, pull_request integer, primary key (repo, pull_request));
			INSERT INTO env_locks VALUES (77, 'old/repo', 1), (-5, 'old/repo', 2), (9223372036854775807, 'old/repo', 3)`)
		p := pgProvider(t, uri)
		for pr, want := range map[uint]int64{1: 77, 2: -5, 3: 9223372036854775807} {
			key, err := p.LockKey(pgBackground, "old/repo", pr)
			require.NoError(t, err)
			require.Equal(t, want, key)
		}
		key, err := p.LockKey(pgBackground, "new/repo", 1)
		require.NoError(t, err)

		el := PostgresEnvLock{}
		into := el.ScanValues()
		require.NoError(t, db.QueryRowContext(pgBackground, `SELECT `+el.Columns()+` FROM env_locks WHERE repo = 'new/repo'`).Scan(into...))
		require.Equal(t, key, *into[0].(*int64))
		require.Equal(t, "new/repo", *into[1].(*string))
		require.Equal(t, uint(1), *into[2].(*uint))
		require.Equal(t, 4, pgGet[int](t, db, `SELECT count(*) FROM env_locks`))
		require.Equal(t, 3, pgGet[int](t, db, `SELECT count(*) FROM information_schema.columns WHERE table_name = 'env_locks'`))

		locker := pgLocker(t, p)("old/repo", 2, "negative key")
		_, err = locker.Lock(pgBackground)
		require.NoError(t, err)
		require.NoError(t, locker.Release(pgBackground))
	})
}

// pgRole creates a role that can log in, with its name as the password.
func pgRole(t testing.TB, db *sql.DB) string {
	t.Helper()
	role := pgGet[string](t, db, `SELECT current_database() || '_user'`)
	pgExec(t, db, `CREATE ROLE `+role+` LOGIN PASSWORD '`+role+`'`)
	t.Cleanup(func() {
		_, _ = db.ExecContext(pgBackground, `DROP OWNED BY `+role+`; DROP ROLE `+role)
	})
	return role
}

// A transaction of another client keeps rows locked. Statements about these rows are repeated
// within the bound of their caller (C21), and other keys are not affected.
func TestPostgresForeignTransaction(t *testing.T) {
	t.Parallel()

	t.Run("row of one key for longer than a session may be silent", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		const timeout = 4 * time.Second
		p := pgProvider(t, uri, WithSessionTimeout(timeout), WithLockTimeout(2*soon))
		const bad = 100
		var holds []<-chan NotificationPayload
		for key := range int64(3) {
			_, ch := pgHold(t, p, key, "holder")
			holds = append(holds, ch)
		}
		l, _ := pgHold(t, p, bad, "creates the row")
		require.NoError(t, l.Unlock(pgBackground))
		tx, err := db.BeginTx(pgBackground, nil)
		require.NoError(t, err)
		defer func() { _ = tx.Rollback() }()
		pgExec(t, tx, `SELECT FROM env_lock_state WHERE lock_key = $1 FOR UPDATE`, bad)

		until := time.Now().Add(lease(timeout) + heartbeatInterval(timeout))
		type outcome struct {
			good bool
			err  error
		}
		ends := make(chan outcome)
		var running sync.WaitGroup
		for i := range 4 {
			running.Add(2)
			// These callers claim and lock the bad key.
			go func() {
				defer running.Done()
				for time.Now().Before(until) {
					ctx, cancel := context.WithTimeout(pgBackground, 2*time.Second)
					l, err := p.New(ctx, bad, "bad")
					if err == nil && i%2 == 0 {
						err = l.Notify(ctx)
					} else if err == nil {
						_, err = l.Lock(ctx)
					}
					cancel()
					ends <- outcome{false, err}
				}
			}()
			// These callers work on good keys meanwhile.
			go func() {
				defer running.Done()
				for time.Now().Before(until) {
					l, err := p.New(pgBackground, int64(10+i), "good")
					if err == nil {
						err = l.Notify(pgBackground)
					}
					if err == nil {
						_, err = l.Lock(pgBackground)
					}
					if err == nil {
						err = l.Unlock(pgBackground)
					}
					ends <- outcome{true, err}
				}
			}()
		}
		go func() {
			running.Wait()
			close(ends)
		}()
		good, failed := 0, 0
		for o := range ends {
			if o.good {
				assert.NoError(t, o.err)
				good++
				continue
			}
			assert.ErrorIs(t, o.err, context.DeadlineExceeded)
			assert.NotErrorIs(t, o.err, ErrLockPreempted)
			failed++
			if o.err != nil && strings.Contains(o.err.Error(), "lock timeout") {
				// Once a statement has been tried, the error contains the reason.
				failed++
			}
		}
		t.Logf("%d cycles on good keys, %d errors on the bad one", good, failed)
		require.NotZero(t, good)
		require.NotZero(t, failed)
		for _, ch := range holds {
			pgQuiet(t, ch)
		}
		require.NoError(t, tx.Rollback())
		l, _ = pgHold(t, pgProvider(t, uri), bad, "free again")
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("whole table for 5 s", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		p := pgProvider(t, uri, WithSessionTimeout(4*time.Second), WithLockTimeout(2*soon))
		var holds []<-chan NotificationPayload
		for key := range int64(50) {
			_, ch := pgHold(t, p, key, "holder")
			holds = append(holds, ch)
		}
		released, _ := pgHold(t, p, 60, "released meanwhile")
		tx, err := db.BeginTx(pgBackground, nil)
		require.NoError(t, err)
		defer func() { _ = tx.Rollback() }()
		pgExec(t, tx, `LOCK TABLE env_lock_state IN ACCESS EXCLUSIVE MODE`)
		errs := make(chan error, 20)
		for key := range int64(cap(errs)) {
			l := pgNew(t, p, 100+key, "meanwhile")
			go func() {
				_, err := l.Lock(pgBackground)
				errs <- err
			}()
		}
		ctx, cancel := context.WithTimeout(pgBackground, 500*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, released.Unlock(ctx), context.DeadlineExceeded, "C18 a release is bounded by its context, and goes on")
		pgExec(t, tx, `SELECT pg_sleep(5)`)
		require.Empty(t, errs, "nothing has failed")
		require.NoError(t, tx.Rollback())
		for range cap(errs) {
			require.NoError(t, pgReceive(t, "a lock is granted", errs))
		}
		pgUntil(t, "C18 the release has happened", func() bool {
			_, held := pgHolders(t, db)[60]
			return !held
		})
		for _, ch := range holds {
			pgQuiet(t, ch)
		}
		l, _ := pgHold(t, p, 200, "works as before")
		require.NoError(t, l.Unlock(pgBackground))
		for _, ch := range holds {
			pgQuiet(t, ch)
		}
	})
}

// C20, C22: locks that failed leave nothing behind, and neither does Close. The test does not run
// in parallel, because it counts goroutines.
func TestPostgresLeftovers(t *testing.T) {
	uri := newDatabase(t)
	db := pgDB(t, uri)
	require.NoError(t, db.Ping())
	atStart := goleak.IgnoreCurrent()
	const timeout = 4 * time.Second
	occupied := pgProvider(t, uri, WithPreemptionTimeout(4*soon), WithSessionTimeout(timeout))
	p := pgProvider(t, uri, WithLockTimeout(300*time.Millisecond), WithPreemptionTimeout(300*time.Millisecond), WithSessionTimeout(timeout))
	patient := pgProvider(t, uri, WithSessionTimeout(timeout), WithLockTimeout(2*soon))
	occupier, _ := pgHold(t, occupied, 1, "occupies the key")
	holder, _ := pgHold(t, patient, 2, "opens the session")
	require.NoError(t, holder.Unlock(pgBackground))
	// The lock timeout of p may be too short for the first connections.
	pgUntil(t, "p is open", func() bool {
		l, err := p.New(pgBackground, 2, "opens the session")
		require.NoError(t, err)
		_, err = l.Lock(pgBackground)
		return err == nil && l.Unlock(pgBackground) == nil
	})
	idle := func() {
		t.Helper()
		pgUntil(t, "two have two connections, and one that holds has three", func() bool { return pgConnections(t, db) == 7 })
	}
	idle()
	warm := goleak.IgnoreCurrent()

	const each = 15
	errs := make(chan error, 4*each)
	for range each { // claims that time out
		l, err := p.New(pgBackground, 1, "too late")
		require.NoError(t, err)
		go func() {
			_, err := l.Lock(pgBackground)
			if !errors.Is(err, ErrLockTimeout) {
				err = fmt.Errorf("not a timeout: %v", err)
			} else {
				err = nil
			}
			errs <- err
		}()
	}
	var waits []*PostgresLock
	wait := func(want error, after func(l *PostgresLock, cancel context.CancelFunc)) {
		l, err := patient.New(pgBackground, 1, "waiter")
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(pgBackground)
		go func() {
			defer cancel()
			_, err := l.Lock(ctx)
			if !errors.Is(err, want) {
				err = fmt.Errorf("want %v: %v", want, err)
			} else {
				err = nil
			}
			errs <- err
		}()
		pl := l.(*PostgresLock)
		pgUntil(t, "the lock waits", func() bool {
			pl.mu.Lock()
			defer pl.mu.Unlock()
			return pl.placed
		})
		waits = append(waits, pl)
		if after != nil {
			after(pl, cancel)
		}
	}
	for range each {
		wait(context.Canceled, func(_ *PostgresLock, cancel context.CancelFunc) { cancel() })
		wait(errReleasedWait, func(l *PostgresLock, _ context.CancelFunc) { require.NoError(t, l.Unlock(pgBackground)) })
	}
	for range each {
		wait(ErrLockPreempted, nil)
	}
	require.NoError(t, pgNew(t, patient, 1, "displaces them").Notify(pgBackground))
	for range 4 * each {
		require.NoError(t, pgReceive(t, "Lock fails", errs))
	}
	leaks := func(known goleak.Option) {
		t.Helper()
		require.NoError(t, goleak.Find(known))
	}
	// C20: the connections have returned to their number when idle.
	idle()
	leaks(warm)
	require.Len(t, pgAdvisory(t, db), 3, "one for each session")
	require.Len(t, pgHolders(t, db), 1)
	for _, s := range []*session{p.session, patient.session} {
		s.mu.Lock()
		require.Zero(t, s.queuedLocked())
		s.mu.Unlock()
		s.hub.mu.Lock()
		require.Zero(t, s.hub.count)
		require.Empty(t, s.hub.locks)
		require.Empty(t, s.hub.holds)
		s.hub.mu.Unlock()
		s.hub.alarms.mu.Lock()
		require.Empty(t, s.hub.alarms.queue)
		s.hub.alarms.mu.Unlock()
	}
	for _, l := range waits {
		require.NoError(t, l.Unlock(pgBackground), "C20 Release afterwards is harmless")
	}

	var notified <-chan NotificationPayload
	pgUntil(t, "p holds a key", func() bool {
		l, err := p.New(pgBackground, 2, "is notified by Close, takes no notice")
		require.NoError(t, err)
		notified, err = l.Lock(pgBackground)
		return err == nil
	})
	closed := make(chan error, 1)
	go func() { closed <- p.Close() }()
	require.Contains(t, pgReceive(t, "the holder is notified", notified).Message, ErrProviderClosed.Error())
	require.NoError(t, pgReceive(t, "Close returns", closed), "C22")
	require.NoError(t, patient.Close())
	require.Len(t, pgHolders(t, db), 1)
	require.NoError(t, occupier.Unlock(pgBackground))
	require.NoError(t, occupied.Close())
	require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM env_lock_sessions`), "C22 the sessions' rows")
	pgUntil(t, "C22 no connection remains", func() bool { return pgConnections(t, db) == 0 })
	leaks(atStart)
}

// C20: an attempt that is given up while the server works on it holds nothing, whether it is
// granted afterwards or fails.
func TestPostgresAbandoned(t *testing.T) {
	t.Parallel()
	for _, granted := range []bool{true, false} {
		t.Run(fmt.Sprintf("C20 granted afterwards %v", granted), func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			p := pgProvider(t, uri)
			l, _ := pgHold(t, p, 1, "creates the row")
			token := l.Token()
			require.NoError(t, l.Unlock(pgBackground))
			tx, err := db.BeginTx(pgBackground, nil)
			require.NoError(t, err)
			defer func() { _ = tx.Rollback() }()
			pgExec(t, tx, `SELECT FROM env_lock_state WHERE lock_key = 1 FOR UPDATE`)
			given := pgNew(t, p, 1, "given up")
			ctx, cancel := context.WithCancel(pgBackground)
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := given.Lock(ctx)
				done <- err
			}()
			pid := pgBlocked(t, db)
			cancel()
			require.ErrorIs(t, pgReceive(t, "Lock gives up", done), context.Canceled)
			if granted {
				require.NoError(t, tx.Rollback())
			}
			pgUntil(t, "the statement has ended, and nothing is queued", func() bool {
				return pgGet[bool](t, db, `SELECT state = 'idle' FROM pg_stat_activity WHERE pid = $1`, pid) && p.Stats().Queued == 0
			})
			if !granted {
				require.NoError(t, tx.Rollback())
			}
			pgUntil(t, "nothing is held", func() bool { return len(pgHolders(t, db)) == 0 })
			if granted {
				require.Greater(t, pgGet[int64](t, db, `SELECT token FROM env_lock_state WHERE lock_key = 1`), token, "it was not granted: the test is void")
			}
			other, _ := pgHold(t, pgProvider(t, uri), 1, "another provider")
			require.NoError(t, other.Unlock(pgBackground))
			l, _ = pgHold(t, p, 1, "the same provider")
			require.NoError(t, l.Unlock(pgBackground))
		})
	}
}

// C13: an operator's NOTIFY, and messages of other programs on the channel.
func TestPostgresNotifyByHand(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	var log pgLog
	p := pgProvider(t, uri, log.option())
	l, ch := pgHold(t, p, -7, "asked to stop")
	_, other := pgHold(t, p, 8, "never asked")
	_, waiting := pgWait(t, p, 8, "waiter")

	for _, payload := range []string{
		``, `garbage`, `null`, `[]`, `8`, `"8"`, `{}`, `{"event":"no key"}`, `{"lockKey":null,"event":"x"}`, `{"lockKey":"eight","event":"x"}`, `{"lockKey":"","event":"x"}`,
		`{"lockKey":8.5}`, `{"lockKey":99999999999999999999}`, `{"kind":"foreign","lockKey":8,"event":"x"}`, `{"kind":5,"lockKey":8}`,
		`{"kind":"check","id":"00000000-0000-0000-0000-000000000000"}`, `{"kind":"released","lockKey":8}`, `{"kind":"released","lockKey":-7}`,
		`{"kind":"claim","lockKey":8,"id":"nonsense","claim":99999}`, `{"lockKey":9,"event":"no one has this key"}`,
		`{"some":{"other":["program"]}}`, strings.Repeat("x", 7999),
	} {
		pgExec(t, db, `SELECT pg_notify($1, $2)`, notifyChannel, payload)
	}
	pgExec(t, db, `SELECT pg_notify($1, 'flood ' || i) FROM generate_series(1, 10000) i`, notifyChannel)

	// Notifications arrive in order, so the others have been read before this one. If the listener
	// has lost its connection because of the flood, the operator asks again.
	var n NotificationPayload
	deadline := time.After(soon)
	for n.LockKey == 0 {
		pgExec(t, db, `NOTIFY env_lock_events, '{"lockKey": -7, "event": "maintenance at noon"}'`)
		select {
		case n = <-ch:
		case <-time.After(2 * time.Second):
		case <-deadline:
			require.FailNow(t, "the holder is not asked to stop")
		}
	}
	require.Equal(t, NotificationPayload{l.claim.id, "maintenance at noon", -7}, n)
	require.ErrorIs(t, l.Cause(), ErrStopRequested)
	require.NotErrorIs(t, l.Cause(), ErrLockPreempted)
	pgQuiet(t, other)
	select {
	case err := <-waiting:
		require.FailNow(t, "the waiter left", "%v", err)
	default:
	}
	require.NoError(t, l.Unlock(pgBackground))

	// The function of Do gets the sentinel, too.
	f := pgLocker(t, p)
	key, err := p.LockKey(pgBackground, "repo", 1)
	require.NoError(t, err)
	err = f("repo", 1, "do").Do(pgBackground, func(ctx context.Context) error {
		pgExec(t, db, `SELECT pg_notify($1, $2)`, notifyChannel, fmt.Sprintf(`{"lockKey":%d,"event":"stop, please"}`, key))
		pgReceive(t, "the context ends", ctx.Done())
		return context.Cause(ctx)
	})
	require.ErrorIs(t, err, ErrStopRequested)
	require.ErrorContains(t, err, "stop, please")
}

// C30: events of any length and content arrive. Events that are too long are cut.
func TestPostgresEvents(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	holders, claimants := pgProvider(t, uri), pgProvider(t, uri)
	var controls strings.Builder
	for r := rune(1); r < 0x20; r++ {
		controls.WriteRune(r)
	}
	events := map[string]struct {
		event string
		want  string // empty if a part of the event arrives
	}{
		"plain":              {"opened by a@b", "opened by a@b"},
		"empty":              {"", ""},
		"100 kB":             {strings.Repeat("x", 100_000), ""},
		"100 kB of quotes":   {strings.Repeat(`"`, 100_000), ""},
		"100 kB of slashes":  {strings.Repeat(`\`, 100_000), ""},
		"100 kB of controls": {strings.Repeat("\x01", 100_000), ""},
		"100 kB of deletes":  {strings.Repeat("\x7f", 100_000), ""},
		"100 kB of newlines": {strings.Repeat("\n", 100_000), ""},
		"100 kB of markup":   {strings.Repeat("<&>\u2028\u2029", 10_000), ""},
		"controls":           {controls.String() + "\x7f\u0085", controls.String() + "\x7f\u0085"},
		"invalid UTF-8":      {"a\xff\xfeb\xc3", "a\uFFFDb\uFFFD"},
		"much invalid UTF-8": {strings.Repeat("\xff-", 50_000), strings.Repeat("\uFFFD-", 50_000)},
		"NUL":                {"a\x00b\x00", "a\uFFFDb\uFFFD"},
		"quotes":             {`"quoted" \back\ 'single' $1 %s {"lockKey":1}`, `"quoted" \back\ 'single' $1 %s {"lockKey":1}`},
	}
	// The cut falls on every byte of a character.
	for shift := range 4 {
		prefix := strings.Repeat("x", shift)
		for name, s := range map[string]string{"two": "é", "three": "界", "four": "🔒"} {
			events[fmt.Sprintf("%s bytes each, shifted by %d", name, shift)] = struct{ event, want string }{prefix + strings.Repeat(s, 30_000), ""}
		}
	}
	key := int64(0)
	for name, c := range events {
		key++
		t.Run("C30 "+name, func(t *testing.T) {
			want := c.want
			if want == "" {
				want = c.event
			}
			holder, ch := pgHold(t, holders, key, "holder")
			claimant := pgNew(t, claimants, key, c.event)
			require.NoError(t, claimant.Notify(pgBackground))
			n := pgReceive(t, "the holder is notified", ch)
			require.True(t, utf8.ValidString(n.Message))
			if len(want) < 1000 {
				require.Equal(t, want, n.Message)
			} else {
				require.True(t, strings.HasPrefix(want, n.Message), "not a part of the event")
				require.Greater(t, len(n.Message), 1000)
			}
			require.NoError(t, holder.Unlock(pgBackground))
			ch, err := claimant.Lock(pgBackground)
			require.NoError(t, err)
			pgQuiet(t, ch)
			require.NoError(t, claimant.Unlock(pgBackground))
		})
	}
}

// C31: no error and no log line contains a password, whatever is wrong.
func TestPostgresPassword(t *testing.T) {
	t.Parallel()
	const password = "hunter2-\u00e9-secret"
	const right = "correct horse"
	server := pgCluster(t, pgserver.Options{Password: right})
	unused, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, unused.Close())
	// secret returns uri with the wrong password.
	secret := func(uri string) string {
		u, err := url.Parse(uri)
		require.NoError(t, err)
		u.User = url.UserPassword("postgres", password)
		return u.String()
	}
	clean := func(t *testing.T, log *pgLog, err error) {
		t.Helper()
		require.Error(t, err)
		for _, text := range []string{err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%#v", err), log.String()} {
			for _, forbidden := range []string{"hunter2", "secret", right, url.QueryEscape(right), url.PathEscape(right)} {
				require.NotContains(t, text, forbidden)
			}
		}
	}

	good := pgProvider(t, server.URI("postgres"))
	l, _ := pgHold(t, good, 1, "the right password")
	require.NoError(t, l.Unlock(pgBackground))

	for name, uri := range map[string]string{
		"wrong password":        secret(server.URI("postgres")),
		"no such database":      server.URI("missing"),
		"wrong, key=value":      fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres sslmode=disable password='%s'", server.Port(), password),
		"connection refused":    secret(throughAddress(t, server.URI("postgres"), unused.Addr().String())),
		"unreachable host":      secret(throughAddress(t, server.URI("postgres"), "192.0.2.1:5432")),
		"unknown host":          secret(throughAddress(t, server.URI("postgres"), "nowhere.invalid:5432")),
		"TLS that is not there": secret(strings.Replace(server.URI("postgres"), "sslmode=disable", "sslmode=require", 1)),
	} {
		t.Run("C31 "+name, func(t *testing.T) {
			t.Parallel()
			var log pgLog
			p := pgProvider(t, uri, log.option(), WithLockTimeout(2*time.Second))
			ctx, cancel := context.WithTimeout(pgBackground, 2*time.Second)
			defer cancel()
			_, err := pgNew(t, p, 1, "event").Lock(pgBackground)
			clean(t, &log, err)
			_, err = p.LockKey(ctx, "repo", 1)
			clean(t, &log, err)
			_, err = pgLocker(t, p)("repo", 1, "event").Lock(ctx)
			clean(t, &log, err)
			if strings.HasPrefix(name, "wrong") {
				require.ErrorContains(t, err, "password authentication failed", "the error does not say what is wrong")
			}

			db, err := sqlx.Open("postgres", uri)
			require.NoError(t, err)
			defer func() { _ = db.Close() }()
			pings, cancel := context.WithTimeout(pgBackground, 2*time.Second)
			defer cancel()
			var conf LockProviderConfig
			log.option()(&conf)
			_, err = NewPostgresLock(pings, db, 1, uri, "event", conf)
			clean(t, &log, err)
			require.NotContains(t, fmt.Sprintf("%v %+v", conf, conf), "hunter2")
		})
	}
	for _, uri := range []string{
		"postgres://postgres:" + password + "@host:port/db",
		"postgres://postgres:" + password + "@[::1/db",
		"postgres://postgres:" + password + "%zz@host/db",
		"postgres://postgres:hunter2 secret@host/db?sslmode=nonsense",
		"postgres://postgres:" + password + "@host/db?connect_timeout=" + password,
		"postgres://postgres@host/db?password=" + password + "&connect_timeout=x",
		"postgresql://postgres:" + password + "@host/db?target_session_attrs=" + password,
		"mysql://postgres:" + password + "@host/db",
		"password=" + password + " port=x",
		"password='" + password,
		"password=" + password + " nonsense",
		password,
	} {
		var log pgLog
		_, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(uri, ""), log.option())
		clean(t, &log, err)
		_, err = NewPostgresPreemptiveLockerFactory(uri, "", nil)
		clean(t, &log, err)
		db := sqlx.NewDb(pgDB(t, newDatabase(t)), "postgres")
		_, err = NewPostgresLock(pgBackground, db, 1, uri, "event", LockProviderConfig{})
		clean(t, &log, err)
	}
}

// NewPostgresLock returns a lock with a separate session, which ends with the lock.
func TestPostgresSingleLock(t *testing.T) {
	t.Parallel()
	conf := func(t *testing.T, options ...LockProviderOption) LockProviderConfig {
		t.Helper()
		var c LockProviderConfig
		for _, o := range options {
			o(&c)
		}
		return c
	}
	setup := func(t *testing.T, options ...LockProviderOption) (*sql.DB, string, *PostgresLock) {
		t.Helper()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		l, err := NewPostgresLock(pgBackground, sqlx.NewDb(db, "postgres"), 1, uri, "single", conf(t, options...))
		require.NoError(t, err)
		t.Cleanup(func() { _ = l.Unlock(pgBackground) })
		return db, uri, l
	}
	gone := func(t *testing.T, db *sql.DB) {
		t.Helper()
		pgUntil(t, "its connections are gone", func() bool { return pgConnections(t, db, "provider") == 0 })
	}

	t.Run("Unlock", func(t *testing.T) {
		t.Parallel()
		db, _, l := setup(t)
		require.Zero(t, pgConnections(t, db))
		require.NoError(t, l.Notify(pgBackground))
		ch, err := l.Lock(pgBackground)
		require.NoError(t, err)
		require.Positive(t, l.Token())
		require.LessOrEqual(t, pgConnections(t, db), 4)
		require.Contains(t, pgHolders(t, db), int64(1))
		require.NoError(t, l.Unlock(pgBackground))
		require.Empty(t, pgHolders(t, db))
		_, open := <-ch
		require.False(t, open)
		gone(t, db)
		require.NoError(t, l.Unlock(pgBackground))
		require.Error(t, l.Notify(pgBackground))
		_, err = l.Lock(pgBackground)
		require.Error(t, err)
		gone(t, db)
	})

	t.Run("Unlock before Lock", func(t *testing.T) {
		t.Parallel()
		db, _, l := setup(t)
		require.NoError(t, l.Notify(pgBackground))
		require.Error(t, l.Unlock(pgBackground), "C17")
		gone(t, db)
	})

	t.Run("with a provider on the same key", func(t *testing.T) {
		t.Parallel()
		db, uri, l := setup(t, WithLockTimeout(2*soon))
		p := pgProvider(t, pgNamed(t, uri, "provider"))
		_, _ = pgHold(t, p, 2, "keeps the session busy")
		holder := pgNew(t, p, 1, "holder")
		held, err := holder.Lock(pgBackground)
		require.NoError(t, err)
		require.NoError(t, l.Notify(pgBackground))
		require.Equal(t, NotificationPayload{l.claim.id, "single", 1}, pgReceive(t, "the provider's lock is notified", held))
		done := pgWaits(t, l)
		require.NoError(t, holder.Unlock(pgBackground))
		require.NoError(t, pgReceive(t, "the single lock gets the key", done))
		require.Greater(t, l.Token(), holder.Token())
		next := pgNew(t, p, 1, "next")
		require.NoError(t, next.Notify(pgBackground))
		require.Equal(t, "next", pgReceive(t, "the single lock is notified", l.ch).Message)
		require.NoError(t, l.Unlock(pgBackground))
		_, err = next.Lock(pgBackground)
		require.NoError(t, err)
		require.Greater(t, next.Token(), l.Token())
		gone(t, db)
	})

	t.Run("Lock that fails", func(t *testing.T) {
		t.Parallel()
		db, uri, l := setup(t, WithLockTimeout(500*time.Millisecond))
		p := pgProvider(t, pgNamed(t, uri, "provider"))
		pgHold(t, p, 1, "holder")
		_, err := l.Lock(pgBackground)
		require.ErrorIs(t, err, ErrLockTimeout)
		gone(t, db)
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("Unlock during Lock", func(t *testing.T) {
		t.Parallel()
		db, uri, l := setup(t)
		pgHold(t, pgProvider(t, pgNamed(t, uri, "provider")), 1, "holder")
		done := pgWaits(t, l)
		require.NoError(t, l.Unlock(pgBackground))
		require.Error(t, pgReceive(t, "Lock ends", done))
		gone(t, db)
	})

	t.Run("revocation", func(t *testing.T) {
		t.Parallel()
		db, _, l := setup(t, WithPreemptionTimeout(200*time.Millisecond), WithMaxLockDuration(200*time.Millisecond))
		ch, err := l.Lock(pgBackground)
		require.NoError(t, err)
		pgReceive(t, "the holder is notified", ch)
		require.ErrorIs(t, l.Cause(), ErrMaxLockDuration)
		gone(t, db)
		require.Empty(t, pgHolders(t, db))
		require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost)
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("its connection ends", func(t *testing.T) {
		t.Parallel()
		db, _, l := setup(t)
		ch, err := l.Lock(pgBackground)
		require.NoError(t, err)
		s := l.backend.(*session)
		before, _ := s.trust.current()
		pgTerminate(t, db, pgOwn(t, db, s))
		pgUntil(t, "it is reconnected", func() bool {
			now, connected := s.trust.current()
			return connected && now != before
		})
		pgQuiet(t, ch)
		require.Contains(t, pgHolders(t, db), int64(1))
		require.NoError(t, l.Unlock(pgBackground))
		gone(t, db)
	})

	t.Run("loss", func(t *testing.T) {
		t.Parallel()
		db, _, l := setup(t, WithSessionTimeout(2*time.Second))
		ch, err := l.Lock(pgBackground)
		require.NoError(t, err)
		pgExec(t, db, `UPDATE env_lock_state SET holder_id = NULL, holder_session = NULL WHERE lock_key = 1`)
		pgReceive(t, "the holder is notified", ch)
		gone(t, db)
		require.ErrorIs(t, l.Unlock(pgBackground), ErrLockLost)
		require.NoError(t, l.Unlock(pgBackground))
	})

	t.Run("C29 bad arguments", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := sqlx.NewDb(pgDB(t, uri), "postgres")
		for name, f := range map[string]func() (*PostgresLock, error){
			"nil db": func() (*PostgresLock, error) {
				return NewPostgresLock(pgBackground, nil, 1, uri, "event", LockProviderConfig{})
			},
			"empty db": func() (*PostgresLock, error) {
				return NewPostgresLock(pgBackground, &sqlx.DB{}, 1, uri, "event", LockProviderConfig{})
			},
			"closed db": func() (*PostgresLock, error) {
				closed, err := sqlx.Open("postgres", uri)
				require.NoError(t, err)
				require.NoError(t, closed.Close())
				return NewPostgresLock(pgBackground, closed, 1, uri, "event", LockProviderConfig{})
			},
			"no URI": func() (*PostgresLock, error) {
				return NewPostgresLock(pgBackground, db, 1, "", "event", LockProviderConfig{})
			},
			"negative duration": func() (*PostgresLock, error) {
				return NewPostgresLock(pgBackground, db, 1, uri, "event", conf(t, WithLockTimeout(-1)))
			},
			"done context": func() (*PostgresLock, error) {
				ctx, cancel := context.WithCancel(pgBackground)
				cancel()
				return NewPostgresLock(ctx, db, 1, uri, "event", LockProviderConfig{})
			},
		} {
			l, err := f()
			require.Error(t, err, name)
			require.Nil(t, l, name)
		}
	})
}

// The properties of PostgreSQL that the design relies on.
func TestPostgresFacts(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	conn := func() *sql.Conn {
		c, err := db.Conn(pgBackground)
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	yes := func(c *sql.Conn, query string) (b bool) {
		t.Helper()
		require.NoError(t, c.QueryRowContext(pgBackground, query).Scan(&b))
		return b
	}
	a, b := conn(), conn()

	// A transaction-level try in share mode shows whether a session with an advisory lock lives. It
	// waits for nothing and leaves nothing behind, and two of them do not conflict.
	require.True(t, yes(a, `SELECT pg_try_advisory_xact_lock_shared(2)`))
	require.True(t, yes(a, `SELECT pg_try_advisory_lock(2)`), "the try has left something behind")
	require.False(t, yes(b, `SELECT pg_try_advisory_xact_lock_shared(2)`))
	pgExec(t, b, `BEGIN`)
	require.True(t, yes(b, `SELECT pg_try_advisory_xact_lock_shared(1)`))
	require.True(t, yes(conn(), `SELECT pg_try_advisory_xact_lock_shared(1)`))
	pgExec(t, b, `ROLLBACK`)
	require.True(t, yes(a, `SELECT pg_try_advisory_xact_lock(1)`))

	// A session does not see its own lock as taken, so a provider asks on another connection.
	require.True(t, yes(a, `SELECT pg_try_advisory_xact_lock_shared(2)`))

	// The lock outlives a transaction that fails, and ends with the session.
	pgExec(t, a, `BEGIN`)
	pgExec(t, a, `ROLLBACK`)
	require.False(t, yes(b, `SELECT pg_try_advisory_xact_lock_shared(2)`))
	pid := pgGet[int](t, db, `SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	pgTerminate(t, db, pid)
	pgUntil(t, "the lock is free", func() bool { return yes(b, `SELECT pg_try_advisory_xact_lock_shared(2)`) })

	// An UPDATE that has waited for a row uses the new version of the row. Its WHERE and its SET
	// see the other transaction's commit. The tables that it joined do not.
	pgExec(t, db, `CREATE TABLE fact (id int PRIMARY KEY, claim int, seen int); INSERT INTO fact VALUES (1, 1, 0), (2, 1, 0)`)
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	pgExec(t, tx, `UPDATE fact SET claim = 2`)
	waits := make(chan error, 1)
	c := conn()
	var waiter int
	require.NoError(t, c.QueryRowContext(pgBackground, `SELECT pg_backend_pid()`).Scan(&waiter))
	var rows int64
	go func() {
		r, err := c.ExecContext(pgBackground, `WITH old AS MATERIALIZED (SELECT * FROM fact)
			UPDATE fact f SET seen = f.claim * 10 + old.claim FROM old WHERE old.id = f.id AND (f.id = 1 OR f.claim < 2)`)
		if err == nil {
			rows, err = r.RowsAffected()
		}
		waits <- err
	}()
	pgUntil(t, "the statement waits", func() bool {
		return pgGet[bool](t, db, `SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' FROM pg_stat_activity WHERE pid = $1`, waiter)
	})
	require.NoError(t, tx.Commit())
	require.NoError(t, pgReceive(t, "the statement ends", waits))
	require.EqualValues(t, 1, rows, "the WHERE was not looked at again")
	require.Equal(t, 21, pgGet[int](t, db, `SELECT seen FROM fact WHERE id = 1`))
}

// With few operations a worker waits for the statement of the other one, but not for a second one,
// and not for one that takes long.
func TestWorkersWaitForEachOther(t *testing.T) {
	t.Parallel()
	now := time.Now()
	other := &worker{begun: now}
	few := func() *worker { return &worker{queues: [opKinds][]*op{opRelease: {{}}}} }
	w := few()
	require.Zero(t, w.together(&worker{}, now), "the other worker is idle")
	require.Zero(t, (&worker{}).together(other, now), "nothing is queued")
	require.Zero(t, (&worker{queues: [opKinds][]*op{opRelease: make([]*op, fewOps)}}).together(other, now), "many operations are queued")
	require.Zero(t, few().together(other, now.Add(maxTogether)), "the statement takes long")
	require.Equal(t, maxTogether/2, w.together(other, now.Add(maxTogether/2)))
	require.Equal(t, maxTogether/4, w.together(other, now.Add(3*maxTogether/4)), "the same statement")
	require.Zero(t, w.together(&worker{begun: now.Add(maxTogether / 2)}, now.Add(3*maxTogether/4)), "the next statement")
}
