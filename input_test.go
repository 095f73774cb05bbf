package locker

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// secret is the password in every URI of these tests.
const secret = "sw0rdfish"

// noCtx is a nil context. Linters would object to a literal nil.
var noCtx context.Context

// deadEnd is a server that no rejected input may reach. It closes every connection immediately.
type deadEnd struct {
	uri      string
	listener net.Listener
	callers  atomic.Int32
	done     chan struct{}
}

func newDeadEnd(t *testing.T) *deadEnd {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	tr := &deadEnd{uri: "postgres://user:" + secret + "@" + l.Addr().String() + "/db?sslmode=disable", listener: l, done: make(chan struct{})}
	go func() {
		defer close(tr.done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			tr.callers.Add(1)
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-tr.done
	})
	return tr
}

// requireNoCaller gives a connection a moment to arrive, and requires that none has.
func (tr *deadEnd) requireNoCaller(t *testing.T) {
	t.Helper()
	time.Sleep(100 * time.Millisecond)
	require.Zero(t, tr.callers.Load(), "connections")
}

// requireNoLeak checks at the end of the test that its goroutines have ended. It has to be the
// first call of the test.
func requireNoLeak(t *testing.T) {
	current := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, current) })
}

// requireRefused requires that an error names the argument that was wrong, and no password.
func requireRefused(t *testing.T, err error, name string) {
	t.Helper()
	require.ErrorContains(t, err, name)
	require.ErrorContains(t, err, "locker: ")
	requireNoSecret(t, err)
}

func requireNoSecret(t *testing.T, v any) {
	t.Helper()
	for _, format := range []string{"%v", "%+v", "%#v"} {
		require.NotContains(t, fmt.Sprintf(format, v), secret, format)
	}
}

