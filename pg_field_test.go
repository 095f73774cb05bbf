package locker

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Situations that users of lock, queue and migration libraries on PostgreSQL have reported. Each
// test names its case and the report. The tests use the exported names of the package, SQL on the
// server, and a relay between the two.

// fieldPatience is the lock timeout of a caller that can wait.
const fieldPatience = 20 * time.Second

// field is a database, a relay to it and a provider behind the relay.
type field struct {
	uri   string
	db    *sql.DB
	relay *fieldProxy
	log   *pgLog
	p     *PostgresLockProvider
	// first is the first of the field's keys and pull requests. Other fields may share the
	// database.
	first int
}

var fieldsMade atomic.Int32

// key returns the nth key of this field, and pr the nth pull request.
func (f *field) key(n int) int64 { return int64(f.first + n) }
func (f *field) pr(n int) uint   { return uint(f.first + n) }

// newField creates a field on a separate database.
func newField(t testing.TB, options ...LockProviderOption) *field {
	t.Helper()
	return fieldOn(t, newDatabase(t), options...)
}

func fieldOn(t testing.TB, uri string, options ...LockProviderOption) *field {
	t.Helper()
	f := &field{uri: uri, db: pgDB(t, uri), relay: newFieldProxy(t, uri), log: &pgLog{}, first: int(fieldsMade.Add(1)) * 1000}
	options = append([]LockProviderOption{f.log.option(), WithLockTimeout(fieldPatience)}, options...)
	f.p = pgProvider(t, pgNamed(t, f.relay.uri(t, uri), "field"), options...)
	return f
}

// other creates a provider that does not depend on the relay.
func (f *field) other(t testing.TB, options ...LockProviderOption) *PostgresLockProvider {
	t.Helper()
	return pgProvider(t, f.uri, append([]LockProviderOption{WithLockTimeout(2 * soon)}, options...)...)
}

// settled waits until the provider's session and listener are connected.
func (f *field) settled(t testing.TB) {
	t.Helper()
	pgUntil(t, "session and listener are connected", func() bool {
		return f.session(t) != nil && f.relay.find(func(c *fieldConn) bool { return c.listens.Load() && c.isIdle() }) != nil
	})
}

// session returns the connection whose advisory lock shows that the provider lives, or nil.
func (f *field) session(t testing.TB) *fieldConn {
	t.Helper()
	pids := map[int]bool{}
	for _, pid := range fieldHolders(t, f.db) {
		pids[pid] = true
	}
	return f.relay.find(func(c *fieldConn) bool { return pids[c.backend()] })
}

// fieldTroubled reports whether Stats shows that the provider cannot work.
func fieldTroubled(p *PostgresLockProvider) bool {
	s := p.Stats()
	return !s.Connected || !s.Suspended.IsZero()
}

