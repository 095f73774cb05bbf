package locker

import (
	"fmt"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/pkg/errors"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/require"
)

// What follows is about the second connection of a provider (C23).

// underLock calls f with the session's mutex, also when f fails the test.
func underLock(s *session, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// openSecondLane opens the second lane without a need.
func openSecondLane(t *testing.T, s *session) {
	t.Helper()
	pgBackend(t, s)
	pgUntil(t, "the second lane is open", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.widenLocked()
		return s.lanes[1].link != nil
	})
}

// moveAway begins to park keys, however few they are.
func moveAway(t *testing.T, s *session, keys ...int64) {
	t.Helper()
	openSecondLane(t, s)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.takeDutyLocked(dutyPark)
	s.lanes[0].choreLocked(func(l *link) error { return s.share(l, keys) })
}

// onLane has a lane's worker call f, and answers its error.
func onLane(t *testing.T, s *session, index int, f chore) error {
	t.Helper()
	done := make(chan error, 1)
	s.mu.Lock()
	s.lanes[index].choreLocked(func(l *link) error {
		err := f(l)
		done <- err
		return err
	})
	s.mu.Unlock()
	return pgReceive(t, "the chore", done)
}

// occupy keeps a lane's worker busy until the function that it answers is called.
func occupy(t *testing.T, s *session, index int) (goOn func()) {
	t.Helper()
	begun, end := make(chan struct{}), make(chan struct{})
	s.mu.Lock()
	s.lanes[index].choreLocked(func(*link) error {
		close(begun)
		<-end
		return nil
	})
	s.mu.Unlock()
	pgReceive(t, "the lane is busy", begun)
	goOn = sync.OnceFunc(func() { close(end) })
	t.Cleanup(goOn)
	return goOn
}

// queued returns when a lane has that many operations of a kind in its queue.
func queued(t *testing.T, s *session, index int, kind opKind, number int) {
	t.Helper()
	pgUntil(t, "the operations are queued", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.lanes[index].queues[kind]) == number
	})
}

// idle returns when the chores that there were are done.
func idle(t *testing.T, s *session) {
	t.Helper()
	for range 3 { // the steps of a move
		for i := range s.lanes {
			require.NoError(t, onLane(t, s, i, func(*link) error { return nil }))
		}
	}
}

// moved answers a key's hold once it does not move any more.
func moved(t *testing.T, s *session, key int64) (h hold) {
	t.Helper()
	pgUntil(t, "the move is over", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		h = s.held[key]
		return h.shared && !h.moving
	})
	return h
}

func secondBackend(t *testing.T, s *session) int {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	require.NotNil(t, s.lanes[1].link)
	return s.lanes[1].link.pid
}

// holdMany locks keys 1, 2, …
func holdMany(t *testing.T, p *PostgresLockProvider, number int) ([]*PostgresLock, []<-chan NotificationPayload) {
	t.Helper()
	locks, told := make([]*PostgresLock, number), make([]<-chan NotificationPayload, number)
	errs := make(chan error)
	for i := range number {
		locks[i] = pgNew(t, p, int64(i+1), "lasts")
		go func() {
			var err error
			told[i], err = locks[i].Lock(pgBackground)
			errs <- err
		}()
	}
	for range number {
		require.NoError(t, <-errs)
	}
	return locks, told
}

