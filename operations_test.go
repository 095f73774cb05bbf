package locker

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"math"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/require"
)

// TestPostgresOperators tests what an operator can see and do (C35).
func TestPostgresOperators(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	uri := newDatabase(t)
	p, other := pgProvider(t, pgNamed(t, uri, "deployer")), pgProvider(t, pgNamed(t, uri, "reviewer"))
	watcher := pgProvider(t, uri)
	newLocker, newOther := pgLocker(t, p), pgLocker(t, other)

	all, err := watcher.ListLocks(ctx)
	require.NoError(t, err, "the first use creates the schema")
	require.Empty(t, all)

	holder := newLocker("acme/widget", 7, "first").Labels(map[string]string{"commit": "a1"})
	start := time.Now()
	stop, err := holder.Lock(ctx)
	require.NoError(t, err)
	key, err := p.LockKey(ctx, "acme/widget", 7)
	require.NoError(t, err)
	waiter := newOther("acme/widget", 7, "second").Labels(map[string]string{"commit": "b2"})
	waited := make(chan error, 1)
	go func() { _, err := waiter.Lock(ctx); waited <- err }()
	require.Equal(t, "second", (<-stop).Message)

	all, err = watcher.ListLocks(ctx)
	require.NoError(t, err)
	require.Len(t, all, 1)
	h := all[0]
	require.WithinRange(t, h.Since, start.Add(-time.Minute), time.Now().Add(time.Minute))
	require.False(t, h.NewestAt.Before(h.Since))
	h.Since, h.NewestAt = time.Time{}, time.Time{}
	require.Equal(t, LockStatus{
		Key: key, Repo: "acme/widget", PullRequest: 7,
		Event: "first", Host: hostName, PID: os.Getpid(), Application: "deployer", Token: holder.Token(), Alive: true,
		Labels: map[string]string{"commit": "a1"}, StopAsked: true, NewestLabels: map[string]string{"commit": "b2"},
		NewestEvent: "second", NewestHost: hostName, NewestPID: os.Getpid(), NewestApplication: "reviewer", Waiting: true,
	}, h)
	pgUntil(t, "no check of rows is queued", func() bool { return p.Stats().Queued == 0 })
	st := p.Stats()
	require.WithinRange(t, st.LastHeartbeat, start.Add(-time.Minute), time.Now())
	st.LastHeartbeat = time.Time{}
	require.Equal(t, Stats{Held: 1, Connected: true, Listening: true}, st)
	require.Equal(t, 1, other.Stats().Waiting)
	require.Zero(t, other.Stats().Held)

	require.NoError(t, holder.Release(ctx))
	require.NoError(t, <-waited)
	all, err = watcher.ListLocks(ctx)
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Equal(t, "second", all[0].Event)
	require.Equal(t, map[string]string{"commit": "b2"}, all[0].Labels)
	require.False(t, all[0].Waiting)
	require.False(t, all[0].StopAsked)
	require.Equal(t, 1, all[0].Streak)
	require.Zero(t, all[0].SparedUntil)

	asked, err := watcher.RequestStop(ctx, "acme/widget", 8, "no one there")
	require.NoError(t, err)
	require.False(t, asked)
	cause := make(chan error, 1)
	working := newLocker("acme/widget", 9, "works")
	began, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- working.Do(ctx, func(ctx context.Context) error {
			close(began)
			<-ctx.Done()
			cause <- context.Cause(ctx)
			return nil
		})
	}()
	<-began
	asked, err = watcher.RequestStop(ctx, "acme/widget", 9, `maintenance "now"`)
	require.NoError(t, err)
	require.True(t, asked)
	err = <-cause
	require.ErrorIs(t, err, ErrStopRequested)
	require.NotErrorIs(t, err, ErrLockPreempted)
	require.ErrorContains(t, err, "maintenance")
	require.ErrorIs(t, <-ended, ErrStopRequested)

	// A waiter whose process has ended is not shown as waiting.
	dying := pgProvider(t, uri)
	go func() { _, _ = pgLocker(t, dying)("acme/widget", 7, "dies").Lock(ctx) }()
	require.Eventually(t, func() bool {
		all, err = watcher.ListLocks(ctx)
		return err == nil && len(all) == 1 && all[0].NewestEvent == "dies" && all[0].Waiting
	}, soon, 10*time.Millisecond)
	require.NoError(t, dying.Close())
	require.Eventually(t, func() bool {
		all, err = watcher.ListLocks(ctx)
		return err == nil && len(all) == 1 && !all[0].Waiting
	}, soon, 10*time.Millisecond)
	_ = waiter.Release(ctx)
	require.Eventually(t, func() bool {
		all, err = watcher.ListLocks(ctx)
		return err == nil && len(all) == 0
	}, soon, 10*time.Millisecond)
}