// fieldHolders returns the server processes that have an advisory lock.
func fieldHolders(t testing.TB, db *sql.DB) (pids []int) {
	t.Helper()
	rows, err := db.QueryContext(pgBackground, `SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND granted
		AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	require.NoError(t, err)
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var pid int
		require.NoError(t, rows.Scan(&pid))
		pids = append(pids, pid)
	}
	require.NoError(t, rows.Err())
	return pids
}

func (c *fieldConn) isIdle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.idle && !c.closed
}

// logged counts the lines of the log, without those for debugging, that contain one of the words in
// any case.
func (f *field) logged(words ...string) (n int) {
	for _, line := range strings.Split(strings.ToLower(f.log.String()), "\n") {
		if strings.Contains(line, "level=debug") {
			continue
		}
		if slices.ContainsFunc(words, func(w string) bool { return strings.Contains(line, strings.ToLower(w)) }) {
			n++
		}
	}
	return n
}

// fieldResult is the result of a call.
type fieldResult struct {
	err  error
	took time.Duration
}

// fieldGo makes a call on a separate goroutine.
func fieldGo(call func() error) <-chan fieldResult {
	done := make(chan fieldResult, 1)
	start := time.Now()
	// The goroutine ends with the call, which is bounded by its own timeout.
	go func() {
		err := call()
		done <- fieldResult{err, time.Since(start)}
	}()
	return done
}

// fieldLock locks a pull request and returns its lock.
func fieldLock(t testing.TB, p LockProvider, pr uint, event string) (*PreemptiveLocker, <-chan NotificationPayload, error) {
	t.Helper()
	l := pgLocker(t, p)("field", pr, event)
	t.Cleanup(func() { _ = l.Release(pgBackground) })
	ch, err := l.Lock(pgBackground)
	return l, ch, err
}

// fieldWorks requires that a pull request can be locked and released now.
func fieldWorks(t testing.TB, p LockProvider, pr uint) {
	t.Helper()
	l, _, err := fieldLock(t, p, pr, "works")
	require.NoError(t, err)
	require.NoError(t, l.Release(pgBackground))
}

// fieldAfter calls f when d has passed, and closes the channel when f has returned. It sets how
// long a fault lasts and is not used to wait for an event.
func fieldAfter(t testing.TB, d time.Duration, f func()) <-chan struct{} {
	t.Helper()
	over := make(chan struct{})
	timer := time.AfterFunc(d, func() {
		defer close(over)
		f()
	})
	t.Cleanup(func() {
		if !timer.Stop() {
			<-over
		}
	})
	return over
}

// fieldDuring requires that a condition holds all the time during d.
func fieldDuring(t testing.TB, d time.Duration, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for start := time.Now(); time.Since(start) < d; <-tick.C {
		if !holds() {
			require.FailNow(t, fmt.Sprintf("not after %.1f s any more: %s", time.Since(start).Seconds(), what))
		}
	}
}

// fieldNotified reports whether a holder was notified, and receives the payload.
func fieldNotified(ch <-chan NotificationPayload) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// fieldContender waits for a key. Its claim is not announced, so the holder is not notified.
func fieldContender(t testing.TB, p LockProvider, key int64) (*PostgresLock, <-chan fieldResult) {
	t.Helper()
	l := pgNew(t, p, key, "contender")
	return l, fieldGo(func() error {
		_, err := l.Lock(pgBackground)
		return err
	})
}

// fieldExclusive watches a contender for d: it must not be granted the key before the holder was
// notified. It reports whether the holder was notified.
func fieldExclusive(t testing.TB, d time.Duration, ch <-chan NotificationPayload, contender <-chan fieldResult) (notified bool) {
	t.Helper()
	window := time.After(d)
	for {
		select {
		case r := <-contender:
			require.NoError(t, r.err)
			require.True(t, notified || fieldNotified(ch), "two holders: the second was granted the key after %.1f s, and the first was not notified", r.took.Seconds())
			return true
		case <-ch:
			notified, ch = true, nil
		case <-window:
			return notified
		}
	}
}

// fieldHolds reports whether the key's row names a holder.
func fieldHolds(t testing.TB, db *sql.DB, key int64) bool {
	t.Helper()
	return pgGet[bool](t, db, `SELECT EXISTS (SELECT FROM env_lock_state WHERE lock_key = $1 AND holder_id IS NOT NULL)`, key)
}

// fieldGroup runs subtests concurrently.
type fieldGroup struct {
	t       *testing.T
	slots   chan struct{}
	running sync.WaitGroup
}

// fieldSlots bounds the subtests that run concurrently, over all tests, because each uses some
// connections.
var fieldSlots = make(chan struct{}, 8)

// fieldTogether returns a group. Its subtests wait for servers and compute little, so more of them
// run concurrently than t.Parallel allows on a machine with few processors.
func fieldTogether(t *testing.T) *fieldGroup {
	return &fieldGroup{t: t, slots: fieldSlots}
}

func (g *fieldGroup) run(name string, f func(t *testing.T)) {
	g.running.Add(1)
	// The goroutine ends with the subtest.
	go func() {
		defer g.running.Done()
		g.slots <- struct{}{}
		defer func() { <-g.slots }()
		g.t.Run(name, f)
	}()
}

func (g *fieldGroup) wait() { g.running.Wait() }

// fieldOne returns a single connection, for statements that must not open another one.
func fieldOne(t testing.TB, db *sql.DB) *sql.Conn {
	t.Helper()
	c, err := db.Conn(pgBackground)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// A1. Reported: after a role swap, or while a disk is protected because it is full, the server
// accepts no writes but closes no connection. Every write fails forever, and the service has to be
// restarted by hand.
func TestFieldReadOnly(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	g.run("for three seconds", func(t *testing.T) {
		server := pgCluster(t, pgserver.Options{})
		uri, err := server.CreateDatabase(pgBackground, "readonly")
		require.NoError(t, err)
		f := fieldOn(t, uri)
		kept, ch := pgHold(t, f.p, 1, "holder")
		require.NoError(t, server.Set(pgBackground, "default_transaction_read_only", "on"))
		pgUntil(t, "the server takes no writes", func() bool {
			return pgGet[string](t, f.db, `SHOW default_transaction_read_only`) == "on"
		})
		claim := fieldGo(func() error {
			_, _, err := fieldLock(t, f.p, 2, "claim")
			return err
		})
		over := fieldAfter(t, 3*time.Second, func() {
			assert.NoError(t, server.Set(pgBackground, "default_transaction_read_only", "off"))
		})
		noticed := false
		for waiting := true; waiting; {
			noticed = noticed || fieldTroubled(f.p)
			select {
			case <-over:
				waiting = false
			case <-time.After(10 * time.Millisecond):
			}
		}
		r := pgReceive(t, "the claim ends", claim)
		assert.NoError(t, r.err, "after %.1f s", r.took.Seconds())
		assert.True(t, noticed, "Stats said all the time that the provider is connected")
		assert.NotZero(t, f.logged("read-only", "25006"), "not a line in the log:\n%s", f.log)
		pgQuiet(t, ch)
		require.NoError(t, kept.Unlock(pgBackground))
	})

	// The old primary still serves statements that only read. A heartbeat that did not ask whether
	// the server accepts writes would keep holds of keys that the new primary grants to others.
	g.run("role swap", func(t *testing.T) {
		primary := pgCluster(t, pgserver.Options{})
		uri, err := primary.CreateDatabase(pgBackground, "swap")
		require.NoError(t, err)
		standby := pgStandby(t, primary, pgserver.StandbyOptions{Synchronous: true})
		u, err := url.Parse(uri)
		require.NoError(t, err)
		hosts := fmt.Sprintf("postgres://postgres@127.0.0.1,127.0.0.1%s?port=%d,%d&sslmode=disable", u.Path, primary.Port(), standby.Port())
		follower := pgProvider(t, hosts, WithLockTimeout(fieldPatience), WithSessionTimeout(6*time.Second))
		stranded := pgProvider(t, uri, WithLockTimeout(fieldPatience), WithSessionTimeout(6*time.Second))
		kept, keptCh := pgHold(t, follower, 1, "follows")
		left, leftCh := pgHold(t, stranded, 2, "is left behind")

		require.NoError(t, primary.Set(pgBackground, "default_transaction_read_only", "on"))
		require.NoError(t, standby.Promote(pgBackground))
		next := pgProvider(t, hosts, WithLockTimeout(2*soon), WithSessionTimeout(6*time.Second))
		_, second := fieldContender(t, next, 2)
		_, first := fieldContender(t, next, 1)
		assert.True(t, fieldExclusive(t, soon, leftCh, second), "a holder without a server was not notified in %v", soon)
		assert.ErrorIs(t, left.Cause(), ErrLockLost)
		require.False(t, fieldExclusive(t, time.Second, keptCh, first), "a holder that has another server was notified")
		require.NoError(t, kept.Unlock(pgBackground))
		require.NoError(t, pgReceive(t, "the contender is granted the key", first).err)
	})
}

// fieldOutage is a way in which an endpoint refuses its clients.
type fieldOutage struct {
	name       string
	atFirst    bool // at first use it is an error, not an outage
	alone      bool // it affects the database, not only the relay
	begin, end func(t testing.TB, f *field, admin *sql.Conn)
}

func fieldRefusal(code, text string, atFirst bool) fieldOutage {
	return fieldOutage{code, atFirst, false,
		func(_ testing.TB, f *field, _ *sql.Conn) { f.relay.refuseLogins(code, text) },
		func(_ testing.TB, f *field, _ *sql.Conn) { f.relay.refuseLogins("", "") }}
}

var fieldOutages = []fieldOutage{
	fieldRefusal("28P01", "password authentication failed", true),
	fieldRefusal("28000", "no pg_hba.conf entry", true),
	fieldRefusal("3D000", "database does not exist", true),
	fieldRefusal("53300", "too many connections", false),
	fieldRefusal("57P03", "the database system is starting up", false),
	fieldRefusal("08P01", "server login has been failing, try again later (server_login_retry)", false),
	fieldRefusal("08P01", "unsupported startup parameter: options", true),
	{"read-only", true, true,
		func(t testing.TB, _ *field, admin *sql.Conn) {
			_, err := admin.ExecContext(pgBackground, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$`)
			require.NoError(t, err)
		},
		func(t testing.TB, _ *field, admin *sql.Conn) {
			_, err := admin.ExecContext(pgBackground, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database()); END $$`)
			assert.NoError(t, err)
		}},
	{"closed", false, false,
		func(_ testing.TB, f *field, _ *sql.Conn) { f.relay.set(func(r *fieldProxy) { r.down = true }) },
		func(_ testing.TB, f *field, _ *sql.Conn) { f.relay.set(func(r *fieldProxy) { r.down = false }) }},
}

// A2. Reported: for some seconds of a failover the endpoint leads to a server that refuses logins,
// lacks the database, or accepts only reads. Libraries take it for a mistake in the configuration
// and give up.
func TestFieldFailover(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	shared := newDatabase(t)
	database := func(t *testing.T, o fieldOutage) string {
		if o.alone {
			return newDatabase(t)
		}
		return shared
	}
	for _, o := range fieldOutages {
		g.run(o.name, func(t *testing.T) {
			f := fieldOn(t, database(t, o))
			admin := fieldOne(t, f.db)
			kept, ch := pgHold(t, f.p, f.key(1), "holder")
			released, _ := pgHold(t, f.p, f.key(2), "is released meanwhile")
			f.settled(t)
			fieldWorks(t, f.p, f.pr(3))

			o.begin(t, f, admin)
			f.relay.cutAll()
			over := fieldAfter(t, 4*time.Second, func() { o.end(t, f, admin) })
			claim := fieldGo(func() error {
				_, _, err := fieldLock(t, f.p, f.pr(3), "claim")
				return err
			})
			release := fieldGo(func() error { return released.Unlock(pgBackground) })
			<-over
			r := pgReceive(t, "the claim ends", claim)
			assert.NoError(t, r.err, "after %.1f s", r.took.Seconds())
			_ = pgReceive(t, "the release ends", release)
			pgQuiet(t, ch)
			pgUntil(t, "the release has happened", func() bool { return !fieldHolds(t, f.db, f.key(2)) })
			require.NoError(t, kept.Unlock(pgBackground))
		})
		g.run(o.name+" at first use", func(t *testing.T) {
			f := fieldOn(t, database(t, o))
			admin := fieldOne(t, f.db)
			o.begin(t, f, admin)
			claim := fieldGo(func() error {
				_, _, err := fieldLock(t, f.p, f.pr(1), "claim")
				return err
			})
			if !o.atFirst {
				<-fieldAfter(t, 2*time.Second, func() { o.end(t, f, admin) })
				require.NoError(t, pgReceive(t, "the claim ends", claim).err)
				return
			}
			r := <-claim
			require.Error(t, r.err)
			require.NotErrorIs(t, r.err, ErrLockTimeout)
			require.Less(t, r.took, fieldPatience/2, "a refusal at first use is not an answer")
		})
	}
}

// A proxy ends every connection soon after it was opened: attempts become rarer, although all succeed.
func TestFieldShortConnections(t *testing.T) {
	t.Parallel()
	f := newField(t)
	pgHold(t, f.p, f.key(1), "holder")
	f.settled(t)
	start := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for range 50 {
		<-tick.C
		f.relay.cutAll()
	}
	early, late := f.relay.loginsSince(start)-f.relay.loginsSince(start.Add(time.Second)), f.relay.loginsSince(start.Add(4*time.Second))
	assert.Less(t, late, early, "attempts in the last second, and in the first")
}

// A4. Reported: a wrong password and a library that continues to try lock the account, although no
// call waits any longer.
func TestFieldLoginAttempts(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	g.run("no call waits", func(t *testing.T) {
		f := fieldOn(t, uri)
		f.relay.refuseLogins("28P01", "password authentication failed")
		_, _, err := fieldLock(t, f.p, f.pr(1), "claim")
		require.Error(t, err)
		since := time.Now()
		fieldDuring(t, 4*time.Second, "no call waits", func() bool { return true })
		assert.LessOrEqual(t, f.relay.loginsSince(since), 1, "attempts to log in, of which one may have been on its way")
		f.relay.refuseLogins("", "")
		fieldWorks(t, f.p, f.pr(1))
	})
	g.run("a caller waits", func(t *testing.T) {
		const window = 10 * time.Second
		f := fieldOn(t, uri, WithLockTimeout(window))
		fieldWorks(t, f.p, f.pr(1))
		f.relay.refuseLogins("28P01", "password authentication failed")
		f.relay.cutAll()
		start := time.Now()
		r := pgReceive(t, "the claim ends", fieldGo(func() error {
			_, _, err := fieldLock(t, f.p, f.pr(2), "claim")
			return err
		}))
		all, late := f.relay.loginsSince(start), f.relay.loginsSince(start.Add(window/2))
		assert.ErrorIs(t, r.err, ErrLockTimeout)
		assert.ErrorContains(t, r.err, "password authentication failed")
		assert.Less(t, late, all-late, "the attempts do not become rarer: %d, then %d", all-late, late)
		f.relay.refuseLogins("", "")
		pgUntil(t, "the provider works again", func() bool {
			_, _, err := fieldLock(t, f.p, f.pr(3), "claim")
			return err == nil
		})
	})
}

// fieldShadow creates a database in which a function that shadows the server's pg_notify decides
// whether NOTIFY works. At first it does. fieldShadow returns the URI for which that is so, a count
// of the failures, and the switch.
func fieldShadow(t testing.TB) (uri string, failures func() int, works func(bool)) {
	t.Helper()
	uri = newDatabase(t)
	db := pgDB(t, uri)
	pgExec(t, db, `CREATE SCHEMA shadow; CREATE SEQUENCE shadow.failures`)
	works = func(yes bool) {
		t.Helper()
		body := `PERFORM nextval('shadow.failures'); RAISE EXCEPTION 'too many notifications in the NOTIFY queue' USING ERRCODE = '54000';`
		if yes {
			body = `PERFORM pg_catalog.pg_notify($1, $2);`
		}
		pgExec(t, db, `CREATE OR REPLACE FUNCTION shadow.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN `+body+` END $$`)
	}
	works(true)
	u, err := url.Parse(uri)
	require.NoError(t, err)
	q := u.Query()
	q.Set("search_path", "shadow, pg_catalog, public")
	u.RawQuery = q.Encode()
	failures = func() int {
		return pgGet[int](t, db, `SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM shadow.failures`)
	}
	return u.String(), failures, works
}

// A5. Reported: NOTIFY fails, because a session that never reads has filled the queue of the whole
// server. Every statement that notifies then fails, too.
func TestFieldNotifyFails(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	g.run("newer claim", func(t *testing.T) {
		uri, failures, works := fieldShadow(t)
		f := fieldOn(t, uri)
		other := f.other(t)
		fieldWorks(t, other, 1)
		holder, ch, err := fieldLock(t, f.p, 1, "holder")
		require.NoError(t, err)
		works(false)
		newer := pgLocker(t, other)("field", 1, "newer")
		claim := fieldGo(func() error {
			_, err := newer.Lock(pgBackground)
			return err
		})
		var r fieldResult
		select {
		case n := <-ch:
			assert.Equal(t, "newer", n.Message)
			require.NoError(t, holder.Release(pgBackground))
			r = pgReceive(t, "the newer claim ends", claim)
		case r = <-claim:
		}
		require.NoError(t, r.err, "the newer claim, after %.1f s", r.took.Seconds())
		assert.NotZero(t, failures(), "nothing was notified")

		// NOTIFY is used again once it works again.
		works(true)
		heard := make(chan string, 1000)
		over := make(chan struct{})
		defer close(over)
		listener := pq.NewListener(uri, time.Second, time.Second, nil)
		t.Cleanup(func() { _ = listener.Close() })
		require.NoError(t, listener.Listen(notifyChannel))
		// The goroutine ends with the test.
		go func() {
			for {
				select {
				case n := <-listener.Notify:
					if n != nil && strings.Contains(n.Extra, "once more") {
						heard <- n.Extra
					}
				case <-over:
					return
				}
			}
		}()
		pgUntil(t, "NOTIFY is used again", func() bool {
			key, err := f.p.LockKey(pgBackground, "field", 1)
			require.NoError(t, err)
			require.NoError(t, pgNew(t, f.p, key, "once more").Notify(pgBackground))
			select {
			case <-heard:
				return true
			case <-time.After(100 * time.Millisecond):
				return false
			}
		})
	})
	g.run("release", func(t *testing.T) {
		uri, failures, works := fieldShadow(t)
		f := fieldOn(t, uri)
		other := f.other(t)
		holder, _ := pgHold(t, f.p, 1000, "holder")
		waiter, done := pgWait(t, other, 1000, "waiter")
		works(false)
		start := time.Now()
		require.NoError(t, holder.Unlock(pgBackground))
		require.NoError(t, pgReceive(t, "the released key reaches its waiter", done))
		took := time.Since(start)
		assert.Less(t, took, 5*time.Second, "the waiter had to take the key over")
		require.NoError(t, waiter.Unlock(pgBackground))
		assert.NotZero(t, failures(), "nothing was notified")
		assert.NotZero(t, f.logged("notif"), "not a line in the log:\n%s", f.log)
	})
	g.run("a service starts", func(t *testing.T) {
		uri, _, works := fieldShadow(t)
		works(false)
		f := fieldOn(t, uri)
		fieldWorks(t, f.p, 1)
	})
}

// A6. Reported: a pooler in session mode gives the client another backend while the client is idle,
// after a failover or when the pooler is reconfigured. The advisory lock is gone, and the
// connection looks unchanged.
func TestFieldBackendSwapped(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	for _, which := range []string{"session", "listener", "statements", "all"} {
		g.run(which, func(t *testing.T) {
			f := fieldOn(t, uri, WithSessionTimeout(3*time.Second))
			l, ch := pgHold(t, f.p, f.key(1), "holder")
			f.settled(t)
			session := f.session(t)
			_, contender := fieldContender(t, f.other(t, WithSessionTimeout(3*time.Second)), f.key(1))
			for _, c := range f.relay.open() {
				kind := "statements"
				if c == session {
					kind = "session"
				} else if c.listens.Load() {
					kind = "listener"
				}
				if which == "all" || which == kind {
					pgUntil(t, "the backend is swapped", func() bool { return c.swap() || !c.isOpen() })
				}
			}
			require.False(t, fieldExclusive(t, 7*time.Second, ch, contender), "the holder was notified: %v", l.Cause())
			require.NoError(t, l.Unlock(pgBackground))
			require.NoError(t, pgReceive(t, "the contender is granted the key", contender).err)
		})
	}
}

func (c *fieldConn) isOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.closed
}

// A7. Reported: poolers reset a backend after each transaction (server_reset_query_always), or
// unpin it at the first unlock. Session-level locks vanish, and every statement succeeds.
func TestFieldPoolerResets(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	for _, reset := range []string{"DISCARD ALL", "SELECT pg_advisory_unlock_all()", "UNLISTEN *", "DEALLOCATE ALL"} {
		for _, when := range []string{"always", "later"} {
			g.run(reset+" "+when, func(t *testing.T) {
				f := fieldOn(t, uri, WithSessionTimeout(2*time.Second))
				if when == "always" {
					f.relay.set(func(r *fieldProxy) { r.reset = reset })
				}
				holder := pgNew(t, f.p, f.key(1), "holder")
				ch, err := holder.Lock(pgBackground)
				// First use has rejected the pooler.
				if when == "always" && err != nil {
					require.NotErrorIs(t, err, ErrLockTimeout)
					return
				}
				require.NoError(t, err)
				f.relay.set(func(r *fieldProxy) { r.reset = reset })
				_, contender := fieldContender(t, f.other(t, WithSessionTimeout(2*time.Second)), f.key(1))
				fieldExclusive(t, 5*time.Second, ch, contender)
			})
		}
	}
}

// A8. Reported: the listening connection lives, but its registration is gone. Every notification is
// missed, and nothing reports it.
func TestFieldDeafListener(t *testing.T) {
	t.Parallel()
	f := newField(t)
	_, ch := pgHold(t, f.p, 1, "holder")
	f.settled(t)
	deaf := f.relay.listening()
	pgUntil(t, "the registration is gone", func() bool { return deaf.inject("UNLISTEN *") })
	start := time.Now()
	pgUntil(t, "it listens anew", func() bool {
		c := f.relay.find(func(c *fieldConn) bool { return c != deaf && c.listens.Load() && c.isIdle() })
		return c != nil
	})
	t.Logf("it listens anew after %.1f s", time.Since(start).Seconds())
	assert.NotZero(t, f.logged("listen"), "not a line in the log:\n%s", f.log)
	other := f.other(t)
	l, _ := pgHold(t, other, 2, "connects")
	require.NoError(t, l.Unlock(pgBackground))
	start = time.Now()
	require.NoError(t, pgNew(t, other, 1, "claim").Notify(pgBackground))
	require.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)
	require.Less(t, time.Since(start), 2*time.Second, "not by the listener")
}

// A9. Reported: LISTEN fails, or the listening connection cannot come back for hours. The only
// symptom is that everything is slow.
func TestFieldListenFails(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	const text = "LISTEN is forbidden here"
	refuse := func(attempts *atomic.Int32) fieldHook {
		return func(c *fieldConn, to direction, m []byte) (verdict, []byte) {
			if to == toServer && kindOf(m) == 'Q' && isListen(m) {
				attempts.Add(1)
				c.answer(errorMessage("ERROR", "42501", text), readyMessage())
				return drop, nil
			}
			return pass, m
		}
	}
	g.run("at first use", func(t *testing.T) {
		f := fieldOn(t, uri)
		var attempts atomic.Int32
		f.relay.set(func(r *fieldProxy) { r.hook = refuse(&attempts) })
		r := <-fieldGo(func() error {
			_, _, err := fieldLock(t, f.p, f.pr(1), "claim")
			return err
		})
		all := fmt.Sprint(r.err, "\n", f.log)
		require.Contains(t, all, text)
		require.NotContains(t, all, "transaction-pooling")
	})
	g.run("later", func(t *testing.T) {
		f := fieldOn(t, uri)
		_, ch := pgHold(t, f.p, f.key(1), "holder")
		f.settled(t)
		var attempts atomic.Int32
		f.relay.set(func(r *fieldProxy) { r.hook = refuse(&attempts) })
		f.relay.listening().close()
		pgUntil(t, "it tries to listen three times", func() bool { return attempts.Load() >= 3 })
		fieldWorks(t, f.p, f.pr(2))
		assert.False(t, f.p.Stats().Listening)
		assert.Equal(t, 1, f.logged(text), "lines with the error:\n%s", f.log)
		require.NoError(t, pgNew(t, f.other(t), f.key(1), "claim").Notify(pgBackground))
		assert.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)

		before := f.logged("listen")
		f.relay.set(func(r *fieldProxy) { r.hook = nil })
		pgUntil(t, "it listens again", func() bool {
			return f.relay.find(func(c *fieldConn) bool { return c.listens.Load() && c.isIdle() }) != nil
		})
		pgUntil(t, "Stats reports it", func() bool { return f.p.Stats().Listening })
		fieldWorks(t, f.p, f.pr(2))
		assert.Equal(t, before+1, f.logged("listen"), "lines that say that it listens again:\n%s", f.log)
	})
	g.run("connection limit", func(t *testing.T) {
		role := fmt.Sprintf("field_%d", time.Now().UnixNano())
		var server *sql.DB
		// The role can only be dropped after the database.
		t.Cleanup(func() {
			_, err := server.ExecContext(pgBackground, `DROP ROLE `+role)
			assert.NoError(t, err)
			_ = server.Close()
		})
		uri := newDatabase(t)
		u, err := url.Parse(uri)
		require.NoError(t, err)
		u.Path = "/postgres"
		server, err = sql.Open("postgres", u.String())
		require.NoError(t, err)
		db := pgDB(t, uri)
		pgExec(t, db, `CREATE ROLE `+role+` LOGIN PASSWORD 'field'; ALTER SCHEMA public OWNER TO `+role)
		u.Path, u.User = "", url.UserPassword(role, "field")
		full, err := url.Parse(uri)
		require.NoError(t, err)
		full.User = u.User
		f := fieldOn(t, full.String())
		f.db = db
		_, ch := pgHold(t, f.p, f.key(1), "holder")

		// Cycles run all the time, so that the connections for statements stay open.
		var cycles, failed atomic.Int64
		stop := make(chan struct{})
		var running sync.WaitGroup
		running.Add(1)
		go func() {
			defer running.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				l := pgLocker(t, f.p)("field", f.pr(2), "works")
				_, err := l.Lock(pgBackground)
				if err == nil {
					err = l.Release(pgBackground)
				}
				if err != nil {
					failed.Add(1)
				}
				cycles.Add(1)
			}
		}()
		defer func() {
			close(stop)
			running.Wait()
		}()
		f.settled(t)
		pgUntil(t, "it works", func() bool { return cycles.Load() > 50 })
		n := pgConnections(t, db)
		pgExec(t, db, fmt.Sprintf(`ALTER ROLE %s CONNECTION LIMIT %d`, role, n-1))
		pgTerminate(t, db, f.relay.listening().backend())
		from := time.Now()
		pgUntil(t, "it tries to come back", func() bool { return f.relay.loginsSince(from) >= 2 })
		before := cycles.Load()
		fieldDuring(t, 3*time.Second, "the holder is undisturbed", func() bool { return !fieldNotified(ch) })
		assert.Greater(t, cycles.Load(), before, "nothing was locked meanwhile")
		assert.Zero(t, failed.Load(), "locks failed meanwhile")
		assert.Equal(t, 1, f.logged("too many connections"), "lines with the error:\n%s", f.log)
		pgExec(t, db, `ALTER ROLE `+role+` CONNECTION LIMIT -1`)
		f.settled(t)
		require.NoError(t, pgNew(t, f.other(t), f.key(1), "claim").Notify(pgBackground))
		require.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)
	})
}

// A10. Reported: a proxy responds to a ping with an error, and the driver panics. The whole process
// ends.
func TestFieldErrorReply(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	for _, which := range []string{"session", "listener"} {
		for _, kind := range []string{"ERROR", "FATAL", "FATAL and end", "stray ERROR", "stray FATAL and end"} {
			g.run(which+" "+kind, func(t *testing.T) {
				f := fieldOn(t, uri, WithSessionTimeout(4*time.Second))
				l, ch := pgHold(t, f.p, f.key(1), "holder")
				f.settled(t)
				victim := f.session(t)
				if which == "listener" {
					victim = f.relay.listening()
				}
				severity := strings.Fields(strings.TrimPrefix(kind, "stray "))[0]
				message := errorMessage(severity, "53300", "too many connections for this proxy")
				if strings.HasPrefix(kind, "stray") {
					pgUntil(t, "it is idle", victim.isIdle)
					victim.answer(message)
					if strings.HasSuffix(kind, "end") {
						victim.close()
					}
				} else {
					answered := make(chan struct{})
					var once sync.Once
					f.relay.set(func(r *fieldProxy) {
						r.hook = func(c *fieldConn, to direction, m []byte) (verdict, []byte) {
							if to != toServer || c != victim || c.mark.Load() {
								return pass, m
							}
							if k := kindOf(m); k != 'Q' && k != 'S' {
								return drop, nil
							}
							c.mark.Store(true)
							c.answer(message)
							once.Do(func() { close(answered) })
							if strings.HasSuffix(kind, "end") {
								return cut, nil
							}
							c.answer(readyMessage())
							return drop, nil
						}
					})
					pgReceive(t, "its next statement is answered", answered)
				}
				fieldDuring(t, time.Second, "the holder is undisturbed", func() bool { return !fieldNotified(ch) })
				fieldWorks(t, f.p, f.pr(2))
				require.NoError(t, pgNew(t, f.other(t), f.key(1), "claim").Notify(pgBackground))
				require.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)
				require.NoError(t, l.Unlock(pgBackground))
			})
		}
	}
}

// A11. Reported: a statement never gets a response, and the service cannot be shut down.
func TestFieldCloseIsBounded(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	// The bound is 10 s, and more for a busy machine.
	const bound = 15 * time.Second
	uri := newDatabase(t)
	pgExec(t, pgDB(t, uri), SchemaSQL)

	// silent lets n statements pass. On the connection of the next one for which is holds, nothing
	// gets a response any longer.
	silent := func(n int32, is func(m []byte) bool) (fieldHook, *atomic.Int32, <-chan struct{}) {
		var seen atomic.Int32
		hit := make(chan struct{})
		return func(c *fieldConn, to direction, m []byte) (verdict, []byte) {
			if to == toClient {
				return pass, m
			}
			if c.dead.Load() {
				return drop, nil
			}
			k := kindOf(m)
			if (k == 'Q' || k == 'S' || k == 0) && is(m) && seen.Add(1) == n+1 {
				c.dead.Store(true)
				close(hit)
				if k != 0 {
					return drop, nil
				}
			}
			return pass, m
		}, &seen, hit
	}
	anything := func([]byte) bool { return true }

	run := func(t *testing.T, hook fieldHook, hit <-chan struct{}) error {
		f := fieldOn(t, uri)
		f.relay.set(func(r *fieldProxy) { r.hook = hook })
		ctx, cancel := context.WithCancel(pgBackground)
		defer cancel()
		call := fieldGo(func() error {
			_, err := pgNew(t, f.p, f.key(1), "claim").Lock(ctx)
			return err
		})
		pgReceive(t, "the statement is sent", hit)
		fieldClose(t, f, bound)
		return pgReceive(t, "Lock answers", call).err
	}

	g.run("LISTEN", func(t *testing.T) {
		hook, _, hit := silent(0, func(m []byte) bool { return kindOf(m) == 'Q' && isListen(m) })
		require.Error(t, run(t, hook, hit))
	})
	g.run("LISTEN of a listener that reconnects", func(t *testing.T) {
		hook, _, hit := silent(0, func(m []byte) bool { return kindOf(m) == 'Q' && isListen(m) })
		f := fieldOn(t, uri)
		l, _ := pgHold(t, f.p, f.key(2), "holder")
		f.settled(t)
		f.relay.set(func(r *fieldProxy) { r.hook = hook })
		f.relay.listening().close()
		pgReceive(t, "LISTEN is sent", hit)
		require.NoError(t, l.Unlock(pgBackground))
		fieldClose(t, f, bound)
	})

	// Count the statements and logins before a claim is granted.
	counter, seen, _ := silent(1<<30, anything)
	f := fieldOn(t, uri)
	f.relay.set(func(r *fieldProxy) { r.hook = counter })
	pgHold(t, f.p, f.key(3), "counts")
	total := seen.Load()
	require.NoError(t, f.p.Close())
	t.Logf("%d statements and logins before the first claim is granted", total)
	step := max(1, total/8)
	// The last statements are left out, because two connections may take turns.
	for n := int32(0); n < total-2; n += step {
		g.run(fmt.Sprintf("statement %d", n), func(t *testing.T) {
			hook, _, hit := silent(n, anything)
			// The later statements need not belong to the claim.
			if err := run(t, hook, hit); n < total/2 {
				require.Error(t, err)
			}
		})
	}
	g.run("release", func(t *testing.T) {
		f := fieldOn(t, uri)
		// No other value in a message equals it.
		const key = 0x5EC2E7F00DBEEF01
		pgHold(t, f.p, key, "holder")
		f.settled(t)
		var hole atomic.Bool
		f.relay.set(func(r *fieldProxy) {
			r.hook = func(c *fieldConn, to direction, m []byte) (verdict, []byte) {
				if to == toServer && about(m, key) {
					hole.Store(true)
				}
				if hole.Load() {
					return drop, nil
				}
				return pass, m
			}
		})
		// Close notifies the holder, which does not react and is revoked after its preemption
		// timeout. The release never gets a response.
		fieldClose(t, f, bound+10*time.Second)
	})
}

// fieldClose requires that Close returns in time. If it does not, the connections are cut to end
// it.
func fieldClose(t testing.TB, f *field, bound time.Duration) {
	t.Helper()
	closed := fieldGo(f.p.Close)
	select {
	case r := <-closed:
		require.NoError(t, r.err)
		t.Logf("Close took %.1f s", r.took.Seconds())
	case <-time.After(bound):
		assert.Fail(t, fmt.Sprintf("Close has not answered after %v", bound))
		f.relay.set(func(r *fieldProxy) { r.hook, r.down = nil, true })
		f.relay.cutAll()
		<-closed
	}
}

// A12. Reported: a migration, REINDEX or VACUUM FULL locks a table for some seconds, or another
// client locks a row in an open transaction. Deployments fail although they had enough time.
func TestFieldLockedTables(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	for _, c := range []struct{ name, sql string }{
		{"row", `SELECT FROM env_lock_state WHERE lock_key = $1 FOR UPDATE`},
		{"LOCK TABLE", `LOCK TABLE env_lock_state IN ACCESS EXCLUSIVE MODE`},
		{"LOCK TABLE of the keys", `LOCK TABLE env_locks IN ACCESS EXCLUSIVE MODE`},
		{"LOCK TABLE of the sessions", `LOCK TABLE env_lock_sessions IN ACCESS EXCLUSIVE MODE`},
		{"ALTER TABLE", `ALTER TABLE env_lock_state ADD COLUMN remark text`},
		{"REINDEX", `REINDEX TABLE env_lock_state`},
	} {
		g.run(c.name, func(t *testing.T) {
			f := newField(t)
			key, err := f.p.LockKey(pgBackground, "field", 1)
			require.NoError(t, err)
			fieldWorks(t, f.p, 1)
			fieldWorks(t, f.p, 2)
			if strings.Contains(c.sql, "env_lock_sessions") && !fieldTable(t, f.db, "env_lock_sessions") {
				t.Skip("there is no table env_lock_sessions yet")
			}
			kept, ch := pgHold(t, f.p, 1000, "holder")

			tx, err := f.db.BeginTx(pgBackground, nil)
			require.NoError(t, err)
			if strings.Contains(c.sql, "$1") {
				pgExec(t, tx, c.sql, key)
			} else {
				pgExec(t, tx, c.sql)
			}
			over := fieldAfter(t, 2500*time.Millisecond, func() { assert.NoError(t, tx.Commit()) })
			var first *PreemptiveLocker
			claim := fieldGo(func() error {
				l, _, err := fieldLock(t, f.p, 1, "claim")
				first = l
				return err
			})
			if c.name == "row" {
				fieldWorks(t, f.p, 2)
				select {
				case <-over:
					assert.Fail(t, "another key had to wait for the row")
				default:
				}
			}
			further := make(chan fieldResult, 1)
			begun := fieldAfter(t, 1500*time.Millisecond, func() {
				// The further claim comes while the first one has been trying for a while.
				_, done := fieldContender(t, f.p, key)
				go func() { further <- <-done }()
			})
			<-over
			<-begun
			r := pgReceive(t, "the claim ends", claim)
			if assert.NoError(t, r.err, "after %.1f s", r.took.Seconds()) {
				require.NoError(t, first.Release(pgBackground))
			}
			r = pgReceive(t, "the further claim ends", further)
			assert.NoError(t, r.err, "after %.1f s", r.took.Seconds())
			pgQuiet(t, ch)
			require.NoError(t, kept.Unlock(pgBackground))
		})
	}

	// The heartbeat, which shows that a process lives, does not wait for a table.
	g.run("for longer than the session timeout", func(t *testing.T) {
		f := newField(t, WithSessionTimeout(2*time.Second))
		_, ch := pgHold(t, f.p, 1, "holder")
		tx, err := f.db.BeginTx(pgBackground, nil)
		require.NoError(t, err)
		pgExec(t, tx, `LOCK TABLE env_lock_state, env_locks IN ACCESS EXCLUSIVE MODE`)
		fieldDuring(t, 5*time.Second, "the holder is undisturbed", func() bool { return !fieldNotified(ch) })
		require.NoError(t, tx.Commit())
	})
}

func fieldTable(t testing.TB, db *sql.DB, name string) bool {
	t.Helper()
	return pgGet[bool](t, db, `SELECT to_regclass($1) IS NOT NULL`, name)
}

// A13. Reported: with lc_messages in another language the driver takes the end of a connection for
// a failed statement.
func TestFieldForeignLanguage(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	translate := func(c *fieldConn, to direction, m []byte) (verdict, []byte) {
		if to == toClient && kindOf(m) == 'E' {
			return pass, translated(m)
		}
		return pass, m
	}
	g.run("idle", func(t *testing.T) {
		f := newField(t)
		l, ch := pgHold(t, f.p, f.key(1), "holder")
		f.settled(t)
		f.relay.set(func(r *fieldProxy) { r.hook = translate })
		for _, c := range f.relay.open() {
			pgTerminate(t, f.db, c.backend())
		}
		fieldWorks(t, f.p, f.pr(2))
		f.settled(t)
		pgQuiet(t, ch)
		require.NoError(t, l.Unlock(pgBackground))
	})
	g.run("during a claim", func(t *testing.T) {
		fieldDuringClaim(t, newField(t), translate, func(f *field, pid int) { pgTerminate(t, f.db, pid) })
	})
}

// fieldDuringClaim lets a claim wait for a row, does something to its backend, and requires that
// neither the claim nor a hold suffers.
func fieldDuringClaim(t *testing.T, f *field, hook fieldHook, disturb func(f *field, pid int)) {
	key, err := f.p.LockKey(pgBackground, "field", f.pr(1))
	require.NoError(t, err)
	fieldWorks(t, f.p, f.pr(1))
	kept, ch := pgHold(t, f.p, f.key(1000), "holder")
	f.relay.set(func(r *fieldProxy) { r.hook = hook })
	tx, err := f.db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	pgExec(t, tx, `SELECT FROM env_lock_state WHERE lock_key = $1 FOR UPDATE`, key)
	claim := fieldGo(func() error {
		_, _, err := fieldLock(t, f.p, f.pr(1), "claim")
		return err
	})
	var pid int
	pgUntil(t, "the claim waits for the row", func() bool {
		return f.db.QueryRowContext(pgBackground, `SELECT pid FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = 'field' AND wait_event_type = 'Lock' LIMIT 1`).Scan(&pid) == nil
	})
	disturb(f, pid)
	pgUntil(t, "the statement has ended", func() bool {
		return !pgGet[bool](t, f.db, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'
			AND clock_timestamp() - query_start > '0.3 s')`, pid)
	})
	require.NoError(t, tx.Commit())
	r := pgReceive(t, "the claim ends", claim)
	assert.NoError(t, r.err, "after %.1f s", r.took.Seconds())
	pgQuiet(t, ch)
	require.NoError(t, kept.Unlock(pgBackground))
}