// openDB opens a pool, which does not connect yet.
func openDB(t *testing.T, uri string) *sqlx.DB {
	t.Helper()
	db, err := sqlx.Open("postgres", uri)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

// constructors returns all functions that create a provider or lock from a URI and options. Each of
// them returns only the error. A value that was created without an error is closed, and with an
// error it has to be nil.
func constructors(t *testing.T) map[string]func(uri string, opts ...LockProviderOption) error {
	db := openDB(t, newDeadEnd(t).uri)
	return map[string]func(uri string, opts ...LockProviderOption) error{
		"NewLockProvider": func(uri string, opts ...LockProviderOption) error {
			p, err := NewLockProvider(PostgresLockProviderKind, append(opts, WithPostgresBackend(uri, "service"))...)
			if err != nil {
				require.True(t, p == nil, "a provider that is not nil, with an error")
				return err
			}
			return p.(*PostgresLockProvider).Close()
		},
		"NewPostgresPreemptiveLockerFactory": func(uri string, opts ...LockProviderOption) error {
			f, err := NewPostgresPreemptiveLockerFactory(uri, "service", opts)
			if err != nil {
				require.Nil(t, f)
				return err
			}
			return f("a/b", 1, "opened").provider.(*PostgresLockProvider).Close()
		},
		"NewPostgresLock": func(uri string, opts ...LockProviderOption) error {
			var conf LockProviderConfig
			for _, o := range opts {
				o(&conf)
			}
			l, err := NewPostgresLock(t.Context(), db, 1, uri, "opened", conf)
			require.Error(t, err, "the dead end let a caller in")
			require.Nil(t, l)
			return err
		},
	}
}

func TestInputURI(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	// The address is that of tr.uri. The port does not matter for input that is rejected.
	at := "127.0.0.1"
	invalid := map[string]string{
		"empty":                       "",
		"blank":                       " \t\n",
		"garbage":                     "garbage-" + secret,
		"port is not a number":        "postgres://user:" + secret + "@" + at + ":port/db",
		"port too large":              "postgres://user:" + secret + "@" + at + ":65536/db",
		"bad escape in the password":  "postgres://user:" + secret + "%zz@" + at + "/db",
		"bad escape in the path":      "postgres://user:" + secret + "@" + at + "/%d",
		"blank in the password":       "postgres://user:a " + secret + "@" + at + "/db",
		"hash in the password":        "postgres://user:" + secret + "#x@" + at + "/db",
		"open bracket":                "postgres://user:" + secret + "@[::1/db",
		"control character":           "postgres://user:" + secret + "@" + at + "/db\x7f",
		"NUL":                         "postgres://user:" + secret + "@" + at + "/db\x00",
		"unknown sslmode":             strings.Replace(tr.uri, "sslmode=disable", "sslmode=sometimes", 1),
		"connect_timeout not number":  tr.uri + "&connect_timeout=soon",
		"another scheme":              "mysql://user:" + secret + "@" + at + "/db",
		"another scheme, parameters":  "mysql://user:" + secret + "@" + at + "/db?sslmode=disable",
		"scheme in capitals":          "POSTGRES://user:" + secret + "@" + at + "/db?sslmode=disable",
		"one slash":                   "postgres:/user:" + secret + "@" + at + "/db",
		"one slash, parameters":       "postgres:/user:" + secret + "@" + at + "/db?sslmode=disable",
		"blank before it":             " " + tr.uri,
		"pairs: unknown sslmode":      "host=" + at + " password=" + secret + " sslmode=sometimes",
		"pairs: bad port":             "host=" + at + " password=" + secret + " port=x",
		"pairs: quote is not closed":  "host=" + at + " password='" + secret,
		"pairs: no equals sign":       "host=" + at + " password " + secret,
		"pairs: blank in password":    "host=" + at + " password=a " + secret,
		"pairs: backslash at the end": "host=" + at + " password=" + secret + `\`,
	}
	for maker, call := range constructors(t) {
		for name, uri := range invalid {
			t.Run(maker+"/"+name, func(t *testing.T) { requireRefused(t, call(uri), "URI") })
		}
	}
	tr.requireNoCaller(t)
}

// An accepted URI means the same as it does to lib/pq.
func TestInputURIMeaning(t *testing.T) {
	for _, uri := range []string{
		"postgres://", "postgresql://", "postgres:///", "postgres://?host=/sockets&dbname=db", "postgres://?sslmode=disable",
		"postgres://host", "postgres://host/", "postgres://host/db", "postgresql://user@host:1/db",
		"postgres://user:" + secret + "@host:5433/db?sslmode=disable&application_name=me&connect_timeout=7",
		"postgres://user:a@" + secret + "@host/db", "postgres://us%40er:%20%2F%3A%25" + secret + "@host/d%20b", "postgres://user:@host/db",
		"postgres://user@[::1]:5433/db", "postgres://a,b,c/db", "postgres://a,b/db?port=1,2&target_session_attrs=standby",
		"postgres://host/db?search_path=a%2Cb&options=-c%20geqo%3Doff&work_mem=64MB",
		"host=h", "host=h port=7 user=u password=" + secret + " dbname=d", `user='a b' password='\'\\` + secret + `' dbname=d`,
		"postgres://host/db?binary_parameters=no", "host=h binary_parameters=no", "host=a,b target_session_attrs=any", "host=/sockets dbname=d", "password=postgres://x host=h", "password='mysql://x' host=h",
		"host=h password=", "host=h password= \n", "host=h sslrootcert=", "host=h application_name=",
	} {
		want, err := pq.NewConfig(uri)
		require.NoError(t, err, uri)
		got := configOf(t, uri)

		assert.NotZero(t, got.ConnectTimeout, uri)
		assert.NotEmpty(t, got.ApplicationName, uri)
		assert.True(t, got.BinaryParameters, uri)
		if len(want.Multi) > 0 && (want.TargetSessionAttrs == "" || want.TargetSessionAttrs == pq.TargetSessionAttrsAny) {
			want.TargetSessionAttrs = pq.TargetSessionAttrsReadWrite
		}
		if want.ConnectTimeout == 0 {
			want.ConnectTimeout = got.ConnectTimeout
		}
		if want.SSLMode == "" {
			want.SSLMode = pq.SSLModeRequire
		}
		// lib/pq sets both names to the fallback.
		if want.ApplicationName == "" {
			want.ApplicationName, want.FallbackApplicationName = got.ApplicationName, got.FallbackApplicationName
		}
		assert.Equal(t, meaning(want), meaning(got), uri)
	}
}

// meaning returns the settings of a configuration, whatever the form in which they were given.
func meaning(c pq.Config) string {
	return fmt.Sprint(c.Host, c.Hostaddr, c.Port, c.Multi, c.TargetSessionAttrs, c.User, c.Password, c.Database, c.SSLMode,
		c.Options, c.ApplicationName, c.FallbackApplicationName, c.ConnectTimeout, c.Runtime)
}

func TestInputNegativeDurations(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	for name, option := range map[string]func(time.Duration) LockProviderOption{
		"lock timeout": WithLockTimeout, "max lock duration": WithMaxLockDuration, "preemption timeout": WithPreemptionTimeout,
		"session timeout": WithSessionTimeout,
	} {
		for _, d := range []time.Duration{-1, -time.Hour, math.MinInt64} {
			for _, call := range constructors(t) {
				requireRefused(t, call(tr.uri, option(d)), name)
				requireRefused(t, call(tr.uri, option(time.Second), option(d)), name)
			}
			p, err := NewLockProvider(FakeLockProviderKind, option(d))
			requireRefused(t, err, name)
			require.True(t, p == nil)
			f, err := NewFakePreemptiveLockerFactory([]LockProviderOption{option(d)})
			requireRefused(t, err, name)
			require.Nil(t, f)
		}
	}
	for _, d := range []time.Duration{-1, math.MinInt64} {
		f, err := NewFakePreemptiveLockerFactory(nil, WithLockDelay(d))
		requireRefused(t, err, "lock delay")
		require.Nil(t, f)
		f, err = NewPostgresPreemptiveLockerFactory(tr.uri, "", nil, WithLockDelay(d))
		requireRefused(t, err, "lock delay")
		require.Nil(t, f)
		f, err = NewPreemptiveLockerFactory(&FakeLockProvider{}, WithLockDelay(d))
		requireRefused(t, err, "lock delay")
		require.Nil(t, f)
	}
	tr.requireNoCaller(t)
}

// A session timeout is between a second and an hour (C29).
func TestInputSessionTimeout(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	for _, d := range []time.Duration{1, time.Millisecond, time.Second - 1, time.Hour + 1, 24 * time.Hour, math.MaxInt64} {
		for _, call := range constructors(t) {
			requireRefused(t, call(tr.uri, WithSessionTimeout(d)), "session timeout is not between 1s and 1h0m0s: "+d.String())
		}
		p, err := NewLockProvider(FakeLockProviderKind, WithSessionTimeout(d))
		requireRefused(t, err, "session timeout")
		require.True(t, p == nil)
		f, err := NewFakePreemptiveLockerFactory([]LockProviderOption{WithSessionTimeout(d)})
		requireRefused(t, err, "session timeout")
		require.Nil(t, f)
	}
	for d, want := range map[time.Duration]time.Duration{
		0: 10 * time.Second, time.Second: time.Second, time.Minute: time.Minute, time.Hour: time.Hour,
	} {
		p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(tr.uri, ""), WithSessionTimeout(d))
		require.NoError(t, err)
		require.Equal(t, want, p.(*PostgresLockProvider).conf.sessionTimeout)
		require.NoError(t, p.(*PostgresLockProvider).Close())
		fake, err := NewLockProvider(FakeLockProviderKind, WithSessionTimeout(d))
		require.NoError(t, err)
		require.Equal(t, want, fake.(*FakeLockProvider).conf.sessionTimeout)
		require.NoError(t, fake.(*FakeLockProvider).Close())
	}
	tr.requireNoCaller(t)
}

// An idle timeout is at least a second, or none (C29).
func TestInputIdleTimeout(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	for _, d := range []time.Duration{-1, math.MinInt64, 1, time.Second - 1} {
		for _, call := range constructors(t) {
			requireRefused(t, call(tr.uri, WithIdleTimeout(d)), "idle timeout is below 1s: "+d.String())
		}
		p, err := NewLockProvider(FakeLockProviderKind, WithIdleTimeout(d))
		requireRefused(t, err, "idle timeout")
		require.True(t, p == nil)
	}
	for _, d := range []time.Duration{0, time.Second, math.MaxInt64} {
		p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(tr.uri, ""), WithIdleTimeout(d))
		require.NoError(t, err)
		require.NoError(t, p.(*PostgresLockProvider).Close())
	}
	tr.requireNoCaller(t)
}

// A duration that is zero never switches a bound off.
func TestInputZeroDurations(t *testing.T) {
	requireNoLeak(t)
	zero := []LockProviderOption{WithLockTimeout(0), WithMaxLockDuration(0), WithPreemptionTimeout(0), WithSessionTimeout(0)}
	unset := append([]LockProviderOption{WithLockTimeout(1), WithMaxLockDuration(1), WithPreemptionTimeout(1), WithSessionTimeout(1)}, zero...)
	db := openDB(t, newDatabase(t))
	for name, opts := range map[string][]LockProviderOption{"none": nil, "zero": zero, "zero after another value": unset} {
		t.Run(name, func(t *testing.T) {
			fake, err := NewLockProvider(FakeLockProviderKind, opts...)
			require.NoError(t, err)
			postgres, err := NewLockProvider(PostgresLockProviderKind, append(opts, WithPostgresBackend("host=h", ""))...)
			require.NoError(t, err)
			var conf LockProviderConfig
			for _, o := range opts {
				o(&conf)
			}
			single, err := NewPostgresLock(t.Context(), db, 1, "host=h", "opened", conf)
			require.NoError(t, err)
			confs := []LockProviderConfig{*single.conf}
			for _, p := range []LockProvider{fake, postgres, &FakeLockProvider{}} {
				l, err := p.New(t.Context(), 1, "opened")
				require.NoError(t, err)
				switch l := l.(type) {
				case *PostgresLock:
					confs = append(confs, *l.conf)
				case *FakePreemptableLock:
					confs = append(confs, *l.conf)
				}
			}
			require.Len(t, confs, 4)
			for _, c := range confs {
				require.Equal(t, 20*time.Second, c.lockTimeout)
				require.Equal(t, 30*time.Minute+30*time.Second, c.maxLockDuration)
				require.Equal(t, 10*time.Second, c.preemptionTimeout)
				require.Equal(t, 10*time.Second, c.sessionTimeout)
				require.NotNil(t, c.logger)
			}
		})
	}
}

func TestInputLongestDurations(t *testing.T) {
	requireNoLeak(t)
	factory, err := NewFakePreemptiveLockerFactory([]LockProviderOption{WithLockTimeout(math.MaxInt64),
		WithMaxLockDuration(math.MaxInt64), WithPreemptionTimeout(math.MaxInt64), WithSessionTimeout(time.Hour), WithLogger(nil), WithObserver(nil)}, WithLockDelay(0))
	require.NoError(t, err)
	require.NoError(t, factory("a/b", 1, "opened").Do(t.Context(), func(ctx context.Context) error { return context.Cause(ctx) }))
}

func TestInputKind(t *testing.T) {
	requireNoLeak(t)
	for _, kind := range []LockProviderKind{UnknownLockProviderKind, -1, 3, 7, math.MaxInt, math.MinInt} {
		for _, opts := range [][]LockProviderOption{nil, {WithPostgresBackend("host=h password="+secret, "")}} {
			p, err := NewLockProvider(kind, opts...)
			requireRefused(t, err, "kind")
			require.True(t, p == nil)
		}
	}
	p, err := NewLockProvider(PostgresLockProviderKind, WithLockTimeout(time.Second))
	requireRefused(t, err, "WithPostgresBackend")
	require.True(t, p == nil)
}

func TestInputNilOptions(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	backend := WithPostgresBackend(tr.uri, "")
	for _, kind := range []LockProviderKind{PostgresLockProviderKind, FakeLockProviderKind} {
		for i, opts := range [][]LockProviderOption{{nil}, {backend, nil}, {WithLockTimeout(1), backend, nil, backend}} {
			p, err := NewLockProvider(kind, opts...)
			requireRefused(t, err, fmt.Sprintf("provider option %d is nil", i))
			require.True(t, p == nil)
		}
	}
	none := []LockProviderOption{nil}
	f, err := NewFakePreemptiveLockerFactory(none)
	requireRefused(t, err, "provider option 0 is nil")
	require.Nil(t, f)
	f, err = NewPostgresPreemptiveLockerFactory(tr.uri, "", none)
	requireRefused(t, err, "provider option")
	require.Nil(t, f)

	f, err = NewFakePreemptiveLockerFactory(nil, nil)
	requireRefused(t, err, "locker option 0 is nil")
	require.Nil(t, f)
	f, err = NewPostgresPreemptiveLockerFactory(tr.uri, "", nil, nil)
	requireRefused(t, err, "locker option")
	require.Nil(t, f)
	f, err = NewPreemptiveLockerFactory(&FakeLockProvider{}, WithLockDelay(1), nil)
	requireRefused(t, err, "locker option 1 is nil")
	require.Nil(t, f)
	tr.requireNoCaller(t)
}

// ownProvider is a user's provider. It counts its calls.
type ownProvider struct {
	LockProvider
	calls int
}

func (p *ownProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	p.calls++
	return p.LockProvider.LockKey(ctx, repo, pr)
}

// ownFunc is a user's provider that is a function.
type ownFunc func() int64

func (f ownFunc) New(context.Context, int64, string) (PreemptableLock, error) { return nil, nil }
func (f ownFunc) LockKey(context.Context, string, uint) (int64, error)        { return f(), nil }

func TestInputNilProvider(t *testing.T) {
	for _, p := range []LockProvider{nil, (*PostgresLockProvider)(nil), (*FakeLockProvider)(nil), (*ownProvider)(nil), ownFunc(nil)} {
		f, err := NewPreemptiveLockerFactory(p)
		requireRefused(t, err, "lock provider is nil")
		require.Nil(t, f)
	}
}

// A user's provider returns neither a lock nor an error.
func TestInputNilLock(t *testing.T) {
	f, err := NewPreemptiveLockerFactory(ownFunc(func() int64 { return 1 }))
	require.NoError(t, err)
	_, err = f("a/b", 1, "opened").Lock(t.Context())
	requireRefused(t, err, "no lock")
}

func TestInputNilContext(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	postgres, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(tr.uri, ""))
	require.NoError(t, err)
	for _, p := range []LockProvider{postgres, &FakeLockProvider{}} {
		l, err := p.New(noCtx, 1, "opened")
		requireRefused(t, err, "context is nil")
		require.True(t, l == nil)
		_, err = p.LockKey(noCtx, "a/b", 1)
		requireRefused(t, err, "context is nil")

		l, err = p.New(t.Context(), 1, "opened")
		require.NoError(t, err)
		requireRefused(t, l.Notify(noCtx), "context is nil")
		ch, err := l.Lock(noCtx)
		requireRefused(t, err, "context is nil")
		require.Nil(t, ch)
		requireRefused(t, l.Unlock(noCtx), "context is nil")

		factory, err := NewPreemptiveLockerFactory(p, WithTracer(func(ctx context.Context, _ Operation) (context.Context, func(OperationEnd)) {
			require.NotNil(t, ctx)
			return nil, nil
		}))
		require.NoError(t, err)
		pl := factory("a/b", 1, "opened")
		ch, err = pl.Lock(noCtx)
		requireRefused(t, err, "context is nil")
		require.Nil(t, ch)
		requireRefused(t, pl.Release(noCtx), "context is nil")
		requireRefused(t, pl.Do(noCtx, func(context.Context) error { return nil }), "context is nil")
		requireRefused(t, pl.Do(t.Context(), nil), "function is nil")
		requireRefused(t, pl.Do(noCtx, nil), "is nil")
		requireRefused(t, pl.Shield(noCtx, time.Second, func(context.Context) error { return nil }), "context is nil")
		requireRefused(t, pl.Shield(t.Context(), time.Second, nil), "function is nil")
		requireRefused(t, pl.Shield(t.Context(), 0, func(context.Context) error { return nil }), "limit is not positive")
		requireRefused(t, pl.Shield(t.Context(), -1, func(context.Context) error { return nil }), "limit is not positive")
		requireRefused(t, pl.Shield(t.Context(), 1, func(context.Context) error { return nil }), "outside of Do")
		// None of the calls above has counted as a Lock.
		requireRefused(t, pl.Release(t.Context()), "Release before Lock")
	}
	_, err = postgres.(*PostgresLockProvider).ListLocks(noCtx)
	requireRefused(t, err, "context is nil")
	_, err = postgres.(*PostgresLockProvider).RequestStop(noCtx, "a/b", 1, "")
	requireRefused(t, err, "context is nil")
	_, err = postgres.(*PostgresLockProvider).ResetSequence(noCtx, "a/b", 1)
	requireRefused(t, err, "context is nil")
	l, err := NewPostgresLock(noCtx, openDB(t, tr.uri), 1, tr.uri, "opened", LockProviderConfig{})
	requireRefused(t, err, "context is nil")
	require.Nil(t, l)
	tr.requireNoCaller(t)

	// A call that was rejected can be repeated.
	fake := &FakeLockProvider{}
	lock, err := fake.New(t.Context(), 1, "opened")
	require.NoError(t, err)
	_, err = lock.Lock(noCtx)
	require.Error(t, err)
	_, err = lock.Lock(t.Context())
	require.NoError(t, err)
	requireRefused(t, lock.Unlock(noCtx), "context is nil")
	require.NoError(t, lock.Unlock(t.Context()))
	require.NoError(t, fake.Close())
}

func TestInputNewPostgresLock(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	untouched := openDB(t, tr.uri)
	closed := openDB(t, tr.uri)
	require.NoError(t, closed.Close())
	done, cancel := context.WithCancel(t.Context())
	cancel()
	var negative LockProviderConfig
	WithPreemptionTimeout(-1)(&negative)

	for name, test := range map[string]struct {
		ctx      context.Context
		db       *sqlx.DB
		connInfo string
		conf     LockProviderConfig
		want     string
	}{
		"nil context":      {noCtx, untouched, tr.uri, LockProviderConfig{}, "context is nil"},
		"done context":     {done, untouched, tr.uri, LockProviderConfig{}, "context canceled"},
		"nil db":           {t.Context(), nil, tr.uri, LockProviderConfig{}, "db is nil"},
		"zero db":          {t.Context(), &sqlx.DB{}, tr.uri, LockProviderConfig{}, "db is nil"},
		"closed db":        {t.Context(), closed, tr.uri, LockProviderConfig{}, "db is not usable: sql: database is closed"},
		"empty connInfo":   {t.Context(), untouched, "", LockProviderConfig{}, "connInfo: "},
		"invalid connInfo": {t.Context(), untouched, tr.uri + "&connect_timeout=x", LockProviderConfig{}, "connInfo: "},
		"negative conf":    {t.Context(), untouched, tr.uri, negative, "preemption timeout is negative"},
	} {
		l, err := NewPostgresLock(test.ctx, test.db, 1, test.connInfo, "opened", test.conf)
		require.Nil(t, l, name)
		requireRefused(t, err, test.want)
	}
	tr.requireNoCaller(t)
	_, err := NewPostgresLock(done, untouched, 1, tr.uri, "opened", LockProviderConfig{})
	require.ErrorIs(t, err, context.Canceled)

	// If the URI of db itself is bad, the first use of db fails with an error that may contain the
	// password. The error of NewPostgresLock does not contain it.
	for _, uri := range []string{
		"postgres://user:" + secret + "@127.0.0.1:port/db",
		"postgres://user:" + secret + "%zz@127.0.0.1/db",
		"mysql://user:" + secret + "@127.0.0.1/db",
		"host=127.0.0.1 password=a " + secret,
		tr.uri, // the server closes the connection
	} {
		l, err := NewPostgresLock(t.Context(), openDB(t, uri), 1, tr.uri, "opened", LockProviderConfig{})
		require.Nil(t, l)
		requireRefused(t, err, "db is not usable")
	}
}

func TestInputRepo(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	postgres, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(tr.uri, ""))
	require.NoError(t, err)
	own := &ownProvider{LockProvider: &FakeLockProvider{}}
	for _, p := range []LockProvider{postgres, &FakeLockProvider{}, own} {
		factory, err := NewPreemptiveLockerFactory(p)
		require.NoError(t, err)
		for _, test := range []struct {
			repo string
			pr   uint
			want string
		}{
			{"\x00", 1, "repo"}, {"a/b\x00", 1, "repo"}, {"\xff", 1, "repo"}, {"a/\xc3", 1, "repo"}, {"\xed\xa0\x80", 1, "repo"},
			{"a/b", math.MaxInt32 + 1, "pull request"}, {"a/b", math.MaxUint32, "pull request"}, {"a/b", math.MaxUint, "pull request"},
			{"a\x00b", math.MaxUint, "repo"},
		} {
			if p != LockProvider(own) {
				key, err := p.LockKey(t.Context(), test.repo, test.pr)
				requireRefused(t, err, test.want)
				require.Zero(t, key)
			}
			if p, ok := p.(*PostgresLockProvider); ok {
				asked, err := p.RequestStop(t.Context(), test.repo, test.pr, "")
				requireRefused(t, err, test.want)
				require.False(t, asked)
				known, err := p.ResetSequence(t.Context(), test.repo, test.pr)
				requireRefused(t, err, test.want)
				require.False(t, known)
			}
			l := factory(test.repo, test.pr, "opened")
			ch, err := l.Lock(t.Context())
			requireRefused(t, err, test.want)
			require.Nil(t, ch)
			require.NoError(t, l.Release(t.Context()), "a Lock that failed leaves nothing behind")
			requireRefused(t, factory(test.repo, test.pr, "opened").Do(t.Context(), func(context.Context) error {
				t.Error("called without the lock")
				return nil
			}), test.want)
		}
	}
	require.Zero(t, own.calls)
	tr.requireNoCaller(t)
}

// Input at the limits of the accepted values, on both providers.
func TestInputRepoAccepted(t *testing.T) {
	requireNoLeak(t)
	postgres, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(newDatabase(t), ""))
	require.NoError(t, err)
	for _, p := range []LockProvider{postgres, &FakeLockProvider{}} {
		keys := map[int64]bool{}
		repos := []string{"", "a/b", "A/b", "a/b ", `a'"\/b`, "{a,b}", "NULL", "é", "e\u0301", "\u0001", "\U0010ffff", "\ufeff"}
		for _, repo := range repos {
			for _, pr := range []uint{0, 1, math.MaxInt32} {
				key, err := p.LockKey(t.Context(), repo, pr)
				require.NoError(t, err, "%q", repo)
				require.NotZero(t, key)
				again, err := p.LockKey(t.Context(), repo, pr)
				require.NoError(t, err)
				require.Equal(t, key, again)
				keys[key] = true
			}
		}
		require.Len(t, keys, 3*len(repos), "%T", p)
	}
	require.NoError(t, postgres.(*PostgresLockProvider).Close())
}

// The reason of a request to stop is any text, too. It is cut to fit (C30).
func TestInputStopReason(t *testing.T) {
	requireNoLeak(t)
	provider, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(newDatabase(t), ""))
	require.NoError(t, err)
	postgres := provider.(*PostgresLockProvider)
	defer func() { require.NoError(t, postgres.Close()) }()
	factory, err := NewPreemptiveLockerFactory(provider)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	for _, unit := range []string{"x", "<", "&", "\"", "\x00", "\xff", "\x01", "\u2028", "\U0001f512"} {
		reason := strings.Repeat(unit, 9000)
		err := factory("a/b", 1, "opened").Do(ctx, func(hold context.Context) error {
			asked, err := postgres.RequestStop(ctx, "a/b", 1, reason)
			assert.NoError(t, err, "%q", unit)
			assert.True(t, asked, "%q", unit)
			if err == nil {
				<-hold.Done()
			}
			return nil
		})
		require.ErrorIs(t, err, ErrStopRequested, "%q", unit)
		require.ErrorContains(t, err, fmt.Sprintf("%q", cleanEvent(reason)))
	}
}

