package locker

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestMigration tests what docs/migration.md promises about services of the original library on the
// same database. The other side is internal/standin, in separate processes. In the names and
// comments of these tests, "we" and "ours" are this library, and "theirs" is a stand-in.
func TestMigration(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "standin")
	out, err := exec.Command("go", "build", "-o", program, "./internal/standin").CombinedOutput()
	require.NoError(t, err, "%s", out)

	for _, test := range []struct {
		name string
		f    func(m *migration)
	}{
		{"same keys", migrationKeys},
		{"new keys of a stand-in", migrationNewKeys},
		{"exclusion", migrationExclusion},
		{"one way without the option", migrationOneWay},
		{"stand-in is notified", migrationNotified},
		{"stand-in that gets the key before us is notified", migrationNotifiedLater},
		{"stand-in is killed", migrationKilled},
		{"connection killed, stand-in waits", migrationConnectionTaken},
		{"connection killed, no stand-in waits", migrationConnectionKept},
		{"connection silent", migrationConnectionSilent},
		{"many holds reconnect", migrationManyReconnect},
		{"we die", migrationWeDie},
		{"stand-in claims what we hold", migrationNotHeard},
		{"stand-in gives up", migrationGivesUp},
		{"tokens and overview", migrationOverview},
		{"locked by hand", migrationByHand},
		{"two locks of one provider", migrationSameProvider},
		{"no key lock is left behind", migrationLeaks},
		{"key taken during the grant", migrationGone},
		{"key of a suspended holder", migrationUntouched},
		{"connections killed at random", migrationFlapping},
		{"option is removed", migrationRemoved},
		{"roll back", migrationBack},
		{"both roll", migrationRolling},
		{"flood", migrationFlood},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db, err := sql.Open("postgres", uri)
			require.NoError(t, err)
			t.Cleanup(func() { _ = db.Close() })
			test.f(&migration{t, program, uri, db})
		})
	}
}

// migration is the environment of one test: a database that both libraries use.
type migration struct {
	*testing.T
	program, uri string
	db           *sql.DB
}

// provider creates one of our providers, with an open session, as it is during a roll-out.
func (m *migration) provider(options ...LockProviderOption) *PostgresLockProvider {
	m.Helper()
	return m.plain(append([]LockProviderOption{WithOriginalReplicas()}, options...)...)
}

// plain creates one of our providers without WithOriginalReplicas.
func (m *migration) plain(options ...LockProviderOption) *PostgresLockProvider {
	m.Helper()
	p, err := NewLockProvider(PostgresLockProviderKind, append([]LockProviderOption{WithPostgresBackend(m.uri, "")}, options...)...)
	require.NoError(m, err)
	m.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
	// The call creates the schema.
	_, err = p.LockKey(context.Background(), "repo", 0)
	require.NoError(m, err)
	return p.(*PostgresLockProvider)
}

// claim announces one of our claims.
func (m *migration) claim(p *PostgresLockProvider, key int64, event string) *PostgresLock {
	m.Helper()
	l, err := p.New(context.Background(), key, event)
	require.NoError(m, err)
	m.Cleanup(func() { _ = l.Unlock(context.Background()) })
	require.NoError(m, l.Notify(context.Background()))
	return l.(*PostgresLock)
}

type migrationGot struct {
	ch  <-chan NotificationPayload
	err error
}

// locks calls Lock in the background.
func (m *migration) locks(l *PostgresLock) <-chan migrationGot {
	done := make(chan migrationGot, 1)
	go func() {
		ch, err := l.Lock(context.Background())
		done <- migrationGot{ch, err}
	}()
	return done
}

// hold announces a claim and locks.
func (m *migration) hold(p *PostgresLockProvider, key int64, event string) (*PostgresLock, <-chan NotificationPayload) {
	m.Helper()
	l := m.claim(p, key, event)
	got := pgReceive(m, "our lock", m.locks(l))
	require.NoError(m, got.err)
	return l, got.ch
}

func (m *migration) unlock(l *PostgresLock) {
	m.Helper()
	require.NoError(m, l.Unlock(context.Background()))
}

// until repeats a query until it returns true.
func (m *migration) until(query string, args ...any) {
	m.Helper()
	deadline := time.After(soon)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		var yes bool
		require.NoError(m, m.db.QueryRow(query, args...).Scan(&yes))
		if yes {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			require.FailNow(m, "not in time: "+query)
		}
	}
}

const (
	advisory = `SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
		AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND (classid::bigint << 32) | objid::bigint = $1`
	isHeld = advisory + ` AND granted`
	// Only stand-ins wait inside the server.
	isAwaited = advisory + ` AND NOT granted`

	// keyLocksHeld counts the advisory locks except for those of our sessions.
	keyLocksHeld = `SELECT count(*) FROM pg_locks l WHERE locktype = 'advisory' AND objsubid = 1
		AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND NOT EXISTS (SELECT FROM env_lock_sessions x WHERE x.lock = (l.classid::bigint << 32) | l.objid::bigint)`
	noneHeld = `SELECT (` + keyLocksHeld + `) = 0`

	// weWait is true once one of our locks has seen that the key is not free.
	weWait = `SELECT count(*) = 1 FROM env_lock_state WHERE lock_key = $1 AND waiting`
)

// backend returns the server process of the connection that has our session's advisory lock.
func (m *migration) backend(p *PostgresLockProvider) (pid int) {
	m.Helper()
	ref, connected := p.session.trust.current()
	require.True(m, connected)
	require.NoError(m, m.db.QueryRow(strings.Replace(advisory, "count(*) = 1", "pid", 1)+` AND mode = 'ExclusiveLock'`, ref.lock).Scan(&pid))
	return pid
}

