package locker

import (
	"context"
	"database/sql"
	stderrors "errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/pkg/errors"
	"github.com/stretchr/testify/require"
)

// TestContract holds both providers to CONTRACT.md, clause by clause. A case is one function for
// both. With the fake it runs in a synctest bubble: the defaults apply, and every duration is
// exact. With PostgreSQL it runs in real time, with short timeouts, in a separate database.
func TestContract(t *testing.T) {
	t.Run("fake", func(t *testing.T) {
		for _, c := range slices.Concat(contract, troubleCases(true), virtual) {
			t.Run(c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { newFakeEnv(t).run(c.run) })
			})
		}
	})
	t.Run("postgres", func(t *testing.T) {
		// A server with default settings accepts 100 connections.
		slots := make(chan struct{}, 4)
		for _, c := range slices.Concat(contract, troubleCases(false)) {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				slots <- struct{}{}
				defer func() { <-slots }()
				newPostgresEnv(t, newDatabase(t)).run(c.run)
			})
		}
	})
}

type contractCase struct {
	name string
	run  func(e *env)
}

// virtual holds the cases that need virtual time and do not depend on the provider.
var virtual = []contractCase{
	{"C18 Release is bounded", releaseIsBounded},
}

// contract is the table of the cases. troubleCases adds those that are the same for every cause of
// a notification.
var contract = []contractCase{
	{"The story of A, B and C", story},

	{"C1 one key for each pull request", oneKeyEach},
	{"C1 a known key is only read", knownKeyIsRead},
	{"C1 C2 work without a pull request", withoutPullRequest},
	{"C2 any int64 is a key", anyKey},
	{"C2 a done context is refused", doneContextRefused},

	{"C3 an older claim cannot acquire a free key", olderClaimCannotAcquire},
	{"C3 announcing again makes a claim the newest", announceAgain},
	{"C4 a waiter with an older claim leaves at once", waiterLeaves},
	{"C5 the holder is sent the claimant once", holderIsToldOnce},
	{"C5 own and foreign claims do not disturb", notDisturbed},
	{"C5 a claim that comes with the grant is not missed", claimedWithGrant},
	{"C6 a lock without a claim disturbs nobody", unannouncedDisturbsNobody},
	{"C6 a waiter without a claim is superseded by a later one", unannouncedIsDisplaced},
	{"C6 a holder without a claim is told of a later one", unannouncedHolderIsTold},
	{"C5 C6 the claim that was the newest is announced again", adoptedClaimAgain},
	{"C7 the newest of many wins", newestWins},
	{"C9 only the public interfaces are used", publicInterfacesOnly},
	{"C9 a provider from scratch works", scratchProvider},
	{"C9 C20 a provider that fails is cleaned up", failingProvider},

	{"C10 C11 no wait without contention", noArtificialWait},
	{"C11 no wait after a clean end", noWaitAfterCleanEnd},
	{"C11 no wait after a revocation", noWaitAfterRevocation},
	{"C11 10 s after a session that died", waitAfterDeath},
	{"C11 a delay that is set is always waited", delayThatIsSet},
	{"C12 the channel need not be read", channelUnread},
	{"C12 the channel is closed without a payload", channelUndisturbed},
	{"C13 the provider's options replace the defaults", optionsReplaceDefaults},
	{"C14 the next claimant gets what is revoked", nextAfterRevocation},
	{"C14 further events change nothing", furtherEvents},
	{"C14 a loss after the notification ends the hold", lossAfterNotification},
	{"C14 C21 the lock timeout outlives other events", timeoutOutlivesEvents},
	{"C15 tokens only grow", tokensGrow},

	{"C16 Do locks, runs and releases", doRuns},
	{"C16 Do answers the function's error", doAnswersError},
	{"C16 Do does not run what it cannot lock", doCannotLock},
	{"C16 Do waits for the function", doWaitsForFunction},
	{"C16 Do releases on a panic", doPanics},
	{"C16 Do releases on Goexit", doGoexit},
	{"C16 Do is released from inside", doReleasedInside},
	{"C47 a claim inside a Do on the same key is refused", nestedClaims},
	{"C47 what is no claim inside the hold", notNested},

	{"C17 misuse is told", misuse},
	{"C18 a done context still releases", doneContextReleases},
	{"C18 a loss is told once", lossToldOnce},
	{"C18 Release does not wait for waiters", releaseDoesNotWait},
	{"C19 Unlock ends the wait", unlockEndsWait},
	{"C19 Release ends Lock at every stage", releaseAtEveryStage},
	{"C19 a stale call frees nobody", staleCalls},
	{"C19 a non-holder frees nobody", nonHolderFreesNobody},
	{"C19 stale timers free nobody", staleTimers},
	{"C20 a failed Lock leaves nothing", failedLockLeavesNothing},
	{"C20 a key that is granted too late is given back", grantedTooLate},
	{"C21 failures are told apart", failuresToldApart},
	{"C21 a context's cause is not matched", contextCauseNotMatched},

	{"C22 Close ends holds and waits", closeEndsAll},
	{"C22 Close does not wait for ever", closeRevokes},
	{"C22 Close again and use after Close", useAfterClose},
	{"C22 a key is given back before its lock is forgotten", givenBackFirst},

	{"C33 a claim that comes too late is turned away", lateClaim},
	{"C33 a claim outlives the session", lateClaimAfterLoss},
	{"C48 the error of a late claim says how late", howLate},
	{"C20 C33 a claim that gave up stands in nobody's way", claimThatGaveUp},
	{"C34 a shielded step is not cut off", shieldHoldsBack},
	{"C34 after a step there is time to release", shieldLeavesTime},
	{"C34 a step that ends in time", shieldGivesBackInTime},
	{"C34 a shield is bounded", shieldIsBounded},
	{"C34 a lost session ends a step", shieldDoesNotOutliveSession},
	{"C34 what Shield refuses", shieldRefuses},
	{"C36 what happens is observed", observations},
	{"C36 a Lock that fails early is observed", earlyFailureObserved},
	{"C36 a loss that the release finds is observed", lossFoundByRelease},
	{"C20 Notify of a lock that has ended", notifyAfterEnd},

	{"C24 a hold outlives its connection", holdOutlivesConnection},
	{"C24 a claim that was missed is notified", missedClaim},
	{"C24 every reconnect begins a new watch", flapping},
	{"C24 the timeout of the holder counts", holdersTimeoutCounts},
	{"C24 C18 a lost hold is given back by Unlock", lostGivenBack},
	{"C24 a row that does not name the hold any longer", rowTaken},
	{"C25 a hold that was taken from a session with a longer timeout", takenFromLongerTimeout},
	{"C26 claims wait for the session", claimsWait},
	{"C26 a claim waits no longer than its bound", claimsWaitNoLonger},
	{"C26 claims keep the order in which they were asked for", orderOfAsking},
	{"C36 sessions are observed", sessionsObserved},
	{"C40 a tracer is told of every Lock and Release", tracedCalls},

	{"C49 the newer claim's mode decides", everyMode},
	{"C49 a later claim that preempts", preemptAfterLetFinish},
	{"C49 a claim that skips", skipping},
	{"C49 C25 a claim that skips after a death", skipAfterDeath},
	{"C50 a bound for one wait", boundedWait},
	{"C17 a setting that comes too late", settingTooLate},
	{"C51 of n + 1 holds one is let finish", progressing},
	{"C51 a hold is spared for a time", progressIsBounded},
	{"C51 a hold that is spared is announced again", sparedAgain},
	{"C52 labels come back", labelsComeBack},
	{"C52 errors say who", errorsSayWho},
	{"C53 the worst outcome counts", outcomes},
	{"C53 C11 a function that was never run", outcomeOfDelay},
	{"C49 C24 a hold that was taken away", goneIsNotWaitedFor},
	{"C21 ordinary errors are plain", plainErrors},
	{"C15 the token in the function's context", tokenInContext},

	{"C29 bad options are refused", badOptions},
	{"C30 any event is accepted", anyEvent},
	{"C32 zero values do not panic", zeroValues},
}

// The durations that the package promises, and the short ones that are used with PostgreSQL.
const (
	promisedLockTimeout    = 20 * time.Second
	promisedMaxDuration    = 30*time.Minute + 30*time.Second
	promisedPreemption     = 10 * time.Second
	promisedSessionTimeout = 10 * time.Second
	pgSessionTimeout       = 2 * time.Second
	promisedRelease        = 5 * time.Second

	short = 400 * time.Millisecond
)

// ---------------------------------------------------------------------------
// The environment of a case.

// env is one kind of provider, as a case uses it.
type env struct {
	*require.Assertions
	t          *testing.T
	ctx        context.Context
	limit      time.Duration // longest wait for an expected event
	opened     []LockProvider
	background sync.WaitGroup
	keys       int64

	store *memory // fake only: shared by all processes

	uri   string  // PostgreSQL only, like all below
	admin *sql.DB // one connection
	cords map[LockProvider]*cord
}

func newFakeEnv(t *testing.T) *env {
	return &env{
		Assertions: require.New(t), t: t, ctx: context.Background(), limit: 100 * time.Hour,
		store: newMemory(),
	}
}

func newPostgresEnv(t *testing.T, uri string) *env {
	e := &env{
		Assertions: require.New(t), t: t, ctx: context.Background(), limit: soon,
		uri: uri, cords: map[LockProvider]*cord{},
	}
	var err error
	e.admin, err = sql.Open("postgres", e.uri)
	e.NoError(err)
	e.admin.SetMaxOpenConns(1)
	t.Cleanup(func() { _ = e.admin.Close() })
	return e
}

func (e *env) fake() bool { return e.store != nil }

// run runs a case and then looks for leaks.
func (e *env) run(f func(*env)) {
	defer func() {
		if e.t.Failed() {
			e.abandon()
		}
	}()
	f(e)
	e.finish()
}

// finish requires that the case has left nothing behind: no lock that waits or holds and, once the
// providers are closed, no connection and no held key.
func (e *env) finish() {
	for _, p := range e.opened {
		e.eventually(func() bool { return e.subscribed(p) == 0 })
	}
	start := time.Now()
	done := make(chan struct{})
	go func() {
		e.closeAll()
		close(done)
	}()
	receive(e, done)
	if e.fake() {
		e.Zero(time.Since(start), "Close found something to wait for")
		for key, row := range e.store.rows {
			e.Zero(row.holder, "key %d is still held", key)
		}
		e.Empty(e.store.live)
		return
	}
	e.eventually(func() bool {
		var n int
		e.NoError(e.admin.QueryRow(`SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`).Scan(&n))
		return n == 0
	})
}

func (e *env) closeAll() {
	for _, p := range e.opened {
		_ = p.(io.Closer).Close()
	}
	e.background.Wait()
}

// abandon cleans up after a case that has failed, so that the results of the next ones still mean
// something.
func (e *env) abandon() {
	done := make(chan struct{})
	go func() {
		e.closeAll()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(e.limit):
	}
}

// process creates a provider, as one more process would. With PostgreSQL it has a shorter session
// timeout, because the loss of a session takes real time there.
func (e *env) process(options ...LockProviderOption) LockProvider {
	e.t.Helper()
	if e.fake() {
		p, err := NewLockProvider(FakeLockProviderKind, options...)
		e.NoError(err)
		flp := p.(*FakeLockProvider)
		flp.once.Do(func() {})
		flp.session = e.store.open(&flp.conf)
		e.opened = append(e.opened, p)
		return p
	}
	c := newCord(e.t, e.uri)
	uri := c.uri(e.t, e.uri)
	p, err := NewLockProvider(PostgresLockProviderKind,
		append([]LockProviderOption{WithPostgresBackend(uri, ""), WithSessionTimeout(pgSessionTimeout)}, options...)...)
	e.NoError(err)
	e.opened = append(e.opened, p)
	e.cords[p] = c
	// The cases do not measure the first connections.
	e.eventually(func() bool {
		_, err := p.LockKey(e.ctx, "warm up", 0)
		return err == nil
	})
	return p
}

// sessionTimeout returns the session timeout of a process without an option.
func (e *env) sessionTimeout() time.Duration {
	if e.fake() {
		return promisedSessionTimeout
	}
	return pgSessionTimeout
}

func trustOf(p LockProvider) *trust {
	switch p := p.(type) {
	case *FakeLockProvider:
		return p.session.trust
	case *PostgresLockProvider:
		return p.session.trust
	}
	panic("not a provider of this package")
}

// suspend cuts a process off from the database.
func (e *env) suspend(p LockProvider) {
	e.t.Helper()
	if e.fake() {
		p.(*FakeLockProvider).session.suspend()
	} else {
		e.cords[p].cut()
	}
	e.eventually(func() bool { _, connected := trustOf(p).current(); return !connected })
}

// restore lets a process that is cut off connect again.
func (e *env) restore(p LockProvider) {
	e.t.Helper()
	if e.fake() {
		p.(*FakeLockProvider).session.restore()
	} else {
		e.cords[p].mend()
	}
	// While it has no lock, the provider has no reason to connect.
	e.eventually(func() bool {
		_, connected := trustOf(p).current()
		return connected || e.subscribed(p) == 0
	})
}

