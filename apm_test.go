//go:build !nodatadog

package locker

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	sqltrace "gopkg.in/DataDog/dd-trace-go.v1/contrib/database/sql"
	"gopkg.in/DataDog/dd-trace-go.v1/ddtrace/ext"
	"gopkg.in/DataDog/dd-trace-go.v1/ddtrace/mocktracer"
	"gopkg.in/DataDog/dd-trace-go.v1/ddtrace/tracer"
)

// The tracer is global to the process, so none of these tests is parallel.

const apmPassword = "sw0rdfish-of-the-spans"

// apmDatabase returns the URI of a new database with a password in it, and the password.
func apmDatabase(t *testing.T) (uri, password string) {
	u, err := url.Parse(newDatabase(t))
	require.NoError(t, err)
	password, has := u.User.Password()
	// The server asks for no password, and accepts any.
	if !has {
		password = apmPassword
		u.User = url.UserPassword(u.User.Username(), password)
	}
	return u.String(), password
}

// recorder collects the spans of a test.
type recorder struct {
	t  *testing.T
	mt mocktracer.Tracer
}

// record starts to collect spans. At the end of the test no span may be open, and none may contain
// the password.
func record(t *testing.T, password string) recorder {
	r := recorder{t, mocktracer.Start()}
	t.Cleanup(func() {
		defer r.mt.Stop()
		assert.Empty(t, r.mt.OpenSpans())
		for _, s := range r.mt.FinishedSpans() {
			assert.NotContains(t, fmt.Sprintf("%v %+v", s.OperationName(), s.Tags()), password)
		}
	})
	return r
}

func (r recorder) count() int { return len(r.mt.FinishedSpans()) }

// named returns the finished spans with a name, oldest first.
func (r recorder) named(name string) []mocktracer.Span {
	return slices.DeleteFunc(r.mt.FinishedSpans(), func(s mocktracer.Span) bool { return s.OperationName() != name })
}

// one returns the only span with a name.
func (r recorder) one(name string) mocktracer.Span {
	r.t.Helper()
	found := r.named(name)
	require.Len(r.t, found, 1, "spans named %q", name)
	return found[0]
}

// statements returns the spans of SQL statements.
func (r recorder) statements() []mocktracer.Span {
	return slices.DeleteFunc(r.mt.FinishedSpans(), func(s mocktracer.Span) bool { return s.Tag(ext.SpanType) != ext.SpanTypeSQL })
}

// under returns the spans of the SQL statements below a span.
func (r recorder) under(parent mocktracer.Span) []mocktracer.Span {
	return slices.DeleteFunc(r.statements(), func(s mocktracer.Span) bool { return s.ParentID() != parent.SpanID() })
}

// requireTags checks the tags of a locker's span.
func requireTags(t *testing.T, s mocktracer.Span, service, repo string, pr uint, event string, key, token int64) {
	t.Helper()
	for name, want := range map[string]any{
		ext.ServiceName: service, "repo": repo, "pr": pr, "event": event, "lock_key": key, "token": token,
	} {
		got := s.Tag(name)
		// The tracer stores small numbers as float64.
		if number, ok := got.(float64); ok {
			got = int64(number)
		}
		require.Equal(t, fmt.Sprint(want), fmt.Sprint(got), "tag %s of %s", name, s.OperationName())
	}
}

func requireFailed(t *testing.T, s mocktracer.Span, message string) {
	t.Helper()
	require.NotNil(t, s.Tag(ext.Error))
	require.Contains(t, s.Tag(ext.ErrorMsg), message)
}

func requireSucceeded(t *testing.T, s mocktracer.Span) {
	t.Helper()
	require.Nil(t, s.Tag(ext.Error))
	require.Nil(t, s.Tag(ext.ErrorMsg))
}

// apmLockers returns a factory on a provider that is closed at the end of the test.
func apmLockers(t *testing.T, uri, sqlService, service string) PreemptiveLockerFactory {
	provider, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(uri, sqlService))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, provider.(*PostgresLockProvider).Close()) })
	factory, err := NewPreemptiveLockerFactory(provider, WithAPMServiceName(service))
	require.NoError(t, err)
	return factory
}