// operationsSQL returns the statement of docs/operations.md that begins with a comment.
func operationsSQL(t *testing.T, comment string) string {
	t.Helper()
	page, err := os.ReadFile("docs/operations.md")
	require.NoError(t, err)
	_, rest, found := strings.Cut(string(page), "-- "+comment+"\n")
	require.True(t, found, comment)
	query, _, _ := strings.Cut(rest, ";")
	return query
}

// TestPostgresResetSequence tests that one number in nanoseconds rejects all later ones in
// microseconds, until an operator resets it (C48).
func TestPostgresResetSequence(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	deploy := func(pr uint, order int64) error {
		return goRound(pgLocker(t, q)("org/repo", pr, "push").Sequence(order))
	}
	wrong, right := time.Now().UnixNano(), time.Now().UnixMicro()

	for name, reset := range map[string]func(t *testing.T){
		"ResetSequence": func(t *testing.T) {
			known, err := p.ResetSequence(ctx, "org/repo", 7)
			require.NoError(t, err)
			require.True(t, known)
		},
		"one, by hand": func(t *testing.T) { pgExec(t, db, operationsSQL(t, "forget the highest number of one pull request")) },
		"all in a unit, by hand": func(t *testing.T) {
			pgExec(t, db, operationsSQL(t, "forget all that are in nanoseconds"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, deploy(7, wrong))
			require.NoError(t, deploy(8, right))
			require.ErrorIs(t, deploy(7, right), ErrClaimOutdated)
			var pr, top, newest int64
			var at time.Time
			var event string
			require.NoError(t, db.QueryRow(operationsSQL(t, "the highest numbers")).Scan(new(string), &pr, &top, &newest, &event, &at))
			require.Equal(t, []int64{7, wrong, wrong}, []int64{pr, top, newest})

			reset(t)
			require.NoError(t, deploy(7, right))
			require.ErrorIs(t, deploy(7, right-1), ErrClaimOutdated, "orders count again")
			require.ErrorIs(t, deploy(8, right-1), ErrClaimOutdated, "another pull request's is kept")
		})
	}

	known, err := p.ResetSequence(ctx, "org/repo", 9)
	require.NoError(t, err)
	require.False(t, known)
	known, err = p.ResetSequence(ctx, "org/repo", 8)
	require.NoError(t, err)
	require.True(t, known)

	// ResetSequence does not notify the holder. The next claim does.
	holder := pgLocker(t, p)("org/repo", 7, "holder").Sequence(wrong)
	notified, err := holder.Lock(ctx)
	require.NoError(t, err)
	known, err = q.ResetSequence(ctx, "org/repo", 7)
	require.NoError(t, err)
	require.True(t, known)
	pgQuiet(t, notified)
	next := make(chan error, 1)
	go func() { next <- deploy(7, right) }()
	require.Equal(t, "push", pgReceive(t, "the holder is notified", notified).Message)
	require.NoError(t, holder.Release(ctx))
	require.NoError(t, pgReceive(t, "the next claim", next))
}

// TestPostgresLateRelease tests that a release that comes after its hold was lost does not free the
// hold of a successor in the same process (C19).
func TestPostgresLateRelease(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri)
	const key = 7
	l, ch := pgHold(t, p, key, "successor")
	late := claim{key: key, id: uuid.New(), event: "predecessor"}
	released := p.session.release(pgBackground, late)
	pgReceive(t, "the answer", released.done)
	require.ErrorIs(t, released.err, ErrLockLost)
	pgQuiet(t, ch)
	require.Contains(t, pgHolders(t, pgDB(t, uri)), int64(key), "the successor's key was freed")
	require.NoError(t, l.Unlock(pgBackground))
}