// Holds that last move to a second connection. They are released like any other, and
// then the connection is closed.
func TestParking(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	const number = parkFrom + 2*maxBatch // several batches
	locks, told := holdMany(t, p, number)
	require.Equal(t, 2, pgConnections(t, db))
	pids := func() []int {
		var all []int
		for _, pid := range pgAdvisory(t, db) {
			all = append(all, pid)
		}
		slices.Sort(all)
		require.Len(t, all, number)
		return slices.Compact(all)
	}
	first := pgBackend(t, p.session)
	require.Equal(t, []int{first}, pids())
	pgUntil(t, "all is held by another connection", func() bool {
		all := pids()
		return len(all) == 1 && all[0] != first
	})
	require.Equal(t, 3, pgConnections(t, db))
	second := secondBackend(t, p.session)
	require.Equal(t, []int{second}, pids())

	// What is new is on the first connection.
	extra, _ := pgHold(t, p, number+1, "short")
	require.Equal(t, first, pgAdvisory(t, db)[number+1])
	require.NoError(t, extra.Unlock(pgBackground))

	for _, ch := range told {
		pgQuiet(t, ch)
	}
	done := make(chan error)
	for _, l := range locks {
		go func() { done <- l.Unlock(pgBackground) }()
	}
	for range locks {
		require.NoError(t, <-done)
	}
	require.Empty(t, pgAdvisory(t, db))
	require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM env_lock_state WHERE holder_id IS NOT NULL`))
	pgUntil(t, "the second connection is closed", func() bool { return pgConnections(t, db) == 2 })
	require.Equal(t, first, pgBackend(t, p.session), "the session is the same")
}

// A parked hold bars everybody, is preempted and handed over.
func TestParkedHold(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p, q := pgProvider(t, uri), pgProvider(t, uri)
	l, told := pgHold(t, p, 1, "first")
	moveAway(t, p.session, 1)
	require.Equal(t, uint8(1), moved(t, p.session, 1).lane)
	p.session.park(nil) // the first lane's heartbeat, before the second has counted what it has got
	underLock(p.session, func() {
		require.Equal(t, dutyPark, p.session.duty)
	})
	moveAway(t, p.session, 1, 2) // one is moved already, the other not held
	idle(t, p.session)
	require.Equal(t, map[int64]int{1: secondBackend(t, p.session)}, pgAdvisory(t, db))
	require.False(t, pgGet[bool](t, db, `SELECT pg_try_advisory_lock(1)`))

	same, fromSame := pgWait(t, p, 1, "same provider")
	other := pgNew(t, q, 1, "another provider")
	require.NoError(t, other.Notify(pgBackground))
	fromOther := pgWaits(t, other)
	require.Equal(t, "another provider", pgReceive(t, "the holder is told", told).Message)
	require.ErrorIs(t, pgReceive(t, "the older waiter leaves", fromSame), ErrLockPreempted)
	require.NoError(t, l.Unlock(pgBackground))
	require.NoError(t, pgReceive(t, "the newer claim is granted", fromOther))
	require.Greater(t, other.Token(), l.Token())
	require.Zero(t, other.Drain(), "it was a clean end")
	require.NoError(t, other.Unlock(pgBackground))
	require.NoError(t, same.Unlock(pgBackground))

	again, _ := pgHold(t, p, 1, "same key, on the first connection")
	require.Equal(t, map[int64]int{1: pgBackend(t, p.session)}, pgAdvisory(t, db))
	require.NoError(t, again.Unlock(pgBackground))
	require.Empty(t, pgAdvisory(t, db))
}

// With one connection everything is lost (C24): neither is of use without the other.
func TestLossOfEitherConnection(t *testing.T) {
	t.Parallel()
	for name, pick := range map[string]func(*testing.T, *session) int{
		"the first":  func(t *testing.T, s *session) int { return pgBackend(t, s) },
		"the second": secondBackend,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			db := pgDB(t, uri)
			p := pgProvider(t, uri)
			l1, told1 := pgHold(t, p, 1, "parked")
			l2, told2 := pgHold(t, p, 2, "not parked")
			moveAway(t, p.session, 1)
			moved(t, p.session, 1)
			start := time.Now()
			pgTerminate(t, db, pick(t, p.session))
			pgReceive(t, "the parked holder is told", told1)
			pgReceive(t, "the other holder is told", told2)
			require.Less(t, time.Since(start), heartbeatInterval*2/3, "at once, not by a heartbeat")
			require.ErrorIs(t, l1.Unlock(pgBackground), ErrLockLost)
			require.ErrorIs(t, l2.Unlock(pgBackground), ErrLockLost)
			next, _ := pgHold(t, p, 1, "in the next session")
			require.NoError(t, next.Unlock(pgBackground))
			underLock(p.session, func() {
				require.Equal(t, name == "the second", time.Now().Before(p.session.widenAfter), "the second is left alone for a while")
			})
			require.Equal(t, 2, pgConnections(t, db))
			require.Empty(t, pgAdvisory(t, db))
		})
	}
}

// The second connection has heartbeats of its own, which keep the server's lease (C25).
func TestParkedHeartbeat(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	l, told := pgHold(t, p, 1, "parked")
	moveAway(t, p.session, 1)
	moved(t, p.session, 1)
	second := secondBackend(t, p.session)
	beats := map[string]bool{}
	pgUntil(t, "heartbeats on the second connection", func() bool {
		beats[pgGet[string](t, db, `SELECT query_start::text FROM pg_stat_activity WHERE pid = $1`, second)] = true
		return len(beats) > 6 // more than 15 s
	})
	pgQuiet(t, told)
	require.NoError(t, l.Unlock(pgBackground))
}

// A key that somebody of the original library waits for inside the server cannot be
// moved; nobody else is disturbed, and the waiter gets it in the end.
func TestMoveWithWaiterInServer(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	l1, told1 := pgHold(t, p, 1, "awaited")
	l2, told2 := pgHold(t, p, 2, "not awaited")
	conn, err := db.Conn(pgBackground)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	got := make(chan error, 1)
	go func() {
		_, err := conn.ExecContext(pgBackground, `SELECT pg_advisory_lock(1)`)
		got <- err
	}()
	waits := func() bool {
		return pgGet[bool](t, db, `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND NOT granted)`)
	}
	pgUntil(t, "it waits", waits)
	moveAway(t, p.session, 1, 2)
	require.Equal(t, uint8(1), moved(t, p.session, 2).lane)
	underLock(p.session, func() {
		require.Equal(t, uint8(0), p.session.held[1].lane)
		require.Zero(t, p.session.moving)
	})
	require.True(t, waits())
	pgQuiet(t, told1)
	pgQuiet(t, told2)
	require.NoError(t, l1.Unlock(pgBackground))
	require.NoError(t, pgReceive(t, "the waiter gets it", got))
	require.NoError(t, l2.Unlock(pgBackground))
}

// Somebody comes between the first and the second step: the hold stays on the first
// connection, in share mode, and is as exclusive as before.
func TestMoveInterrupted(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	l, told := pgHold(t, p, 1, "half moved")
	openSecondLane(t, p.session)
	s := p.session
	conn, err := db.Conn(pgBackground)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	got := make(chan error, 1)
	s.mu.Lock()
	s.duty = dutyPark
	s.lanes[1].choreLocked(func(*link) error { // the second step waits for this
		pgUntil(t, "the first step is done", func() bool {
			return pgGet[bool](t, db, `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND objsubid = 1 AND mode = 'ShareLock')`)
		})
		go func() {
			_, err := conn.ExecContext(pgBackground, `SELECT pg_advisory_lock(1)`)
			got <- err
		}()
		pgUntil(t, "it waits", func() bool {
			return pgGet[bool](t, db, `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND NOT granted)`)
		})
		return nil
	})
	s.lanes[0].choreLocked(func(l *link) error { return s.share(l, []int64{1}) })
	s.mu.Unlock()
	require.Equal(t, uint8(0), moved(t, s, 1).lane)
	pgQuiet(t, told)
	require.Empty(t, got)
	require.NoError(t, l.Unlock(pgBackground))
	require.NoError(t, pgReceive(t, "the waiter gets it", got))
}

// A release that comes while its key moves waits for the end of the move and leaves
// nothing behind on either connection.
func TestReleaseWhileMoving(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	s := pgProviderInUse(t, p).session
	openSecondLane(t, s)
	for round := range 30 {
		const number = 20
		locks, _ := holdMany(t, p, number)
		var keys []int64
		for key := range int64(number) {
			keys = append(keys, key+1)
		}
		done := make(chan error)
		moveAway(t, s, keys...)
		for i, l := range locks {
			go func() {
				pgUntil(t, "it moves or has moved", func() bool {
					s.mu.Lock()
					defer s.mu.Unlock()
					return i%2 == 0 || s.held[l.claim.key].shared
				})
				done <- l.Unlock(pgBackground)
			}()
		}
		for range locks {
			require.NoError(t, <-done)
		}
		idle(t, s)
		require.Empty(t, pgAdvisory(t, db), "round %d", round)
		require.Zero(t, p.Stats().Held)
	}
}

// The server's lock table is full: what cannot be moved stays where it is.
func TestMoveWithFullLockTable(t *testing.T) {
	t.Parallel()
	server := pgCluster(t, pgserver.Options{Config: map[string]string{"max_connections": "12", "max_locks_per_transaction": "10"}})
	uri, err := server.CreateDatabase(pgBackground, "full")
	require.NoError(t, err)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	const number = 40
	locks, told := holdMany(t, p, number)
	s := p.session
	openSecondLane(t, s)
	conn, err := db.Conn(pgBackground)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	for i, err := 1000, error(nil); err == nil; i++ {
		_, err = conn.ExecContext(pgBackground, `SELECT pg_advisory_lock($1)`, i)
	}
	_, err = conn.ExecContext(pgBackground, `SELECT pg_advisory_unlock(1000), pg_advisory_unlock(1001)`) // the step fails halfway
	require.NoError(t, err)
	moveAway(t, s, 1, 2, 3, 4, 5)
	require.Equal(t, uint8(0), moved(t, s, 5).lane)
	var left int
	require.NoError(t, conn.QueryRowContext(pgBackground, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND pid = $1`,
		secondBackend(t, s)).Scan(&left))
	require.Zero(t, left, "what the second connection got before")
	for _, ch := range told {
		pgQuiet(t, ch)
	}
	_, err = conn.ExecContext(pgBackground, `SELECT pg_advisory_unlock(i) FROM generate_series(1002, 1022) AS i`)
	require.NoError(t, err)
	other := pgDB(t, uri)
	require.False(t, pgGet[bool](t, other, `SELECT pg_try_advisory_lock(1)`))
	require.NoError(t, conn.Close())
	require.NoError(t, db.Close()) // with it ends what filled the table
	for _, l := range locks {
		require.NoError(t, l.Unlock(pgBackground))
	}
	pgUntil(t, "all is free", func() bool { return len(pgAdvisory(t, other)) == 0 })
}