// A Lock and a Release are one span each, and the statements that serve them are spans below. There
// are no other spans, such as those of connecting or of heartbeats.
func TestAPMSpans(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	factory := apmLockers(t, uri, "the-sql", "the-lock")
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()

	l := factory("octo/cat", 42, "synchronize")
	_, err := l.Lock(ctx)
	require.NoError(t, err)
	locked := r.count()
	awaitHeartbeats(ctx, t, uri, 2)
	require.Equal(t, locked, r.count(), "spans of heartbeats")
	require.NoError(t, l.Release(ctx))

	// There is no span above this call, so it has none itself.
	key, err := l.provider.LockKey(ctx, "octo/cat", 42)
	require.NoError(t, err)
	lock, release := r.one("lock"), r.one("release")
	for _, s := range []mocktracer.Span{lock, release} {
		requireTags(t, s, "the-lock", "octo/cat", 42, "synchronize", key, l.Token())
		requireSucceeded(t, s)
		require.Zero(t, s.ParentID())
	}
	require.NotZero(t, l.Token())
	require.GreaterOrEqual(t, len(r.under(lock)), 2, "look up, announce")
	require.NotEmpty(t, r.under(release))
	require.Len(t, r.statements(), len(r.under(lock))+len(r.under(release)), "statements without a parent")
	require.Equal(t, r.count(), len(r.statements())+2, "spans of another kind")
	again := factory("octo/cat", 42, "synchronize")
	_, err = again.Lock(ctx)
	require.NoError(t, err)
	require.NoError(t, again.Release(ctx))
	require.Equal(t, r.count(), len(r.statements())+4)
	for _, s := range r.mt.FinishedSpans() {
		if s.ParentID() == 0 && s.SpanID() != lock.SpanID() && s.SpanID() != release.SpanID() {
			require.Len(t, r.under(s), 1, "one statement for %s where no other is", s.OperationName())
		}
	}
	for _, s := range r.statements() {
		require.Equal(t, "the-sql", s.Tag(ext.ServiceName))
		require.NotContains(t, s.Tag(ext.ResourceName), "pg_backend_pid()", "a heartbeat")
		require.NotContains(t, s.Tag(ext.ResourceName), "UNION ALL", "a check of rows")
		requireSucceeded(t, s)
	}
}

// awaitHeartbeats returns when the session has sent a number of heartbeats.
func awaitHeartbeats(ctx context.Context, t *testing.T, uri string, number int) {
	t.Helper()
	db, err := sql.Open("postgres", uri)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	beats := map[time.Time]bool{}
	pgUntil(t, "heartbeats", func() bool {
		var at time.Time
		switch err := db.QueryRowContext(ctx, `
			SELECT query_start FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%pid = pg_backend_pid() AND granted%'`).Scan(&at); err {
		case nil:
			beats[at] = true
		case sql.ErrNoRows:
		default:
			require.NoError(t, err)
		}
		return len(beats) >= number
	})
}

// A failure is recorded in the span.
func TestAPMErrors(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	factory := apmLockers(t, uri, "the-sql", "the-lock")
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()

	t.Run("context is done", func(t *testing.T) {
		r.mt.Reset()
		done, cancel := context.WithCancel(ctx)
		cancel()
		l := factory("a/b", 1, "opened")
		_, err := l.Lock(done)
		require.ErrorIs(t, err, context.Canceled)
		requireTags(t, r.one("lock"), "the-lock", "a/b", 1, "opened", 0, 0)
		requireFailed(t, r.one("lock"), "context canceled")
	})

	t.Run("input", func(t *testing.T) {
		r.mt.Reset()
		_, err := factory("a\x00b", 1, "opened").Lock(ctx)
		require.Error(t, err)
		requireFailed(t, r.one("lock"), "contains a NUL")
		require.Empty(t, r.statements())
	})

	t.Run("no such database", func(t *testing.T) {
		r.mt.Reset()
		u, err := url.Parse(uri)
		require.NoError(t, err)
		u.Path = "/locker_no_such_database"
		_, err = apmLockers(t, u.String(), "the-sql", "the-lock")("a/b", 1, "opened").Lock(ctx)
		require.Error(t, err)
		requireFailed(t, r.one("lock"), "locker_no_such_database")
		require.Empty(t, r.statements())
	})

	t.Run("Release before Lock", func(t *testing.T) {
		r.mt.Reset()
		require.Error(t, factory("a/b", 1, "opened").Release(ctx))
		requireTags(t, r.one("release"), "the-lock", "a/b", 1, "opened", 0, 0)
		requireFailed(t, r.one("release"), "Release before Lock")
	})

	t.Run("preempted", func(t *testing.T) {
		r.mt.Reset()
		holder, waiter, newest := factory("a/b", 1, "one"), factory("a/b", 1, "two"), factory("a/b", 1, "three")
		notified, err := holder.Lock(ctx)
		require.NoError(t, err)
		preempted := make(chan error, 1)
		go func() {
			_, err := waiter.Lock(ctx)
			preempted <- err
		}()
		select {
		// The waiter's claim has been announced.
		case <-notified:
		case <-ctx.Done():
			t.Fatal("the holder was not notified")
		}
		locked := make(chan error, 1)
		go func() {
			_, err := newest.Lock(ctx)
			locked <- err
		}()
		require.ErrorIs(t, <-preempted, ErrLockPreempted)
		require.NoError(t, holder.Release(ctx))
		require.NoError(t, <-locked)
		require.NoError(t, newest.Release(ctx))

		var failed []string
		for _, s := range r.named("lock") {
			if s.Tag(ext.Error) != nil {
				failed = append(failed, s.Tag("event").(string))
				requireTags(t, s, "the-lock", "a/b", 1, "two", holder.key, 0)
				requireFailed(t, s, "three")
			}
		}
		require.Equal(t, []string{"two"}, failed)
	})
}