// lossAfter returns how long after suspend the session is lost. With the fake this is exact.
func (e *env) lossAfter() time.Duration {
	if e.fake() {
		return patience(promisedSessionTimeout)
	}
	return 0
}

// loseSession cuts a process off until its session is lost, and then lets it connect again.
func (e *env) loseSession(p LockProvider) {
	e.t.Helper()
	before, _ := trustOf(p).current()
	e.suspend(p)
	e.pass(e.lossAfter())
	e.eventually(func() bool { now, _ := trustOf(p).current(); return now.generation > before.generation })
	if e.fake() {
		e.restore(p)
	} else {
		e.cords[p].mend()
	}
}

// pass lets time pass in a bubble.
func (e *env) pass(d time.Duration) {
	if e.fake() {
		time.Sleep(d)
	}
}

// isHeld reports whether the database itself has the key as held.
func (e *env) isHeld(key int64) bool {
	e.t.Helper()
	if e.fake() {
		synctest.Wait()
		e.store.mu.Lock()
		defer e.store.mu.Unlock()
		row := e.store.rows[key]
		return row != nil && row.holder != uuid.Nil
	}
	var held bool
	e.NoError(e.admin.QueryRow(`SELECT EXISTS (SELECT FROM env_lock_state WHERE lock_key = $1 AND holder_id IS NOT NULL)`, key).Scan(&held))
	return held
}

// eventually waits for a condition: until all goroutines of the bubble are blocked, or for some
// real time.
func (e *env) eventually(condition func() bool) {
	e.t.Helper()
	if e.fake() {
		synctest.Wait()
		e.True(condition(), "the condition does not hold")
		return
	}
	for end := time.Now().Add(e.limit); !condition(); time.Sleep(5 * time.Millisecond) {
		e.True(time.Now().Before(end), "the condition never held")
	}
}

// took requires that d has passed since start: exactly d in virtual time, at least d in real time.
func (e *env) took(start time.Time, d time.Duration) {
	e.t.Helper()
	if e.fake() {
		e.Equal(d, time.Since(start))
	} else {
		e.GreaterOrEqual(time.Since(start), d)
	}
}

// bound returns an option and its duration: the promised default in virtual time, a short one in
// real time.
func (e *env) bound(option func(time.Duration) LockProviderOption, promised time.Duration) (LockProviderOption, time.Duration) {
	if e.fake() {
		return option(0), promised
	}
	return option(short), short
}

// settle returns when everything that was announced before has reached the holders of a process.
// Notifications keep their order, so one that is sent now arrives last.
func (e *env) settle(p LockProvider) {
	e.t.Helper()
	key := e.key()
	l, ch := e.hold(p, key, "marker")
	e.announced(p, key, "settle")
	e.payload(ch)
	e.NoError(l.Unlock(e.ctx))
}

// key returns a key that no other part of the case uses.
func (e *env) key() int64 {
	e.keys++
	return 1_000_000 + e.keys
}

func hubOf(p LockProvider) *hub {
	switch p := p.(type) {
	case *FakeLockProvider:
		p.init()
		return p.session.hub
	case *PostgresLockProvider:
		return p.session.hub
	}
	panic("not a provider of this package")
}

func lockOf(l PreemptableLock) *lock {
	switch l := l.(type) {
	case *FakePreemptableLock:
		return &l.lock
	case *PostgresLock:
		return &l.lock
	}
	panic("not a lock of this package")
}

func claimNumber(pl PreemptableLock) int64 {
	l := lockOf(pl)
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.standing.number
}

func (e *env) subscribed(p LockProvider) int {
	h := hubOf(p)
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.count
}

// inPhase waits until one of the process's locks of the key is in a phase.
func (e *env) inPhase(p LockProvider, key int64, want phase) {
	e.t.Helper()
	e.someLock(p, key, func(l *lock) bool { return l.phase == want })
}

// waitsFor waits until one of the process's locks sleeps, because the key is not free. Then its claim
// is known to the database, and it has no attempt in flight.
func (e *env) waitsFor(p LockProvider, key int64) {
	e.t.Helper()
	e.someLock(p, key, func(l *lock) bool { return l.phase == waiting && l.wake != nil })
}

// someLock waits until the condition is true of one of the process's locks of the key.
func (e *env) someLock(p LockProvider, key int64, condition func(l *lock) bool) {
	e.t.Helper()
	e.eventually(func() bool {
		h := hubOf(p)
		h.mu.Lock()
		var locks []*lock
		for l := h.locks[key]; l != nil; l = l.next {
			locks = append(locks, l)
		}
		h.mu.Unlock()
		return slices.ContainsFunc(locks, func(l *lock) bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return condition(l)
		})
	})
}

// waits waits until a lock is waiting and its place is known: it was announced, or has seen which
// claim is the newest.
func (e *env) waits(l PreemptableLock) {
	e.t.Helper()
	e.eventually(func() bool {
		l := lockOf(l)
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.phase == waiting && l.placed
	})
}

func (e *env) lock(p LockProvider, key int64, event string) PreemptableLock {
	e.t.Helper()
	l, err := p.New(e.ctx, key, event)
	e.NoError(err)
	return l
}

func (e *env) announced(p LockProvider, key int64, event string) PreemptableLock {
	e.t.Helper()
	l := e.lock(p, key, event)
	e.NoError(l.Notify(e.ctx))
	return l
}

func (e *env) hold(p LockProvider, key int64, event string) (PreemptableLock, <-chan NotificationPayload) {
	e.t.Helper()
	l := e.announced(p, key, event)
	return l, e.acquire(l)
}

// lockable is a lock or a PreemptiveLocker.
type lockable interface {
	Lock(ctx context.Context) (<-chan NotificationPayload, error)
}

type attempt struct {
	ch  <-chan NotificationPayload
	err error
}

// start calls Lock in the background.
func (e *env) start(ctx context.Context, l lockable) <-chan attempt {
	out := make(chan attempt, 1)
	go func() {
		ch, err := l.Lock(ctx)
		out <- attempt{ch, err}
	}()
	return out
}

// acquire calls Lock and requires that it succeeds.
func (e *env) acquire(l lockable) <-chan NotificationPayload {
	e.t.Helper()
	return e.acquired(e.start(e.ctx, l))
}

func (e *env) acquired(out <-chan attempt) <-chan NotificationPayload {
	e.t.Helper()
	a := receive(e, out)
	e.NoError(a.err)
	e.NotNil(a.ch)
	return a.ch
}

// failed requires that a Lock fails, and returns its error.
func (e *env) failed(out <-chan attempt) error {
	e.t.Helper()
	a := receive(e, out)
	e.Error(a.err)
	e.Nil(a.ch)
	return a.err
}

func (e *env) pending(out <-chan attempt) {
	e.t.Helper()
	if e.fake() {
		synctest.Wait()
	}
	e.Empty(out, "Lock has returned")
}

// receive receives a value from a channel, or finds it closed.
func receive[T any](e *env, ch <-chan T) T {
	e.t.Helper()
	v, _ := receiveOK(e, ch)
	return v
}

func receiveOK[T any](e *env, ch <-chan T) (T, bool) {
	e.t.Helper()
	timer := time.NewTimer(e.limit)
	defer timer.Stop()
	select {
	case v, ok := <-ch:
		return v, ok
	case <-timer.C:
		e.FailNow("nothing came")
		panic("unreachable")
	}
}

func (e *env) payload(ch <-chan NotificationPayload) NotificationPayload {
	e.t.Helper()
	n, ok := receiveOK(e, ch)
	e.True(ok, "the channel was closed without a payload")
	return n
}

func (e *env) closed(ch <-chan NotificationPayload) {
	e.t.Helper()
	n, ok := receiveOK(e, ch)
	e.False(ok, "a payload came: %v", n)
}

// quiet requires that a holder has neither been notified nor lost its hold.
func (e *env) quiet(p LockProvider, ch <-chan NotificationPayload) {
	e.t.Helper()
	e.settle(p)
	select {
	case n, ok := <-ch:
		e.FailNow("the holder was disturbed", "%v (channel open: %v)", n, ok)
	default:
	}
}

// free requires that any lock can acquire the key immediately.
func (e *env) free(p LockProvider, key int64) {
	e.t.Helper()
	e.eventually(func() bool { return !e.isHeld(key) })
	start := time.Now()
	l := e.lock(p, key, "probe")
	e.acquire(l)
	if e.fake() {
		e.took(start, 0)
	}
	e.NoError(l.Unlock(e.ctx))
}

// repo and number identify the pull request of every PreemptiveLocker of a case.
const (
	repo   = "acme/widget"
	number = 7
)

func (e *env) locker(p LockProvider, event string, options ...PreemptiveLockerOption) *PreemptiveLocker {
	e.t.Helper()
	f, err := NewPreemptiveLockerFactory(p, options...)
	e.NoError(err)
	return f(repo, number, event)
}

// lockerKey returns the key of the lockers.
func (e *env) lockerKey(p LockProvider) int64 {
	e.t.Helper()
	key, err := p.LockKey(e.ctx, repo, number)
	e.NoError(err)
	return key
}

var sentinels = []error{
	ErrLockPreempted, ErrLockTimeout, ErrLockLost, ErrMaxLockDuration, ErrProviderClosed, ErrStopRequested,
	ErrLockNested, ErrLockBusy, context.Canceled, context.DeadlineExceeded,
}

// matchesOnly requires that an error matches exactly these sentinels.
func (e *env) matchesOnly(err error, want ...error) {
	e.t.Helper()
	e.Error(err)
	for _, s := range sentinels {
		e.Equal(slices.Contains(want, s), stderrors.Is(err, s), "%q and %q", err, s)
	}
}

// ---------------------------------------------------------------------------
// The example of the documentation: A, B and C.

func story(e *env) {
	p, q := e.process(), e.process()
	key := e.lockerKey(p)
	a, b, c := e.locker(p, "event A"), e.locker(q, "event B"), e.locker(p, "event C")

	chA := e.acquire(a)
	lockB := e.start(e.ctx, b)
	n := e.payload(chA)
	e.Equal("event B", n.Message)
	e.Equal(key, n.LockKey)

	lockC := e.start(e.ctx, c)
	err := e.failed(lockB)
	e.matchesOnly(err, ErrLockPreempted)
	e.ErrorContains(err, "event C")
	e.pending(lockC)
	e.True(e.isHeld(key))

	e.NoError(a.Release(e.ctx))
	e.closed(chA)
	chC := e.acquired(lockC)
	e.quiet(p, chC)
	e.NoError(b.Release(e.ctx))
	e.True(e.isHeld(key))
	e.Greater(c.Token(), a.Token())
	e.NoError(c.Release(e.ctx))
	e.free(p, key)
}

// ---------------------------------------------------------------------------
// Keys: C1, C2.

func oneKeyEach(e *env) {
	type pull struct {
		repo string
		pr   uint
	}
	pulls := []pull{{"a/b", 1}, {"a/b", 2}, {"a/c", 1}, {"", 0}, {"A/b", 1}, {"a/b ", 1}, {"ä/ß", maxPullRequest}}
	type answer struct {
		pull
		key int64
		err error
	}
	const callers = 5 // of each process and pull request
	p, q := e.process(), e.process()
	answers := make(chan answer, 2*callers*len(pulls))
	for range callers {
		for _, provider := range []LockProvider{p, q} {
			for _, x := range pulls {
				go func() {
					key, err := provider.LockKey(e.ctx, x.repo, x.pr)
					answers <- answer{x, key, err}
				}()
			}
		}
	}
	keys, owners := map[pull]int64{}, map[int64]pull{}
	for range cap(answers) {
		a := receive(e, answers)
		e.NoError(a.err)
		e.NotZero(a.key)
		if known, ok := keys[a.pull]; ok {
			e.Equal(known, a.key, "%v has two keys", a.pull)
		}
		if owner, ok := owners[a.key]; ok {
			e.Equal(owner, a.pull, "two pull requests have key %d", a.key)
		}
		keys[a.pull], owners[a.key] = a.key, a.pull
	}
	e.Len(keys, len(pulls))

	later := e.process()
	for _, x := range pulls {
		key, err := later.LockKey(e.ctx, x.repo, x.pr)
		e.NoError(err)
		e.Equal(keys[x], key)
	}
}

func knownKeyIsRead(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	if !e.fake() {
		_, err := e.admin.Exec(`ALTER TABLE env_locks ADD CONSTRAINT no_more CHECK (false) NOT VALID`)
		e.NoError(err)
		_, err = p.LockKey(e.ctx, repo, number+1)
		e.Error(err, "the table takes rows: this case proves nothing")
	}
	e.Equal(key, e.lockerKey(p))
	e.Equal(key, e.lockerKey(e.process()))
}