// cut ends the connection that has our session's advisory lock, and returns when the session has
// another one.
func (m *migration) cut(p *PostgresLockProvider) {
	m.Helper()
	before, _ := p.session.trust.current()
	m.terminate(m.backend(p))
	m.reconnects(p, before)
}

func (m *migration) terminate(pid int) {
	m.Helper()
	var done bool
	require.NoError(m, m.db.QueryRow(`SELECT pg_terminate_backend($1)`, pid).Scan(&done))
	require.True(m, done)
}

// reconnects waits until our session has another connection than before.
func (m *migration) reconnects(p *PostgresLockProvider, before sessionRef) {
	m.Helper()
	m.eventually("the session reconnects", func() bool {
		now, connected := p.session.trust.current()
		return connected && now != before
	})
	now, _ := p.session.trust.current()
	require.Equal(m, before.generation, now.generation, "the session was lost")
}

func (m *migration) eventually(what string, cond func() bool) {
	m.Helper()
	deadline := time.After(soon)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			require.FailNow(m, "not in time: "+what)
		}
	}
}

// runs waits until one of our connections has run a statement that began after the call of runs.
func (m *migration) runs(query string) {
	m.Helper()
	var now time.Time
	require.NoError(m, m.db.QueryRow(`SELECT clock_timestamp()`).Scan(&now))
	m.until(`SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND left(query, 500) = left($1, 500) AND query_start > $2 AND state = 'idle'`,
		query, now)
}

// sleeps waits until a waiting lock has found its key busy.
func (m *migration) sleeps(l *PostgresLock) {
	m.Helper()
	m.eventually("the lock waits", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.wake != nil
	})
}

// guide returns a query of docs/migration.md.
func (m *migration) guide(comment string) string {
	m.Helper()
	guide, err := os.ReadFile("docs/migration.md")
	require.NoError(m, err)
	_, rest, found := strings.Cut(string(guide), "-- "+comment)
	require.True(m, found, comment)
	query, _, _ := strings.Cut(rest, "```")
	return "-- " + comment + query
}

func (m *migration) count(query string, args ...any) (n int) {
	m.Helper()
	require.NoError(m, m.db.QueryRow(query, args...).Scan(&n))
	return n
}

// standin is a process of internal/standin.
type standin struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	gone chan struct{} // closed when the process's output has ended

	mu      sync.Mutex // guards reports
	reports map[string]chan standinReport
}

type standinReport struct {
	What, Name, ID, Event, Error string
	Key                          int64
}

func (m *migration) standin(flags ...string) *standin {
	m.Helper()
	s := &standin{t: m, gone: make(chan struct{}), reports: map[string]chan standinReport{}}
	s.cmd = exec.Command(m.program, append([]string{"-uri", m.uri}, flags...)...)
	var err error
	s.in, err = s.cmd.StdinPipe()
	require.NoError(m, err)
	out, err := s.cmd.StdoutPipe()
	require.NoError(m, err)
	require.NoError(m, s.cmd.Start())
	// The goroutine ends with the process.
	go func() {
		defer close(s.gone)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var r standinReport
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				r = standinReport{What: "failed", Error: lines.Text()}
			}
			s.box(r.What, r.Name) <- r
		}
	}()
	m.Cleanup(s.kill)
	return s
}

// kill ends the process like a crash.
func (s *standin) kill() {
	// Kill fails if the process has ended.
	_ = s.cmd.Process.Kill()
	<-s.gone
	// The error is that the process was killed.
	_ = s.cmd.Wait()
}

func (s *standin) box(what, name string) chan standinReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := what + " " + name
	if s.reports[id] == nil {
		s.reports[id] = make(chan standinReport, 64)
	}
	return s.reports[id]
}

func (s *standin) send(format string, args ...any) {
	s.t.Helper()
	_, err := fmt.Fprintf(s.in, format+"\n", args...)
	require.NoError(s.t, err)
}

// await waits for a report of the process.
func (s *standin) await(what, name string) standinReport {
	s.t.Helper()
	r, err := s.next(what, name)
	require.NoError(s.t, err)
	return r
}

func (s *standin) next(what, name string) (standinReport, error) {
	failed := s.box("failed", name)
	if what == "failed" {
		failed = nil
	}
	select {
	case r := <-s.box(what, name):
		return r, nil
	case r := <-failed:
		return r, fmt.Errorf("%s, instead of %s: %s", name, what, r.Error)
	case <-s.gone:
		return standinReport{}, errors.New("the process has ended, instead of " + what)
	case <-time.After(soon):
		return standinReport{}, errors.New("not in time: " + what + " " + name)
	}
}

// not requires that the process has not sent a report.
func (s *standin) not(what, name string) {
	s.t.Helper()
	select {
	case r := <-s.box(what, name):
		require.FailNow(s.t, "unexpected", "%+v", r)
	default:
	}
}

func (s *standin) hold(name string, key int64) {
	s.t.Helper()
	s.send("lock %s %d", name, key)
	s.await("locked", name)
}

func (s *standin) unlock(name string) {
	s.t.Helper()
	s.send("unlock %s", name)
	s.await("unlocked", name)
}