// The event can be any text. In the tag it is as it is on the wire (C30).
func TestAPMEvent(t *testing.T) {
	r := record(t, apmPassword)
	factory, err := NewFakePreemptiveLockerFactory(nil, WithAPMServiceName("the-lock"))
	require.NoError(t, err)
	event := "\xff\x00" + strings.Repeat("x", 10_000)
	require.NoError(t, factory("a/b", 1, event).Do(t.Context(), func(context.Context) error { return nil }))
	for _, name := range []string{"lock", "release"} {
		require.Equal(t, cleanEvent(event), r.one(name).Tag("event"))
	}
}

// A caller's span is the parent.
func TestAPMCallersSpan(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	factory := apmLockers(t, uri, "the-sql", "the-lock")
	caller, ctx := tracer.StartSpanFromContext(t.Context(), "caller")
	l := factory("a/b", 1, "opened")
	require.NoError(t, l.Do(ctx, func(context.Context) error { return nil }))
	_, err := l.provider.LockKey(ctx, "a/b", 1)
	require.NoError(t, err)
	caller.Finish()
	for _, name := range []string{"lock", "release"} {
		require.Equal(t, r.one("caller").SpanID(), r.one(name).ParentID())
		require.NotEmpty(t, r.under(r.one(name)))
	}
	require.Len(t, r.under(r.one("caller")), 1, "the lookup")
}

// Each provider keeps its service name, whichever was created first.
func TestAPMTwoServices(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	var lockers []*PreemptiveLocker
	for i, name := range []string{"one", "two"} {
		factory, err := NewPostgresPreemptiveLockerFactory(uri, name, nil)
		require.NoError(t, err)
		l := factory("a/b", uint(i), "opened")
		t.Cleanup(func() { require.NoError(t, l.provider.(*PostgresLockProvider).Close()) })
		lockers = append(lockers, l)
		_, err = l.Lock(ctx)
		require.NoError(t, err)
	}
	for _, l := range lockers {
		require.NoError(t, l.Release(ctx))
	}

	parents := append(r.named("lock"), r.named("release")...)
	require.Len(t, parents, 4)
	seen := 0
	for i, s := range parents {
		service := []string{"one", "two"}[i%2]
		require.Equal(t, service, s.Tag(ext.ServiceName))
		require.NotEmpty(t, r.under(s))
		for _, statement := range r.under(s) {
			require.Equal(t, service, statement.Tag(ext.ServiceName), "statement under %s of %s", s.OperationName(), service)
			seen++
		}
	}
	require.Len(t, r.statements(), seen)
}

// A program can trace its use of lib/pq itself, under another name, and with spans that need no
// parent.
func TestAPMRegisteredDriver(t *testing.T) {
	// The registration cannot be undone, and affects no other test.
	sqltrace.Register("postgres", &pq.Driver{}, sqltrace.WithServiceName("the-program"))
	uri, password := apmDatabase(t)
	r := record(t, password)
	l := apmLockers(t, uri, "the-sql", "the-lock")("a/b", 1, "opened")
	require.NoError(t, l.Do(t.Context(), func(context.Context) error { return nil }))
	require.NotEmpty(t, r.under(r.one("lock")))
	require.NotEmpty(t, r.under(r.one("release")))
	require.Len(t, r.statements(), len(r.under(r.one("lock")))+len(r.under(r.one("release"))))
	for _, s := range r.statements() {
		require.Equal(t, "the-sql", s.Tag(ext.ServiceName))
	}
}

