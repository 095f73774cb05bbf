package locker

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// shared is the PostgreSQL server that all tests use, each with a database of
// its own. The first test that needs it starts it, TestMain ends it.
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

// sharedServer answers the shared server.
func sharedServer(t testing.TB) *pgserver.Instance {
	t.Helper()
	server, err := shared()
	require.NoError(t, err, "no PostgreSQL to test with")
	return server
}

// newDatabase makes an empty database on the shared server for one test and
// answers its URI.
func newDatabase(t testing.TB) string {
	t.Helper()
	uri, drop, err := sharedServer(t).NewDatabase(context.Background())
	require.NoError(t, err)
	t.Cleanup(drop)
	return uri
}

// soon bounds every wait of a test for something that should happen; it is far
// above what it takes.
const soon = 30 * time.Second

// What is here needs a real server; what both providers share is in the
// conformance suite.

var pgBackground = context.Background()

// pgProvider makes a provider that is closed at the end of the test.
func pgProvider(t testing.TB, uri string, options ...LockProviderOption) *PostgresLockProvider {
	t.Helper()
	p, err := NewLockProvider(PostgresLockProviderKind, append([]LockProviderOption{WithPostgresBackend(uri, "")}, options...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
	return p.(*PostgresLockProvider)
}

// pgLocker makes PreemptiveLockers on a provider.
func pgLocker(t testing.TB, p LockProvider, options ...PreemptiveLockerOption) PreemptiveLockerFactory {
	t.Helper()
	f, err := NewPreemptiveLockerFactory(p, options...)
	require.NoError(t, err)
	return f
}

// pgDB is the test's own view of a database.
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

// pgGet answers a query's only value.
func pgGet[T any](t testing.TB, db *sql.DB, query string, args ...any) (v T) {
	t.Helper()
	require.NoError(t, db.QueryRowContext(pgBackground, query, args...).Scan(&v))
	return v
}

// pgUntil asks until the answer is true.
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

// pgQuiet requires that a holder has not been told anything.
func pgQuiet(t testing.TB, ch <-chan NotificationPayload) {
	t.Helper()
	select {
	case n, ok := <-ch:
		require.FailNow(t, "holder was disturbed", "%v %v", n, ok)
	default:
	}
}

// pgNew makes a lock that is unlocked at the end of the test, at the latest.
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

// pgWait begins to lock a key without a claim and answers when it waits.
func pgWait(t testing.TB, p *PostgresLockProvider, key int64, event string) (*PostgresLock, <-chan error) {
	t.Helper()
	l := pgNew(t, p, key, event)
	return l, pgWaits(t, l)
}

// pgWaits begins to lock and answers when the lock waits.
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

// pgNamed is a URI with an application name.
func pgNamed(t testing.TB, uri, application string) string {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	q := u.Query()
	q.Set("application_name", application)
	u.RawQuery = q.Encode()
	return u.String()
}

// pgConnections counts everybody's connections to the database but the test's.
func pgConnections(t testing.TB, db *sql.DB) int {
	t.Helper()
	return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND backend_type = 'client backend' AND application_name <> 'test'`)
}

// pgAdvisory lists which sessions hold or await which key.
func pgAdvisory(t testing.TB, db *sql.DB) map[int64]int {
	t.Helper()
	rows, err := db.QueryContext(pgBackground, `SELECT (classid::bigint << 32) | objid::bigint, pid FROM pg_locks
		WHERE locktype = 'advisory' AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
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

// pgCluster starts a server of the test's own. It skips the test where the
// programs for that are missing and a foreign server is used.
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

// C1: one key for each pair, whoever asks; and the second time nothing is