// A row of env_locks means the same key to both libraries, whichever wrote it. A table that exists
// is used as it is (C1, C28).
func migrationKeys(m *migration) {
	_, err := m.db.Exec(`CREATE TABLE env_locks (lock_key bigint UNIQUE, repo text, pull_request integer, PRIMARY KEY (repo, pull_request))`)
	require.NoError(m, err)
	theirs := m.standin()
	theirs.send("key old/repo 1")
	old := theirs.await("key", "old/repo").Key

	p := m.provider()
	key, err := p.LockKey(context.Background(), "old/repo", 1)
	require.NoError(m, err)
	require.Equal(m, old, key)

	key, err = p.LockKey(context.Background(), "new/repo", 2)
	require.NoError(m, err)
	theirs.send("key new/repo 2")
	require.Equal(m, key, theirs.await("key", "new/repo").Key)

	// Both ask at the same moment.
	for pr := range uint(20) {
		theirs.send("key both/repo %d", pr)
		key, err := p.LockKey(context.Background(), "both/repo", pr)
		require.NoError(m, err)
		require.Equal(m, key, theirs.await("key", "both/repo").Key)
	}
}

// A key that a stand-in assigns while one of our providers runs has no row in our table yet. That
// must not be taken for a row that was deleted: with the option the first claim does not wait.
// Without the option it waits for the session timeout.
func migrationNewKeys(m *migration) {
	p, theirs := m.provider(), m.standin()
	theirs.send("key fresh/repo 1")
	m.hold(p, theirs.await("key", "fresh/repo").Key, "ours")

	const timeout = 2 * time.Second
	plain := m.plain(WithSessionTimeout(timeout))
	theirs.send("key later/repo 2")
	start := time.Now()
	m.hold(plain, theirs.await("key", "later/repo").Key, "ours")
	require.GreaterOrEqual(m, time.Since(start), timeout)
}

// There is one holder at a time, whichever library it uses.
func migrationExclusion(m *migration) {
	const key = 11
	p, theirs := m.provider(), m.standin()

	theirs.hold("first", key)
	l := m.claim(p, key, "ours")
	done := m.locks(l)
	m.until(weWait, key)
	select {
	case got := <-done:
		require.FailNow(m, "two holders", "%v", got)
	default:
	}
	theirs.unlock("first")
	start := time.Now()
	got := pgReceive(m, "our lock", done)
	require.NoError(m, got.err)
	// No notification arrives, so this takes the poll interval at most.
	m.Logf("we had the key %v after it was unlocked", time.Since(start).Round(time.Millisecond))

	theirs.send("lock second %d", key)
	m.until(isAwaited, key)
	theirs.not("locked", "second")
	start = time.Now()
	m.unlock(l)
	theirs.await("locked", "second")
	m.Logf("the stand-in had the key %v after our unlock", time.Since(start).Round(time.Millisecond))
	theirs.unlock("second")
}

// Without the option our claims still respect the holds of stand-ins, and notify them. Stand-ins do
// not see our holds.
func migrationOneWay(m *migration) {
	const key = 41
	p, theirs := m.plain(), m.standin()
	theirs.hold("old", key)
	l := m.claim(p, key, "ours")
	done := m.locks(l)
	require.Equal(m, "ours", theirs.await("notified", "old").Event)
	m.until(weWait, key)
	// The claim has tried once more.
	m.runs(sqlWait)
	select {
	case got := <-done:
		require.FailNow(m, "two holders", "%v", got)
	default:
	}
	theirs.unlock("old")
	got := pgReceive(m, "our lock", done)
	require.NoError(m, got.err)

	require.Zero(m, m.count(keyLocksHeld))
	theirs.hold("blind", key)
	pgQuiet(m, got.ch)
	m.unlock(l)
	theirs.unlock("blind")
}

// Our newer claim notifies a stand-in that holds, and acquires the key as soon as the stand-in has
// released it. A Lock without a claim notifies no holder (C6).
func migrationNotified(m *migration) {
	const key, other = 12, 112
	p, theirs := m.provider(), m.standin()
	theirs.hold("alone", other)
	quiet, err := p.New(context.Background(), other, "quiet")
	require.NoError(m, err)
	waits := m.locks(quiet.(*PostgresLock))
	m.until(weWait, other)

	theirs.hold("old", key)
	start := time.Now()
	l := m.claim(p, key, `newer "claim"`)
	done := m.locks(l)
	notified := theirs.await("notified", "old")
	m.Logf("the stand-in was notified after %v", time.Since(start).Round(time.Millisecond))
	require.Equal(m, standinReport{What: "notified", Name: "old", Key: key, ID: l.claim.id.String(), Event: `newer "claim"`}, notified)
	require.Equal(m, notified, theirs.await("notified", "old"), "it may not have listened yet, so it is notified again")

	theirs.unlock("old")
	got := pgReceive(m, "our lock", done)
	require.NoError(m, got.err)
	require.Positive(m, l.Token())
	pgQuiet(m, got.ch)

	theirs.not("notified", "alone")
	theirs.unlock("alone")
	require.NoError(m, pgReceive(m, "our quiet lock", waits).err)
	m.unlock(quiet.(*PostgresLock))
}

// A stand-in that waits inside the server gets the key before any of our claims, even before a
// newer one. When that claim finds the key taken, the stand-in possibly does not listen yet. It is
// notified anyway. So is a stand-in that holds after one of our waits has ended.
func migrationNotifiedLater(m *migration) {
	const key = 13
	p, theirs := m.provider(), m.standin()
	l, ch := m.hold(p, key, "holder")
	theirs.send("lock queued %d", key)
	m.until(isAwaited, key)

	newer := m.claim(p, key, "newest")
	done := m.locks(newer)
	require.Equal(m, "newest", pgReceive(m, "our notification", ch).Message)
	m.unlock(l)
	theirs.await("locked", "queued")
	require.Equal(m, "newest", theirs.await("notified", "queued").Event)

	// Unlock ends the wait.
	m.unlock(newer)
	require.Error(m, pgReceive(m, "the end of our wait", done).err)
	theirs.unlock("queued")
	theirs.hold("another", key)
	last := m.claim(p, key, "last")
	done = m.locks(last)
	require.Equal(m, "last", theirs.await("notified", "another").Event)
	theirs.unlock("another")
	require.NoError(m, pgReceive(m, "our lock", done).err)
}