// Nothing is sent before it is needed (C26).
func TestInputNothingSentTooEarly(t *testing.T) {
	requireNoLeak(t)
	tr := newDeadEnd(t)
	p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(tr.uri, ""))
	require.NoError(t, err)
	factory, err := NewPreemptiveLockerFactory(p)
	require.NoError(t, err)
	requireRefused(t, factory("a/b", 1, "opened").Release(t.Context()), "Release before Lock")
	l, err := p.New(t.Context(), 1, "opened")
	require.NoError(t, err)
	requireRefused(t, l.Unlock(t.Context()), "Unlock before Lock")
	done, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, l.Notify(done), context.Canceled)
	_, err = p.LockKey(done, "a/b", 1)
	require.ErrorIs(t, err, context.Canceled)
	_, err = factory("a/b", 1, "opened").Lock(done)
	require.ErrorIs(t, err, context.Canceled)
	tr.requireNoCaller(t)
	require.NoError(t, p.(*PostgresLockProvider).Close())
	_, err = p.LockKey(t.Context(), "a/b", 1)
	require.ErrorIs(t, err, ErrProviderClosed)
	tr.requireNoCaller(t)
}

// No zero value panics (C32).
func TestInputZeroValues(t *testing.T) {
	requireNoLeak(t)
	f := func(context.Context) error { return nil }
	for _, ctx := range []context.Context{t.Context(), noCtx} {
		for _, err := range []error{
			second((&PreemptiveLocker{}).Lock(ctx)),
			(&PreemptiveLocker{}).Release(ctx),
			(&PreemptiveLocker{}).Do(ctx, f),
			(&PreemptiveLocker{}).Do(ctx, nil),
			second((&PostgresLockProvider{}).New(ctx, 1, "")),
			second((&PostgresLockProvider{}).LockKey(ctx, "", 0)),
			(&PostgresLockProvider{}).Close(),
			second((&PostgresLockProvider{}).ListLocks(ctx)),
			second((&PostgresLockProvider{}).RequestStop(ctx, "", 0, "")),
			second((&PostgresLockProvider{}).ResetSequence(ctx, "", 0)),
			(&PreemptiveLocker{}).Shield(ctx, time.Second, f),
			(&PreemptiveLocker{}).Shield(ctx, 0, nil),
			(&PostgresLock{}).Shield(time.Second),
			(&FakePreemptableLock{}).Shield(0),
			second((&PostgresLock{}).Lock(ctx)),
			(&PostgresLock{}).Unlock(ctx),
			(&PostgresLock{}).Notify(ctx),
			second((&FakePreemptableLock{}).Lock(ctx)),
			(&FakePreemptableLock{}).Unlock(ctx),
			(&FakePreemptableLock{}).Notify(ctx),
			second(NewPostgresLock(ctx, nil, 0, "", "", LockProviderConfig{})),
			second(NewPreemptiveLockerFactory(nil)),
			second(NewLockProvider(LockProviderKind(0))),
			second(NewLockProvider(FakeLockProviderKind, LockProviderOption(nil))),
			second(NewPreemptiveLockerFactory(&FakeLockProvider{}, PreemptiveLockerOption(nil))),
			second(NewPostgresPreemptiveLockerFactory("", "", nil)),
		} {
			requireRefused(t, err, "")
		}
	}
	require.Zero(t, (&PreemptiveLocker{}).Token())
	require.NotNil(t, (&PreemptiveLocker{}).Sequence(1))
	for _, l := range []interface {
		Token() int64
		Cause() error
	}{&PostgresLock{}, &FakePreemptableLock{}} {
		require.Zero(t, l.Token())
		require.NoError(t, l.Cause())
	}
	(&PostgresLock{}).Unshield()
	(&FakePreemptableLock{}).Unshield()
	require.Zero(t, (&PostgresLockProvider{}).Stats())
	require.Equal(t, "unknown", ObservationKind(0).String())
	require.NotEmpty(t, PostgresEnvLock{}.Columns())
	require.Len(t, PostgresEnvLock{}.ScanValues(), 3)
	for _, option := range []LockProviderOption{WithLockTimeout(-1), WithMaxLockDuration(-1), WithPreemptionTimeout(-1),
		WithSessionTimeout(-1), WithOriginalReplicas(), WithPostgresBackend("", ""), WithPostgresURI(nil), WithLogger(nil), WithObserver(nil)} {
		option(&LockProviderConfig{})
	}
	for _, option := range []PreemptiveLockerOption{WithLockDelay(-1), WithAPMServiceName(""), WithTracer(nil)} {
		option(&PreemptiveLockerConfig{})
	}

	factory, err := NewPreemptiveLockerFactory(&PostgresLockProvider{})
	require.NoError(t, err)
	requireRefused(t, factory("", 0, "").Do(t.Context(), f), "PostgresLockProvider was not made by NewLockProvider")
}