// The first step fails in the middle, and nobody knows what it did: no key is lost,
// and all can be released.
func TestMoveInDoubt(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	s := p.session
	locks, told := holdMany(t, p, 3)
	openSecondLane(t, s)
	s.mu.Lock()
	s.duty = dutyPark
	s.mu.Unlock()
	require.NoError(t, onLane(t, s, 0, func(l *link) (err error) {
		good := l.share
		defer func() { l.share = good }()
		l.share, err = l.conn.PrepareContext(pgBackground, `
			SELECT k.key, pg_try_advisory_lock_shared(k.key) AND pg_advisory_unlock(k.key) AND 1 / (k.key - 2) IS NOT NULL
			FROM unnest($1::bigint[]) AS k(key)`)
		if err == nil {
			err = s.share(l, []int64{1, 2, 3})
		}
		return err
	}))
	for key := range int64(3) {
		require.Equal(t, uint8(0), moved(t, s, key+1).lane)
		pgQuiet(t, told[key])
		require.False(t, pgGet[bool](t, db, `SELECT pg_try_advisory_lock($1)`, key+1))
	}
	for _, l := range locks {
		require.NoError(t, l.Unlock(pgBackground))
	}
	require.Empty(t, pgAdvisory(t, db))
}

// Under load both connections work, each on its half of the keys; afterwards one is
// closed. Exclusion and order hold throughout.
func TestSplitUnderLoad(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	f := pgLocker(t, p)
	const workers, keys = 300, 250 // some fight
	var inside [keys]sync.Mutex
	stop := make(chan struct{})
	stopped := sync.OnceFunc(func() { close(stop) })
	var running sync.WaitGroup
	defer running.Wait()
	defer stopped()
	for w := range workers {
		running.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				l := f("org/repo", uint(w%keys), "load")
				ch, err := l.Lock(pgBackground)
				if err != nil {
					require.ErrorIs(t, err, ErrLockPreempted)
					continue
				}
				require.True(t, inside[w%keys].TryLock(), "two hold the same key")
				if w%7 == 0 {
					select {
					case <-ch:
					case <-time.After(time.Millisecond):
					}
				}
				inside[w%keys].Unlock()
				require.NoError(t, l.Release(pgBackground))
			}
		})
	}
	var pids []int
	pgUntil(t, "both connections hold locks", func() bool {
		pids = pids[:0]
		for _, pid := range pgAdvisory(t, db) {
			pids = append(pids, pid)
		}
		slices.Sort(pids)
		pids = slices.Compact(pids)
		return len(pids) == 2
	})
	require.Equal(t, 3, pgConnections(t, db))
	s := p.session
	underLock(s, func() {
		require.Equal(t, dutyClaims, s.duty)
	})
	stopped()
	running.Wait()
	require.Empty(t, pgAdvisory(t, db))
	pgUntil(t, "the second connection is closed", func() bool { return pgConnections(t, db) == 2 })
	l, _ := pgHold(t, p, 1, "afterwards")
	require.NoError(t, l.Unlock(pgBackground))
}