// Related to A12: an operator, or a tool that ends slow statements, cancels the claim's statement.
func TestFieldCancelled(t *testing.T) {
	t.Parallel()
	fieldDuringClaim(t, newField(t), nil, func(f *field, pid int) {
		require.True(t, pgGet[bool](t, f.db, `SELECT pg_cancel_backend($1)`, pid))
	})
}

// Related to A1: an operator ends a provider's connections, one by one or all of them, in any
// order.
func TestFieldTerminated(t *testing.T) {
	t.Parallel()
	const holds = 20
	f := newField(t)
	next := f.other(t)
	var locks []*PostgresLock
	var chans []<-chan NotificationPayload
	for key := range int64(holds) {
		l, ch := pgHold(t, f.p, key, "holder")
		locks, chans = append(locks, l), append(chans, ch)
	}
	_, contender := fieldContender(t, next, 0)
	orders := [][]string{{"session"}, {"listener"}, {"statements"},
		{"session", "listener", "statements"}, {"session", "statements", "listener"},
		{"listener", "session", "statements"}, {"listener", "statements", "session"},
		{"statements", "session", "listener"}, {"statements", "listener", "session"}}
	for _, order := range orders {
		// The cycle makes sure that there are connections for statements.
		fieldWorks(t, f.p, 1)
		f.settled(t)
		pids := map[string][]int{}
		session := f.session(t)
		for _, c := range f.relay.open() {
			kind := "statements"
			if c == session {
				kind = "session"
			} else if c.listens.Load() {
				kind = "listener"
			}
			pids[kind] = append(pids[kind], c.backend())
		}
		for _, kind := range order {
			for _, pid := range pids[kind] {
				// The backend may have ended already.
				_, err := f.db.ExecContext(pgBackground, `SELECT pg_terminate_backend($1)`, pid)
				require.NoError(t, err)
			}
		}
		fieldWorks(t, f.p, 2)
		f.settled(t)
		lost := 0
		for _, ch := range chans {
			if fieldNotified(ch) {
				lost++
			}
		}
		require.Zero(t, lost, "holders that were notified, of %d, after %v", holds, order)
	}
	require.False(t, fieldExclusive(t, 0, chans[0], contender))
	for _, l := range locks {
		require.NoError(t, l.Unlock(pgBackground))
	}
	require.NoError(t, pgReceive(t, "the contender is granted the key", contender).err)
}

