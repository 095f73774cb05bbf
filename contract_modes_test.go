package locker

import (
	"bytes"
	"context"
	stderrors "errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The cases of TestContract for the modes of claims, labels, the bound of a wait, progress, and the
// errors that describe the other claim. They run on both providers.

var modes = []ClaimMode{Preempt, LetFinish, SkipIfBusy}

// claimIn announces a lock in a mode and calls Lock in the background.
func (e *env) claimIn(p LockProvider, key int64, event string, mode ClaimMode) (PreemptableLock, <-chan attempt) {
	e.t.Helper()
	l := e.lock(p, key, event)
	ctx := ContextWithMode(e.ctx, mode)
	e.NoError(l.Notify(ctx))
	return l, e.start(ctx, l)
}

// everyMode tests that the newer claim's mode decides, whatever those of the holder and the waiter
// are. It does not matter whether the holder receives the message or finds the claim in its row.
func everyMode(e *env) {
	p, q, r := e.process(patient), e.process(patient), e.process(patient)
	for _, heard := range []bool{true, false} {
		for _, holds := range modes {
			for _, waits := range modes {
				for _, comes := range modes {
					e.oneOfEveryMode(p, q, r, holds, waits, comes, heard)
				}
			}
		}
	}
}

func (e *env) oneOfEveryMode(p, q, r LockProvider, holds, waits, comes ClaimMode, heard bool) {
	e.t.Helper()
	what := fmt.Sprintf("holder %v, waiter %v, newer claim %v, heard: %v", holds, waits, comes, heard)
	key := e.key()
	holder, held := e.claimIn(p, key, "holder", holds)
	ch := e.acquired(held)
	if !heard {
		e.suspend(p)
	}
	// left is the claim that waits in the end.
	var left <-chan attempt
	var last PreemptableLock
	stop := ""
	for i, c := range []struct {
		p    LockProvider
		name string
		mode ClaimMode
	}{{q, "waiter", waits}, {r, "newer", comes}} {
		l, out := e.claimIn(c.p, key, c.name, c.mode)
		if c.mode == SkipIfBusy {
			err := e.failed(out)
			e.matchesOnly(err, ErrLockBusy)
			e.ErrorContains(err, `held for `, what)
			e.ErrorContains(err, `"holder"`, what)
			continue
		}
		e.waits(l)
		if c.mode == Preempt && (stop == "" || !heard) {
			stop = c.name
		}
		if i == 1 && left != nil {
			e.matchesOnly(e.failed(left), ErrLockPreempted)
		}
		left, last = out, l
	}
	if !heard {
		e.restore(p)
		// The row names the newest claim.
		if stop != "" {
			stop = lockOf(last).claim.event
		}
	}
	if stop != "" {
		e.Equal(stop, e.payload(ch).Message, what)
		e.matchesOnly(lockOf(holder).Cause(), ErrLockPreempted)
	} else {
		e.quiet(p, ch)
	}
	if left != nil {
		e.pending(left)
	}
	e.NoError(holder.Unlock(e.ctx))
	if left != nil {
		next := e.acquired(left)
		e.quiet(q, next)
		e.NoError(last.Unlock(e.ctx))
	}
	e.free(q, key)
}

// A later claim that preempts notifies the holder, although a claim that lets it finish was
// announced in between.
func preemptAfterLetFinish(e *env) {
	p, q := e.process(), e.process()
	e.lockerKey(p)
	holder := e.locker(p, "holder")
	ch := e.acquire(holder)
	spares := e.locker(q, "spares", WithClaimMode(LetFinish))
	out := e.start(e.ctx, spares)
	e.eventually(func() bool { return e.waiting(q) })
	e.quiet(p, ch)
	newer := e.locker(q, "newer", WithClaimMode(SkipIfBusy)).Mode(Preempt)
	next := e.start(e.ctx, newer)
	e.Equal("newer", e.payload(ch).Message)
	e.matchesOnly(e.failed(out), ErrLockPreempted)
	e.NoError(holder.Release(e.ctx))
	e.acquired(next)
	e.NoError(newer.Release(e.ctx))
}

// waiting reports whether a lock of the process waits and the database knows it.
func (e *env) waiting(p LockProvider) bool {
	h := hubOf(p)
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.locks {
		for ; l != nil; l = l.next {
			l.mu.Lock()
			placed := l.phase == waiting && l.placed
			l.mu.Unlock()
			if placed {
				return true
			}
		}
	}
	return false
}

// skipping tests that a claim that skips is seen by no other claim.
func skipping(e *env) {
	p, q := e.process(patient), e.process(patient)
	key := e.lockerKey(p)
	skip := func() *PreemptiveLocker { return e.locker(q, "skips").Mode(SkipIfBusy) }

	held := skip()
	ch := e.acquire(held)
	e.ErrorIs(e.failed(e.start(e.ctx, skip())), ErrLockBusy)
	e.quiet(q, ch)
	first := e.locker(p, "first").Sequence(7)
	out := e.start(e.ctx, first)
	e.Equal("first", e.payload(ch).Message)
	e.NoError(held.Release(e.ctx))
	ch = e.acquired(out)
	number := claimNumber(first.lock)
	err := e.failed(e.start(e.ctx, skip()))
	e.matchesOnly(err, ErrLockBusy)
	c := conflictOf(e, err)
	e.Equal("first", c.Holder.Event)
	e.Nil(c.Winner)
	e.quiet(p, ch)
	e.ErrorIs(e.failed(e.start(e.ctx, e.locker(q, "again").Sequence(7))), ErrClaimOutdated)
	e.NoError(first.Release(e.ctx))

	// A key that is free, but waited for, is busy until the claim is withdrawn.
	waits := e.lock(p, key, "waits")
	e.NoError(waits.Notify(e.ctx))
	e.Greater(claimNumber(waits), number)
	err = e.failed(e.start(e.ctx, skip()))
	e.matchesOnly(err, ErrLockBusy)
	c = conflictOf(e, err)
	e.Nil(c.Holder)
	e.Nil(c.Winner)
	e.Equal("waits", c.Waiter.Event)
	e.Error(waits.Unlock(e.ctx))
	e.eventually(func() bool {
		l := skip()
		_, err := l.Lock(e.ctx)
		if err == nil {
			e.NoError(l.Release(e.ctx))
		}
		return err == nil
	})

	for _, l := range []*PreemptiveLocker{skip().Sequence(1), e.locker(p, "unknown").Mode(99), e.locker(p, "unknown").Mode(-1)} {
		e.notASentinel(e.failed(e.start(e.ctx, l)))
	}
}

// A key whose holder's session is dead is busy until the session has been watched being dead.
func skipAfterDeath(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	_, ch := e.hold(p, key, "holder")
	skips := func() error {
		l := e.lock(q, key, "skips")
		_, err := l.Lock(ContextWithMode(e.ctx, SkipIfBusy))
		if err == nil {
			e.NoError(l.Unlock(e.ctx))
		}
		return err
	}
	e.ErrorIs(skips(), ErrLockBusy)
	e.suspend(p)
	start := time.Now()
	e.ErrorIs(skips(), ErrLockBusy)
	e.wait(e.sessionTimeout())
	e.eventually(func() bool { return skips() == nil })
	e.GreaterOrEqual(time.Since(start), e.sessionTimeout())
	e.payload(ch)
	e.closed(ch)
	e.restore(p)
}

// boundedWait tests that the bound of the wait is not the lock timeout, and does not end the hold.
func boundedWait(e *env) {
	unit := time.Hour // of virtual time
	if !e.fake() {
		unit = time.Second
	}
	p := e.process(WithLockTimeout(2*unit), WithMaxLockDuration(100*unit), patient)
	q := e.process(WithLockTimeout(2*unit), WithMaxLockDuration(100*unit), patient)
	holder := e.locker(p, "holder").Wait(unit)
	ch := e.acquire(holder)
	for _, wait := range []time.Duration{unit, 3 * unit, 0} {
		start := time.Now()
		l := e.locker(q, "waits").Mode(LetFinish).Wait(wait)
		err := e.failed(e.start(e.ctx, l))
		e.matchesOnly(err, ErrLockTimeout, context.DeadlineExceeded)
		e.Contains(err.Error(), `"holder"`)
		if wait == 0 {
			wait = 2 * unit
		}
		e.took(start, wait)
	}
	e.quiet(p, ch)

	own := &relay{q, func(context.Context, string) error { return nil }}
	longer := e.locker(own, "waits for longer than the provider's lock timeout").Mode(LetFinish).Wait(3 * unit)
	start := time.Now()
	e.matchesOnly(e.failed(e.start(e.ctx, longer)), ErrLockTimeout, context.DeadlineExceeded)
	e.took(start, 3*unit)
	start = time.Now()
	err := e.failed(e.start(e.ctx, e.locker(own, "waits").Mode(LetFinish).Wait(unit)))
	e.matchesOnly(err, ErrLockTimeout, context.DeadlineExceeded)
	e.took(start, unit)
	e.quiet(p, ch)
	e.NoError(holder.Release(e.ctx))
	l := e.locker(own, "holds longer than it would wait").Wait(unit)
	ch = e.acquire(l)
	e.wait(2 * unit)
	e.quiet(q, ch)
	e.NoError(l.Release(e.ctx))

	e.notASentinel(e.failed(e.start(e.ctx, e.locker(q, "negative").Wait(-1))))
}

// A setting that is changed after Lock has no effect, and Release returns an error.
func settingTooLate(e *env) {
	p := e.process()
	for name, set := range map[string]func(*PreemptiveLocker) *PreemptiveLocker{
		"Sequence": func(l *PreemptiveLocker) *PreemptiveLocker { return l.Sequence(1) },
		"Mode":     func(l *PreemptiveLocker) *PreemptiveLocker { return l.Mode(LetFinish) },
		"Labels":   func(l *PreemptiveLocker) *PreemptiveLocker { return l.Labels(map[string]string{"a": "b"}) },
		"Wait":     func(l *PreemptiveLocker) *PreemptiveLocker { return l.Wait(time.Second) },
	} {
		l := e.locker(p, "misused")
		e.acquire(l)
		e.Same(l, set(l))
		err := l.Release(e.ctx)
		e.ErrorContains(err, name+" was called after Lock")
		e.notASentinel(err)
		e.NoError(l.Release(e.ctx))
	}
}

// labelsComeBack tests that the labels come back to the claims that lose.
func labelsComeBack(e *env) {
	p, q := e.process(patient), e.process(patient)
	key := e.lockerKey(p)
	one := map[string]string{"commit": "a1", "url": "https://ci/1?a=1&b=<2>"}
	holder := e.locker(p, "holder").Labels(one)
	ch := e.acquire(holder)

	err := e.failed(e.start(e.ctx, e.locker(q, "skips").Mode(SkipIfBusy)))
	c := conflictOf(e, err)
	e.Equal(key, c.Key)
	e.Equal(repo, c.Repo)
	e.EqualValues(number, c.PullRequest)
	e.Nil(c.Winner)
	e.Nil(c.Foreign)
	e.Equal(*c.Holder, c.Other())
	e.Zero((&ConflictError{}).Other())
	e.Equal("holder", c.Holder.Event)
	e.Equal(one, c.Holder.Labels)
	e.Equal(hostName, c.Holder.Host)
	e.Equal(os.Getpid(), c.Holder.PID)
	e.Equal(holder.Token(), c.Holder.Token)
	e.WithinRange(c.Holder.Since, time.Now().Add(-e.limit), time.Now().Add(e.limit))
	e.Contains(err.Error(), fmt.Sprintf("token %d", holder.Token()))

	two := map[string]string{"actor": "Zoë", "\xff": "a\x00b"}
	waiter := e.locker(q, "waiter").Labels(two)
	out := e.start(e.ctx, waiter)
	e.payload(ch)
	two = map[string]string{"actor": "Zoë", "\uFFFD": "a\uFFFDb"}
	c = conflictOf(e, lockOf(holder.lock).Cause())
	e.Equal("waiter", c.Winner.Event)
	e.Equal(two, c.Winner.Labels)
	e.Equal(os.Getpid(), c.Winner.PID)
	e.Equal("holder", c.Holder.Event)
	e.Equal(one, c.Holder.Labels)
	e.Equal(holder.Token(), c.Holder.Token)
	// An error's labels belong to its reader.
	c.Winner.Labels["actor"] = "changed"

	newest := e.locker(p, "newest").Labels(one)
	last := e.start(e.ctx, newest)
	err = e.failed(out)
	e.matchesOnly(err, ErrLockPreempted)
	c = conflictOf(e, err)
	e.Equal("newest", c.Winner.Event)
	e.Equal(one, c.Winner.Labels)
	e.Equal(hostName, c.Winner.Host)
	e.Contains(err.Error(), fmt.Sprintf(`superseded by the newer claim "newest" (process %d on %s)`, os.Getpid(), hostName))
	e.NoError(holder.Release(e.ctx))
	e.acquired(last)
	e.NoError(newest.Release(e.ctx))

	// Raw locks with labels, and without.
	l := e.lock(p, key, "raw")
	e.NoError(l.Notify(ContextWithLabels(e.ctx, one)))
	e.acquire(l)
	_, err = e.lock(q, key, "skips").Lock(ContextWithMode(e.ctx, SkipIfBusy))
	c = conflictOf(e, err)
	e.Equal(one, c.Holder.Labels)
	e.Empty(c.Repo)
	e.NoError(l.Unlock(e.ctx))
	l, _ = e.hold(p, key, "without")
	_, err = e.lock(q, key, "skips").Lock(ContextWithMode(e.ctx, SkipIfBusy))
	e.Nil(conflictOf(e, err).Holder.Labels)
	e.NoError(l.Unlock(e.ctx))

	// Labels of the greatest length, and of one byte more.
	fits := map[string]string{"a": strings.Repeat("x", maxLabels-len(`{"a":""}`))}
	e.NoError(e.locker(p, strings.Repeat("\x01", maxPayload)).Labels(fits).Do(e.ctx, func(context.Context) error { return nil }))
	fits["a"] += "x"
	e.notASentinel(e.failed(e.start(e.ctx, e.locker(p, "too much").Labels(fits))))
	_, err = e.lock(p, key, "too much").Lock(ContextWithLabels(e.ctx, fits))
	e.ErrorContains(err, "1024")
}

// Labels, a mode or a number that are set to nothing replace those of the context.
func TestContextWithoutLabels(t *testing.T) {
	ctx := ContextWithLabels(t.Context(), map[string]string{"job": "outer"})
	require.Nil(t, LabelsFromContext(ContextWithLabels(ctx, nil)))
	require.Nil(t, LabelsFromContext(ContextWithLabels(ContextWithMode(ctx, LetFinish), nil)))
	require.Equal(t, LetFinish, ModeFromContext(ContextWithLabels(ContextWithMode(ctx, LetFinish), nil)))
	require.Equal(t, ctx, ContextWithLabels(ctx, map[string]string{"job": "outer"}))
}

func conflictOf(e *env, err error) *ConflictError {
	e.t.Helper()
	var c *ConflictError
	e.ErrorAs(err, &c)
	return c
}

// A timeout's error names the holder. The error of a claim that came too late names the newest
// claim.
func errorsSayWho(e *env) {
	timeout := WithLockTimeout(short)
	p, q := e.process(patient), e.process(timeout, patient)
	holder := e.locker(p, "holder").Sequence(9)
	e.acquire(holder)
	err := e.failed(e.start(e.ctx, e.locker(q, "waits").Mode(LetFinish)))
	c := conflictOf(e, err)
	e.Equal("holder", c.Holder.Event)
	e.Nil(c.Winner)
	e.Contains(err.Error(), "held for ")
	e.Equal(ErrLockTimeout, errors.Cause(err))
	err = e.failed(e.start(e.ctx, e.locker(q, "late").Sequence(8)))
	c = conflictOf(e, err)
	e.Equal(repo, c.Repo)
	e.Equal("waits", c.Winner.Event)

	// A waiter returns the newer claim, whether or not it has heard of it.
	r, s := e.process(patient), e.process(patient)
	for _, heard := range []bool{true, false} {
		old := e.start(e.ctx, e.locker(r, "old"))
		e.eventually(func() bool { return e.waiting(r) })
		if !heard {
			e.suspend(r)
		}
		newer := e.locker(s, "newer").Labels(map[string]string{"commit": "c0ffee"})
		out := e.start(e.ctx, newer)
		e.eventually(func() bool { return e.waiting(s) })
		if !heard {
			e.restore(r)
		}
		c = conflictOf(e, e.failed(old))
		e.Equal(ErrLockPreempted, c.Err)
		e.Equal("newer", c.Winner.Event)
		e.Equal(map[string]string{"commit": "c0ffee"}, c.Winner.Labels)
		e.Equal(hostName, c.Winner.Host)
		e.Nil(c.Holder)
		e.ErrorContains(c, `superseded by the newer claim "newer"`)
		e.NoError(newer.Release(e.ctx))
		e.failed(out)
	}
	e.NoError(holder.Release(e.ctx))
}

// progressing tests that of n + 1 successive holds at least one is not notified because of a claim.
func progressing(e *env) {
	max := 10 * time.Minute
	if !e.fake() {
		max = 4 * time.Second
	}
	for _, n := range []int{1, 3} {
		p, q := e.process(WithProgress(n, max), patient), e.process(WithProgress(n, max), patient)
		key := e.key()
		claim := func(p LockProvider) (PreemptableLock, <-chan attempt) {
			l := e.announced(p, key, "newer")
			return l, e.start(e.ctx, l)
		}
		holder, out := claim(p)
		for round := range 3*n + 2 {
			ch := e.acquired(out)
			start := time.Now()
			superseded, before := claim(q)
			e.waits(superseded)
			next, after := claim(q)
			e.failed(before)
			e.waits(next)
			spared := round%(n+1) == n
			if spared {
				e.quiet(p, ch)
				e.True(lockOf(holder).spared.After(start))
			} else {
				e.matchesOnly(causeAfter(e, holder, ch), ErrLockPreempted)
			}
			e.NoError(holder.Unlock(e.ctx))
			holder, out = next, after
			p, q = q, p
		}
		e.acquired(out)
		e.NoError(holder.Unlock(e.ctx))
	}
}

func causeAfter(e *env, l PreemptableLock, ch <-chan NotificationPayload) error {
	e.t.Helper()
	e.payload(ch)
	return lockOf(l).Cause()
}

// A hold that is spared announces its claim again. The claim that was announced in between does not
// end it, but the next one does.
func sparedAgain(e *env) {
	max := 10 * time.Minute
	if !e.fake() {
		// Long enough for a slow machine to announce three claims.
		max = 8 * time.Second
	}
	p, q := e.process(WithProgress(1, max), patient), e.process(WithProgress(1, max), patient)
	key := e.key()
	for _, test := range []struct{ missed, next bool }{{}, {next: true}, {missed: true}, {true, true}} {
		first, ch := e.hold(p, key, "first")
		holder := e.announced(p, key, "holder")
		out := e.start(e.ctx, holder)
		e.payload(ch)
		e.NoError(first.Unlock(e.ctx))
		ch = e.acquired(out)
		// If the message of the claim in between is missed, the check of rows finds the claim.
		if test.missed {
			e.suspend(p)
		}
		older := e.announced(q, key, "older")
		if test.missed {
			e.restore(p)
		}
		e.eventually(func() bool {
			l := lockOf(holder)
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.missed != nil
		})
		e.NoError(holder.Notify(e.ctx))
		if test.next {
			e.Error(e.announced(q, key, "next").Unlock(e.ctx))
			e.Equal("next", e.payload(ch).Message)
		} else {
			e.wait(max + max/8)
			e.quiet(p, ch)
		}
		e.Error(older.Unlock(e.ctx))
		e.NoError(holder.Unlock(e.ctx))
		for range 2 {
			l, _ := e.hold(p, key, "resets the count")
			e.NoError(l.Unlock(e.ctx))
		}
	}
}

// A hold that is spared is notified of the claim after max, and the next one is spared as well.
// Every other cause ends it before.
func progressIsBounded(e *env) {
	max := 10 * time.Minute
	if !e.fake() {
		max = time.Second
	}
	p := e.process(WithProgress(1, max), patient, WithLockTimeout(time.Hour))
	q := e.process(WithProgress(1, max), patient, WithLockTimeout(time.Hour))
	key := e.key()
	spared := func() (PreemptableLock, <-chan NotificationPayload) {
		first, ch := e.hold(p, key, "first")
		second := e.announced(p, key, "second")
		out := e.start(e.ctx, second)
		e.payload(ch)
		e.NoError(first.Unlock(e.ctx))
		return second, e.acquired(out)
	}
	start := time.Now()
	holder, ch := spared()
	newer := e.announced(q, key, "newer")
	out := e.start(e.ctx, newer)
	e.Equal("newer", e.payload(ch).Message)
	e.took(start, max)
	e.matchesOnly(lockOf(holder).Cause(), ErrLockPreempted)
	e.NoError(holder.Unlock(e.ctx))
	ch = e.acquired(out)
	last := e.announced(q, key, "last")
	e.quiet(q, ch)
	e.False(lockOf(newer).spared.IsZero(), "the next one is spared as well")
	e.Error(last.Unlock(e.ctx))
	e.NoError(newer.Unlock(e.ctx))

	// If the message was lost, the row decides.
	holder, ch = spared()
	e.suspend(p)
	newer = e.announced(q, key, "missed")
	e.restore(p)
	e.Equal("missed", e.payload(ch).Message)
	e.Error(newer.Unlock(e.ctx))
	e.NoError(holder.Unlock(e.ctx))

	// A hold that no claim asked to stop resets the count.
	for range 2 {
		l, _ := e.hold(p, key, "undisturbed")
		e.NoError(l.Unlock(e.ctx))
	}
	l, ch := e.hold(p, key, "notified")
	e.Error(e.announced(q, key, "newer").Unlock(e.ctx))
	e.payload(ch)
	e.NoError(l.Unlock(e.ctx))

	for name, end := range map[string]func(cancel context.CancelFunc){
		"context": func(cancel context.CancelFunc) { cancel() },
		"close":   func(context.CancelFunc) { go p.(interface{ Close() error }).Close() },
	} {
		first, ch := e.hold(p, key, "first")
		second := e.announced(p, key, "second")
		ctx, cancel := context.WithCancel(e.ctx)
		out := e.start(ctx, second)
		e.payload(ch)
		e.NoError(first.Unlock(e.ctx))
		ch = e.acquired(out)
		end(cancel)
		e.payload(ch)
		e.NotErrorIs(lockOf(second).Cause(), ErrLockPreempted, name)
		e.NoError(second.Unlock(e.ctx))
		cancel()
		if name == "close" {
			break
		}
	}
}

// The response to the first attempt of a claim, which was never announced, is lost. Before the
// second attempt a claim that preempts is announced. The row asks the holder to stop, and the
// holder is notified, although that claim is older than the response.
func TestStopBeforeTheAnswer(t *testing.T) {
	for _, mode := range []ClaimMode{SkipIfBusy, Preempt} {
		synctest.Test(t, func(t *testing.T) {
			p, err := NewFakeProvider()
			require.NoError(t, err)
			ctx := context.Background()
			holder, err := p.New(ctx, 7, "holder")
			require.NoError(t, err)
			newer, err := p.New(ctx, 7, "newer")
			require.NoError(t, err)
			s := p.session
			ref, _ := s.trust.current()
			s.db.mu.Lock()
			s.db.grantLocked(s.db.rowLocked(7), lockOf(holder).claim, "", ref, progress{}, new(answer))
			s.db.mu.Unlock()
			require.NoError(t, newer.Notify(ctx))
			ch, err := holder.Lock(ContextWithMode(ctx, mode))
			require.NoError(t, err)
			// The check of rows, as with every heartbeat of the other provider.
			s.suspend()
			s.restore()
			require.Equal(t, "newer", (<-ch).Message)
			require.NoError(t, holder.Unlock(ctx))
			require.NoError(t, p.Close())
		})
	}
}

// outcomes tests what OutcomeOf returns for errors of Do: the worst first.
func outcomes(e *env) {
	p, q := e.process(WithPreemptionTimeout(short)), e.process()
	boom := errors.New("boom")
	disturb := func(event string) {
		other := e.locker(q, event)
		out := e.start(e.ctx, other)
		e.background.Add(1)
		go func() {
			defer e.background.Done()
			if a := <-out; a.err == nil {
				_ = other.Release(e.ctx)
			}
		}()
	}
	for _, c := range []struct {
		name     string
		f        func(ctx context.Context) error
		outcome  Outcome
		finished bool
	}{
		{"completed", func(context.Context) error { return nil }, OutcomeCompleted, true},
		{"failed", func(context.Context) error { return boom }, OutcomeFailed, false},
		{"failed because of another lock", func(context.Context) error { return fmt.Errorf("other key: %w", ErrLockPreempted) }, OutcomeFailed, false},
		{"preempted", func(ctx context.Context) error { disturb("newer"); <-ctx.Done(); return context.Cause(ctx) }, OutcomePreempted, false},
		{"preempted and canceled", func(ctx context.Context) error {
			disturb("newer")
			<-ctx.Done()
			return fmt.Errorf("build: %w", ctx.Err())
		}, OutcomePreempted, false},
		{"preempted, but finished", func(ctx context.Context) error { disturb("newer"); <-ctx.Done(); return nil }, OutcomePreempted, true},
		{"preempted and failed", func(ctx context.Context) error { disturb("newer"); <-ctx.Done(); return boom }, OutcomeFailed, false},
	} {
		err := e.locker(p, c.name).Do(e.ctx, c.f)
		outcome, finished := OutcomeOf(errors.Wrap(annotate(err, "job"), "outer"))
		if err == nil {
			outcome, finished = OutcomeOf(err)
		}
		e.Equal(c.outcome, outcome, "%s: %v", c.name, err)
		e.Equal(c.finished, finished, "%s: %v", c.name, err)
	}

	l := e.locker(p, "preempted, revoked and failed")
	err := l.Do(e.ctx, func(ctx context.Context) error {
		disturb("newer")
		<-ctx.Done()
		e.pass(short)
		e.eventually(func() bool { return OutcomeLost == outcomeOfNow(l) })
		return boom
	})
	e.matchesOnly(err, ErrLockPreempted, ErrLockLost)
	e.ErrorIs(err, boom)
	outcome, finished := OutcomeOf(err)
	e.Equal(OutcomeLost, outcome)
	e.False(finished)
}

// outcomeOfNow returns the outcome of a Do whose function would return now.
func outcomeOfNow(l *PreemptiveLocker) Outcome {
	own := lockOf(l.lock)
	own.mu.Lock()
	defer own.mu.Unlock()
	return classify(own.lost)
}

// A function that was never run, because the lock was taken away during the lock delay, was not
// preempted. Its claim was superseded.
func outcomeOfDelay(e *env) {
	p, q := e.process(patient), e.process(patient)
	ran := false
	delayed := e.locker(p, "delayed", WithLockDelay(time.Hour))
	ended := make(chan error, 1)
	go func() { ended <- delayed.Do(e.ctx, func(context.Context) error { ran = true; return nil }) }()
	e.eventually(func() bool { e.pass(time.Second); return e.isHeldBy("delayed") })
	newer := e.locker(q, "newer")
	out := e.start(e.ctx, newer)
	err := receive(e, ended)
	outcome, finished := OutcomeOf(err)
	e.Equal(OutcomeSuperseded, outcome, "%v", err)
	e.False(finished)
	e.False(ran)
	e.acquired(out)
	e.NoError(newer.Release(e.ctx))
}

func (e *env) isHeldBy(event string) bool {
	_, err := e.locker(e.opened[0], "look").Mode(SkipIfBusy).Lock(e.ctx)
	var c *ConflictError
	return stderrors.As(err, &c) && c.Holder != nil && c.Holder.Event == event
}

// A hold that was taken away does not leave its key marked as waited for.
func goneIsNotWaitedFor(e *env) {
	p, q := e.process(patient), e.process(patient)
	key := e.key()
	holder, ch := e.hold(p, key, "holder")
	e.suspend(p)
	if e.fake() {
		e.store.mu.Lock()
		e.store.rowLocked(key).end()
		e.store.mu.Unlock()
	} else {
		_, err := e.admin.Exec(`UPDATE env_lock_state SET holder_id = NULL, holder_session = NULL WHERE lock_key = $1`, key)
		e.NoError(err)
	}
	e.restore(p)
	e.payload(ch)
	e.closed(ch)
	e.eventually(func() bool {
		l := e.lock(q, key, "skips")
		_, err := l.Lock(ContextWithMode(e.ctx, SkipIfBusy))
		if err == nil {
			e.NoError(l.Unlock(e.ctx))
		}
		return err == nil
	})
	e.ErrorIs(holder.Unlock(e.ctx), ErrLockLost)
}

func tokenInContext(e *env) {
	p := e.process()
	e.Zero(TokenFromContext(e.ctx))
	l := e.locker(p, "outer")
	e.NoError(l.Do(e.ctx, func(ctx context.Context) error {
		e.NotZero(l.Token())
		e.Equal(l.Token(), TokenFromContext(ctx))
		f, err := NewPreemptiveLockerFactory(p)
		e.NoError(err)
		inner := f(repo, number+1, "inner")
		return inner.Do(ctx, func(ctx context.Context) error {
			e.Equal(inner.Token(), TokenFromContext(ctx))
			return nil
		})
	}))
}

// The error of an ordinary outcome is one line in a log, and has the name of the package once.
func plainErrors(e *env) {
	timeout := WithLockTimeout(short)
	p, q := e.process(patient), e.process(timeout, patient)
	holder := e.locker(p, "holder").Sequence(2)
	e.acquire(holder)
	done, cancel := context.WithCancel(e.ctx)
	cancel()
	raw := e.lock(q, e.key(), "raw")
	_, rawErr := raw.Lock(done)
	for name, err := range map[string]error{
		"timeout":  e.failed(e.start(e.ctx, e.locker(q, "waits").Mode(LetFinish))),
		"late":     e.failed(e.start(e.ctx, e.locker(q, "late").Sequence(1))),
		"busy":     e.failed(e.start(e.ctx, e.locker(q, "skips").Mode(SkipIfBusy))),
		"context":  e.failed(e.start(done, e.locker(q, "canceled"))),
		"raw":      rawErr,
		"released": e.locker(q, "misused").Release(e.ctx),
		"input":    e.failed(e.start(e.ctx, e.locker(q, "late").Mode(99))),
	} {
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Error("job", "err", err)
		e.Equal(1, strings.Count(log.String(), "\n"), "%s: %s", name, log.String())
		e.NotContains(log.String(), `\n`, name)
		e.NotContains(log.String(), `.go:`, name)
		e.Equal(1, strings.Count(err.Error(), "locker:"), "%s: %v", name, err)
		e.True(strings.HasPrefix(err.Error(), "locker: "), "%s: %v", name, err)
	}
	e.NoError(holder.Release(e.ctx))
}

// A stream of claims against work that takes longer. Without the bound only the last hold finishes.
// With it every fourth hold does.
func TestProgressOfAStream(t *testing.T) {
	for _, n := range []int{0, 3} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, err := NewFakeProvider(WithProgress(n, 10*time.Minute))
				require.NoError(t, err)
				f, err := NewPreemptiveLockerFactory(p)
				require.NoError(t, err)
				var finished, notified atomic.Int64
				var background sync.WaitGroup
				for end := time.Now().Add(time.Hour); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
					background.Go(func() {
						err := f("acme/shop", 1, "push").Do(context.Background(), func(ctx context.Context) error {
							select {
							case <-time.After(time.Second):
								finished.Add(1)
								return nil
							case <-ctx.Done():
								notified.Add(1)
								return context.Cause(ctx)
							}
						})
						if err != nil && !stderrors.Is(err, ErrLockPreempted) {
							t.Error(err)
						}
					})
				}
				background.Wait()
				require.NoError(t, p.Close())
				done := finished.Load()
				holds := done + notified.Load()
				t.Logf("36000 claims, %d holds, %d finished", holds, done)
				if n == 0 {
					require.EqualValues(t, 1, done, "the last, after the stream")
					return
				}
				require.InDelta(t, float64(holds)/float64(n+1), float64(done), 2)
				require.Greater(t, done, int64(1000))
			})
		})
	}
}