// withoutPullRequest tests the recipe of docs/webhook.md for environments, branches, merge queues
// and numbers above 2^31.
func withoutPullRequest(e *env) {
	p, q := e.process(), e.process()
	newLocker, err := NewPreemptiveLockerFactory(p)
	e.NoError(err)
	newOther, err := NewPreemptiveLockerFactory(q)
	e.NoError(err)
	names := []string{
		"github.com/186853002", "github.com/186853002/env/production", "github.com/186853002/env/staging",
		"github.com/186853002/branch/main", "github.com/186853002/merge-queue/main", "git.example/5000000000/run/9007199254740993",
	}
	var held []*PreemptiveLocker
	var stops []<-chan NotificationPayload
	// All of them are held concurrently, and no holder is notified.
	for _, name := range names {
		l := newLocker(name, 0, "first")
		stops = append(stops, e.acquire(l))
		held = append(held, l)
	}
	for i, name := range names {
		e.Empty(stops[i])
		newer := newOther(name, 0, "newer "+name)
		out := e.start(e.ctx, newer)
		e.Equal("newer "+name, e.payload(stops[i]).Message)
		e.NoError(held[i].Release(e.ctx))
		e.acquired(out)
		e.NoError(newer.Release(e.ctx))
	}

	_, err = newLocker("github.com/186853002", maxPullRequest+1, "too large").Lock(e.ctx)
	e.ErrorContains(err, "put a larger number into the repo")
}

func anyKey(e *env) {
	p, q := e.process(), e.process()
	for _, key := range []int64{0, 1, -1, math.MaxInt64, math.MinInt64, 1 << 32, -1 << 32, math.MaxUint32} {
		holder, ch := e.hold(p, key, "holder")
		e.True(e.isHeld(key), "key %d", key)
		next := e.announced(q, key, "next")
		out := e.start(e.ctx, next)
		n := e.payload(ch)
		e.Equal(key, n.LockKey)
		e.Equal("next", n.Message)
		e.NoError(holder.Unlock(e.ctx))
		e.acquired(out)
		e.NoError(next.Unlock(e.ctx))
	}
}

func doneContextRefused(e *env) {
	p := e.process()
	cancelled, cancel := context.WithCancel(e.ctx)
	cancel()
	expired, cancel := context.WithDeadline(e.ctx, time.Now().Add(-time.Second))
	defer cancel()
	for _, ctx := range []context.Context{cancelled, expired} {
		l, err := p.New(ctx, e.key(), "late")
		e.matchesOnly(err, ctx.Err())
		e.Nil(l)
		_, err = p.LockKey(ctx, repo, number)
		e.matchesOnly(err, ctx.Err())
		early := e.lock(p, e.key(), "early")
		e.matchesOnly(early.Notify(ctx), ctx.Err())
		e.matchesOnly(e.failed(e.start(ctx, early)), ctx.Err())
		e.matchesOnly(e.failed(e.start(ctx, e.locker(p, "late"))), ctx.Err())
	}
}

// ---------------------------------------------------------------------------
// Order: C3 to C9.

func olderClaimCannotAcquire(e *env) {
	p, q := e.process(), e.process()
	for _, other := range []LockProvider{p, q} {
		key := e.key()
		older := e.announced(p, key, "older")
		// older does not listen yet, so nothing is delivered to it.
		newer := e.announced(other, key, "newer event")
		err := e.failed(e.start(e.ctx, older))
		e.matchesOnly(err, ErrLockPreempted)
		e.ErrorContains(err, "newer event")
		e.False(e.isHeld(key))
		ch := e.acquire(newer)
		e.quiet(other, ch)
		e.NoError(newer.Unlock(e.ctx))

		after := e.announced(p, key, "after")
		e.NoError(e.announced(other, key, "gone").Notify(e.ctx))
		e.matchesOnly(e.failed(e.start(e.ctx, after)), ErrLockPreempted)
	}
}

func announceAgain(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	a, b := e.announced(p, key, "a"), e.announced(q, key, "b")
	e.NoError(a.Notify(e.ctx))
	err := e.failed(e.start(e.ctx, b))
	e.matchesOnly(err, ErrLockPreempted)
	e.ErrorContains(err, `"a"`)
	e.acquire(a)
	e.NoError(a.Unlock(e.ctx))
}

func waiterLeaves(e *env) {
	p, q := e.process(WithLockTimeout(time.Hour)), e.process()
	for _, other := range []LockProvider{p, q} {
		key := e.key()
		holder, _ := e.hold(q, key, "holder")
		waiter := e.announced(p, key, "waiter")
		out := e.start(e.ctx, waiter)
		e.waits(waiter)
		e.pending(out)

		start := time.Now()
		e.announced(other, key, "newer event")
		err := e.failed(out)
		if e.fake() {
			e.took(start, 0)
		}
		e.matchesOnly(err, ErrLockPreempted)
		e.ErrorContains(err, "newer event")
		e.Equal(ErrLockPreempted, errors.Cause(err))
		e.True(e.isHeld(key))
		e.NoError(waiter.Unlock(e.ctx))
		e.NoError(holder.Unlock(e.ctx))
		e.free(p, key)
	}
}

func holderIsToldOnce(e *env) {
	p, q := e.process(), e.process()
	for _, other := range []LockProvider{p, q} {
		key := e.key()
		holder, ch := e.hold(p, key, "holder")
		first := e.announced(other, key, "first")
		e.announced(other, key, "second")
		e.NoError(first.Notify(e.ctx))
		e.settle(p)
		e.Equal(NotificationPayload{ID: lockOf(first).claim.id, Message: "first", LockKey: key}, e.payload(ch))
		e.quiet(p, ch)
		e.NoError(holder.Unlock(e.ctx))
		e.closed(ch)
	}
}

func notDisturbed(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.NoError(holder.Notify(e.ctx))
	e.announced(p, e.key(), "another key")
	e.announced(q, e.key(), "another key")
	e.quiet(p, ch)

	e.announced(q, key, "newer")
	e.Equal("newer", e.payload(ch).Message)
	e.NoError(holder.Unlock(e.ctx))
}

func unannouncedDisturbsNobody(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	other := e.lock(p, key, "first without a claim")
	outOther := e.start(e.ctx, other)
	e.waits(other)
	quiet := e.lock(q, key, "without a claim")
	out := e.start(e.ctx, quiet)
	e.waits(quiet)
	e.quiet(p, ch)
	e.pending(out)
	e.pending(outOther)
	e.NoError(other.Unlock(e.ctx))
	e.Error(e.failed(outOther))

	e.NoError(holder.Unlock(e.ctx))
	e.acquired(out)
	e.NoError(quiet.Unlock(e.ctx))
}

func unannouncedIsDisplaced(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	first := e.lock(q, key, "holder without a claim")
	ch := e.acquire(first)

	quiet := e.lock(p, key, "without a claim")
	out := e.start(e.ctx, quiet)
	e.waits(quiet)
	e.announced(q, key, "newer event")
	err := e.failed(out)
	e.matchesOnly(err, ErrLockPreempted)
	e.ErrorContains(err, "newer event")
	e.Equal("newer event", e.payload(ch).Message)

	// A claim that was announced before the wait began does not supersede the waiter.
	later := e.lock(p, key, "later, without a claim")
	out = e.start(e.ctx, later)
	e.waits(later)
	e.NoError(first.Unlock(e.ctx))
	e.acquired(out)
	e.NoError(later.Unlock(e.ctx))
}

func unannouncedHolderIsTold(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	old := e.announced(q, key, "older")
	holder := e.lock(p, key, "holder without a claim")
	ch := e.acquire(holder)
	e.quiet(p, ch)
	newer := e.announced(q, key, "newer")
	e.Equal(NotificationPayload{ID: lockOf(newer).claim.id, Message: "newer", LockKey: key}, e.payload(ch))
	e.matchesOnly(lockOf(holder).Cause(), ErrLockPreempted)
	e.NoError(holder.Unlock(e.ctx))
	e.matchesOnly(e.failed(e.start(e.ctx, old)), ErrLockPreempted)
}

// The claim that was the newest when a lock without a claim came is announced once more. It counts
// as a new claim for a waiter and for a holder.
func adoptedClaimAgain(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	claimant := e.announced(q, key, "claimant")
	holder := e.lock(p, key, "holder without a claim")
	ch := e.acquire(holder)
	waiter := e.lock(p, key, "waiter without a claim")
	out := e.start(e.ctx, waiter)
	e.waits(waiter)
	e.pending(out)

	e.NoError(claimant.Notify(e.ctx))
	e.Equal(NotificationPayload{ID: lockOf(claimant).claim.id, Message: "claimant", LockKey: key}, e.payload(ch))
	e.matchesOnly(e.failed(out), ErrLockPreempted)
	e.NoError(holder.Unlock(e.ctx))
	e.acquire(claimant)
	e.NoError(claimant.Unlock(e.ctx))
}

func newestWins(e *env) {
	const claimants = 24
	key := e.key()
	processes := []LockProvider{e.process(), e.process(), e.process()}
	locks := make([]PreemptableLock, claimants)
	ids := map[uuid.UUID]bool{}
	for i := range locks {
		locks[i] = e.lock(processes[i%len(processes)], key, fmt.Sprint("claimant ", i))
		ids[lockOf(locks[i]).claim.id] = true
	}

	type ending struct {
		i         int
		err       error // of Notify, Lock or Unlock
		preempted bool  // while waiting, or while holding
		payload   NotificationPayload
	}
	endings := make(chan ending, claimants)
	begin := make(chan struct{})
	for i, l := range locks {
		go func() {
			<-begin
			if err := l.Notify(e.ctx); err != nil {
				endings <- ending{i: i, err: err}
				return
			}
			ch, err := l.Lock(e.ctx)
			if stderrors.Is(err, ErrLockPreempted) {
				endings <- ending{i: i, preempted: true}
				return
			}
			if err != nil {
				endings <- ending{i: i, err: err}
				return
			}
			n, ok := <-ch
			endings <- ending{i: i, preempted: ok, payload: n, err: l.Unlock(e.ctx)}
		}()
	}
	close(begin)

	ended := map[int]bool{}
	for range claimants - 1 {
		end := receive(e, endings)
		e.NoError(end.err)
		e.True(end.preempted)
		if end.payload.LockKey != 0 {
			e.True(ids[end.payload.ID])
			e.NotEqual(lockOf(locks[end.i]).claim.id, end.payload.ID)
		}
		ended[end.i] = true
	}
	winner := 0
	for ended[winner] {
		winner++
	}
	e.inPhase(processes[winner%len(processes)], key, held)
	e.settle(processes[winner%len(processes)])
	e.Empty(endings, "nobody is left")
	won := locks[winner]
	for i, l := range locks {
		if i != winner {
			e.Less(claimNumber(l), claimNumber(won), "the winner is not the newest")
			e.Less(lockOf(l).Token(), lockOf(won).Token(), "the winner's token is not the highest")
		}
	}
	e.NoError(won.Unlock(e.ctx))
	end := receive(e, endings)
	e.NoError(end.err)
	e.False(end.preempted)
}

// relay is a provider of a user, on top of another one. It calls step before each call. Its locks
// have only the three methods of the interface.
type relay struct {
	LockProvider
	step func(ctx context.Context, name string) error
}

type relayLock struct {
	PreemptableLock
	step func(ctx context.Context, name string) error
}

func (r *relay) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	if err := r.step(ctx, "LockKey"); err != nil {
		return 0, err
	}
	return r.LockProvider.LockKey(ctx, repo, pr)
}

func (r *relay) New(ctx context.Context, key int64, event string) (PreemptableLock, error) {
	if err := r.step(ctx, "New"); err != nil {
		return nil, err
	}
	l, err := r.LockProvider.New(ctx, key, event)
	if err != nil {
		return nil, err
	}
	return &relayLock{l, r.step}, nil
}

func (r *relayLock) Notify(ctx context.Context) error {
	if err := r.step(ctx, "Notify"); err != nil {
		return err
	}
	return r.PreemptableLock.Notify(ctx)
}

func (r *relayLock) Lock(ctx context.Context) (<-chan NotificationPayload, error) {
	if err := r.step(ctx, "Lock"); err != nil {
		return nil, err
	}
	return r.PreemptableLock.Lock(ctx)
}

func (r *relayLock) Unlock(ctx context.Context) error {
	if err := r.step(ctx, "Unlock"); err != nil {
		return err
	}
	return r.PreemptableLock.Unlock(ctx)
}

func publicInterfacesOnly(e *env) {
	p := e.process()
	var mu sync.Mutex
	var steps []string
	own := &relay{p, func(_ context.Context, name string) error {
		mu.Lock()
		defer mu.Unlock()
		steps = append(steps, name)
		return nil
	}}
	l := e.locker(own, "own")
	ch := e.acquire(l)
	e.Equal([]string{"LockKey", "New", "Notify", "Lock"}, steps)
	e.Zero(l.Token(), "the provider's locks have no token")
	e.NoError(l.Release(e.ctx))
	e.closed(ch)
	e.Equal([]string{"LockKey", "New", "Notify", "Lock", "Unlock"}, steps)

	// Without Cause the payload alone gives the reason.
	key := e.lockerKey(p)
	var cause error
	err := e.locker(own, "disturbed").Do(e.ctx, func(ctx context.Context) error {
		e.announced(p, key, "newer event")
		receive(e, ctx.Done())
		cause = context.Cause(ctx)
		return nil
	})
	e.matchesOnly(cause, ErrLockPreempted)
	e.matchesOnly(err, ErrLockPreempted)
	e.ErrorContains(err, "newer event")
	e.free(p, key)

	// The lock delay is that of the locker.
	start := time.Now()
	l = e.locker(own, "delayed", WithLockDelay(short))
	e.acquire(l)
	e.took(start, short)
	e.NoError(l.Release(e.ctx))
}