func second[T any](_ T, err error) error { return err }

// The zero FakeLockProvider works, whichever of its methods is called first and from however many
// goroutines.
func TestInputZeroFakeLockProvider(t *testing.T) {
	requireNoLeak(t)
	require.NoError(t, (&FakeLockProvider{}).Close())

	p := &FakeLockProvider{}
	factory, err := NewPreemptiveLockerFactory(p)
	require.NoError(t, err)
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			assert.NoError(t, factory("a/b", uint(i), "opened").Do(t.Context(), func(context.Context) error { return nil }))
			l, err := p.New(t.Context(), int64(-i), "")
			assert.NoError(t, err)
			_, err = l.Lock(t.Context())
			assert.NoError(t, err)
			assert.NoError(t, l.Unlock(t.Context()))
		})
	}
	group.Wait()
	require.NoError(t, p.Close())
	_, err = p.New(t.Context(), 1, "")
	require.ErrorIs(t, err, ErrProviderClosed)
}

// lines is a log whose text the test can read.
type lines struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// No error, no log line and no printed value that contains the URI shows the password, even if the
// server cannot be used (C31).
func TestInputPassword(t *testing.T) {
	requireNoLeak(t)
	good, err := url.Parse(newDatabase(t))
	require.NoError(t, err)
	// The server asks for no password, and accepts any.
	if _, has := good.User.Password(); !has {
		good.User = url.UserPassword(good.User.Username(), secret)
	}
	with := func(change func(u *url.URL)) string {
		u := *good
		change(&u)
		return u.String()
	}
	tr := newDeadEnd(t)
	var log lines
	logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug, AddSource: true}))
	uris := map[string]string{
		"hung up on":        tr.uri,
		"no one listens":    "postgres://user:" + secret + "@127.0.0.1:1/db?sslmode=disable",
		"no such host":      "postgres://user:" + secret + "@host.invalid/db?sslmode=disable",
		"no such database":  with(func(u *url.URL) { u.Path = "/locker_no_such_database" }),
		"no such parameter": with(func(u *url.URL) { u.RawQuery += "&no_such_parameter=1" }),
		"read-only":         with(func(u *url.URL) { u.RawQuery += "&default_transaction_read_only=on" }),
		"certificates":      with(func(u *url.URL) { u.RawQuery = "sslmode=verify-full&sslrootcert=/no/such/file" }),
	}
	// Most of the calls take the lock timeout.
	var group sync.WaitGroup
	for name, uri := range uris {
		p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(uri, "service"), WithLogger(logger),
			WithLockTimeout(6*time.Second))
		require.NoError(t, err, name)
		l, err := p.New(t.Context(), 1, "opened")
		require.NoError(t, err)
		factory, err := NewPreemptiveLockerFactory(p)
		require.NoError(t, err)
		for _, v := range []any{p, p.(*PostgresLockProvider).conf, l, factory("a/b", 1, "opened")} {
			requireNoSecret(t, v)
		}
		calls := []func() error{
			func() error { return second(p.LockKey(t.Context(), "a/b", 1)) },
			func() error { return second(p.(*PostgresLockProvider).ListLocks(t.Context())) },
			func() error { return second(p.(*PostgresLockProvider).RequestStop(t.Context(), "a/b", 1, "")) },
			func() error { return second(p.(*PostgresLockProvider).ResetSequence(t.Context(), "a/b", 1)) },
			func() error { return l.Notify(t.Context()) },
			func() error { return second(l.Lock(t.Context())) },
			func() error { return second(factory("a/b", 1, "opened").Lock(t.Context())) },
		}
		group.Go(func() {
			errs := make(chan error, len(calls))
			for _, call := range calls {
				go func() { errs <- call() }()
			}
			for range calls {
				err := <-errs
				assert.Error(t, err, name)
				assert.NotErrorIs(t, err, ErrLockPreempted, name)
				for _, format := range []string{"%v", "%+v", "%#v"} {
					assert.NotContains(t, fmt.Sprintf(format, err), secret)
				}
			}
			assert.NoError(t, p.(*PostgresLockProvider).Close())
		})
	}
	group.Wait()
	log.mu.Lock()
	defer log.mu.Unlock()
	require.NotEmpty(t, log.text.String())
	require.NotContains(t, strings.ToLower(log.text.String()), secret)
}

// The repo of an index entry that is too long for PostgreSQL is rejected before anything is sent. The
// longest one that is accepted can be stored, even if it cannot be compressed.
func TestInputLongRepo(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t))
	var b strings.Builder
	for b.Len() < maxRepo {
		b.WriteString(strings.ReplaceAll(uuid.NewString(), "-", ""))
	}
	long := b.String()[:maxRepo]
	_, err := p.LockKey(pgBackground, long, 1)
	require.NoError(t, err)
	_, err = p.LockKey(pgBackground, long+"x", 1)
	requireRefused(t, err, "longer than 2000 bytes")
}