func TestOutcomeOf(t *testing.T) {
	for want, err := range map[Outcome]error{
		OutcomeCompleted:  nil,
		OutcomeBusy:       fmt.Errorf("job: %w", ErrLockBusy),
		OutcomeOutdated:   ErrClaimOutdated,
		OutcomeSuperseded: fmt.Errorf("job: %w", ErrLockPreempted),
		OutcomeCanceled:   context.Canceled,
		OutcomeTimeout:    ErrLockTimeout,
		OutcomeStopped:    annotate(ErrStopRequested, "maintenance"),
		OutcomeClosed:     ErrProviderClosed,
		OutcomeExpired:    ErrMaxLockDuration,
		OutcomeFailed:     errors.New("boom"),
		OutcomeLost:       joinErrors(ErrLockPreempted, ErrLockLost),
	} {
		outcome, finished := OutcomeOf(err)
		require.Equal(t, want, outcome)
		require.Equal(t, err == nil, finished)
	}
	outcome, _ := OutcomeOf(context.DeadlineExceeded)
	require.Equal(t, OutcomeCanceled, outcome)
	outcome, _ = OutcomeOf(ErrLockNested)
	require.Equal(t, OutcomeFailed, outcome)

	late := errors.New("not confirmed in time")
	outcome, finished := OutcomeOf((&doError{release: late}).error())
	require.Equal(t, OutcomeCompleted, outcome)
	require.True(t, finished)
	all := (&doError{hold: "x", work: errors.New("boom"), cause: ErrLockPreempted, release: ErrLockLost}).error()
	require.EqualError(t, all, "boom; locker: hold x: "+ErrLockPreempted.Error()+"; "+ErrLockLost.Error())
	outcome, finished = OutcomeOf(all)
	require.Equal(t, OutcomeLost, outcome)
	require.False(t, finished)
	require.NoError(t, (&doError{}).error())

	names := map[string]bool{}
	for o := range OutcomeLost + 2 {
		names[o.String()] = true
	}
	require.Len(t, names, int(OutcomeLost)+1, "each outcome has a name")
	require.Equal(t, "unknown", Outcome(-1).String())
	require.Equal(t, "let_finish", LetFinish.String())
	require.Equal(t, "ClaimMode(7)", ClaimMode(7).String())
}

