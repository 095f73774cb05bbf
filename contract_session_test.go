package locker

import (
	"context"
	"sync"
	"time"
)

// The cases of TestContract for sessions that are suspended, reconnected or lost. They run on both
// providers.

// gap is a time for which a session can be suspended without being lost.
func (e *env) gap() time.Duration { return e.sessionTimeout() / 4 }

// wait lets d pass, in a bubble or in real time.
func (e *env) wait(d time.Duration) {
	end := time.Now().Add(d)
	if e.fake() {
		time.Sleep(d)
		return
	}
	e.eventually(func() bool { return time.Now().After(end) })
}

func holdOutlivesConnection(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.acquireAndRelease(q)
	token := lockOf(holder).Token()
	// The waiter was not announced: the holder is not notified.
	waiter := e.lock(q, key, "waiter")
	out := e.start(e.ctx, waiter)
	e.waits(waiter)
	e.suspend(p)
	e.wait(e.gap())
	e.restore(p)
	// A watch that began during the gap would have ended by now.
	e.wait(e.sessionTimeout())
	e.pending(out)
	e.quiet(p, ch)
	e.Equal(token, lockOf(holder).Token())
	e.True(e.isHeld(key))
	e.NoError(holder.Unlock(e.ctx))
	e.acquired(out)
	e.NoError(waiter.Unlock(e.ctx))
}

// patient is the session timeout of a process whose session must not be lost, however slow the
// machine is.
var patient = WithSessionTimeout(time.Minute)

func missedClaim(e *env) {
	p, q := e.process(patient), e.process()
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.suspend(p)
	newer := e.announced(q, key, "newer")
	out := e.start(e.ctx, newer)
	e.waits(newer)
	e.Empty(ch)
	e.restore(p)
	n := e.payload(ch)
	e.Equal("newer", n.Message)
	e.Equal(lockOf(newer).claim.id, n.ID)
	e.NoError(holder.Unlock(e.ctx))
	e.acquired(out)
	e.NoError(newer.Unlock(e.ctx))
}

// A session that loses its connection again and again loses no key: no watch of one of its advisory
// locks lasts long enough.
func flapping(e *env) {
	// Long enough that a slow machine does not lose the session.
	timeout := 3 * e.sessionTimeout()
	p, q := e.process(WithSessionTimeout(timeout)), e.process(WithLockTimeout(time.Hour))
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	waiter := e.lock(q, key, "waiter")
	out := e.start(e.ctx, waiter)
	e.waits(waiter)
	for end := time.Now().Add(2 * timeout); time.Now().Before(end); {
		e.suspend(p)
		e.wait(timeout / 4)
		e.restore(p)
		e.wait(timeout / 16)
	}
	e.pending(out)
	e.quiet(p, ch)
	e.NoError(holder.Unlock(e.ctx))
	e.acquired(out)
	e.NoError(waiter.Unlock(e.ctx))
}

func holdersTimeoutCounts(e *env) {
	long := 2 * e.sessionTimeout()
	p, q := e.process(WithSessionTimeout(long)), e.process(WithLockTimeout(time.Hour))
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.suspend(p)
	start := time.Now()
	waiter := e.lock(q, key, "waiter")
	out := e.start(e.ctx, waiter)
	e.payload(ch)
	if e.fake() {
		e.took(start, patience(long))
	}
	e.pending(out)
	e.acquired(out)
	e.took(start, long)
	e.NoError(waiter.Unlock(e.ctx))
	e.restore(p)
	e.ErrorIs(holder.Unlock(e.ctx), ErrLockLost)
}

// Once the function of a lost hold has returned, its successor need not wait any longer.
func lostGivenBack(e *env) {
	p, q := e.process(), e.process(WithSessionTimeout(time.Hour))
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.loseSession(p)
	e.payload(ch)
	e.closed(ch)
	e.True(e.isHeld(key), "the row still names the hold")
	start := time.Now()
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
	e.eventually(func() bool { return !e.isHeld(key) })
	next, _ := e.hold(q, key, "next")
	if e.fake() {
		e.took(start, 0)
	}
	e.NoError(next.Unlock(e.ctx))
}

// takeAway gives the hold of a key to a session that does not exist.
func (e *env) takeAway(key int64) {
	e.t.Helper()
	if e.fake() {
		e.store.mu.Lock()
		defer e.store.mu.Unlock()
		e.store.rows[key].session = 1
		return
	}
	_, err := e.admin.Exec(`UPDATE env_lock_state SET holder_session = (5e18 + random() * 1e18)::bigint WHERE lock_key = $1`, key)
	e.NoError(err)
}

// An operator takes a key from a holder by giving the hold to a session that does not exist. The
// holder is notified by the check of its row, and its successor waits for the session timeout.
func rowTaken(e *env) {
	p, q := e.process(), e.process(WithLockTimeout(time.Hour))
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	start := time.Now()
	e.takeAway(key)
	if e.fake() {
		// The fake has no other reason to check its rows.
		e.suspend(p)
		e.restore(p)
	}
	waiter := e.lock(q, key, "waiter")
	out := e.start(e.ctx, waiter)
	n := e.payload(ch)
	e.Equal(lockOf(holder).claim.id, n.ID)
	e.closed(ch)
	e.pending(out)
	e.acquired(out)
	e.took(start, e.sessionTimeout())
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
	e.NoError(holder.Unlock(e.ctx))
	e.True(e.isHeld(key))
	e.NoError(waiter.Unlock(e.ctx))
}