// Keys in JSON reach programs that have no integers of 64 bits. JavaScript and jq round integers
// above 2^53, and node-postgres returns and sends strings.
func TestKeysInJSON(t *testing.T) {
	const key = math.MaxInt64 - 1
	want := LockStatus{Key: key, Token: 7, Event: "opened"}
	text, err := json.Marshal(want)
	require.NoError(t, err)
	require.Contains(t, string(text), `"Key":"9223372036854775806"`)
	var got LockStatus
	require.NoError(t, json.Unmarshal(text, &got))
	require.Equal(t, want, got)

	for payload, ok := range map[string]bool{
		`{"lockKey":9223372036854775806,"event":"stop"}`:   true,
		`{"lockKey":"9223372036854775806","event":"stop"}`: true,
		`{"lockKey":"","event":"stop"}`:                    false,
		`{"lockKey":"1.5","event":"stop"}`:                 false,
		`{"lockKey":"9223372036854775808","event":"stop"}`: false,
	} {
		m, err := decodeMessage(payload)
		require.Equal(t, ok, err == nil, "%s: %v", payload, err)
		if ok {
			require.Equal(t, message{LockKey: key, Event: "stop"}, m)
		}
	}

	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		p, err := NewLockProvider(FakeLockProviderKind, WithLogger(slog.New(slog.NewJSONHandler(&log, nil))), WithMaxLockDuration(1))
		require.NoError(t, err)
		l, err := p.New(t.Context(), key, "stuck")
		require.NoError(t, err)
		ch, err := l.Lock(t.Context())
		require.NoError(t, err)
		// The channel gets the notification, and is closed by the revocation.
		for range ch {
		}
		synctest.Wait()
		require.Contains(t, log.String(), `"key":"9223372036854775806"`)
	})
}

// Ping returns nil if the session is connected, the server accepts writes, and notifications
// arrive. Otherwise its error names the reason.
func TestPing(t *testing.T) {
	t.Parallel()
	fails := func(t *testing.T, p *PostgresLockProvider, texts ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(pgBackground, time.Second)
		defer cancel()
		err := p.Ping(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		for _, text := range texts {
			require.ErrorContains(t, err, text)
		}
	}

	t.Run("works", func(t *testing.T) {
		t.Parallel()
		p := pgProvider(t, newDatabase(t))
		require.NoError(t, p.Ping(pgBackground), "the first use connects")
		errs := make(chan error, 20)
		for range cap(errs) {
			go func() { errs <- p.Ping(pgBackground) }()
		}
		for range cap(errs) {
			require.NoError(t, pgReceive(t, "Ping returns", errs))
		}
		require.Empty(t, p.session.proofs)

		ctx, cancel := context.WithCancel(pgBackground)
		cancel()
		require.ErrorIs(t, p.Ping(ctx), context.Canceled)
		require.NoError(t, p.Close())
		require.ErrorIs(t, p.Ping(pgBackground), ErrProviderClosed)
		require.Error(t, new(PostgresLockProvider).Ping(pgBackground))
		require.NoError(t, new(FakeLockProvider).Ping(pgBackground))
	})

	t.Run("while there is no server", func(t *testing.T) {
		t.Parallel()
		way := newOutage(t, newDatabase(t))
		p := pgProvider(t, way.uri())
		require.NoError(t, p.Ping(pgBackground))
		way.begin()
		pgUntil(t, "the session is suspended", func() bool { return !p.Stats().Connected })
		fails(t, p, "connection refused")
		way.end()
		require.NoError(t, p.Ping(pgBackground))
	})

	t.Run("while the server is read-only", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		p := pgProvider(t, uri)
		require.NoError(t, p.Ping(pgBackground))
		set := func(value string) {
			pgExec(t, db, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = `+value+`', current_database()); END $$`)
		}
		set("on")
		pgExec(t, db, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		fails(t, p, "read-only")
		set("off")
		require.NoError(t, p.Ping(pgBackground))
	})

	t.Run("while notifications do not arrive", func(t *testing.T) {
		t.Parallel()
		f := newField(t)
		require.NoError(t, f.p.Ping(pgBackground))
		// The listener checks itself every 3 s.
		pgUntil(t, "Ping fails", func() bool {
			deaf := f.relay.listening()
			if deaf == nil || !deaf.inject("UNLISTEN *") {
				return false
			}
			ctx, cancel := context.WithTimeout(pgBackground, time.Second)
			defer cancel()
			err := f.p.Ping(ctx)
			if err != nil {
				require.ErrorIs(t, err, context.DeadlineExceeded)
				require.ErrorContains(t, err, "a notification was sent and has not arrived")
			}
			return err != nil
		})
		require.NoError(t, f.p.Ping(pgBackground), "it waits until the listener is back")
	})
}

// A Ping whose NOTIFY fails pauses between two attempts, and returns nil once NOTIFY works.
func TestPingWhileNotifyFails(t *testing.T) {
	t.Parallel()
	uri, failures, works := fieldShadow(t)
	p := pgProvider(t, uri)
	require.NoError(t, p.Ping(pgBackground))
	works(false)
	ctx, cancel := context.WithTimeout(pgBackground, 2*time.Second)
	defer cancel()
	err := p.Ping(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "too many notifications")
	require.Less(t, failures(), 15)
	works(true)
	require.NoError(t, p.Ping(pgBackground))
}

func TestStatsAfterClose(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t))
	require.NoError(t, p.Ping(pgBackground))
	require.True(t, p.Stats().Listening)
	require.NoError(t, p.Close())
	st := p.Stats()
	require.False(t, st.Connected)
	require.False(t, st.Listening)
}