// The worst of several joined errors counts, in any order. The caller's own cause is no failure.
func TestOutcomeOfMany(t *testing.T) {
	preempted := (&doError{work: context.Canceled, cause: ErrLockPreempted}).error()
	lost := fmt.Errorf("job 2: %w", (&doError{work: nil, release: ErrLockLost}).error())
	for _, err := range []error{stderrors.Join(preempted, lost), stderrors.Join(lost, preempted), fmt.Errorf("%w, %w", preempted, lost)} {
		outcome, finished := OutcomeOf(err)
		require.Equal(t, OutcomeLost, outcome)
		require.False(t, finished)
	}
	outcome, _ := OutcomeOf(stderrors.Join(preempted, ErrLockBusy))
	require.Equal(t, OutcomePreempted, outcome)

	p, err := NewFakeProvider()
	require.NoError(t, err)
	f, err := NewPreemptiveLockerFactory(p)
	require.NoError(t, err)
	shutdown := errors.New("the service is shut down")
	ctx, cancel := context.WithCancelCause(context.Background())
	err = f("a/b", 1, "job").Do(ctx, func(ctx context.Context) error {
		cancel(shutdown)
		<-ctx.Done()
		return context.Cause(ctx)
	})
	require.ErrorIs(t, err, shutdown)
	require.ErrorIs(t, err, context.Canceled)
	outcome, finished := OutcomeOf(err)
	require.Equal(t, OutcomeCanceled, outcome)
	require.False(t, finished)
	require.Equal(t, shutdown.Error(), err.Error(), "it is told once")

	// The failure of another lock counts as the function's.
	err = f("a/b", 1, "outer").Do(context.Background(), func(context.Context) error { return lost })
	outcome, _ = OutcomeOf(err)
	require.Equal(t, OutcomeFailed, outcome)
	require.NoError(t, p.Close())
}