// Where no second connection is to be had, one has to do.
func TestNoSecondConnection(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	role := fmt.Sprintf("two_%d", time.Now().UnixNano())
	pgExec(t, db, `CREATE ROLE `+role+` LOGIN SUPERUSER`)
	t.Cleanup(func() { pgExec(t, db, `DROP OWNED BY `+role); pgExec(t, db, `DROP ROLE `+role) })
	u, err := url.Parse(uri)
	require.NoError(t, err)
	u.User = url.User(role)
	var log pgLog
	p := pgProvider(t, u.String(), log.option())
	l, told := pgHold(t, p, 1, "held")
	s := p.session
	pgBackend(t, s)
	pgExec(t, db, `ALTER ROLE `+role+` NOLOGIN`)
	s.mu.Lock()
	s.widenLocked()
	s.mu.Unlock()
	s.awaitSecond()
	require.Contains(t, log.String(), "third connection could not be opened")
	underLock(s, func() {
		s.widenLocked()
		require.Nil(t, s.second, "not again at once")
	})
	pgQuiet(t, told)
	require.NoError(t, l.Unlock(pgBackground))
	require.NoError(t, p.Close())
}

// A second connection that reaches another server, after a failover, would bar
// nobody.
func TestSecondConnectionElsewhere(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t))
	s := pgProviderInUse(t, p).session
	s.mu.Lock()
	elsewhere := &link{generation: s.generation, number: s.lanes[0].link.number, pid: s.lanes[0].link.pid + 1}
	s.mu.Unlock()
	_, err := s.openSecond(pgBackground, elsewhere)
	require.ErrorContains(t, err, "another server")
	p2 := pgProvider(t, newDatabase(t)) // the numbers of another database do not count
	p2.session.dsn = p.session.dsn
	_, err = p2.session.openSecond(pgBackground, &link{generation: 1, number: 1, pid: 1})
	require.ErrorContains(t, err, "another server")
}