// Related to A2: the connection ends immediately before a statement is sent, after it, or before
// its response arrives. The operation takes effect once.
func TestFieldCut(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	pgExec(t, pgDB(t, uri), SchemaSQL)
	pr := uint(0)
	for _, what := range []string{"claim", "acquire", "announce", "release"} {
		for _, when := range []string{"before", "sent", "answered"} {
			pr++
			pr := pr
			g.run(what+" "+when, func(t *testing.T) {
				// A take-over would last longer than the other provider waits.
				f := fieldOn(t, uri, WithSessionTimeout(3*time.Minute))
				key, err := f.p.LockKey(pgBackground, "field", pr)
				require.NoError(t, err)
				other := f.other(t)
				kept, ch := pgHold(t, f.p, -int64(pr), "holder")
				fieldWorks(t, f.p, pr)

				lock := pgNew(t, f.p, key, "holder")
				locker := pgLocker(t, f.p)("field", pr, "holder")
				var hch <-chan NotificationPayload
				call := func() error {
					hch, err = lock.Lock(pgBackground)
					return err
				}
				unlock := func() error { return lock.Unlock(pgBackground) }
				switch what {
				case "claim":
					call = func() error {
						hch, err = locker.Lock(pgBackground)
						return err
					}
					unlock = func() error { return locker.Release(pgBackground) }
				case "announce":
					_, och := pgHold(t, other, key, "is notified")
					call = func() error { return lock.Notify(pgBackground) }
					unlock = func() error {
						require.Equal(t, "holder", pgReceive(t, "the holder is notified", och).Message)
						return nil
					}
				case "release":
					require.NoError(t, call())
					call, unlock = unlock, func() error { return nil }
				}

				var hits atomic.Int32
				f.relay.set(func(r *fieldProxy) { r.hook = fieldCutOnce(key, when, &hits) })
				done := fieldGo(call)
				r := pgReceive(t, "the call ends", done)
				require.NoError(t, r.err, "after %.1f s", r.took.Seconds())
				require.NotZero(t, hits.Load(), "nothing was cut")
				f.relay.set(func(r *fieldProxy) { r.hook = nil })
				if hch != nil && what != "release" {
					require.True(t, fieldHolds(t, f.db, key))
					pgQuiet(t, hch)
				}
				require.NoError(t, unlock())
				pgQuiet(t, ch)
				require.NoError(t, kept.Unlock(pgBackground))
				if what == "announce" {
					return
				}
				next, _ := pgHold(t, other, key, "next")
				require.NoError(t, next.Unlock(pgBackground))
			})
		}
	}
}