// chain is several errors in one. Its method As looks only at the first, and its method Unwrap
// returns the rest.
type chain []error

func (c chain) Error() string        { return c[0].Error() }
func (c chain) As(target any) bool   { return stderrors.As(c[0], target) }
func (c chain) Is(target error) bool { return stderrors.Is(c[0], target) }
func (c chain) Unwrap() error {
	if len(c) == 1 {
		return nil
	}
	return c[1:]
}

func TestOutcomeOfOddErrors(t *testing.T) {
	lost := (&doError{hold: "x", work: errors.New("boom"), cause: ErrLockPreempted, release: ErrLockLost}).error()
	preempted := (&doError{hold: "x", work: context.Canceled, cause: ErrLockPreempted}).error()
	for _, err := range []error{chain{lost}, chain{lost, preempted}, chain{preempted, lost}} {
		outcome, finished := OutcomeOf(err)
		require.Equal(t, OutcomeLost, outcome)
		require.False(t, finished)
	}
	var none *exec.ExitError
	outcome, _ := OutcomeOf((&doError{work: none, cause: ErrLockPreempted}).error())
	require.Equal(t, OutcomeFailed, outcome)

	require.NotPanics(t, func() { _ = (&ConflictError{}).Error() })
	own := &ConflictError{Err: ErrLockBusy}
	require.ErrorIs(t, own, ErrLockBusy)
	require.EqualError(t, own, ErrLockBusy.Error())
}