// An option of the caller takes precedence over the factory's apmServiceName.
func TestAPMOptionWins(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	factory, err := NewPostgresPreemptiveLockerFactory(uri, "both",
		[]LockProviderOption{WithPostgresBackend(uri, "the-sql")}, WithAPMServiceName("the-lock"))
	require.NoError(t, err)
	l := factory("a/b", 1, "opened")
	t.Cleanup(func() { require.NoError(t, l.provider.(*PostgresLockProvider).Close()) })
	require.NoError(t, l.Do(t.Context(), func(context.Context) error { return nil }))
	require.Equal(t, "the-lock", r.one("lock").Tag(ext.ServiceName))
	require.NotEmpty(t, r.under(r.one("lock")))
	for _, s := range r.statements() {
		require.Equal(t, "the-sql", s.Tag(ext.ServiceName))
	}
}

// A statement's span has the tags that Datadog's own tracing of database/sql would set.
func TestAPMStatementTags(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	u, err := url.Parse(uri)
	require.NoError(t, err)
	require.NoError(t, apmLockers(t, uri, "the-sql", "the-lock")("a/b", 1, "opened").Do(t.Context(), func(context.Context) error { return nil }))
	types := map[any]int{}
	for _, s := range r.statements() {
		require.Equal(t, "postgres.query", s.OperationName())
		for name, want := range map[string]string{
			ext.ServiceName: "the-sql", ext.Component: "database/sql", ext.SpanKind: ext.SpanKindClient, ext.DBSystem: "postgresql",
			ext.DBName: strings.TrimPrefix(u.Path, "/"), ext.TargetHost: u.Hostname(), ext.TargetPort: cmp.Or(u.Port(), "5432"),
		} {
			require.Equal(t, want, s.Tag(name), name)
		}
		require.Contains(t, statementNames, s.Tag(ext.ResourceName))
		types[s.Tag("sql.query_type")]++
	}
	require.Equal(t, map[any]int{"Exec": 1, "Query": len(r.statements()) - 1}, types, "adding the key's row returns nothing")
}

// A program that has not started Datadog's tracer can set service names.
func TestAPMNotStarted(t *testing.T) {
	uri, _ := apmDatabase(t)
	l := apmLockers(t, uri, "the-sql", "the-lock")("a/b", 1, "opened")
	require.NoError(t, l.Do(t.Context(), func(context.Context) error { return nil }))
	require.Error(t, l.Do(t.Context(), func(context.Context) error { return nil }), "a second Lock")
}

// A tracer that is used together with Datadog gets the same operations.
func TestAPMNextToTracer(t *testing.T) {
	uri, password := apmDatabase(t)
	r := record(t, password)
	var log traceLog
	factory, err := NewPostgresPreemptiveLockerFactory(uri, "both", nil, WithTracer(log.tracer))
	require.NoError(t, err)
	l := factory("a/b", 1, "opened")
	t.Cleanup(func() { require.NoError(t, l.provider.(*PostgresLockProvider).Close()) })
	require.NoError(t, l.Do(t.Context(), func(context.Context) error { return nil }))
	r.one("lock")
	r.one("release")
	require.NotEmpty(t, r.statements())
	require.Len(t, log.all, r.count())
	require.Len(t, log.of(OperationStatement), len(r.statements()))
}

// Without a service name nothing is recorded, even below a caller's span.
func TestAPMOff(t *testing.T) {
	uri, password := apmDatabase(t)
	for name, test := range map[string]struct {
		sqlService, service string
		lock, sql           bool // spans that are recorded
	}{
		"off":         {"", "", false, false},
		"locker only": {"", "the-lock", true, false},
		"SQL only":    {"the-sql", "", false, true},
	} {
		for _, traced := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, caller's span %t", name, traced), func(t *testing.T) {
				r := record(t, password)
				factory := apmLockers(t, uri, test.sqlService, test.service)
				ctx := t.Context()
				if traced {
					var caller tracer.Span
					caller, ctx = tracer.StartSpanFromContext(ctx, "caller")
					defer caller.Finish()
				}
				require.NoError(t, factory("a/b", 1, "opened").Do(ctx, func(context.Context) error { return nil }))

				spans := 0
				if test.lock {
					r.one("lock")
					r.one("release")
					spans += 2
				}
				if test.sql && traced {
					require.NotEmpty(t, r.statements())
				} else {
					require.Empty(t, r.statements())
				}
				require.Equal(t, spans, r.count()-len(r.statements()))
			})
		}
	}
}