// The key of a stand-in that crashed is free as soon as the server has noticed the crash. No row
// names a holder, so there is no session to watch.
func migrationKilled(m *migration) {
	const key = 14
	p, theirs := m.provider(), m.standin()
	theirs.hold("doomed", key)
	l := m.claim(p, key, "ours")
	done := m.locks(l)
	m.until(weWait, key)
	theirs.kill()
	start := time.Now()
	require.NoError(m, pgReceive(m, "our lock", done).err)
	require.Less(m, time.Since(start), defaultSessionTimeout)
}

// A stand-in that waits gets the key when our session's connection ends. Our holder is notified
// after the reconnect, and from then on our claims notify the stand-in.
func migrationConnectionTaken(m *migration) {
	const key, other = 15, 115
	p, theirs := m.provider(), m.standin()
	l, ch := m.hold(p, key, "ours")
	_, kept := m.hold(p, other, "another of ours")
	theirs.send("lock heir %d", key)
	m.until(isAwaited, key)

	start := time.Now()
	m.cut(p)
	theirs.await("locked", "heir")
	pgReceive(m, "our notification", ch)
	m.Logf("our holder was notified %v after its connection was cut", time.Since(start).Round(time.Millisecond))
	require.ErrorIs(m, l.Cause(), ErrLockLost)
	require.ErrorIs(m, l.Unlock(context.Background()), ErrLockLost)
	pgQuiet(m, kept)
	m.until(isHeld, other)

	next := m.claim(p, key, "next")
	done := m.locks(next)
	require.Equal(m, "next", theirs.await("notified", "heir").Event)
	theirs.unlock("heir")
	start = time.Now()
	require.NoError(m, pgReceive(m, "our lock", done).err)
	require.Less(m, time.Since(start), defaultSessionTimeout)
	m.unlock(next)
	// The remaining lock is that of the key other.
	m.until(`SELECT (` + keyLocksHeld + `) = 1`)
}

// If no stand-in waits, a hold is kept, and its key is locked again.
func migrationConnectionKept(m *migration) {
	const key = 42
	p, theirs := m.provider(), m.standin()
	l, ch := m.hold(p, key, "ours")
	for range 3 {
		m.cut(p)
		m.until(isHeld, key)
	}
	theirs.send("lock late %d", key)
	m.until(isAwaited, key)
	m.runs(sqlCheck)
	pgQuiet(m, ch)
	theirs.not("locked", "late")
	m.unlock(l)
	theirs.await("locked", "late")
	theirs.unlock("late")
	m.until(noneHeld)
}

// It is possible that the server does not notice the end of a connection. The advisory locks of the
// keys then still belong to our old connection, which is no reason to lose the holds.
func migrationConnectionSilent(m *migration) {
	const key = 43
	network := newProxy(m, "", m.uri, nil)
	ours := &migration{m.T, m.program, network.uri(m, m.uri), m.db}
	p, theirs := ours.provider(WithSessionTimeout(5*time.Second)), m.standin()
	l, ch := ours.hold(p, key, "ours")
	before, _ := p.session.trust.current()
	pid := m.backend(p)
	require.True(m, network.silenceBackend(pid))
	m.reconnects(p, before)
	m.runs(sqlCheck)
	pgQuiet(m, ch)
	m.until(isHeld, key)
	m.until(`SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $1`, pid)
	theirs.send("lock late %d", key)
	m.until(isAwaited, key)
	m.unlock(l)
	theirs.await("locked", "late")
}

// All holds of a session are restored together by a reconnect, including those that begin or end
// during it. Only holds whose key was taken are lost.
func migrationManyReconnect(m *migration) {
	const holds, taken = 2*maxChecked + 10, 1_234
	p, theirs := m.provider(), m.standin()
	locks := make([]*PostgresLock, holds)
	channels := make([]<-chan NotificationPayload, holds)
	all := make([]<-chan migrationGot, holds)
	for i := range locks {
		l, err := p.New(context.Background(), int64(i), "one of many")
		require.NoError(m, err)
		locks[i] = l.(*PostgresLock)
		all[i] = m.locks(locks[i])
	}
	m.cut(p)
	for i := range all {
		got := pgReceive(m, "our lock", all[i])
		require.NoError(m, got.err)
		channels[i] = got.ch
	}
	m.until(`SELECT (`+keyLocksHeld+`) = $1`, holds)
	for _, ch := range channels {
		pgQuiet(m, ch)
	}
	theirs.send("lock heir %d", taken)
	m.until(isAwaited, taken)
	start := time.Now()
	m.cut(p)
	m.Logf("%d holds were reconnected after %v", holds, time.Since(start).Round(time.Millisecond))
	pgReceive(m, "our notification", channels[taken])
	for i, ch := range channels {
		if i != taken {
			pgQuiet(m, ch)
		}
	}
	theirs.await("locked", "heir")
	theirs.unlock("heir")
	require.Equal(m, holds-1, m.count(keyLocksHeld))
	var released sync.WaitGroup
	for _, l := range locks {
		// One of the locks has been lost.
		released.Go(func() { _ = l.Unlock(context.Background()) })
	}
	m.terminate(m.backend(p))
	released.Wait()
	m.until(noneHeld)
}