// A claim that skips tries once. It does not wait for a key whose dead holder has been watched for
// long enough, if another claim waits for the key.
func TestSkipDoesNotSpin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		process := func() *FakeLockProvider {
			p, err := NewFakeProvider(patient)
			require.NoError(t, err)
			p.once.Do(func() {})
			p.session = store.open(&p.conf)
			return p
		}
		p, q, s := process(), process(), process()
		ctx := context.Background()
		lock := func(p *FakeLockProvider) PreemptableLock {
			l, err := p.New(ctx, 5, "claim")
			require.NoError(t, err)
			return l
		}
		skips := func() error { _, err := lock(s).Lock(ContextWithMode(ctx, SkipIfBusy)); return err }
		holder := lock(p)
		require.NoError(t, holder.Notify(ctx))
		_, err := holder.Lock(ctx)
		require.NoError(t, err)
		p.session.suspend()
		require.ErrorIs(t, skips(), ErrLockBusy)
		time.Sleep(50 * time.Second)
		waits := lock(q)
		require.NoError(t, waits.Notify(ctx))
		left := make(chan error, 1)
		go func() { _, err := waits.Lock(ctx); left <- err }()
		// By then s has watched the holder for long enough, and q has not.
		time.Sleep(15 * time.Second)
		start := time.Now()
		require.ErrorIs(t, skips(), ErrLockBusy)
		require.Zero(t, time.Since(start))
		require.NoError(t, waits.Unlock(ctx))
		require.Error(t, <-left)
		require.NoError(t, skips())
		p.session.restore()
		_ = holder.Unlock(ctx)
		for _, p := range []*FakeLockProvider{p, q, s} {
			require.NoError(t, p.Close())
		}
	})
}