// The error for a key that another program has locked names that program.
func TestForeignHolderIsNamed(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri, WithLockTimeout(3*time.Second))
	db := pgDB(t, uri)
	// The first connections take time.
	require.NoError(t, goRound(pgLocker(t, p)("warm", 1, "up")))
	const key = -42
	conn, err := db.Conn(pgBackground)
	require.NoError(t, err)
	var pid int
	_, err = conn.ExecContext(pgBackground, `SET application_name = 'migrations'`)
	require.NoError(t, err)
	require.NoError(t, conn.QueryRowContext(pgBackground, `SELECT pg_backend_pid() FROM pg_advisory_lock($1)`, key).Scan(&pid))
	for mode, sentinel := range map[ClaimMode]error{Preempt: ErrLockTimeout, SkipIfBusy: ErrLockBusy} {
		l := pgNew(t, p, key, "waits")
		_, err = l.Lock(ContextWithMode(pgBackground, mode))
		require.ErrorIs(t, err, sentinel)
		require.ErrorContains(t, err, `"migrations"`)
		var c *ConflictError
		require.ErrorAs(t, err, &c)
		require.Equal(t, pid, c.Foreign.PID)
		require.Equal(t, "migrations", c.Foreign.Application)
		require.NotEmpty(t, c.Foreign.User)
		require.Nil(t, c.Holder)
	}
	require.NoError(t, conn.Close())
}

// ListLocks shows until when a hold is spared, and the streak.
func TestProgressIsShown(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri, WithProgress(1, time.Minute))
	f := pgLocker(t, p)
	first := f("acme/widget", 1, "first")
	ch, err := first.Lock(pgBackground)
	require.NoError(t, err)
	second := f("acme/widget", 1, "second")
	waited := make(chan error, 1)
	go func() { _, err := second.Lock(pgBackground); waited <- err }()
	<-ch
	require.NoError(t, first.Release(pgBackground))
	require.NoError(t, <-waited)
	all, err := p.ListLocks(pgBackground)
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.Equal(t, 1, all[0].Streak)
	require.WithinDuration(t, all[0].Since.Add(time.Minute), all[0].SparedUntil, time.Second)
	require.NoError(t, second.Release(pgBackground))
}

