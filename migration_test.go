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

// What docs/migration.md says about services of the original library on the same
// database. The other side is testdata/standin, in processes of its own.
func TestMigration(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "standin")
	out, err := exec.Command("go", "build", "-o", program, "./testdata/standin").CombinedOutput()
	require.NoError(t, err, "%s", out)

	for _, test := range []struct {
		name string
		f    func(m *migration)
	}{
		{"same keys", migrationKeys},
		{"exclusion", migrationExclusion},
		{"stand-in is told to stop", migrationTold},
		{"stand-in that gets the key before us is told to stop", migrationToldLater},
		{"stand-in is killed", migrationKilled},
		{"we die", migrationWeDie},
		{"stand-in claims what we hold", migrationNotTold},
		{"stand-in gives up", migrationGivesUp},
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

// migration is one test: a database that both libraries use.
type migration struct {
	*testing.T
	program, uri string
	db           *sql.DB
}

// provider makes one of ours, with an open session.
func (m *migration) provider(options ...LockProviderOption) *PostgresLockProvider {
	m.Helper()
	p, err := NewLockProvider(PostgresLockProviderKind, append([]LockProviderOption{WithPostgresBackend(m.uri, "")}, options...)...)
	require.NoError(m, err)
	m.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
	_, err = p.LockKey(context.Background(), "repo", 0) // makes the schema
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

// locks begins to lock.
func (m *migration) locks(l *PostgresLock) <-chan migrationGot {
	done := make(chan migrationGot, 1)
	go func() {
		ch, err := l.Lock(context.Background())
		done <- migrationGot{ch, err}
	}()
	return done
}

// hold claims and locks.
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

// until asks the database until it answers true.
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
	isHeld    = advisory + ` AND granted`
	isAwaited = advisory + ` AND NOT granted` // only stand-ins wait inside the server
	// Of ours, once it has seen that the key is not free.
	weWait = `SELECT count(*) = 1 FROM env_lock_state WHERE lock_key = $1 AND waiting`
)

// backend is the server's process of our session.
func (m *migration) backend(p *PostgresLockProvider) int {
	m.Helper()
	p.session.mu.Lock()
	defer p.session.mu.Unlock()
	require.NotNil(m, p.session.lanes[0].link)
	return p.session.lanes[0].link.pid
}

// runs waits until our session has run a statement from now on.
func (m *migration) runs(p *PostgresLockProvider, query string) {
	m.Helper()
	pid := m.backend(p)
	var now time.Time
	require.NoError(m, m.db.QueryRow(`SELECT clock_timestamp()`).Scan(&now))
	m.until(`SELECT count(*) = 1 FROM pg_stat_activity WHERE pid = $1 AND left(query, 500) = left($2, 500) AND query_start > $3 AND state = 'idle'`,
		pid, query, now)
}

// standin is a process of testdata/standin.
type standin struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	gone chan struct{} // closed when its output has ended

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
	go func() { // ends with the process
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

// kill ends the process as a crash does.
func (s *standin) kill() {
	_ = s.cmd.Process.Kill() // fails if it has ended
	<-s.gone
	_ = s.cmd.Wait() // it was killed
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

// await waits until the process reports.
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

// not requires that the process has not reported something.
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

// A row of env_locks means the same key to both, whoever wrote it; a table that
// exists is used as it is (C1, C28).
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

	// Both at the same moment.
	for pr := range uint(20) {
		theirs.send("key both/repo %d", pr)
		key, err := p.LockKey(context.Background(), "both/repo", pr)
		require.NoError(m, err)
		require.Equal(m, key, theirs.await("key", "both/repo").Key)
	}
}

// One holder at a time, whichever library it uses.
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
	m.Logf("we had the key %v after it was unlocked", time.Since(start).Round(time.Millisecond)) // nobody tells us: at most the poll interval
	require.Zero(m, l.Drain(), "lock delay after a clean end")

	theirs.send("lock second %d", key)
	m.until(isAwaited, key)
	theirs.not("locked", "second")
	start = time.Now()
	m.unlock(l)
	theirs.await("locked", "second")
	m.Logf("the stand-in had the key %v after our unlock", time.Since(start).Round(time.Millisecond))
	theirs.unlock("second")
}

// Our newer claim tells a stand-in that holds to stop, and gets the key as soon
// as it does. A Lock without a claim disturbs nobody (C6).
func migrationTold(m *migration) {
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
	told := theirs.await("told", "old")
	m.Logf("the stand-in was told after %v", time.Since(start).Round(time.Millisecond))
	require.Equal(m, standinReport{What: "told", Name: "old", Key: key, ID: l.claim.id.String(), Event: `newer "claim"`}, told)

	theirs.unlock("old")
	got := pgReceive(m, "our lock", done)
	require.NoError(m, got.err)
	require.Zero(m, l.Drain())
	require.Positive(m, l.Token())
	pgQuiet(m, got.ch)

	theirs.not("told", "alone")
	theirs.unlock("alone")
	require.NoError(m, pgReceive(m, "our quiet lock", waits).err)
	m.unlock(quiet.(*PostgresLock))
}

// A stand-in that waits inside the server gets the key before any of ours, also
// before a newer claim, and may not listen yet when that claim finds the key
// taken. It is told to stop all the same; so is one that holds after somebody of
// ours has given up waiting.
func migrationToldLater(m *migration) {
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
	require.Equal(m, "newest", theirs.await("told", "queued").Event)

	m.unlock(newer) // gives up
	require.Error(m, pgReceive(m, "the end of our wait", done).err)
	theirs.unlock("queued")
	theirs.hold("another", key)
	last := m.claim(p, key, "last")
	done = m.locks(last)
	require.Equal(m, "last", theirs.await("told", "another").Event)
	theirs.unlock("another")
	require.NoError(m, pgReceive(m, "our lock", done).err)
}

// The key of a stand-in that crashed is free as soon as the server knows. There
// is no lock delay: no row says that anybody held it.
func migrationKilled(m *migration) {
	const key = 14
	p, theirs := m.provider(), m.standin()
	theirs.hold("doomed", key)
	l := m.claim(p, key, "ours")
	done := m.locks(l)
	m.until(weWait, key)
	theirs.kill()
	require.NoError(m, pgReceive(m, "our lock", done).err)
	require.Zero(m, l.Drain())
}

// The key of one of ours whose session ended is free for a stand-in at once. Our
// next lock still knows of that death and waits the delay (C11). Until then the
// row names the dead holder, so the stand-in is not told to stop.
func migrationWeDie(m *migration) {
	const key = 15
	p, theirs := m.provider(), m.standin()
	_, ch := m.hold(p, key, "doomed")
	theirs.send("lock heir %d", key)
	m.until(isAwaited, key)

	_, err := m.db.Exec(`SELECT pg_terminate_backend($1)`, m.backend(p))
	require.NoError(m, err)
	pgReceive(m, "our notification", ch)
	theirs.await("locked", "heir")

	next := m.claim(p, key, "next")
	done := m.locks(next)
	m.runs(p, sqlAcquire)
	m.runs(p, sqlAcquire) // whatever the first would lead to has been done
	theirs.not("told", "heir")
	theirs.unlock("heir")
	require.NoError(m, pgReceive(m, "our lock", done).err)
	require.Positive(m, next.Drain())
}

// A claim of a stand-in is not heard by our holder, not even at its heartbeat:
// the stand-in waits until the holder releases, or is revoked for another cause.
func migrationNotTold(m *migration) {
	const key = 16
	p, theirs := m.provider(), m.standin()
	l, ch := m.hold(p, key, "ours")
	theirs.send("notify newer %d newer claim", key)
	theirs.await("notified", "newer")
	theirs.send("lock newer %d", key)
	m.until(isAwaited, key)
	m.runs(p, sqlHeartbeat)
	pgQuiet(m, ch)
	theirs.not("locked", "newer")

	// The guide's query passes it on (C13).
	guide, err := os.ReadFile("docs/migration.md")
	require.NoError(m, err)
	_, rest, found := strings.Cut(string(guide), "```sql\n-- bridge")
	require.True(m, found)
	bridge, _, _ := strings.Cut(rest, "```")
	_, err = m.db.Exec("-- " + bridge)
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
	l, _ = m.hold(p, key, "ours again")
	require.Zero(m, l.Drain())
	m.until(isHeld, key)
}

// A replica of ours that is closed gives its keys to the old version that takes
// over again, and what it leaves in its own table disturbs nobody.
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

	theirs.send("notify newer %d newer", key)
	require.Equal(m, "newer", theirs.await("told", "old").Event)
	theirs.unlock("old")
	theirs.hold("newer", key)
	theirs.unlock("newer")

	// And forward once more.
	l, _ = m.hold(m.provider(), key, "ours again")
	require.Zero(m, l.Drain())
}