func TestClaimModeText(t *testing.T) {
	for _, mode := range modes {
		text, err := mode.MarshalText()
		require.NoError(t, err)
		var got ClaimMode = 99
		require.NoError(t, got.UnmarshalText(text))
		require.Equal(t, mode, got)
	}
	_, err := ClaimMode(99).MarshalText()
	require.Error(t, err)
	require.ErrorContains(t, new(ClaimMode).UnmarshalText([]byte("fifo")), `"fifo"`)
}

// A command that was ended by the signal of its context has stopped because it was asked to.
func TestOutcomeOfCommand(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	c := exec.CommandContext(ctx, "sleep", "1000")
	require.NoError(t, c.Start())
	cancel(ErrLockPreempted)
	killed := c.Wait()
	require.Error(t, killed)
	outcome, _ := OutcomeOf((&doError{work: fmt.Errorf("deploy: %w", killed), cause: ErrLockPreempted}).error())
	require.Equal(t, OutcomePreempted, outcome)
	outcome, _ = OutcomeOf((&doError{work: killed}).error())
	require.Equal(t, OutcomeFailed, outcome, "it was not notified")
	failed := exec.Command("false").Run()
	outcome, _ = OutcomeOf((&doError{work: failed, cause: ErrLockPreempted}).error())
	require.Equal(t, OutcomeFailed, outcome)
	told := (&doError{hold: "x", work: ErrStopRequested, cause: ErrStopRequested}).error()
	require.EqualError(t, told, ErrStopRequested.Error(), "once")
}