// scratch is a provider of a user that is made of nothing but the interfaces. It has one key and
// keeps no strict order of claims.
type scratch struct {
	turn chan struct{} // capacity 1: the lock

	mu     sync.Mutex
	holder *scratchLock
}

type scratchLock struct {
	provider *scratch
	event    string
	ch       chan NotificationPayload
}

func (s *scratch) LockKey(context.Context, string, uint) (int64, error) { return 1, nil }

func (s *scratch) New(_ context.Context, _ int64, event string) (PreemptableLock, error) {
	return &scratchLock{s, event, make(chan NotificationPayload, 1)}, nil
}

func (l *scratchLock) Notify(context.Context) error {
	l.provider.mu.Lock()
	defer l.provider.mu.Unlock()
	if holder := l.provider.holder; holder != nil {
		select {
		case holder.ch <- NotificationPayload{Message: l.event, LockKey: 1}:
		default:
		}
	}
	return nil
}

func (l *scratchLock) Lock(ctx context.Context) (<-chan NotificationPayload, error) {
	select {
	case l.provider.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	l.provider.mu.Lock()
	defer l.provider.mu.Unlock()
	l.provider.holder = l
	return l.ch, nil
}

func (l *scratchLock) Unlock(context.Context) error {
	l.provider.mu.Lock()
	defer l.provider.mu.Unlock()
	if l.provider.holder == l {
		l.provider.holder = nil
		close(l.ch)
		<-l.provider.turn
	}
	return nil
}

func scratchProvider(e *env) {
	s := &scratch{turn: make(chan struct{}, 1)}
	a, b := e.locker(s, "a"), e.locker(s, "b")
	ch := e.acquire(a)
	out := e.start(e.ctx, b)
	e.Equal("b", e.payload(ch).Message)
	e.NoError(a.Release(e.ctx))
	e.acquired(out)

	c := e.locker(s, "c")
	ctx, cancel := context.WithCancel(e.ctx)
	out = e.start(ctx, c)
	cancel()
	e.matchesOnly(e.failed(out), context.Canceled)
	e.NoError(b.Release(e.ctx))
	e.NoError(c.Release(e.ctx))

	err := e.locker(s, "d").Do(e.ctx, func(ctx context.Context) error {
		e.NoError((&scratchLock{provider: s, event: "e"}).Notify(ctx))
		receive(e, ctx.Done())
		return context.Cause(ctx)
	})
	e.matchesOnly(err, ErrLockPreempted)
	e.Empty(s.turn)
}

// nilLocks is a provider that returns no lock and no error.
type nilLocks struct {
	LockProvider
	lock PreemptableLock
}

func (n *nilLocks) New(context.Context, int64, string) (PreemptableLock, error) { return n.lock, nil }

func failingProvider(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	boom := stderrors.New("boom")
	for step, unlocks := range map[string]int{"LockKey": 0, "New": 0, "Notify": 1, "Lock": 1} {
		// done makes the context end at the failure.
		for _, done := range []bool{false, true} {
			ctx, cancel := context.WithCancel(e.ctx)
			unlocked := 0
			own := &relay{p, func(ctx context.Context, name string) error {
				switch name {
				case step:
					if done {
						cancel()
					}
					return boom
				case "Unlock":
					unlocked++
					e.NoError(ctx.Err(), "Unlock was given a done context")
					_, bounded := ctx.Deadline()
					e.True(bounded)
				}
				return nil
			}}
			l := e.locker(own, "failing at "+step)
			err := e.failed(e.start(ctx, l))
			e.ErrorIs(err, boom)
			e.Equal(boom, errors.Cause(err))
			e.Equal(unlocks, unlocked, "calls of Unlock after %s has failed", step)
			e.NoError(l.Release(e.ctx))
			e.NoError(l.Release(e.ctx))
			e.Equal(unlocks, unlocked)
			e.Zero(l.Token())
			cancel()
		}
	}
	for _, none := range []PreemptableLock{nil, (*FakePreemptableLock)(nil), (*PostgresLock)(nil)} {
		l := e.locker(&nilLocks{p, none}, "nil")
		e.Error(e.failed(e.start(e.ctx, l)))
		e.NoError(l.Release(e.ctx))
	}
	e.False(e.isHeld(key))

	// An error of Unlock is the error of Release.
	own := &relay{p, func(_ context.Context, name string) error {
		if name == "Unlock" {
			return boom
		}
		return nil
	}}
	l := e.locker(own, "stays")
	e.acquire(l)
	e.ErrorIs(l.Release(e.ctx), boom)
	e.NoError(l.Release(e.ctx))
	e.True(e.isHeld(key))
	e.NoError(l.lock.(*relayLock).PreemptableLock.Unlock(e.ctx))
}

func lateClaim(e *env) {
	p, q := e.process(), e.process()
	key := e.lockerKey(p)
	turnedAway := func(order int64) {
		e.t.Helper()
		l := e.locker(q, "late").Sequence(order)
		err := e.failed(e.start(e.ctx, l))
		e.ErrorIs(err, ErrClaimOutdated)
		e.matchesOnly(err, ErrLockPreempted)
		e.Equal(ErrClaimOutdated, errors.Cause(err))
		e.NoError(l.Release(e.ctx))
	}
	// Each sequence number is higher than the one before.
	for _, order := range []int64{-5, 0, 7} {
		l := e.locker(p, "in time").Sequence(order)
		ch := e.acquire(l)
		turnedAway(order - 1)
		turnedAway(order)
		e.quiet(p, ch)
		e.NoError(l.Release(e.ctx))
		turnedAway(order - 1)

		again := e.locker(q, "delivered again").Sequence(order)
		ch = e.acquire(again)
		next := e.locker(p, "without an order")
		out := e.start(e.ctx, next)
		e.Equal("without an order", e.payload(ch).Message)
		e.NoError(again.Release(e.ctx))
		e.acquired(out)
		e.NoError(next.Release(e.ctx))
	}
	e.free(p, key)
}

// howLate tests that the error distinguishes a sequence number in another unit from a late claim.
func howLate(e *env) {
	p := e.process()
	claim := func(order int64) error {
		e.t.Helper()
		l := e.locker(p, "push").Sequence(order)
		return l.Do(e.ctx, func(context.Context) error { return nil })
	}
	late := func(order int64, want string) time.Time {
		e.t.Helper()
		err := claim(order)
		e.ErrorIs(err, ErrClaimOutdated)
		e.ErrorContains(err, want)
		e.ErrorContains(err, "ResetSequence")
		_, rest, found := strings.Cut(err.Error(), "which was announced at ")
		if !found {
			return time.Time{}
		}
		at, _, _ := strings.Cut(rest, " ")
		since, err := time.Parse(time.RFC3339, at)
		e.NoError(err)
		return since
	}
	e.NoError(claim(math.MinInt64))
	e.NoError(claim(1_700_000_000_000_000_000))
	announced := time.Now()
	e.pass(time.Hour)
	since := late(1_700_000_000_000_000, "1698300000000000000 below the highest, 1700000000000000000, which")
	if e.fake() {
		e.Equal(announced.Truncate(time.Second).UTC(), since)
	} else {
		e.WithinRange(since, announced.Add(-e.limit), announced.Add(e.limit))
	}
	e.NoError(e.locker(p, "without an order").Do(e.ctx, func(context.Context) error { return nil }))
	e.Zero(late(5, `which was announced before the newest claim (newest claim: "without an order")`))
	e.NoError(claim(math.MaxInt64))
	e.NotZero(late(math.MinInt64, "18446744073709551615 below"))
}

// lateClaimAfterLoss tests that a waiter whose session was lost still rejects its own redelivery in
// the new session, while it waits and once it holds.
func lateClaimAfterLoss(e *env) {
	p, q := e.process(), e.process(WithPreemptionTimeout(time.Hour))
	key := e.key()
	blocker, _ := e.hold(q, key, "blocker")
	waiter := e.lock(p, key, "waiter")
	e.NoError(waiter.Notify(ContextWithSequence(e.ctx, 5)))
	out := e.start(e.ctx, waiter)
	e.waits(waiter)
	e.loseSession(p)
	redelivery := func() error {
		return e.lock(q, key, "redelivery").Notify(ContextWithSequence(e.ctx, 5))
	}
	if !e.fake() {
		// The waiter's claim belongs to the new session.
		e.eventually(func() bool {
			var open bool
			e.NoError(e.admin.QueryRow(`SELECT waiting FROM env_lock_overview WHERE lock_key = $1`, key).Scan(&open))
			return open
		})
		e.ErrorIs(redelivery(), ErrClaimOutdated)
	}
	_ = blocker.Unlock(e.ctx)
	ch := e.acquired(out)
	e.ErrorIs(redelivery(), ErrClaimOutdated)
	e.quiet(p, ch)
	e.NoError(waiter.Unlock(e.ctx))
	e.NoError(redelivery())
}

func claimThatGaveUp(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	redelivered := func(order int64) {
		e.t.Helper()
		e.eventually(func() bool {
			l := e.locker(p, "redelivery").Sequence(order)
			ch, err := l.Lock(e.ctx)
			if err != nil {
				e.ErrorIs(err, ErrClaimOutdated)
				return false
			}
			e.NoError(l.Release(e.ctx))
			e.closed(ch)
			return true
		})
	}
	notLocked := e.lock(p, key, "announced, then unlocked")
	e.NoError(notLocked.Notify(ContextWithSequence(e.ctx, 1)))
	e.Error(notLocked.Unlock(e.ctx))
	redelivered(1)

	// Release abandons a lock, and then calls its Unlock.
	aborted := e.lock(p, key, "aborted between Notify and Lock")
	e.NoError(aborted.Notify(ContextWithSequence(e.ctx, 2)))
	lockOf(aborted).abandon()
	e.failed(e.start(e.ctx, aborted))
	e.Error(aborted.Unlock(e.ctx))
	redelivered(2)

	rejected := e.lock(p, key, "an unknown mode")
	e.NoError(rejected.Notify(ContextWithSequence(e.ctx, 3)))
	e.ErrorContains(e.failed(e.start(ContextWithMode(e.ctx, 99), rejected)), "unknown claim mode")
	redelivered(3)

	holder, _ := e.hold(p, key, "holder")
	ctx, cancel := context.WithCancel(e.ctx)
	out := e.start(ctx, e.locker(p, "cancelled").Sequence(4))
	e.waitsFor(p, key)
	cancel()
	e.failed(out)
	e.NoError(holder.Unlock(e.ctx))
	redelivered(4)

	// A holder announces its claim again, and leaves that call. Its claim stays open.
	holds := e.locker(p, "holds").Sequence(5)
	ch := e.acquire(holds)
	own := lockOf(holds.lock)
	own.backend.withdraw(own.claim)
	e.settle(p)
	e.ErrorIs(e.failed(e.start(e.ctx, e.locker(p, "redelivery").Sequence(5))), ErrClaimOutdated)
	e.quiet(p, ch)
	e.NoError(holds.Release(e.ctx))
	redelivered(5)
}

// ---------------------------------------------------------------------------
// Holding: C10 to C15.

func noArtificialWait(e *env) {
	p := e.process()
	start := time.Now()
	for range 10 {
		l := e.locker(p, "alone")
		e.acquire(l)
		e.NoError(l.Release(e.ctx))
	}
	if e.fake() {
		e.took(start, 0)
	} else {
		// This bounds all ten, and the first connection.
		e.Less(time.Since(start), promisedSessionTimeout)
	}
}

func noWaitAfterCleanEnd(e *env) {
	p, q := e.process(), e.process()
	for range 3 {
		a, b := e.locker(p, "a"), e.locker(q, "b")
		ch := e.acquire(a)
		out := e.start(e.ctx, b)
		e.payload(ch)
		start := time.Now()
		e.NoError(a.Release(e.ctx))
		e.acquired(out)
		if e.fake() {
			e.took(start, 0)
		}
		e.NoError(b.Release(e.ctx))
	}
}

func noWaitAfterRevocation(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p, q := e.process(option), e.process()
	a, b := e.locker(p, "a"), e.locker(q, "b")
	e.acquire(a)
	start := time.Now()
	e.acquire(b)
	e.took(start, timeout)
	e.NoError(b.Release(e.ctx))
	e.ErrorIs(a.Release(e.ctx), ErrLockLost)
}

// A predecessor whose session is lost is notified before its successor gets the key. The successor
// waits inside Lock.
func waitAfterDeath(e *env) {
	p, q := e.process(), e.process()
	key := e.lockerKey(q)
	a := e.locker(p, "a")
	ch := e.acquire(a)
	e.suspend(p)
	start := time.Now()

	b := e.locker(q, "b")
	out := e.start(e.ctx, b)
	e.waitsFor(q, key)
	e.payload(ch)
	e.matchesOnly(causeOf(a.lock, NotificationPayload{}, true), ErrLockLost)
	if e.fake() {
		e.took(start, patience(promisedSessionTimeout))
	}
	e.pending(out)
	e.Zero(b.Token(), "b does not hold the lock yet")

	// A waiter that begins later profits from the watch.
	e.pass(promisedSessionTimeout / 20)
	c := e.locker(q, "event of c")
	outC := e.start(e.ctx, c)
	err := e.failed(out)
	e.matchesOnly(err, ErrLockPreempted)
	e.ErrorContains(err, "event of c")
	e.NoError(b.Release(e.ctx))
	e.acquired(outC)
	e.took(start, e.sessionTimeout())
	e.NoError(c.Release(e.ctx))

	e.restore(p)
	d := e.locker(p, "d")
	e.acquire(d)
	e.NoError(d.Release(e.ctx))
	e.ErrorIs(a.Release(e.ctx), ErrLockLost)
}

func delayThatIsSet(e *env) {
	p, q := e.process(), e.process()
	const d = 300 * time.Millisecond
	for _, before := range []string{"nobody", "a clean end", "a death"} {
		start := time.Now()
		l := e.locker(p, "after "+before, WithLockDelay(d))
		ch := e.acquire(l)
		e.took(start, d)
		e.quiet(p, ch)
		if before == "a clean end" {
			e.loseSession(p)
			e.payload(ch)
			e.ErrorIs(l.Release(e.ctx), ErrLockLost)
			continue
		}
		e.NoError(l.Release(e.ctx))
	}
	e.free(q, e.lockerKey(q))
}

func channelUnread(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p, q := e.process(option), e.process()
	key := e.key()
	for _, revoked := range []bool{false, true} {
		holder, ch := e.hold(p, key, "holder")
		e.Equal(1, cap(ch))
		start := time.Now()
		e.announced(q, key, "first")
		e.announced(q, key, "second")
		if revoked {
			next := e.announced(p, key, "third")
			e.acquire(next)
			e.took(start, timeout)
			e.ErrorIs(holder.Unlock(e.ctx), ErrLockLost)
			e.NoError(next.Unlock(e.ctx))
		} else {
			e.inPhase(p, key, notified)
			e.NoError(holder.Unlock(e.ctx))
		}
		e.Equal("first", e.payload(ch).Message)
		e.closed(ch)
		e.closed(ch)
	}
}

func channelUndisturbed(e *env) {
	p := e.process()
	l, ch := e.hold(p, e.key(), "holder")
	e.NoError(l.Unlock(e.ctx))
	e.closed(ch)
	e.closed(ch)
}

func optionsReplaceDefaults(e *env) {
	p := e.process(WithMaxLockDuration(2*short), WithPreemptionTimeout(3*short))
	q := e.process(WithLockTimeout(short))
	key := e.key()
	start := time.Now()
	holder, ch := e.hold(p, key, "holder")
	waiter := e.lock(q, key, "waiter")
	waiting := time.Now()
	e.matchesOnly(e.failed(e.start(e.ctx, waiter)), ErrLockTimeout, context.DeadlineExceeded)
	e.took(waiting, short)
	e.payload(ch)
	e.took(start, 2*short)
	e.closed(ch)
	e.took(start, 5*short)
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
}

func nextAfterRevocation(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p, q := e.process(option), e.process()
	for _, other := range []LockProvider{p, q} {
		key := e.key()
		holder, ch := e.hold(p, key, "holder")
		start := time.Now()
		next := e.announced(other, key, "next")
		out := e.start(e.ctx, next)
		e.payload(ch)
		e.True(e.isHeld(key))
		e.pending(out)
		chNext := e.acquired(out)
		e.took(start, timeout)
		e.closed(ch)
		e.Greater(lockOf(next).Token(), lockOf(holder).Token())
		e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
		e.quiet(other, chNext)
		e.True(e.isHeld(key))
		e.NoError(next.Unlock(e.ctx))
	}
}

// Once a holder is notified, the preemption timeout runs. No later event restarts or ends it, or
// sends another payload.
func furtherEvents(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	maxDuration := WithMaxLockDuration(0)
	// In real time the max lock duration might pass first.
	if e.fake() {
		maxDuration = WithMaxLockDuration(timeout / 2)
	}
	p, q := e.process(option, maxDuration), e.process()
	key := e.key()
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	start := time.Now()
	holder := e.announced(p, key, "holder")
	ch := e.acquired(e.start(ctx, holder))
	e.announced(q, key, "first")
	e.Equal("first", e.payload(ch).Message)
	time.Sleep(timeout / 4)
	e.announced(q, key, "second")
	cancel()
	time.Sleep(timeout / 4)
	e.NoError(holder.Notify(e.ctx))
	e.announced(q, key, "third")
	e.closed(ch)
	e.took(start, timeout)
	e.matchesOnly(lockOf(holder).Cause(), ErrLockPreempted)
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
	e.free(p, key)
}

func lossAfterNotification(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.announced(q, key, "newer")
	e.Equal("newer", e.payload(ch).Message)
	start := time.Now()
	e.loseSession(p)
	e.closed(ch)
	if e.fake() {
		e.took(start, e.lossAfter())
	}
	e.matchesOnly(lockOf(holder).Cause(), ErrLockPreempted)
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
	e.free(p, key)
}

func timeoutOutlivesEvents(e *env) {
	option, timeout := e.bound(WithLockTimeout, promisedLockTimeout)
	p, q := e.process(option), e.process(WithPreemptionTimeout(time.Hour))
	key := e.key()
	holder, ch := e.hold(q, key, "holder")
	waiter := e.announced(p, key, "waiter")
	start := time.Now()
	out := e.start(e.ctx, waiter)
	for range 3 {
		time.Sleep(timeout / 5)
		// The announcement wakes the waiter.
		e.NoError(waiter.Notify(e.ctx))
	}
	e.matchesOnly(e.failed(out), ErrLockTimeout, context.DeadlineExceeded)
	e.took(start, timeout)
	e.Equal("waiter", e.payload(ch).Message)
	e.NoError(holder.Unlock(e.ctx))
}

func tokensGrow(e *env) {
	p, q := e.process(), e.process()
	key := e.lockerKey(p)
	last := int64(0)
	grown := func(token int64) {
		e.t.Helper()
		e.Greater(token, last)
		last = token
	}
	for i := range 6 {
		provider := []LockProvider{p, q}[i%2]
		l := e.locker(provider, "locker", WithLockDelay(time.Millisecond))
		e.Zero(l.Token())
		ch := e.acquire(l)
		grown(l.Token())
		if i == 3 {
			e.loseSession(provider)
			e.payload(ch)
			e.ErrorIs(l.Release(e.ctx), ErrLockLost)
		} else {
			e.NoError(l.Release(e.ctx))
		}
		e.Equal(last, l.Token())

		quiet := e.lock(provider, key, "without a claim")
		e.Zero(lockOf(quiet).Token())
		e.acquire(quiet)
		grown(lockOf(quiet).Token())
		e.NoError(quiet.Unlock(e.ctx))
	}
	l := e.locker(p, "do", WithLockDelay(time.Millisecond))
	e.NoError(l.Do(e.ctx, func(context.Context) error {
		grown(l.Token())
		return nil
	}))

	failed := e.locker(p, "failed")
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	e.Error(failed.Do(ctx, func(context.Context) error { return nil }))
	e.Zero(failed.Token())
}

// ---------------------------------------------------------------------------
// The causes of a notification: C11 to C14, C16.

// trouble is one cause of a notification.
type trouble struct {
	name     string
	sentinel error
	peer     bool // a peer causes it
	ends     bool // the hold ends immediately
	postgres bool // PostgreSQL only
	// prepare returns what the holder needs for it.
	prepare func(e *env) trap
}

// trap is a trouble that is prepared for one holder.
type trap struct {
	ctx     context.Context // for Lock, or nil for any
	options []LockProviderOption
	after   time.Duration                       // the time between Lock and the notification
	cause   error                               // of context.Cause, if it is not the sentinel
	text    string                              // part of the error
	fire    func(p LockProvider, key int64)     // causes the trouble, or nil if it needs no action
	check   func(e *env, n NotificationPayload) // checks the payload, or nil
}

const newerEvent = "the newer event"

var troubles = []trouble{
	{
		name: "a newer claim", sentinel: ErrLockPreempted, peer: true,
		prepare: func(e *env) trap {
			var claimant PreemptableLock
			return trap{
				text: newerEvent,
				fire: func(_ LockProvider, key int64) { claimant = e.announced(e.process(), key, newerEvent) },
				check: func(e *env, n NotificationPayload) {
					e.Equal(newerEvent, n.Message)
					e.Equal(lockOf(claimant).claim.id, n.ID)
				},
			}
		},
	},
	{
		name: "a cancelled context", sentinel: context.Canceled,
		prepare: func(e *env) trap {
			ctx, cancel := context.WithCancel(e.ctx)
			return trap{ctx: ctx, fire: func(LockProvider, int64) { cancel() }}
		},
	},
	{
		name: "a context cancelled for a cause", sentinel: context.Canceled,
		prepare: func(e *env) trap {
			ctx, cancel := context.WithCancelCause(e.ctx)
			cause := fmt.Errorf("the boiler: %w", ErrLockPreempted) // another lock's error
			return trap{ctx: ctx, cause: cause, text: "the boiler", fire: func(LockProvider, int64) { cancel(cause) }}
		},
	},
	{
		name: "a context's deadline", sentinel: context.DeadlineExceeded,
		prepare: func(e *env) trap {
			ctx := &expiring{Context: e.ctx, done: make(chan struct{})}
			return trap{ctx: ctx, fire: func(LockProvider, int64) { ctx.expire() }}
		},
	},
	{
		name: "the max lock duration", sentinel: ErrMaxLockDuration,
		prepare: func(e *env) trap {
			option, d := e.bound(WithMaxLockDuration, promisedMaxDuration)
			return trap{options: []LockProviderOption{option}, after: d}
		},
	},
	{
		name: "a lost session", sentinel: ErrLockLost, ends: true,
		prepare: func(e *env) trap {
			return trap{after: e.lossAfter(), fire: func(p LockProvider, _ int64) { e.loseSession(p) }}
		},
	},
	{
		name: "a closed provider", sentinel: ErrProviderClosed,
		prepare: func(e *env) trap {
			return trap{fire: func(p LockProvider, _ int64) {
				e.background.Go(func() { _ = p.(io.Closer).Close() })
			}}
		},
	},
	{
		name: "an operator", sentinel: ErrStopRequested, postgres: true,
		prepare: func(e *env) trap {
			return trap{
				text: "maintenance at noon",
				fire: func(_ LockProvider, key int64) {
					_, err := e.admin.Exec(`SELECT pg_notify($1, $2)`, notifyChannel,
						fmt.Sprintf(`{"lockKey": %d, "event": "maintenance at noon"}`, key))
					e.NoError(err)
				},
				check: func(e *env, n NotificationPayload) { e.Equal("maintenance at noon", n.Message) },
			}
		},
	},
}

// expiring is a context whose deadline passes when the test decides.
type expiring struct {
	context.Context
	done chan struct{}
}

func (x *expiring) expire()               { close(x.done) }
func (x *expiring) Done() <-chan struct{} { return x.done }
func (x *expiring) Err() error {
	select {
	case <-x.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// set prepares a trap. Its fire and ctx are never nil.
func (tr trouble) set(e *env) trap {
	trap := tr.prepare(e)
	if trap.ctx == nil {
		trap.ctx = e.ctx
	}
	if trap.fire == nil {
		trap.fire = func(LockProvider, int64) {}
	}
	return trap
}

func troubleCases(fake bool) []contractCase {
	var cases []contractCase
	for _, tr := range troubles {
		if tr.postgres && fake {
			continue
		}
		cases = append(cases,
			contractCase{"C13 notified by " + tr.name, tr.notified},
			contractCase{"C11 disturbed in the lock delay by " + tr.name, tr.duringDelay},
			contractCase{"C16 Do disturbed by " + tr.name, tr.duringDo},
		)
		if !tr.ends {
			cases = append(cases,
				contractCase{"C14 revoked unread after " + tr.name, tr.revokedUnread},
				contractCase{"C14 revoked though read after " + tr.name, tr.revokedRead},
			)
		}
	}
	return cases
}

func (tr trouble) notified(e *env) {
	trap := tr.set(e)
	p := e.process(trap.options...)
	key := e.key()
	holder := e.announced(p, key, "holder")
	start := time.Now()
	ch := e.acquired(e.start(trap.ctx, holder))
	e.NoError(lockOf(holder).Cause())
	trap.fire(p, key)
	n := e.payload(ch)
	e.took(start, trap.after)

	e.Equal(key, n.LockKey)
	e.NotEmpty(n.Message)
	e.Equal(tr.peer, n.ID != lockOf(holder).claim.id, "whose ID is it?")
	if trap.check != nil {
		trap.check(e, n)
	}
	cause := lockOf(holder).Cause()
	e.matchesOnly(cause, tr.sentinel)
	e.ErrorContains(cause, trap.text)
	if tr.ends {
		e.closed(ch)
		e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
	} else {
		e.True(e.isHeld(key), "the holder has not released yet")
		e.NoError(holder.Unlock(e.ctx))
		e.closed(ch)
	}
	e.NoError(holder.Unlock(e.ctx))
	e.eventually(func() bool { return !e.isHeld(key) })
}

func (tr trouble) duringDelay(e *env) {
	trap := tr.set(e)
	p := e.process(trap.options...)
	key := e.lockerKey(p)
	l := e.locker(p, "holder", WithLockDelay(24*time.Hour))
	start := time.Now()
	out := e.start(trap.ctx, l)
	e.inPhase(p, key, held)
	e.pending(out)
	trap.fire(p, key)
	err := e.failed(out)
	e.took(start, trap.after)
	e.matchesOnly(err, tr.sentinel)
	e.ErrorContains(err, trap.text)
	e.eventually(func() bool { return !e.isHeld(key) })
	e.Zero(l.Token())
	e.NoError(l.Release(e.ctx))
}

func (tr trouble) duringDo(e *env) {
	boom := stderrors.New("boom")
	for _, result := range []error{nil, boom} {
		trap := tr.set(e)
		p := e.process(trap.options...)
		key := e.lockerKey(p)
		var cause error
		l := e.locker(p, "holder", WithLockDelay(time.Millisecond))
		start := time.Now()
		err := l.Do(trap.ctx, func(ctx context.Context) error {
			e.NoError(ctx.Err())
			if tr.ends {
				start = time.Now()
			}
			trap.fire(p, key)
			receive(e, ctx.Done())
			cause = context.Cause(ctx)
			return result
		})
		if trap.after > 0 {
			e.took(start, trap.after)
		}
		if trap.cause != nil {
			e.Equal(trap.cause, cause)
		} else {
			e.matchesOnly(cause, tr.sentinel)
		}
		e.matchesOnly(err, tr.sentinel)
		e.Equal(result != nil, stderrors.Is(err, boom))
		e.ErrorContains(err, trap.text)
		e.eventually(func() bool { return !e.isHeld(key) })
		e.NoError(l.Release(e.ctx))
	}
}

func (tr trouble) revokedUnread(e *env) { tr.revoked(e, false) }
func (tr trouble) revokedRead(e *env)   { tr.revoked(e, true) }

func (tr trouble) revoked(e *env, read bool) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	trap := tr.set(e)
	p := e.process(append(trap.options, option)...)
	key := e.key()
	holder := e.announced(p, key, "holder")
	start := time.Now()
	ch := e.acquired(e.start(trap.ctx, holder))
	trap.fire(p, key)
	if read {
		e.payload(ch)
	}
	if e.fake() {
		time.Sleep(time.Until(start.Add(trap.after + timeout - 1)))
		e.True(e.isHeld(key), "revoked too early")
		time.Sleep(time.Nanosecond)
	}
	e.eventually(func() bool { return !e.isHeld(key) })
	e.took(start, trap.after+timeout)
	if !read {
		e.payload(ch)
	}
	e.closed(ch)
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
	e.NoError(holder.Unlock(e.ctx))
}

// ---------------------------------------------------------------------------
// Do: C16.

func doRuns(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	l := e.locker(p, "do")
	type name struct{}
	ctx, cancel := context.WithTimeout(context.WithValue(e.ctx, name{}, "value"), 24*time.Hour)
	defer cancel()
	var inside context.Context
	err := l.Do(ctx, func(fctx context.Context) error {
		inside = fctx
		e.Equal("value", fctx.Value(name{}))
		want, _ := ctx.Deadline()
		got, _ := fctx.Deadline()
		e.Equal(want, got)
		e.True(e.isHeld(key))
		e.NotZero(l.Token())
		e.settle(p)
		return fctx.Err()
	})
	e.NoError(err)
	e.False(e.isHeld(key))
	e.Error(inside.Err(), "the function's context outlives Do")
	e.NoError(l.Release(e.ctx))
	e.free(p, key)

	called := false
	e.Error(l.Do(e.ctx, func(context.Context) error { called = true; return nil }), "a second Do")
	e.Error(e.locker(p, "nil").Do(e.ctx, nil))
	e.False(called)
}

func doAnswersError(e *env) {
	p := e.process()
	boom := errors.New("boom")
	err := e.locker(p, "do").Do(e.ctx, func(context.Context) error { return boom })
	e.ErrorIs(err, boom)
	for _, s := range sentinels {
		e.NotErrorIs(err, s)
	}
	e.free(p, e.lockerKey(p))
}

func doCannotLock(e *env) {
	option, timeout := e.bound(WithLockTimeout, promisedLockTimeout)
	p, q := e.process(option), e.process(WithPreemptionTimeout(time.Hour))
	holder, _ := e.hold(q, e.lockerKey(q), "holder")
	called := false
	l := e.locker(p, "do")
	start := time.Now()
	err := l.Do(e.ctx, func(context.Context) error { called = true; return nil })
	e.matchesOnly(err, ErrLockTimeout, context.DeadlineExceeded)
	e.took(start, timeout)
	e.False(called)
	e.NoError(l.Release(e.ctx))
	e.NoError(holder.Unlock(e.ctx))
}

func doWaitsForFunction(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p, q := e.process(option), e.process()
	key := e.lockerKey(p)
	var next PreemptableLock
	start := time.Now()
	err := e.locker(p, "do").Do(e.ctx, func(ctx context.Context) error {
		next = e.announced(q, key, "next")
		// The function ignores the notification. The next claim acquires the key after the
		// revocation.
		e.acquire(next)
		e.took(start, timeout)
		e.ErrorIs(context.Cause(ctx), ErrLockPreempted)
		return nil
	})
	e.matchesOnly(err, ErrLockPreempted, ErrLockLost)
	e.True(e.isHeld(key), "next holds the key")
	e.NoError(next.Unlock(e.ctx))
}

func doPanics(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	for _, disturbed := range []bool{false, true} {
		l := e.locker(p, "do")
		e.PanicsWithValue("at the disco", func() {
			_ = l.Do(e.ctx, func(ctx context.Context) error {
				if disturbed {
					e.announced(p, key, "newer")
					receive(e, ctx.Done())
				}
				panic("at the disco")
			})
		})
		e.False(e.isHeld(key))
		e.NoError(l.Release(e.ctx))
	}
	e.free(p, key)
}

func doGoexit(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	l := e.locker(p, "do")
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.Do(e.ctx, func(context.Context) error {
			runtime.Goexit()
			return nil
		})
	}()
	receive(e, done)
	e.False(e.isHeld(key))
	e.NoError(l.Release(e.ctx))
	e.free(p, key)
}

func doReleasedInside(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	l := e.locker(p, "do")
	err := l.Do(e.ctx, func(ctx context.Context) error {
		e.NoError(l.Release(e.ctx))
		e.False(e.isHeld(key))
		return nil
	})
	e.NoError(err)
}

// nestedClaims tests that a claim inside the function of a Do that holds the key is rejected, and
// that this Do is not notified.
func nestedClaims(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	fine := func(context.Context, string) error { return nil }
	for name, provider := range map[string]LockProvider{
		"the provider itself":                p,
		"one around it":                      &relay{p, fine},
		"one around it that makes own locks": struct{ LockProvider }{p},
		"one that cannot be compared": struct {
			LockProvider
			_ func()
		}{&relay{p, fine}, nil},
	} {
		newLocker, err := NewPreemptiveLockerFactory(provider)
		e.NoError(err)
		inside := func(ctx context.Context, l lockable) {
			e.t.Helper()
			start := time.Now()
			err := e.failed(e.start(ctx, l))
			e.ErrorIs(err, ErrLockNested, name)
			e.matchesOnly(err, ErrLockNested)
			if e.fake() {
				e.took(start, 0)
			}
		}
		e.NoError(newLocker(repo, number, "outer").Do(e.ctx, func(ctx context.Context) error {
			inner := newLocker(repo, number, "inner")
			inside(ctx, inner)
			e.NoError(inner.Release(e.ctx))
			return newLocker(repo, number+1, "another pull request").Do(ctx, func(ctx context.Context) error {
				inside(ctx, newLocker(repo, number, "two levels below"))
				inside(context.WithoutCancel(ctx), newLocker(repo, number+1, "the inner key"))
				return ctx.Err()
			})
		}), name)
	}

	// The key decides, not the pull request.
	outer := e.locker(p, "outer")
	e.NoError(outer.Do(e.ctx, func(ctx context.Context) error {
		e.NoError(outer.Shield(ctx, time.Minute, func(ctx context.Context) error {
			e.ErrorIs(e.failed(e.start(ctx, e.locker(p, "shielded"))), ErrLockNested)
			return nil
		}))
		l := e.lock(p, key, "its key")
		e.ErrorIs(l.Notify(ctx), ErrLockNested)
		e.ErrorIs(e.failed(e.start(ctx, l)), ErrLockNested)
		e.NoError(l.Unlock(e.ctx))
		other := e.lock(p, e.key(), "another key")
		e.NoError(other.Notify(ctx))
		_, err := other.Lock(ctx)
		e.NoError(err)
		e.NoError(other.Unlock(e.ctx))
		return ctx.Err()
	}))
	e.free(p, key)
}

// notNested tests claims that are not inside a Do's hold, although their context comes from its
// function.
func notNested(e *env) {
	p, q := e.process(), e.process()
	var left context.Context
	first := e.locker(p, "first")
	e.NoError(first.Do(e.ctx, func(ctx context.Context) error {
		left = context.WithoutCancel(ctx)
		e.NoError(first.Release(e.ctx))
		return e.locker(p, "after Release").Do(left, func(context.Context) error { return nil })
	}))
	e.NoError(e.locker(p, "after Do").Do(left, func(context.Context) error { return nil }))

	// A claim of another process, or with another context, cannot be distinguished from a newer
	// claim.
	for name, c := range map[string]struct {
		provider LockProvider
		context  func(context.Context) context.Context
	}{
		"another context": {p, func(context.Context) context.Context { return e.ctx }},
		"another process": {q, context.WithoutCancel},
	} {
		newer := e.locker(c.provider, "newer")
		var out <-chan attempt
		err := e.locker(p, "outer").Do(e.ctx, func(ctx context.Context) error {
			out = e.start(c.context(ctx), newer)
			receive(e, ctx.Done())
			return nil
		})
		e.ErrorIs(err, ErrLockPreempted, name)
		e.matchesOnly(err, ErrLockPreempted)
		e.acquired(out)
		e.NoError(newer.Release(e.ctx))
	}
}

// ---------------------------------------------------------------------------
// Ending: C17 to C21.

func misuse(e *env) {
	p := e.process()
	key := e.key()
	l := e.lock(p, key, "lock")
	e.Error(l.Unlock(e.ctx), "Unlock before Lock")
	e.NoError(l.Notify(e.ctx))
	e.Error(l.Unlock(e.ctx), "Unlock before Lock")
	ch := e.acquire(l)
	e.Error(e.failed(e.start(e.ctx, l)), "a second Lock")
	e.quiet(p, ch)
	e.True(e.isHeld(key))
	e.NoError(l.Unlock(e.ctx))
	e.NoError(l.Unlock(e.ctx))
	e.Error(e.failed(e.start(e.ctx, l)), "Lock after Unlock")
	e.NoError(l.Unlock(e.ctx))

	key = e.lockerKey(p)
	pl := e.locker(p, "locker")
	e.Error(pl.Release(e.ctx), "Release before Lock")
	ch = e.acquire(pl)
	e.Error(e.failed(e.start(e.ctx, pl)), "a second Lock")
	e.quiet(p, ch)
	e.True(e.isHeld(key))
	e.NoError(pl.Release(e.ctx))
	e.NoError(pl.Release(e.ctx))
	e.Error(e.failed(e.start(e.ctx, pl)), "Lock after Release")
	e.NoError(pl.Release(e.ctx))
}

func doneContextReleases(e *env) {
	p, q := e.process(), e.process()
	done, cancel := context.WithCancel(e.ctx)
	cancel()
	key := e.lockerKey(p)

	l := e.locker(p, "locker")
	ch := e.acquire(l)
	if err := l.Release(done); err != nil {
		e.matchesOnly(err, context.Canceled)
	}
	e.closed(ch)
	e.free(q, key)
	e.NoError(l.Release(e.ctx))

	held, ch := e.hold(p, key, "lock")
	if err := held.Unlock(done); err != nil {
		e.matchesOnly(err, context.Canceled)
	}
	e.closed(ch)
	e.free(q, key)
	e.NoError(held.Unlock(e.ctx))

	// The same is true of an Unlock that ends a wait.
	held, _ = e.hold(p, key, "lock")
	waiter := e.lock(q, key, "waiter")
	out := e.start(e.ctx, waiter)
	e.waits(waiter)
	if err := waiter.Unlock(done); err != nil {
		e.matchesOnly(err, context.Canceled)
	}
	e.Error(e.failed(out))
	e.NoError(held.Unlock(e.ctx))
}

func lossToldOnce(e *env) {
	option, _ := e.bound(WithPreemptionTimeout, promisedPreemption)
	p, q := e.process(option), e.process()
	key := e.lockerKey(p)
	done, cancel := context.WithCancel(e.ctx)
	cancel()
	for i, ctx := range []context.Context{e.ctx, done, e.ctx, done} {
		l := e.locker(p, "holder", WithLockDelay(time.Millisecond))
		ch := e.acquire(l)
		if i < 2 {
			e.loseSession(p)
		} else {
			e.announced(q, key, "newer")
		}
		e.payload(ch)
		e.closed(ch)
		err := l.Release(ctx)
		e.matchesOnly(err, ErrLockLost)
		e.Equal(ErrLockLost, errors.Cause(err))
		e.NoError(l.Release(ctx))
		e.NoError(l.Release(e.ctx))
	}
}

func releaseDoesNotWait(e *env) {
	p, q := e.process(), e.process()
	blocked, other := e.key(), e.key()
	holder, _ := e.hold(q, blocked, "holder")
	held, _ := e.hold(p, other, "released")
	var outs []<-chan attempt
	var waiters []PreemptableLock
	for i := range 5 {
		for _, key := range []int64{blocked, other} {
			w := e.lock(p, key, fmt.Sprint("waiter ", i))
			outs = append(outs, e.start(e.ctx, w))
			waiters = append(waiters, w)
			e.waits(w)
		}
	}
	start := time.Now()
	e.NoError(held.Unlock(e.ctx))
	if e.fake() {
		e.took(start, 0)
	}
	for i := 0; i < len(outs); i += 2 {
		e.pending(outs[i])
	}
	for i, w := range waiters {
		e.NoError(w.Unlock(e.ctx))
		receive(e, outs[i])
	}
	e.NoError(holder.Unlock(e.ctx))
}

// stuck is a database that never confirms a release.
type stuck struct{ backend }

func (s stuck) release(ctx context.Context, c claim) *op {
	s.backend.release(ctx, c)
	return &op{done: make(chan struct{})}
}

func releaseIsBounded(e *env) {
	p := e.process()
	key := e.lockerKey(p)
	ctx, cancel := context.WithTimeout(e.ctx, 24*time.Hour)
	defer cancel()
	for _, bound := range []time.Duration{time.Second, promisedRelease, time.Hour} {
		// A lock whose database does not respond.
		l := &FakePreemptableLock{}
		e.NoError(newLock(e.ctx, &l.lock, stuck{p.(*FakeLockProvider).session}, &p.(*FakeLockProvider).conf, key, "stuck"))
		e.acquire(l)
		ctx, cancel := context.WithTimeout(ctx, bound)
		start := time.Now()
		e.Error(l.Unlock(ctx))
		e.took(start, min(bound, promisedRelease))
		cancel()

		// A lock of a user's provider whose Unlock does not return.
		own := &relay{p, func(ctx context.Context, name string) error {
			if name == "Unlock" {
				<-ctx.Done()
			}
			return nil
		}}
		pl := e.locker(own, "slow")
		e.acquire(pl)
		ctx, cancel = context.WithTimeout(e.ctx, bound)
		start = time.Now()
		_ = pl.Release(ctx)
		e.took(start, min(bound, promisedRelease))
		cancel()
		e.free(p, key)
	}
}

func unlockEndsWait(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	for _, ofHolder := range []bool{true, false} {
		holder, ch := e.hold(p, key, "holder")
		provider := q
		if ofHolder {
			provider = p
		}
		waiter := e.lock(provider, key, "waiter")
		out := e.start(e.ctx, waiter)
		e.waits(waiter)
		e.NoError(waiter.Unlock(e.ctx))
		select {
		case a := <-out:
			e.notASentinel(a.err)
		case <-time.After(e.limit):
			e.FailNow("Unlock answered before Lock")
		}
		e.NoError(waiter.Unlock(e.ctx))
		e.quiet(p, ch)
		e.True(e.isHeld(key))
		e.NoError(holder.Unlock(e.ctx))
	}
}

func (e *env) notASentinel(err error) {
	e.t.Helper()
	e.matchesOnly(err)
}

func releaseAtEveryStage(e *env) {
	p := e.process(WithPreemptionTimeout(time.Hour))
	key := e.lockerKey(p)
	end := func(l *PreemptiveLocker, out <-chan attempt) {
		e.t.Helper()
		e.NoError(l.Release(e.ctx))
		e.notASentinel(e.failed(out))
		e.NoError(l.Release(e.ctx))
		e.Zero(l.Token())
	}
	for _, stage := range []string{"LockKey", "New", "Notify", "Lock"} {
		reached := make(chan struct{})
		own := &relay{p, func(ctx context.Context, name string) error {
			if name != stage {
				return nil
			}
			close(reached)
			<-ctx.Done()
			return ctx.Err()
		}}
		l := e.locker(own, "released at "+stage)
		out := e.start(e.ctx, l)
		receive(e, reached)
		end(l, out)
		e.False(e.isHeld(key))
	}

	// While it waits for the key.
	holder, ch := e.hold(p, key, "holder")
	l := e.locker(p, "waiter")
	out := e.start(e.ctx, l)
	e.payload(ch)
	e.waitsFor(p, key)
	end(l, out)
	e.True(e.isHeld(key))
	e.NoError(holder.Unlock(e.ctx))

	// While it waits for the lock delay.
	l = e.locker(p, "delayed", WithLockDelay(24*time.Hour))
	out = e.start(e.ctx, l)
	e.inPhase(p, key, held)
	end(l, out)
	e.False(e.isHeld(key))
	e.free(p, key)

	// At any moment.
	for i := range 20 {
		l := e.locker(p, fmt.Sprint("hurry ", i))
		out := e.start(e.ctx, l)
		for range i {
			runtime.Gosched()
		}
		// Release returns an error until Lock has begun.
		for l.Release(e.ctx) != nil {
			runtime.Gosched()
		}
		if a := receive(e, out); a.err == nil {
			e.closed(a.ch)
		} else {
			e.notASentinel(a.err)
		}
		// A grant that was in flight when the wait ended is given back a moment later.
		e.eventually(func() bool { return !e.isHeld(key) })
	}
}

func staleCalls(e *env) {
	option, _ := e.bound(WithPreemptionTimeout, promisedPreemption)
	p, q := e.process(option), e.process()
	for _, other := range []LockProvider{p, q} {
		for _, revoked := range []bool{false, true} {
			key := e.key()
			stale, _ := e.hold(p, key, "stale")
			next := e.announced(other, key, "next")
			out := e.start(e.ctx, next)
			if !revoked {
				e.NoError(stale.Unlock(e.ctx))
			}
			ch := e.acquired(out)
			if revoked {
				e.ErrorIs(stale.Unlock(e.ctx), ErrLockLost)
			}
			for range 2 {
				e.NoError(stale.Unlock(e.ctx))
			}
			e.quiet(other, ch)
			e.True(e.isHeld(key))
			e.NoError(next.Unlock(e.ctx))
		}
	}
}

func nonHolderFreesNobody(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	for _, provider := range []LockProvider{p, q} {
		fresh := e.lock(provider, key, "never locked")
		e.Error(fresh.Unlock(e.ctx))

		ctx, cancel := context.WithCancel(e.ctx)
		failed := e.lock(provider, key, "failed")
		out := e.start(ctx, failed)
		e.waits(failed)
		cancel()
		e.failed(out)
		e.NoError(failed.Unlock(e.ctx))

		waiter := e.lock(provider, key, "waiter")
		out = e.start(e.ctx, waiter)
		e.waits(waiter)
		e.NoError(waiter.Unlock(e.ctx))
		e.failed(out)
		e.True(e.isHeld(key))
	}
	e.quiet(p, ch)
	e.True(e.isHeld(key))
	e.NoError(holder.Unlock(e.ctx))
}

// The timers and the context of a hold end with it.
func staleTimers(e *env) {
	preemption, _ := e.bound(WithPreemptionTimeout, promisedPreemption)
	maxDuration, longest := e.bound(WithMaxLockDuration, promisedMaxDuration)
	p, q := e.process(preemption, maxDuration), e.process(WithMaxLockDuration(24*time.Hour))
	key := e.key()
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	undisturbed := e.announced(p, key, "undisturbed")
	e.acquired(e.start(ctx, undisturbed))
	e.NoError(undisturbed.Unlock(e.ctx))

	disturbed := e.announced(p, key, "disturbed")
	ch := e.acquired(e.start(ctx, disturbed))
	next := e.announced(q, key, "next")
	e.payload(ch)
	e.NoError(disturbed.Unlock(e.ctx))
	chNext := e.acquire(next)
	cancel()
	// Every timer has fired by then.
	time.Sleep(2 * longest)
	e.quiet(q, chNext)
	e.True(e.isHeld(key))
	e.NoError(next.Unlock(e.ctx))
	e.NoError(disturbed.Unlock(e.ctx))
	e.NoError(undisturbed.Unlock(e.ctx))
}

func failedLockLeavesNothing(e *env) {
	option, _ := e.bound(WithLockTimeout, promisedLockTimeout)
	impatient, p, q := e.process(option), e.process(patient), e.process(WithPreemptionTimeout(time.Hour))
	key := e.lockerKey(q)
	var failed []*PreemptiveLocker
	fail := func(why string, p LockProvider, run func(l *PreemptiveLocker)) {
		e.t.Helper()
		holder, _ := e.hold(q, key, "holder")
		l := e.locker(p, why)
		run(l)
		e.Zero(e.subscribed(p))
		failed = append(failed, l)
		e.NoError(holder.Unlock(e.ctx))
		e.False(e.isHeld(key))
		// No lock waits for it.
		e.free(p, key)
	}
	fail("timeout", impatient, func(l *PreemptiveLocker) {
		e.ErrorIs(e.failed(e.start(e.ctx, l)), ErrLockTimeout)
	})
	fail("cancelled", p, func(l *PreemptiveLocker) {
		ctx, cancel := context.WithCancel(e.ctx)
		out := e.start(ctx, l)
		e.waitsFor(p, key)
		cancel()
		e.ErrorIs(e.failed(out), context.Canceled)
	})
	fail("preempted", p, func(l *PreemptiveLocker) {
		out := e.start(e.ctx, l)
		e.waitsFor(p, key)
		e.announced(q, key, "newer")
		e.ErrorIs(e.failed(out), ErrLockPreempted)
	})
	fail("released", p, func(l *PreemptiveLocker) {
		out := e.start(e.ctx, l)
		e.waitsFor(p, key)
		e.NoError(l.Release(e.ctx))
		e.failed(out)
	})

	// During the lock delay it holds the key already.
	ctx, cancel := context.WithCancel(e.ctx)
	l := e.locker(p, "delayed", WithLockDelay(24*time.Hour))
	out := e.start(ctx, l)
	e.inPhase(p, key, held)
	cancel()
	e.ErrorIs(e.failed(out), context.Canceled)
	e.Zero(e.subscribed(p))
	e.free(q, key)

	// Release is called only now, and only for some of them.
	done := e.locker(q, "done")
	ch := e.acquire(done)
	for _, l := range failed[:2] {
		e.NoError(l.Release(e.ctx))
		e.NoError(l.Release(e.ctx))
	}
	e.quiet(q, ch)
	e.NoError(done.Release(e.ctx))
}

// late is a database that delays the result of an acquire that was granted.
type late struct {
	backend
	meanwhile func()
}

func (l late) acquire(ctx context.Context, stop <-chan struct{}, r request) (answer, error) {
	a, err := l.backend.acquire(ctx, stop, r)
	if a.outcome == granted {
		l.meanwhile()
	}
	return a, err
}

func claimedWithGrant(e *env) {
	p := e.process()
	key := e.key()
	l := e.announced(p, key, "holder")
	var newer PreemptableLock
	inner := lockOf(l).backend
	lockOf(l).backend = late{inner, func() {
		newer = e.announced(p, key, "newer")
		// The claim has reached the lock, which does not know yet that it holds.
		e.eventually(func() bool {
			lockOf(l).mu.Lock()
			defer lockOf(l).mu.Unlock()
			return lockOf(l).missed != nil && lockOf(l).missed.claim.Event == "newer"
		})
	}}
	ch := e.acquire(l)
	select {
	case n := <-ch:
		e.Equal("newer", n.Message)
	default:
		e.Fail("the holder does not know")
	}
	e.NoError(l.Unlock(e.ctx))
	e.acquire(newer)
	e.NoError(newer.Unlock(e.ctx))
	e.free(p, key)
}

func grantedTooLate(e *env) {
	p := e.process()
	for _, cancelled := range []bool{false, true} {
		key := e.key()
		l := e.announced(p, key, "late")
		ctx, cancel := context.WithCancel(e.ctx)
		unlocked := make(chan error, 1)
		lockOf(l).backend = late{lockOf(l).backend, func() {
			if cancelled {
				cancel()
				return
			}
			go func() { unlocked <- l.Unlock(e.ctx) }()
			// The wait has been ended.
			<-lockOf(l).stop
		}}
		err := e.failed(e.start(ctx, l))
		if cancelled {
			e.matchesOnly(err, context.Canceled)
		} else {
			e.notASentinel(err)
			e.NoError(receive(e, unlocked))
		}
		cancel()
		e.NoError(l.Unlock(e.ctx))
		e.free(p, key)
	}
}

func failuresToldApart(e *env) {
	option, timeout := e.bound(WithLockTimeout, promisedLockTimeout)
	p, q := e.process(option), e.process(WithPreemptionTimeout(time.Hour))
	key := e.lockerKey(q)
	holder, _ := e.hold(q, key, "holder")

	start := time.Now()
	err := e.failed(e.start(e.ctx, e.locker(p, "timeout")))
	e.took(start, timeout)
	e.matchesOnly(err, ErrLockTimeout, context.DeadlineExceeded)
	e.Equal(ErrLockTimeout, errors.Cause(err))
	var timeouter interface{ Timeout() bool }
	e.ErrorAs(err, &timeouter)
	e.True(timeouter.Timeout())
	e.ErrorContains(err, repo)

	ctx, cancel := context.WithCancel(e.ctx)
	out := e.start(ctx, e.locker(q, "cancelled"))
	e.waitsFor(q, key)
	cancel()
	err = e.failed(out)
	e.matchesOnly(err, context.Canceled)
	e.Equal(context.Canceled, errors.Cause(err))

	start = time.Now()
	ctx, cancel = context.WithTimeout(e.ctx, timeout/2)
	defer cancel()
	err = e.failed(e.start(ctx, e.locker(q, "deadline")))
	e.matchesOnly(err, context.DeadlineExceeded)
	e.took(start, timeout/2)
	e.Equal(context.DeadlineExceeded, errors.Cause(err))

	out = e.start(e.ctx, e.locker(q, "preempted"))
	e.waitsFor(q, key)
	e.announced(q, key, "newer event")
	err = e.failed(out)
	e.matchesOnly(err, ErrLockPreempted)
	e.Equal(ErrLockPreempted, errors.Cause(err))
	e.ErrorContains(err, ErrLockPreempted.Error())
	e.ErrorContains(err, "newer event")
	e.NoError(holder.Unlock(e.ctx))
}

func contextCauseNotMatched(e *env) {
	p := e.process(WithPreemptionTimeout(time.Hour))
	key := e.lockerKey(p)
	for _, cause := range []error{ErrLockPreempted, ErrLockTimeout, ErrLockLost, ErrProviderClosed} {
		holder, _ := e.hold(p, key, "holder")
		ctx, cancel := context.WithCancelCause(e.ctx)
		out := e.start(ctx, e.locker(p, "waiter"))
		e.waitsFor(p, key)
		cancel(cause)
		err := e.failed(out)
		e.matchesOnly(err, context.Canceled)
		e.Equal(context.Canceled, errors.Cause(err))
		e.ErrorContains(err, cause.Error())

		err = e.failed(e.start(ctx, e.locker(p, "done before")))
		e.matchesOnly(err, context.Canceled)
		_, err = p.New(ctx, key, "done before")
		e.matchesOnly(err, context.Canceled)
		e.NoError(holder.Unlock(e.ctx))
	}

	ctx, cancel := context.WithTimeoutCause(e.ctx, short, ErrLockPreempted)
	defer cancel()
	holder, _ := e.hold(p, key, "holder")
	e.matchesOnly(e.failed(e.start(ctx, e.locker(p, "waiter"))), context.DeadlineExceeded)
	e.NoError(holder.Unlock(e.ctx))
}

// ---------------------------------------------------------------------------
// Close: C22.

func closeEndsAll(e *env) {
	p, q := e.process(), e.process()
	keys := []int64{e.key(), e.key()}
	var locks []PreemptableLock
	var chs []<-chan NotificationPayload
	var outs []<-chan attempt
	for _, key := range keys {
		l, ch := e.hold(p, key, "holder")
		w := e.lock(p, key, "waiter")
		outs = append(outs, e.start(e.ctx, w))
		e.waits(w)
		locks, chs = append(locks, l), append(chs, ch)
	}
	waiter := e.announced(p, keys[0], "claimant")
	e.payload(chs[0])
	e.matchesOnly(e.failed(outs[0]), ErrLockPreempted)
	outs[0] = e.start(e.ctx, waiter)
	e.waits(waiter)

	closed := make(chan error, 2)
	for range 2 {
		go func() { closed <- p.(io.Closer).Close() }()
	}
	for _, out := range outs {
		e.matchesOnly(e.failed(out), ErrProviderClosed)
	}
	n := e.payload(chs[1])
	e.Equal(NotificationPayload{ID: lockOf(locks[1]).claim.id, Message: ErrProviderClosed.Error(), LockKey: keys[1]}, n)
	for i, l := range locks {
		e.Empty(closed, "Close does not wait for the holders")
		e.NoError(l.Unlock(e.ctx))
		e.closed(chs[i])
	}
	e.NoError(receive(e, closed))
	e.NoError(receive(e, closed))
	e.NoError(waiter.Unlock(e.ctx))
	for _, key := range keys {
		e.False(e.isHeld(key))
	}
	// Another process continues.
	e.free(q, keys[0])
}

func closeRevokes(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p := e.process(option)
	key := e.key()
	l, ch := e.hold(p, key, "does not care")
	start := time.Now()
	closed := make(chan error, 1)
	go func() { closed <- p.(io.Closer).Close() }()
	e.NoError(receive(e, closed))
	e.took(start, timeout)
	e.False(e.isHeld(key))
	e.payload(ch)
	e.closed(ch)
	e.matchesOnly(l.Unlock(e.ctx), ErrLockLost)
	e.NoError(l.Unlock(e.ctx))
}

// witness is a database that looks, at every release, whether the lock is still known. Close ends
// the session when no lock is known any longer.
type witness struct {
	backend
	known chan bool
}

func (w witness) release(ctx context.Context, c claim) *op {
	h := w.backend.events()
	h.mu.Lock()
	w.known <- h.locks[c.key] != nil
	h.mu.Unlock()
	return w.backend.release(ctx, c)
}

func givenBackFirst(e *env) {
	option, _ := e.bound(WithPreemptionTimeout, promisedPreemption)
	p := e.process(option)
	for _, revoked := range []bool{false, true} {
		key := e.key()
		l := e.lock(p, key, "holder")
		known := make(chan bool, 1)
		lockOf(l).backend = witness{lockOf(l).backend, known}
		ch := e.acquire(l)
		if revoked {
			e.announced(p, key, "newer")
			e.payload(ch)
		} else {
			e.NoError(l.Unlock(e.ctx))
		}
		e.closed(ch)
		e.True(receive(e, known))
		if revoked {
			e.matchesOnly(l.Unlock(e.ctx), ErrLockLost)
		}
		e.free(p, key)
	}
}

func useAfterClose(e *env) {
	for _, used := range []bool{false, true} {
		p := e.process()
		early := e.lock(p, e.key(), "early")
		announced := e.lock(p, e.key(), "announced")
		pl := e.locker(p, "early")
		if used {
			e.NoError(announced.Notify(e.ctx))
			e.lockerKey(p)
		}
		closer := p.(io.Closer)
		for range 3 {
			e.NoError(closer.Close())
		}
		l, err := p.New(e.ctx, e.key(), "late")
		e.matchesOnly(err, ErrProviderClosed)
		e.Nil(l)
		_, err = p.LockKey(e.ctx, repo, number)
		e.matchesOnly(err, ErrProviderClosed)
		e.matchesOnly(early.Notify(e.ctx), ErrProviderClosed)
		e.matchesOnly(e.failed(e.start(e.ctx, early)), ErrProviderClosed)
		e.matchesOnly(e.failed(e.start(e.ctx, announced)), ErrProviderClosed)
		e.matchesOnly(e.failed(e.start(e.ctx, pl)), ErrProviderClosed)
		e.matchesOnly(e.locker(p, "late").Do(e.ctx, func(context.Context) error { return nil }), ErrProviderClosed)
		e.NoError(early.Unlock(e.ctx))
		e.NoError(pl.Release(e.ctx))
		e.NoError(closer.Close())
	}
}

// ---------------------------------------------------------------------------
// Input: C29, C30, C32. The remaining cases are a table in input_test.go.

func badOptions(e *env) {
	kind, base := LockProviderKind(FakeLockProviderKind), []LockProviderOption(nil)
	if !e.fake() {
		kind, base = PostgresLockProviderKind, []LockProviderOption{WithPostgresBackend(e.uri, "")}
	}
	for name, option := range map[string]LockProviderOption{
		"lock timeout":       WithLockTimeout(-1),
		"max lock duration":  WithMaxLockDuration(-1),
		"preemption timeout": WithPreemptionTimeout(-1),
	} {
		p, err := NewLockProvider(kind, append(base[:len(base):len(base)], option)...)
		e.ErrorContains(err, name)
		e.Nil(p)
	}
	p, err := NewLockProvider(kind, append(base[:len(base):len(base)],
		WithLockTimeout(0), WithMaxLockDuration(0), WithPreemptionTimeout(0), WithLogger(nil))...)
	e.NoError(err)
	e.opened = append(e.opened, p)
	_, err = NewPreemptiveLockerFactory(p, WithLockDelay(-1))
	e.ErrorContains(err, "lock delay")
	_, err = NewPreemptiveLockerFactory(nil)
	e.ErrorContains(err, "provider")

	f, err := NewPreemptiveLockerFactory(p)
	e.NoError(err)
	for what, l := range map[string]*PreemptiveLocker{
		"repo":         f("a\x00b", 1, "event"),
		"UTF-8":        f("a\xffb", 1, "event"),
		"pull request": f("a", maxPullRequest+1, "event"),
	} {
		e.ErrorContains(e.failed(e.start(e.ctx, l)), what)
		e.NoError(l.Release(e.ctx))
	}
}

func anyEvent(e *env) {
	p, q := e.process(), e.process()
	for _, event := range []string{
		"", "\x00", "a\xffb", `"\` + "\n\t'%s$1", "\u2028\U0001F512",
		strings.Repeat("x", 100_000), strings.Repeat("\U0001F512", 10_000), strings.Repeat("\x01\"", 20_000), strings.Repeat("\xff", 9_000),
	} {
		key := e.key()
		holder, ch := e.hold(p, key, event)
		next := e.announced(q, key, event)
		n := e.payload(ch)
		e.True(utf8.ValidString(n.Message))
		e.Equal(len(event) == 0, len(n.Message) == 0)
		if utf8.ValidString(event) && !strings.ContainsRune(event, 0) {
			e.True(strings.HasPrefix(event, n.Message))
		}
		if len(event) < 100 && utf8.ValidString(event) && !strings.ContainsRune(event, 0) {
			e.Equal(event, n.Message)
		}
		e.NoError(holder.Unlock(e.ctx))
		e.acquire(next)
		e.NoError(next.Unlock(e.ctx))
	}
}

func zeroValues(e *env) {
	zeroLock := func(l PreemptableLock) {
		e.t.Helper()
		e.Error(l.Notify(e.ctx))
		_, err := l.Lock(e.ctx)
		e.Error(err)
		e.Error(l.Unlock(e.ctx))
		e.Zero(lockOf(l).Token())
		e.NoError(lockOf(l).Cause())
	}
	var locker PreemptiveLocker
	_, err := locker.Lock(e.ctx)
	e.Error(err)
	e.Error(locker.Release(e.ctx))
	e.Error(locker.Do(e.ctx, func(context.Context) error { return nil }))
	e.Zero(locker.Token())

	if !e.fake() {
		zeroLock(&PostgresLock{})
		var p PostgresLockProvider
		_, err = p.New(e.ctx, 1, "event")
		e.Error(err)
		_, err = p.LockKey(e.ctx, repo, number)
		e.Error(err)
		e.Error(p.Close())
		_, err = NewPostgresLock(e.ctx, nil, 1, e.uri, "event", LockProviderConfig{})
		e.Error(err)
		_, err = NewPostgresLock(e.ctx, &sqlx.DB{}, 1, e.uri, "event", LockProviderConfig{})
		e.Error(err)
		var row PostgresEnvLock
		e.Len(row.ScanValues(), 3)
		e.NotEmpty(row.Columns())
		return
	}
	zeroLock(&FakePreemptableLock{})
	var closed FakeLockProvider
	e.NoError(closed.Close())
	var p FakeLockProvider
	l := e.locker(&p, "on the zero value")
	ch := e.acquire(l)
	key, err := p.LockKey(e.ctx, repo, number)
	e.NoError(err)
	start := time.Now()
	next := e.announced(&p, key, "next")
	e.acquire(next)
	e.took(start, promisedPreemption)
	e.Equal("next", e.payload(ch).Message)
	e.NoError(next.Unlock(e.ctx))
	e.ErrorIs(l.Release(e.ctx), ErrLockLost)
	e.NoError(p.Close())
}