// Two processes of the old version and two providers of the new one work on the
// same keys: never two holders, everybody gets its turn, nobody
// hangs, nothing stays behind.
func migrationRolling(m *migration) {
	const (
		duration = 5 * time.Second
		work     = 20 * time.Millisecond // at most
		pause    = 400 * time.Millisecond
	)
	keys := []int64{21, -22, 1<<62 + 23}
	holder := make([]atomic.Pointer[string], len(keys))
	var overlaps, failures sync.Map
	held := func(k int, who string, stop <-chan struct{}) {
		// The hold is longer than what is judged, so every overlap is a true one.
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
	ctx, cancel := context.WithTimeout(context.Background(), duration)
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
					{fmt.Sprintf("notify %s %d claim of %s", name, key, name), "notified"},
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
				go func() { // ends with the hold
					<-ch
					close(stop)
				}()
				held(k, name, stop)
				return true, l.Unlock(context.Background())
			})
		}
	}
	finished := make(chan struct{})
	go func() {
		workers.Wait()
		close(finished)
	}()
	pgReceive(m, "everybody to finish", finished)

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
	for i := range counts {
		require.Positive(m, counts[i].Load(), "worker %d never held", i)
	}
	m.Logf("holds: %d and %d of the old version, %d and %d of the new",
		counts[0].Load(), counts[1].Load(), counts[2].Load(), counts[3].Load())
	m.until(`SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
		AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	m.until(`SELECT count(*) = 0 FROM env_lock_state WHERE holder_id IS NOT NULL OR claim_open OR unclean_at IS NOT NULL`)
}

// What the old version sends on its own channels disturbs nothing of ours.
func migrationFlood(m *migration) {
	const (
		held, used = 31, 32
		count      = 10_000
	)
	a, b, theirs := m.provider(), m.provider(), m.standin()
	_, ch := m.hold(a, held, "held all the time")
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
		first, told := m.hold(a, used, "first")
		second := m.claim(b, used, "second")
		done := m.locks(second)
		require.Equal(m, "second", pgReceive(m, "our notification", told).Message)
		m.unlock(first)
		require.NoError(m, pgReceive(m, "our second lock", done).err)
		m.unlock(second)
		longest = max(longest, time.Since(start))
	}
	m.Logf("%d cycles of two holds during %d notifications, the longest took %v", cycles, count, longest.Round(time.Millisecond))
	pgQuiet(m, ch)
	a.session.mu.Lock()
	generation := a.session.generation
	a.session.mu.Unlock()
	require.EqualValues(m, 1, generation, "the session was lost")
}