// Claims that may wait for a holder which is not notified wait for longer by default.
func TestDefaultWaits(t *testing.T) {
	for _, c := range []struct {
		options       []LockProviderOption
		waits, finish time.Duration
	}{
		{nil, promisedLockTimeout, promisedMaxDuration + promisedPreemption + promisedLockTimeout},
		{[]LockProviderOption{WithProgress(3, time.Hour)}, promisedLockTimeout + time.Hour, promisedMaxDuration + promisedPreemption + promisedLockTimeout},
		{[]LockProviderOption{WithProgress(3, time.Hour), WithLockTimeout(time.Second)}, time.Second, time.Second},
		{[]LockProviderOption{WithSessionTimeout(time.Minute)}, 70 * time.Second, promisedMaxDuration + promisedPreemption + 70*time.Second},
		{[]LockProviderOption{WithSessionTimeout(time.Second)}, promisedLockTimeout, promisedMaxDuration + promisedPreemption + promisedLockTimeout},
	} {
		synctest.Test(t, func(t *testing.T) {
			p, err := NewFakeProvider(append(c.options, WithPreemptionTimeout(0))...)
			require.NoError(t, err)
			holder, err := p.New(context.Background(), 1, "holder")
			require.NoError(t, err)
			for mode, want := range map[ClaimMode]time.Duration{Preempt: c.waits, LetFinish: c.finish} {
				l, err := p.New(context.Background(), 1, "waits")
				require.NoError(t, err)
				row := p.session.db
				row.mu.Lock()
				// The row names a hold that does not end.
				row.rowLocked(1).holder = lockOf(holder).claim.id
				row.rowLocked(1).session = lockOf(holder).claim.key
				row.live[1] = true
				row.mu.Unlock()
				ctx := ContextWithMode(context.Background(), mode)
				require.NoError(t, l.Notify(ctx))
				start := time.Now()
				_, err = l.Lock(ctx)
				require.ErrorIs(t, err, ErrLockTimeout)
				require.Equal(t, want, time.Since(start), mode)
			}
			require.NoError(t, p.Close())
		})
	}
}

func TestTypedConstructors(t *testing.T) {
	p, err := NewPostgresProvider("postgres://u@localhost/db", WithLockTimeout(time.Second))
	require.NoError(t, err)
	require.Equal(t, time.Second, p.conf.lockTimeout)
	require.NoError(t, p.Close())
	for _, uri := range []string{"", "nonsense"} {
		p, err = NewPostgresProvider(uri)
		require.Error(t, err)
		require.Nil(t, p)
	}
	f, err := NewFakeProvider(WithLockTimeout(-1))
	require.Error(t, err)
	require.Nil(t, f)
	for _, bad := range []LockProviderOption{WithProgress(-1, time.Second), WithProgress(1, 0), WithProgress(1, -1), WithProgress(math.MaxInt, time.Second)} {
		_, err := NewFakeProvider(bad)
		require.ErrorContains(t, err, "locker: progress: ")
	}
	f, err = NewFakeProvider(WithMaxLockDuration(math.MaxInt64), WithProgress(1, math.MaxInt64))
	require.NoError(t, err)
	require.EqualValues(t, math.MaxInt64, f.conf.lockTimeout)
	require.EqualValues(t, math.MaxInt64, f.conf.finishTimeout)
	require.NoError(t, f.Close())
	f, err = NewFakeProvider(WithProgress(0, 0))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	_, err = NewPreemptiveLockerFactory(f, WithClaimMode(3))
	require.ErrorContains(t, err, "locker: claim mode: ")
}

// A Lock that fails before its key is known is observed like every other one.
func earlyFailureObserved(e *env) {
	var seen []Observation
	p := e.process(WithObserver(func(o Observation) { seen = append(seen, o) }))
	l := e.locker(p, "too late").Labels(map[string]string{"sha": "1f2e"})
	e.NoError(p.(io.Closer).Close())
	e.matchesOnly(e.failed(e.start(e.ctx, l)), ErrProviderClosed)
	e.Len(seen, 1)
	e.Equal(ObservedFailed, seen[0].Kind)
	e.Equal("too late", seen[0].Event)
	e.Equal(map[string]string{"sha": "1f2e"}, seen[0].Labels)
	e.matchesOnly(seen[0].Err, ErrProviderClosed)

	// Release comes between the creation of a lock and its Lock.
	seen = nil
	aborted := e.lock(e.process(WithObserver(func(o Observation) { seen = append(seen, o) })), e.key(), "aborted")
	lockOf(aborted).abandon()
	e.failed(e.start(e.ctx, aborted))
	e.Len(seen, 1)
	e.Equal(ObservedFailed, seen[0].Kind)
}