// The key of a process that has ended is free for a stand-in immediately. As long as the stand-in
// holds it, the row names the dead holder, so our claims do not notify the stand-in. Our next lock
// has watched the dead session meanwhile.
func migrationWeDie(m *migration) {
	const key, timeout = 44, 3 * time.Second
	network := newProxy(m, "", m.uri, nil)
	ours := &migration{m.T, m.program, network.uri(m, m.uri), m.db}
	doomed, p, theirs := ours.provider(WithSessionTimeout(timeout)), m.provider(), m.standin()
	l, ch := ours.hold(doomed, key, "doomed")
	theirs.send("lock heir %d", key)
	m.until(isAwaited, key)

	pid := m.backend(doomed)
	start := time.Now()
	network.silence(toServer, toClient)
	m.terminate(pid)
	theirs.await("locked", "heir")
	require.Less(m, time.Since(start), timeout)
	next := m.claim(p, key, "next")
	done := m.locks(next)
	pgReceive(m, "our notification", ch)
	require.ErrorIs(m, l.Cause(), ErrLockLost)
	m.Logf("our holder was notified %v after its network was cut", time.Since(start).Round(10*time.Millisecond))

	m.runs(sqlForOne[sqlAcquire])
	theirs.not("notified", "heir")
	theirs.unlock("heir")
	require.NoError(m, pgReceive(m, "our lock", done).err)
	require.GreaterOrEqual(m, time.Since(start), timeout)
	network.silence()
}

// A claim of a stand-in does not reach our holder, not even by the check of its row. The stand-in
// waits until the holder releases, or is revoked for another cause.
func migrationNotHeard(m *migration) {
	const key = 16
	p, theirs := m.provider(), m.standin()
	l, ch := m.hold(p, key, "ours")
	theirs.send("announce newer %d newer claim", key)
	theirs.await("announced", "newer")
	theirs.send("lock newer %d", key)
	m.until(isAwaited, key)
	m.runs(sqlCheck)
	pgQuiet(m, ch)
	theirs.not("locked", "newer")

	// The guide's query asks the holder to stop for the stand-in (C13).
	_, err := m.db.Exec(m.guide("bridge"))
	require.NoError(m, err)
	require.Equal(m, "an old replica waits", pgReceive(m, "our notification", ch).Message)
	require.ErrorIs(m, l.Cause(), ErrStopRequested)
	m.unlock(l)
	theirs.await("locked", "newer")
	theirs.unlock("newer")
}

// A stand-in whose wait ends in a timeout leaves nothing behind.
func migrationGivesUp(m *migration) {
	const key = 17
	p, theirs := m.provider(), m.standin("-wait", "200ms")
	l, ch := m.hold(p, key, "ours")
	theirs.send("lock impatient %d", key)
	theirs.await("failed", "impatient")
	pgQuiet(m, ch)
	m.unlock(l)
	m.hold(p, key, "ours again")
	m.until(isHeld, key)
}

// Tokens, the overview and the operators' calls cover only our holds. The guide's query finds the
// sessions that hold a key without a row.
func migrationOverview(m *migration) {
	p, theirs := m.provider(), m.standin()
	key, err := p.LockKey(context.Background(), "repo", 45)
	require.NoError(m, err)
	l, _ := m.hold(p, key, "ours")
	holders, err := p.ListLocks(context.Background())
	require.NoError(m, err)
	require.Len(m, holders, 1)
	require.True(m, holders[0].Alive)
	strangers := `SELECT count(*) FROM (` + strings.Trim(m.guide("strangers"), " \n;") + `) AS q`
	require.Zero(m, m.count(strangers))
	first := l.Token()
	m.unlock(l)

	theirs.hold("old", key)
	var token int64
	require.NoError(m, m.db.QueryRow(`SELECT token FROM env_lock_state WHERE lock_key = $1`, key).Scan(&token))
	require.Equal(m, first, token)
	holders, err = p.ListLocks(context.Background())
	require.NoError(m, err)
	require.Empty(m, holders)
	asked, err := p.RequestStop(context.Background(), "repo", 45, "please")
	require.NoError(m, err)
	require.False(m, asked)
	require.Equal(m, 1, m.count(strangers))
	theirs.unlock("old")

	l, _ = m.hold(p, key, "ours again")
	require.Greater(m, l.Token(), first)
}

// An advisory lock that was taken by hand makes the key busy for our locks, with the option and
// without (C2).
func migrationByHand(m *migration) {
	for pr, provider := range []func(...LockProviderOption) *PostgresLockProvider{m.provider, m.plain} {
		p := provider(WithLockTimeout(3 * time.Second))
		key, err := p.LockKey(context.Background(), "hand", uint(pr))
		require.NoError(m, err)
		hand, err := m.db.Conn(context.Background())
		require.NoError(m, err)
		_, err = hand.ExecContext(context.Background(), `SELECT pg_advisory_lock($1)`, key)
		require.NoError(m, err)

		f, err := NewPreemptiveLockerFactory(p)
		require.NoError(m, err)
		_, err = f("hand", uint(pr), "claim").Lock(context.Background())
		require.ErrorIs(m, err, ErrLockTimeout)
		quiet, err := p.New(context.Background(), key, "without a claim")
		require.NoError(m, err)
		require.ErrorIs(m, pgReceive(m, "the end of our wait", m.locks(quiet.(*PostgresLock))).err, ErrLockTimeout)
		require.Equal(m, 1, m.count(keyLocksHeld))

		l := m.claim(p, key, "newest claim")
		done := m.locks(l)
		m.until(weWait, key)
		_, err = hand.ExecContext(context.Background(), `SELECT pg_advisory_unlock($1)`, key)
		require.NoError(m, err)
		require.NoError(m, hand.Close())
		require.NoError(m, pgReceive(m, "our lock", done).err)
		m.unlock(l)
		m.until(noneHeld)
	}
}