// fieldCutOnce cuts the connection at the next statement about a key.
func fieldCutOnce(key int64, when string, hits *atomic.Int32) fieldHook {
	return func(c *fieldConn, to direction, m []byte) (verdict, []byte) {
		k := kindOf(m)
		if to == toClient {
			// The response is dropped.
			if c.mark.Load() {
				if k == 'Z' {
					return cut, nil
				}
				return drop, nil
			}
			return pass, m
		}
		if about(m, key) && hits.CompareAndSwap(0, 1) {
			if when == "before" {
				return cut, nil
			}
			c.mark.Store(true)
		}
		if when == "sent" && c.mark.Load() && (k == 'Q' || k == 'S') {
			c.mu.Lock()
			// send fails only on a connection that has ended.
			_ = c.send(c.server, m)
			c.mu.Unlock()
			return cut, nil
		}
		return pass, m
	}
}

// Related to B9 and to an operator's mistakes: rows and tables vanish while keys are held. The
// holder is notified, and the tables are created again. As long as the row in env_locks shows that
// the key is known, no other claim holds it before this holder was notified.
func TestFieldRowsVanish(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	for _, c := range []struct {
		name, sql string
		free      bool // the operator has freed the key
	}{
		{"DELETE", `DELETE FROM env_lock_state`, false},
		{"TRUNCATE", `TRUNCATE env_lock_state`, false},
		{"DROP", `DROP TABLE env_lock_state CASCADE`, false},
		{"DROP both", `DROP TABLE env_locks, env_lock_state CASCADE`, true},
		{"cleared", `UPDATE env_lock_state SET holder_id = NULL`, true},
		{"DELETE sessions", `DELETE FROM env_lock_sessions`, false},
		{"DROP sessions", `DROP TABLE env_lock_sessions CASCADE`, false},
	} {
		g.run(c.name, func(t *testing.T) {
			f := newField(t, WithSessionTimeout(2*time.Second))
			_, ch, err := fieldLock(t, f.p, 1, "holder")
			require.NoError(t, err)
			key, err := f.p.LockKey(pgBackground, "field", 1)
			require.NoError(t, err)
			other := f.other(t, WithSessionTimeout(2*time.Second))
			fieldWorks(t, other, 2)
			sessions := strings.Contains(c.sql, "env_lock_sessions")
			if sessions && !fieldTable(t, f.db, "env_lock_sessions") {
				t.Skip("there is no table env_lock_sessions yet")
			}
			pgExec(t, f.db, c.sql)
			_, contender := fieldContender(t, other, key)
			start := time.Now()
			if c.free {
				select {
				case <-ch:
					t.Logf("notified after %.1f s", time.Since(start).Seconds())
				case <-time.After(15 * time.Second):
					assert.Fail(t, "the holder was not notified in 15 s")
				}
			} else {
				notified := fieldExclusive(t, 15*time.Second, ch, contender)
				// A session may write its row again.
				assert.True(t, notified || sessions, "the holder was not notified in 15 s")
			}
			fieldWorks(t, f.p, 3)
			fieldWorks(t, other, 4)
		})
	}
}