// A hold whose loss is found by its own release is observed as lost.
func lossFoundByRelease(e *env) {
	var seen seenSessions
	p := e.process(WithObserver(seen.observe))
	key := e.key()
	l, _ := e.hold(p, key, "holder")
	if e.fake() {
		// Its releases find nothing out.
		e.NoError(l.Unlock(e.ctx))
		return
	}
	_, err := e.admin.Exec(`UPDATE env_lock_state SET holder_id = NULL WHERE lock_key = $1`, key)
	e.NoError(err)
	e.ErrorIs(l.Unlock(e.ctx), ErrLockLost)
	e.Equal([]ObservationKind{ObservedAcquired, ObservedLost}, seen.kinds())
}

// A newer claim arrives before the grant: the observer sees the hold before its notification.
func TestObservedInOrder(t *testing.T) {
	var seen seenSessions
	p, err := NewFakeProvider(WithObserver(seen.observe))
	require.NoError(t, err)
	made, err := p.New(t.Context(), 1, "holder")
	require.NoError(t, err)
	l := lockOf(made)
	require.NoError(t, l.begin(lockCall{asked: time.Now()}))
	require.NoError(t, p.session.hub.subscribe(l))
	l.handle(event{kind: evClaimed, from: standing{number: 1 << 60, id: uuid.New()}, claim: &ClaimInfo{Event: "newer"}})
	a, err := p.session.acquire(t.Context(), l.stop, l.request(terms{}, 0))
	require.NoError(t, err)
	_, err = l.hold(t.Context(), a)
	require.NoError(t, err)
	require.NoError(t, l.Unlock(t.Context()))
	require.Equal(t, []ObservationKind{ObservedAcquired, ObservedNotified, ObservedReleased}, seen.kinds())
}

// The first use of a fake may be concurrent, even if one of the calls fails early.
func TestFakeFirstUse(t *testing.T) {
	p := &FakeLockProvider{}
	f, err := NewPreemptiveLockerFactory(p)
	require.NoError(t, err)
	var all sync.WaitGroup
	all.Go(func() {
		assert.NoError(t, f("org/repo", 1, "fine").Do(t.Context(), func(context.Context) error { return nil }))
	})
	all.Go(func() {
		assert.Error(t, f("", 1, "bad").Wait(-1).Do(t.Context(), func(context.Context) error { return nil }))
	})
	all.Wait()
}

// The cause of a holder of a user's own lock, which has no method Cause, is that of a holder.
func TestOwnLockIsPreempted(t *testing.T) {
	n := NotificationPayload{ID: uuid.New(), Message: "newer", LockKey: 7}
	err := causeOf(&slowLock{}, n, true)
	require.ErrorIs(t, err, ErrLockPreempted)
	outcome, _ := OutcomeOf(err)
	require.Equal(t, OutcomePreempted, outcome)
	require.ErrorContains(t, err, `notified: "newer"`)
	var c *ConflictError
	require.ErrorAs(t, err, &c)
	require.Equal(t, ClaimInfo{ID: n.ID, Event: "newer"}, c.Other())
	require.Equal(t, n.LockKey, c.Key)
}

// The claim of a lock that has ended does not wait, even if Notify makes it the newest afterwards.
func notifyAfterEnd(e *env) {
	p, q := e.process(), e.process()
	key := e.key()
	over, _ := e.hold(p, key, "over")
	e.NoError(over.Unlock(e.ctx))
	holder, ch := e.hold(q, key, "holder")
	e.NoError(over.Notify(e.ctx))
	e.payload(ch)
	e.NoError(holder.Unlock(e.ctx))
	e.eventually(func() bool {
		l := e.lock(q, key, "skips")
		_, err := l.Lock(ContextWithMode(e.ctx, SkipIfBusy))
		if err != nil {
			e.matchesOnly(err, ErrLockBusy)
			return false
		}
		e.NoError(l.Unlock(e.ctx))
		return true
	})
}

// The bound of a wait passes in the Lock of a user's lock, which succeeds nevertheless.
func TestWaitEndsInOwnLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own := &slowLock{}
		f, err := NewPreemptiveLockerFactory(&slowProvider{own})
		require.NoError(t, err)
		_, err = f("org/repo", 1, "waits").Wait(time.Second).Lock(t.Context())
		require.ErrorIs(t, err, ErrLockTimeout)
		require.True(t, own.unlocked)
	})
}

type slowProvider struct{ lock *slowLock }

func (p *slowProvider) New(context.Context, int64, string) (PreemptableLock, error) {
	return p.lock, nil
}
func (p *slowProvider) LockKey(context.Context, string, uint) (int64, error) { return 1, nil }

// slowLock is locked when its context is done.
type slowLock struct{ unlocked bool }

func (l *slowLock) Notify(context.Context) error { return nil }

func (l *slowLock) Lock(ctx context.Context) (<-chan NotificationPayload, error) {
	<-ctx.Done()
	return make(chan NotificationPayload), nil
}

func (l *slowLock) Unlock(context.Context) error {
	l.unlocked = true
	return nil
}

// A waiter announces its claim again while its Lock returns that it is superseded. The claim does
// not stay open.
func TestNotifyWhileSuperseded(t *testing.T) {
	p := &FakeLockProvider{}
	made, err := p.New(t.Context(), 1, "superseded")
	require.NoError(t, err)
	l := lockOf(made)
	require.NoError(t, l.begin(lockCall{asked: time.Now()}))
	require.NoError(t, l.Notify(t.Context()))
	require.True(t, p.session.db.rows[1].open)
	l.leave(t.Context(), ErrLockPreempted)
	require.False(t, p.session.db.rows[1].open)
}

// The lock timeout passes after the database has granted the key, and before the lock is held.
func TestTimeoutBetweenGrantAndHold(t *testing.T) {
	p := &FakeLockProvider{}
	made, err := p.New(t.Context(), 1, "late")
	require.NoError(t, err)
	l := lockOf(made)
	require.NoError(t, l.begin(lockCall{asked: time.Now()}))
	l.mu.Lock()
	l.endWaitLocked(ErrLockTimeout)
	l.mu.Unlock()
	_, err = l.hold(t.Context(), answer{outcome: granted, token: 1, session: 1})
	require.ErrorIs(t, err, ErrLockTimeout)
	var c *ConflictError
	require.ErrorAs(t, err, &c)
	require.Equal(t, int64(1), c.Key)
	l.backend.events().alarms.drop(l)
}