// One session can take an advisory lock twice. Locks of one provider exclude each other anyway, and
// the advisory lock that one of them releases is not that of the other.
func migrationSameProvider(m *migration) {
	const key = 48
	p, theirs := m.provider(), m.standin()
	first, ch := m.hold(p, key, "first")
	second := m.claim(p, key, "second")
	done := m.locks(second)
	require.Equal(m, "second", pgReceive(m, "our notification", ch).Message)
	m.sleeps(second)
	select {
	case got := <-done:
		require.FailNow(m, "two holders", "%v", got)
	default:
	}
	gone, err := p.New(context.Background(), key, "one that leaves")
	require.NoError(m, err)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err = gone.Lock(ctx)
	require.ErrorIs(m, err, context.DeadlineExceeded)
	m.until(isHeld, key)
	theirs.send("lock old %d", key)
	m.until(isAwaited, key)

	m.unlock(first)
	// The stand-in was first in the server's queue.
	theirs.await("locked", "old")
	theirs.unlock("old")
	require.NoError(m, pgReceive(m, "our second lock", done).err)
	m.until(isHeld, key)
	m.unlock(second)
	m.until(noneHeld)

	// Many locks hold the key, one after the other.
	var holds atomic.Int64
	var workers sync.WaitGroup
	for range 8 {
		workers.Go(func() {
			for range 10 {
				l, err := p.New(context.Background(), key, "one of many")
				if err == nil {
					_, err = l.Lock(context.Background())
				}
				if err != nil {
					m.Error(err)
					return
				}
				if holds.Add(1) != 1 {
					m.Error("two holders")
				}
				holds.Add(-1)
				if err := l.Unlock(context.Background()); err != nil {
					m.Error(err)
				}
			}
		})
	}
	workers.Wait()
	m.until(noneHeld)
}

// However a lock ends, its key's advisory lock is released.
func migrationLeaks(m *migration) {
	const key, other = 49, 149
	p, theirs := m.provider(WithLockTimeout(1500*time.Millisecond), WithPreemptionTimeout(50*time.Millisecond)), m.standin()
	q := m.provider()
	l, _ := m.hold(p, key, "released")
	require.Equal(m, 1, m.count(keyLocksHeld))
	m.unlock(l)
	require.Zero(m, m.count(keyLocksHeld))

	// The wait fails with the lock timeout, with a newer claim, or with an Unlock during the wait.
	l, _ = m.hold(q, key, "held by another provider")
	// The key is free, but the claim is not the newest.
	timedOut := m.claim(p, other, "elsewhere")
	m.claim(q, other, "newer")
	require.ErrorIs(m, pgReceive(m, "a superseded wait", m.locks(timedOut)).err, ErrLockPreempted)
	waiter, err := p.New(context.Background(), key, "without a claim")
	require.NoError(m, err)
	_, err = waiter.Lock(context.Background())
	require.ErrorIs(m, err, ErrLockTimeout)
	waits := m.claim(p, key, "ends by Unlock")
	done := m.locks(waits)
	m.sleeps(waits)
	m.unlock(waits)
	require.Error(m, pgReceive(m, "the end of our wait", done).err)
	m.unlock(l)
	m.until(noneHeld)

	// The caller has left when the key is granted.
	for range 50 {
		ctx, cancel := context.WithCancel(context.Background())
		l, err := p.New(context.Background(), key, "leaves")
		require.NoError(m, err)
		time.AfterFunc(time.Duration(rand.Int64N(int64(2*time.Millisecond))), cancel)
		if _, err := l.Lock(ctx); err == nil {
			// The lock's context has ended, so the lock may have been revoked.
			_ = l.Unlock(context.Background())
		}
		cancel()
	}
	m.until(noneHeld)

	// A holder is revoked, and a waiter is superseded.
	_, ch := m.hold(p, key, "revoked")
	next, _ := m.hold(q, key, "next")
	require.Equal(m, "next", pgReceive(m, "our notification", ch).Message)
	require.Equal(m, 1, m.count(keyLocksHeld))
	first := m.claim(p, key, "first")
	done = m.locks(first)
	m.sleeps(first)
	second := m.claim(p, key, "second")
	require.ErrorIs(m, pgReceive(m, "the superseded wait", done).err, ErrLockPreempted)
	require.Error(m, second.Unlock(context.Background()), "Unlock before Lock withdraws the claim")
	m.unlock(next)
	m.until(noneHeld)

	// Close is called during a hold and a wait.
	theirs.hold("old", key)
	_, ch = m.hold(p, other, "closed")
	done = m.locks(m.claim(p, key, "waits"))
	m.until(weWait, key)
	require.NoError(m, p.Close())
	pgReceive(m, "our notification", ch)
	require.ErrorIs(m, pgReceive(m, "the end of our wait", done).err, ErrProviderClosed)
	m.until(`SELECT (` + keyLocksHeld + `) = 1`)
	theirs.unlock("old")
	m.until(noneHeld)
}