func pgProviderInUse(t *testing.T, p *PostgresLockProvider) *PostgresLockProvider {
	t.Helper()
	l, _ := pgHold(t, p, 1, "to open the session")
	require.NoError(t, l.Unlock(pgBackground))
	return p
}

// Close ends both connections, whatever they do.
func TestCloseWithSecondConnection(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri, WithPreemptionTimeout(50*time.Millisecond))
	_, told := holdMany(t, p, 40)
	var keys []int64
	for key := range int64(20) {
		keys = append(keys, key+1)
	}
	moveAway(t, p.session, keys...)
	moved(t, p.session, 20)
	require.NoError(t, p.Close())
	for _, ch := range told {
		pgReceive(t, "the holder is told", ch)
	}
	pgUntil(t, "no connection is left", func() bool { return pgConnections(t, db) == 0 })
	require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM env_lock_state WHERE holder_id IS NOT NULL`))
}

// A batch of releases fails halfway, and a move comes before it is repeated: what is
// free already must not be locked again.
func TestMoveAfterHalfRelease(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	s := p.session
	locks, _ := holdMany(t, p, 3)
	openSecondLane(t, s)
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	pgExec(t, tx, `SELECT FROM env_lock_state WHERE lock_key = 3 FOR UPDATE`)
	goOn := occupy(t, s, 0)
	done := make(chan error)
	for _, l := range locks {
		go func() { done <- l.Unlock(pgBackground) }()
	}
	queued(t, s, 0, opRelease, 3)
	s.mu.Lock()
	s.duty = dutyPark
	s.lanes[0].choreLocked(func(l *link) error { // after the batch, before its repetition
		err := s.share(l, []int64{1, 2, 3})
		_ = tx.Rollback()
		return err
	})
	s.mu.Unlock()
	goOn()
	for range locks {
		require.NoError(t, pgReceive(t, "the release", done))
	}
	idle(t, s)
	require.Empty(t, pgAdvisory(t, db))
}

// What is queued for one connection when the other is lost waits for the next session.
func TestQueuedWhenTheOtherIsLost(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	s := pgProviderInUse(t, p).session
	openSecondLane(t, s)
	goOn := occupy(t, s, 0)
	done := make(chan error)
	const number = 5
	for i := range number {
		l := pgNew(t, p, int64(i+10), "queued")
		go func() { done <- l.Notify(pgBackground) }()
	}
	queued(t, s, 0, opAnnounce, number)
	pgTerminate(t, db, secondBackend(t, s))
	pgUntil(t, "the session is lost", func() bool { return !p.Stats().Connected })
	goOn()
	for range number {
		require.NoError(t, pgReceive(t, "the claim", done))
	}
}

// A batch that fails after its lane has ended is answered: nobody would repeat it.
func TestFailedBatchOfAnEndedLane(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t))
	s := pgProviderInUse(t, p).session
	s.mu.Lock()
	first := s.lanes[0].link
	s.mu.Unlock()
	l, err := s.openSecond(pgBackground, first)
	require.NoError(t, err)
	defer l.close()
	l.stall.cancel = func() bool { return true }
	l.release, err = l.conn.PrepareContext(pgBackground, `SELECT 1 / (cardinality($1::bigint[]) * 0), $2::uuid[], $3::boolean[], 0`)
	require.NoError(t, err)
	var batch []*op
	for key := range int64(2) {
		batch = append(batch, newOp(pgBackground, opRelease, claim{key: key}))
	}
	require.NoError(t, s.lanes[1].execute(l, batch), "the link is not broken")
	for _, o := range batch {
		pgReceive(t, "the answer", o.done)
		require.ErrorIs(t, o.err, ErrLockLost)
	}
	require.Zero(t, p.Stats().Queued)
}

// The session is lost while the second connection is in the middle of a statement: it
// is cut, and what follows does not wait for the statement.
func TestLossInterruptsTheOther(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	s := pgProviderInUse(t, p).session
	openSecondLane(t, s)
	ended := make(chan error, 1)
	s.mu.Lock()
	s.lanes[1].choreLocked(func(l *link) error {
		_, err := l.conn.ExecContext(pgBackground, `SELECT pg_sleep(60)`)
		ended <- err
		return err
	})
	s.mu.Unlock()
	second := secondBackend(t, s)
	pgUntil(t, "it sleeps", func() bool {
		return pgGet[bool](t, db, `SELECT query LIKE '%pg_sleep%' FROM pg_stat_activity WHERE pid = $1`, second)
	})
	pgTerminate(t, db, pgBackend(t, s))
	require.Nil(t, pq.As(pgReceive(t, "the statement", ended)), "it was not the server's timeout that ended it")
	next, _ := pgHold(t, p, 1, "in the next session")
	require.NoError(t, next.Unlock(pgBackground))
}

// A second connection that is open when the session has been lost is of no use.
func TestSecondConnectionTooLate(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	p := pgProvider(t, uri)
	s := pgProviderInUse(t, p).session
	s.mu.Lock()
	now := s.lanes[0].link
	s.mu.Unlock()
	before := &link{generation: now.generation, number: now.number, pid: now.pid}
	require.NoError(t, s.runSecond(pgBackground, before))
	underLock(s, func() {
		require.Nil(t, s.lanes[1].link)
	})
	require.Equal(t, 2, pgConnections(t, pgDB(t, uri)))
}

// Close carries out what is queued on either connection, and ends no move halfway.
func TestCloseWaitsForBothConnections(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	s := p.session
	locks, _ := holdMany(t, p, 4)
	moveAway(t, s, 1, 2)
	require.Equal(t, uint8(1), moved(t, s, 2).lane)
	goOn := occupy(t, s, 1)
	s.mu.Lock()
	s.lanes[0].choreLocked(func(l *link) error { return s.share(l, []int64{3}) })
	s.mu.Unlock()
	pgUntil(t, "a key moves", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.moving == 1
	})
	done := make(chan error)
	for _, l := range locks {
		go func() { done <- l.Unlock(pgBackground) }()
	}
	queued(t, s, 1, opRelease, 2)
	closed := make(chan error)
	go func() { closed <- p.Close() }()
	pgUntil(t, "it closes", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.closing
	})
	goOn()
	for range locks {
		require.NoError(t, pgReceive(t, "the release", done))
	}
	require.NoError(t, pgReceive(t, "Close", closed))
	require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM env_lock_state WHERE holder_id IS NOT NULL`))
	require.Zero(t, pgConnections(t, db))
}

// The session is lost when the first lane is about to open the second.
func TestWidenAfterLoss(t *testing.T) {
	t.Parallel()
	p := pgProvider(t, newDatabase(t))
	s := pgProviderInUse(t, p).session
	s.mu.Lock()
	first := s.lanes[0].link
	s.mu.Unlock()
	require.True(t, s.lose(first, errors.New("test")))
	require.False(t, s.lose(first, errors.New("test")))
	s.split()
	s.park(make([]int64, parkFrom+1))
	s.awaitSecond()
	l, _ := pgHold(t, p, 1, "in the next session")
	require.NoError(t, l.Unlock(pgBackground))
}