// Related to A6: a network, or a proxy, that ends connections again and again.
func TestFieldFlapping(t *testing.T) {
	t.Parallel()
	g := fieldTogether(t)
	defer g.wait()
	uri := newDatabase(t)
	g.run("holder", func(t *testing.T) {
		f := fieldOn(t, uri, WithSessionTimeout(4*time.Second))
		l, ch := pgHold(t, f.p, f.key(1), "holder")
		f.settled(t)
		_, contender := fieldContender(t, f.other(t, WithSessionTimeout(4*time.Second)), f.key(1))
		cuts := time.NewTicker(300 * time.Millisecond)
		defer cuts.Stop()
		over := make(chan struct{})
		defer close(over)
		// The goroutine ends with the test.
		go func() {
			for {
				select {
				case <-cuts.C:
					f.relay.cutAll()
				case <-over:
					return
				}
			}
		}()
		// On a slow machine no connection is open for long enough. Then the holder is notified,
		// before the contender has the key.
		notified := fieldExclusive(t, 8*time.Second, ch, contender)
		t.Logf("the holder was notified: %t", notified)
		cuts.Stop()
		err := l.Unlock(pgBackground)
		// The contender may have the key already.
		if notified {
			return
		}
		require.NoError(t, err)
		require.NoError(t, pgReceive(t, "the contender is granted the key", contender).err)
	})
	g.run("busy callers", func(t *testing.T) {
		const callers, cuts = 32, 8
		f := fieldOn(t, uri)
		fieldWorks(t, f.p, f.pr(1))
		var cycles, failed atomic.Int64
		var first atomic.Pointer[error]
		var running sync.WaitGroup
		stop := make(chan struct{})
		for i := range callers {
			running.Add(1)
			go func() {
				defer running.Done()
				for {
					select {
					case <-stop:
						return
					default:
					}
					l := pgLocker(t, f.p)("field", f.pr(i), "works")
					_, err := l.Lock(pgBackground)
					if err == nil {
						err = l.Release(pgBackground)
					}
					if err != nil {
						failed.Add(1)
						first.CompareAndSwap(nil, &err)
					}
					cycles.Add(1)
				}
			}()
		}
		for range cuts {
			before := cycles.Load()
			pgUntil(t, "callers get through", func() bool { return cycles.Load() > before+2*callers })
			f.relay.cutAll()
		}
		close(stop)
		running.Wait()
		if err := first.Load(); err != nil {
			require.Zero(t, failed.Load(), "calls failed, of %d, such as: %v", cycles.Load(), *err)
		}
	})
}