// A stand-in may take the key of a hold after it was granted and before its caller knows. That
// grant does not count, and the claim tries again.
func migrationGone(m *migration) {
	const key = 50
	p := m.provider()
	l := m.claim(p, key, "ours")
	require.NoError(m, l.begin(lockCall{asked: time.Now()}))
	require.NoError(m, p.session.hub.subscribe(&l.lock))
	a, err := p.session.acquire(context.Background(), l.stop, l.request(terms{}, 0))
	require.NoError(m, err)
	require.Equal(m, granted, a.outcome)
	p.session.hub.dispatch(key, event{kind: evGone, hold: l.claim.id})
	ch, err := l.hold(context.Background(), a)
	require.NoError(m, err)
	require.Nil(m, ch)

	again, err := p.session.acquire(context.Background(), l.stop, l.request(terms{}, 0))
	require.NoError(m, err)
	require.Equal(m, a.token, again.token)
	ch, err = l.hold(context.Background(), again)
	require.NoError(m, err)
	require.NotNil(m, ch)
	m.unlock(l)
	m.until(noneHeld)
}

// A waiter does not touch the advisory lock of a key whose row names another holder, even if that
// lock is free, because the holder may be about to reconnect.
func migrationUntouched(m *migration) {
	const key = 55
	p := m.provider()
	l, _ := m.hold(p, key, "makes the row")
	m.unlock(l)
	link, err := openLink(context.Background(), p.session.dsn, nil, defaultSessionTimeout)
	require.NoError(m, err)
	defer link.close()
	ref, connected := p.session.trust.current()
	require.True(m, connected)
	tries := func() bool {
		o := newOp(context.Background(), opAcquire, claim{key: key, id: p.session.newID()})
		require.NoError(m, p.session.lockKeys(context.Background(), link, ref, []*op{o}))
		return o.keyLocked
	}
	_, err = m.db.Exec(`UPDATE env_lock_state SET holder_id = gen_random_uuid(), holder_session = 1 WHERE lock_key = $1`, key)
	require.NoError(m, err)
	require.False(m, tries())
	m.until(noneHeld)
	_, err = m.db.Exec(`UPDATE env_lock_state SET holder_id = NULL, holder_session = NULL WHERE lock_key = $1`, key)
	require.NoError(m, err)
	require.True(m, tries())
	m.until(isHeld, key)
	require.False(m, tries(), "it is another claim's")
}

// Connections of our sessions that are killed again and again cost no hold, and no advisory lock of
// a key is left behind.
func migrationFlapping(m *migration) {
	const duration = 4 * time.Second
	keys := []int64{51, 52, 53}
	providers := []*PostgresLockProvider{m.provider(), m.provider()}
	holders := make([]atomic.Int64, len(keys))
	var kept []<-chan NotificationPayload
	for i, p := range providers {
		_, ch := m.hold(p, int64(151+i), "held all the time")
		kept = append(kept, ch)
	}
	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	var holds atomic.Int64
	var workers sync.WaitGroup
	for _, p := range providers {
		for k, key := range keys {
			workers.Go(func() {
				for ctx.Err() == nil {
					l, err := p.New(context.Background(), key, "flapping")
					if err == nil {
						_, err = l.Lock(context.Background())
					}
					if err != nil {
						m.Error(err)
						return
					}
					if holders[k].Add(1) != 1 {
						m.Error("two holders")
					}
					// This is the work.
					time.Sleep(time.Duration(rand.Int64N(int64(50 * time.Millisecond))))
					holders[k].Add(-1)
					if err := l.Unlock(context.Background()); err != nil {
						m.Error(err)
					}
					holds.Add(1)
				}
			})
		}
	}
	cuts := 0
	for ctx.Err() == nil {
		for _, p := range providers {
			m.cut(p)
			cuts++
		}
		time.Sleep(time.Duration(rand.Int64N(int64(200 * time.Millisecond))))
	}
	workers.Wait()
	m.Logf("%d holds, %d connections killed", holds.Load(), cuts)
	m.until(`SELECT (` + keyLocksHeld + `) = 2`)
	for i, p := range providers {
		pgQuiet(m, kept[i])
		m.until(isHeld, 151+i)
		p.session.keys.mu.Lock()
		require.Len(m, p.session.keys.owners, 1)
		p.session.keys.mu.Unlock()
	}
}

// After the roll-out the option is removed, replica by replica. Replicas with the option and
// replicas without it exclude each other.
func migrationRemoved(m *migration) {
	const key, each = 54, 20
	var holders atomic.Int64
	var workers sync.WaitGroup
	for _, p := range []*PostgresLockProvider{m.provider(), m.plain(), m.provider(), m.plain()} {
		workers.Go(func() {
			for range each {
				l, err := p.New(context.Background(), key, "ours")
				if err == nil {
					_, err = l.Lock(context.Background())
				}
				if err != nil {
					m.Error(err)
					return
				}
				if holders.Add(1) != 1 {
					m.Error("two holders")
				}
				holders.Add(-1)
				if err := l.Unlock(context.Background()); err != nil {
					m.Error(err)
				}
			}
		})
	}
	workers.Wait()
	m.until(noneHeld)
}

// A closed replica of ours gives its keys to the old version, which takes over again. The rows that
// the replica leaves in its tables affect no process.
func migrationBack(m *migration) {
	const key = 18
	p, theirs := m.provider(), m.standin()
	l, ch := m.hold(p, key, "ours")
	theirs.send("lock old %d", key)
	m.until(isAwaited, key)
	closed := make(chan error, 1)
	go func() { closed <- p.Close() }()
	pgReceive(m, "our notification", ch)
	require.ErrorIs(m, l.Cause(), ErrProviderClosed)
	m.unlock(l)
	theirs.await("locked", "old")
	require.NoError(m, pgReceive(m, "Close", closed))
	require.Zero(m, m.count(`SELECT count(*) FROM env_lock_sessions`))

	theirs.send("announce newer %d newer", key)
	require.Equal(m, "newer", theirs.await("notified", "old").Event)
	theirs.unlock("old")
	theirs.hold("newer", key)
	theirs.unlock("newer")

	// The new version takes over once more.
	start := time.Now()
	m.hold(m.provider(), key, "ours again")
	require.Less(m, time.Since(start), defaultSessionTimeout)
}