// Columns about a hold in the row of a free key have no effect: a replica of an earlier version, or
// an operator, frees keys without clearing the columns that were added later.
func TestFreeRowSaysNothing(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri, WithProgress(5, time.Hour))
	other := pgProvider(t, uri)
	db := pgDB(t, uri)
	f := pgLocker(t, p)
	require.NoError(t, goRound(f("acme/widget", 1, "first")))
	key, err := p.LockKey(pgBackground, "acme/widget", 1)
	require.NoError(t, err)
	stale := func() {
		t.Helper()
		_, err := db.Exec(`UPDATE env_lock_state SET holder_stop = true, spared_until = now() + interval '1 hour', holder_labels = '{"a":"b"}',
			holder_id = NULL, holder_session = NULL, holder_event = NULL, held_since = NULL WHERE lock_key = $1`, key)
		require.NoError(t, err)
	}
	for name, lock := range map[string]func() PreemptableLock{
		"announced": func() PreemptableLock {
			l, err := other.New(pgBackground, key, "holds")
			require.NoError(t, err)
			require.NoError(t, l.Notify(pgBackground))
			return l
		},
		"in full": func() PreemptableLock {
			l, err := p.New(pgBackground, key, "holds")
			require.NoError(t, err)
			require.NoError(t, l.Notify(pgBackground))
			return l
		},
		"acquired": func() PreemptableLock { return pgNew(t, other, key, "holds") },
	} {
		stale()
		l := lock()
		ch, err := l.Lock(pgBackground)
		require.NoError(t, err, name)
		require.True(t, lockOf(l).spared.IsZero(), name)
		waits := pgNew(t, p, key, "lets finish")
		require.NoError(t, waits.Notify(ContextWithMode(pgBackground, LetFinish)))
		all, err := p.ListLocks(pgBackground)
		require.NoError(t, err)
		require.False(t, all[0].StopAsked, name)
		require.Zero(t, all[0].SparedUntil, name)
		require.Nil(t, all[0].Labels, name)
		pgQuiet(t, ch)
		require.Error(t, waits.Unlock(pgBackground))
		require.NoError(t, l.Unlock(pgBackground))
	}
	stale()
	locker := f("acme/widget", 1, "takes at once")
	_, err = locker.Lock(pgBackground)
	require.NoError(t, err)
	require.True(t, lockOf(locker.lock).spared.IsZero())
	require.NoError(t, locker.Release(pgBackground))
}

// The two ways of docs/operations.md to take a lock work with the privileges that it grants, in every
// state of a key, and can be repeated.
func TestOperatorsTakeLocks(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/operations.md")
	require.NoError(t, err)
	block := func(after string) string {
		_, rest, found := strings.Cut(string(page), after)
		require.True(t, found, after)
		_, rest, found = strings.Cut(rest, "```sql\n")
		require.True(t, found, after)
		text, _, _ := strings.Cut(rest, "```")
		return text
	}
	server := pgCluster(t, pgserver.Options{})
	uri, err := server.CreateDatabase(pgBackground, "roles")
	require.NoError(t, err)
	admin := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	require.NoError(t, goRound(f("org/repo", 7, "creates the schema")))
	pgExec(t, admin, `CREATE ROLE app LOGIN; CREATE ROLE ops LOGIN`)
	pgExec(t, admin, block("## Privileges, and the schema by hand"))
	ops, service := pgDB(t, pgAs(t, uri, "ops")), pgLocker(t, pgProvider(t, pgAs(t, uri, "app")))
	for _, way := range []string{"**The safe way:**", "**The fast way:**"} {
		take := block(way)
		pgExec(t, ops, take) // the key is free
		holder := service("org/repo", 7, "holder")
		ch, err := holder.Lock(pgBackground)
		require.NoError(t, err)
		pgExec(t, ops, take)
		pgExec(t, ops, take)
		require.Equal(t, 0, pgGet[int](t, admin, `SELECT count(*) FROM env_lock_overview WHERE alive`), way)
		pgReceive(t, "the holder is notified", ch)
		require.ErrorIs(t, holder.Release(pgBackground), ErrLockLost)
		// A claim waits for a key that has just become free.
		pgExec(t, admin, `UPDATE env_lock_state SET holder_id = NULL, holder_session = NULL, claim_open = true`)
		pgExec(t, ops, take)
		require.NoError(t, goRound(service("org/repo", 7, "next")), way)
	}
}