// Related to A1: the server is restarted. (The first design lost every hold.)
func TestFieldRestart(t *testing.T) {
	t.Parallel()
	const holds = 50
	server := pgCluster(t, pgserver.Options{})
	for _, mode := range []string{pgserver.Fast, pgserver.Immediate} {
		// The modes run one after the other, because they share the server.
		t.Run(mode, func(t *testing.T) {
			uri, err := server.CreateDatabase(pgBackground, "restart")
			require.NoError(t, err)
			var suspended, reconnected, kept, lost atomic.Int64
			log := &pgLog{}
			// A busy machine may need longer than 9 s for the restart.
			p := pgProvider(t, uri, log.option(), WithLockTimeout(2*soon), WithSessionTimeout(time.Minute), WithObserver(func(o Observation) {
				s, r, k, l := o.Kind == ObservedSuspended, o.Kind == ObservedReconnected, o.Kept, o.Lost
				if s {
					suspended.Add(1)
				}
				if r {
					reconnected.Add(1)
					kept.Store(int64(k))
					lost.Store(int64(l))
				}
			}))
			var locks []*PostgresLock
			var chans []<-chan NotificationPayload
			for key := range int64(holds) {
				l, ch := pgHold(t, p, key, "holder")
				locks, chans = append(locks, l), append(chans, ch)
			}
			contenders := map[int64]<-chan fieldResult{}
			other := pgProvider(t, uri, WithLockTimeout(2*soon))
			for key := range int64(5) {
				_, contenders[key] = fieldContender(t, other, key)
			}
			require.NoError(t, server.Restart(pgBackground, mode))
			start := time.Now()
			fieldWorks(t, p, 1)
			t.Logf("a claim is granted %.1f s after the restart", time.Since(start).Seconds())
			pgUntil(t, "the session is reconnected", func() bool { return reconnected.Load() > 0 })
			assert.NotZero(t, suspended.Load())
			assert.EqualValues(t, holds, kept.Load())
			assert.Zero(t, lost.Load())
			assert.Zero(t, p.Stats().Suspended)
			notified := 0
			for _, ch := range chans {
				if fieldNotified(ch) {
					notified++
				}
			}
			assert.Zero(t, notified, "holders that were notified, of %d", holds)
			failed := 0
			for key, l := range locks {
				if done := contenders[int64(key)]; done != nil {
					fieldExclusive(t, 0, chans[key], done)
				}
				if l.Unlock(pgBackground) != nil {
					failed++
				}
			}
			assert.Zero(t, failed, "holds that were lost, of %d", holds)
			assert.Regexp(t, regexp.MustCompile(`(?i)suspended[\s\S]*reconnected`), log.String())
		})
	}
}