// Two processes of the old version and two providers of the new one work on the same keys. There
// are never two holders, each process gets its turn, no call hangs, and nothing is left behind.
func migrationRolling(m *migration) {
	const (
		duration = 5 * time.Second       // at least
		work     = 20 * time.Millisecond // at most
		pause    = 400 * time.Millisecond
	)
	keys := []int64{21, -22, 1<<62 + 23}
	holder := make([]atomic.Pointer[string], len(keys))
	var overlaps, failures sync.Map
	held := func(k int, who string, stop <-chan struct{}) {
		// The lock is held for longer than the time that is measured, so every overlap is real.
		if other := holder[k].Swap(&who); other != nil {
			overlaps.Store(fmt.Sprintf("%s and %s", who, *other), true)
		}
		select {
		case <-stop:
		case <-time.After(time.Duration(rand.Int64N(int64(work)))):
		}
		if !holder[k].CompareAndSwap(&who, nil) {
			overlaps.Store(who, true)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var counts [4]atomic.Int64
	var workers sync.WaitGroup
	each := func(count *atomic.Int64, cycle func(n int) (bool, error)) {
		workers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				ok, err := cycle(n)
				if err != nil {
					failures.Store(err.Error(), true)
					return
				}
				if ok {
					count.Add(1)
				}
				select {
				case <-ctx.Done():
				case <-time.After(time.Duration(rand.Int64N(int64(pause)))):
				}
			}
		})
	}
	for i := range 2 {
		theirs := m.standin()
		for k, key := range keys {
			each(&counts[i], func(n int) (bool, error) {
				name := fmt.Sprintf("old%d/%d/%d", i, k, n)
				for _, c := range []struct{ command, answer string }{
					{fmt.Sprintf("announce %s %d claim of %s", name, key, name), "announced"},
					{fmt.Sprintf("lock %s %d", name, key), "locked"},
				} {
					if _, err := fmt.Fprintln(theirs.in, c.command); err != nil {
						return false, err
					}
					if _, err := theirs.next(c.answer, name); err != nil {
						return false, err
					}
				}
				held(k, name, nil)
				if _, err := fmt.Fprintln(theirs.in, "unlock "+name); err != nil {
					return false, err
				}
				_, err := theirs.next("unlocked", name)
				return true, err
			})
		}
		ours := m.provider()
		for k, key := range keys {
			each(&counts[2+i], func(n int) (bool, error) {
				name := fmt.Sprintf("new%d/%d/%d", i, k, n)
				l, err := ours.New(context.Background(), key, name)
				if err == nil {
					err = l.Notify(context.Background())
				}
				if err != nil {
					return false, err
				}
				ch, err := l.Lock(context.Background())
				if errors.Is(err, ErrLockPreempted) {
					return false, nil
				}
				if err != nil {
					return false, err
				}
				stop := make(chan struct{})
				// The goroutine ends with the hold.
				go func() {
					<-ch
					close(stop)
				}()
				held(k, name, stop)
				return true, l.Unlock(context.Background())
			})
		}
	}
	time.Sleep(duration)
	m.eventually("each process has its turn", func() bool {
		turns := true
		for i := range counts {
			turns = turns && counts[i].Load() > 0
		}
		return turns
	})
	cancel()
	finished := make(chan struct{})
	go func() {
		workers.Wait()
		close(finished)
	}()
	pgReceive(m, "the end of all workers", finished)

	none := func(found *sync.Map) {
		m.Helper()
		var all []string
		found.Range(func(k, _ any) bool {
			all = append(all, k.(string))
			return true
		})
		require.Empty(m, strings.Join(all, "\n"))
	}
	none(&overlaps)
	none(&failures)
	m.Logf("holds: %d and %d of the old version, %d and %d of the new",
		counts[0].Load(), counts[1].Load(), counts[2].Load(), counts[3].Load())
	m.until(noneHeld)
	m.until(`SELECT count(*) = 0 FROM env_lock_state WHERE holder_id IS NOT NULL OR claim_open`)
}

// Messages of the old version on its channels do not affect our locks.
func migrationFlood(m *migration) {
	const (
		held, used = 31, 32
		count      = 10_000
	)
	a, b, theirs := m.provider(), m.provider(), m.standin()
	_, ch := m.hold(a, held, "held all the time")
	before, _ := a.session.trust.current()
	theirs.send("flood water %d %d %d", count, held, used)

	var longest time.Duration
	cycles := 0
	for flooded := false; !flooded || cycles < 20; cycles++ {
		select {
		case r := <-theirs.box("flooded", "water"):
			require.Empty(m, r.Error)
			flooded = true
		case r := <-theirs.box("failed", "water"):
			require.FailNow(m, r.Error)
		default:
		}
		start := time.Now()
		first, heard := m.hold(a, used, "first")
		second := m.claim(b, used, "second")
		done := m.locks(second)
		require.Equal(m, "second", pgReceive(m, "our notification", heard).Message)
		m.unlock(first)
		require.NoError(m, pgReceive(m, "our second lock", done).err)
		m.unlock(second)
		longest = max(longest, time.Since(start))
	}
	m.Logf("%d cycles of two holds during %d notifications, the longest took %v", cycles, count, longest.Round(time.Millisecond))
	pgQuiet(m, ch)
	after, connected := a.session.trust.current()
	require.True(m, connected)
	require.Equal(m, before, after, "the session was suspended")
}