// An operator takes a key from a holder whose session is suspended. Its session has a longer timeout
// than that of the successor, which waits for it nevertheless.
func takenFromLongerTimeout(e *env) {
	long := promisedSessionTimeout * 13 / 10
	p, q := e.process(WithSessionTimeout(long)), e.process(WithLockTimeout(time.Hour))
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.suspend(p)
	start := time.Now()
	e.takeAway(key)
	waiter := e.lock(q, key, "waiter")
	out := e.start(e.ctx, waiter)
	e.payload(ch)
	e.acquired(out)
	e.took(start, long)
	e.NoError(waiter.Unlock(e.ctx))
	e.restore(p)
	e.matchesOnly(holder.Unlock(e.ctx), ErrLockLost)
}

func claimsWait(e *env) {
	p := e.process(WithLockTimeout(time.Hour), patient)
	key := e.lockerKey(p)
	first := e.locker(p, "first")
	ch := e.acquire(first)
	e.suspend(p)
	next := e.locker(p, "next")
	out := e.start(e.ctx, next)
	e.inPhase(p, key, waiting)
	released := make(chan error, 1)
	e.background.Go(func() { released <- first.Release(e.ctx) })
	e.wait(e.gap())
	e.pending(out)
	e.restore(p)
	receive(e, released)
	e.closed(ch)
	e.acquired(out)
	e.NoError(next.Release(e.ctx))
}

func claimsWaitNoLonger(e *env) {
	timeout := promisedLockTimeout
	if !e.fake() {
		// Enough time for the first connections.
		timeout = 3 * time.Second
	}
	p := e.process(WithLockTimeout(timeout))
	e.acquireAndRelease(p)
	e.suspend(p)
	start := time.Now()
	err := e.failed(e.start(e.ctx, e.locker(p, "late")))
	e.matchesOnly(err, ErrLockTimeout, context.DeadlineExceeded)
	e.took(start, timeout)

	ctx, cancel := context.WithCancel(e.ctx)
	out := e.start(ctx, e.locker(p, "canceled"))
	e.eventually(func() bool { return e.subscribed(p) == 1 })
	cancel()
	e.matchesOnly(e.failed(out), context.Canceled)
	e.restore(p)
	e.acquireAndRelease(p)
}

func (e *env) acquireAndRelease(p LockProvider) {
	e.t.Helper()
	l := e.locker(p, "first use")
	e.acquire(l)
	e.NoError(l.Release(e.ctx))
}

// Two claims are made for one key. The one that was asked for first, by a process that is
// suspended, arrives last. It is superseded nevertheless.
func orderOfAsking(e *env) {
	p, q := e.process(WithLockTimeout(time.Hour), patient), e.process()
	e.acquireAndRelease(p)
	e.suspend(p)
	older := e.locker(p, "asked first")
	out := e.start(e.ctx, older)
	e.eventually(func() bool { return e.subscribed(p) == 1 })
	e.wait(lateAfter / 2)
	newer := e.locker(q, "asked later")
	ch := e.acquire(newer)
	e.wait(lateAfter)
	e.restore(p)
	err := e.failed(out)
	e.matchesOnly(err, ErrLockPreempted)
	e.ErrorContains(err, "asked later")
	e.quiet(q, ch)
	e.NoError(newer.Release(e.ctx))
}

func sessionsObserved(e *env) {
	var mu sync.Mutex
	var seen []Observation
	p := e.process(patient, WithObserver(func(o Observation) {
		mu.Lock()
		defer mu.Unlock()
		if o.Kind == ObservedSuspended || o.Kind == ObservedReconnected {
			seen = append(seen, o)
		}
	}))
	a, _ := e.hold(p, e.key(), "a")
	b, chB := e.hold(p, e.key(), "b")
	e.suspend(p)
	if e.fake() {
		e.store.mu.Lock()
		e.store.rows[lockOf(b).claim.key].holder = [16]byte{1}
		e.store.mu.Unlock()
	} else {
		_, err := e.admin.Exec(`UPDATE env_lock_state SET holder_id = gen_random_uuid() WHERE lock_key = $1`, lockOf(b).claim.key)
		e.NoError(err)
	}
	e.restore(p)
	e.payload(chB)
	e.eventually(func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(seen) == 2
	})
	mu.Lock()
	e.Equal(ObservedSuspended, seen[0].Kind)
	e.Equal(2, seen[0].Kept)
	e.Error(seen[0].Err)
	e.Equal(ObservedReconnected, seen[1].Kind)
	e.Equal([]int{1, 1}, []int{seen[1].Kept, seen[1].Lost})
	mu.Unlock()
	e.NoError(a.Unlock(e.ctx))
	e.ErrorIs(b.Unlock(e.ctx), ErrLockLost)
	if e.fake() {
		e.store.mu.Lock()
		delete(e.store.rows, lockOf(b).claim.key)
		e.store.mu.Unlock()
	}
}
