package locker

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pkg/errors"
	"github.com/stretchr/testify/require"
)

// The cases of TestContract for C34 and C36.

// shielded runs a step under Shield, inside Do, and announces a newer claim while it runs. The step
// begins when the context of Do's function has been canceled.
func shielded(e *env, p LockProvider, limit time.Duration, step func(inner context.Context, newer <-chan attempt) error) (newer *PreemptiveLocker, err error) {
	e.t.Helper()
	l := e.locker(p, "holder")
	newer = e.locker(p, "newer")
	err = l.Do(e.ctx, func(outer context.Context) error {
		return l.Shield(outer, limit, func(inner context.Context) error {
			out := e.start(e.ctx, newer)
			receive(e, outer.Done())
			e.matchesOnly(context.Cause(outer), ErrLockPreempted)
			e.NoError(inner.Err(), "the step was cut off")
			return step(inner, out)
		})
	})
	return newer, err
}

// pause lets d pass.
func (e *env) pause(d time.Duration) { <-time.After(d) }

func shieldHoldsBack(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p := e.process(option, WithLockTimeout(time.Hour))
	key := e.lockerKey(p)
	boom := errors.New("boom")
	var out <-chan attempt
	newer, err := shielded(e, p, time.Hour, func(inner context.Context, newer <-chan attempt) error {
		out = newer
		e.pause(2 * timeout)
		e.pending(newer)
		e.NoError(inner.Err(), "the step was cut off")
		return boom
	})
	e.ErrorIs(err, ErrLockPreempted)
	e.ErrorIs(err, boom)
	e.acquired(out)
	e.NoError(newer.Release(e.ctx))
	e.free(p, key)
}

// A function that returns after its step has the whole preemption timeout for that, even if the step
// was longer.
func shieldLeavesTime(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p := e.process(option, WithLockTimeout(time.Hour))
	l := e.locker(p, "holder")
	newer := e.locker(p, "newer")
	var out <-chan attempt
	err := l.Do(e.ctx, func(ctx context.Context) error {
		e.NoError(l.Shield(ctx, time.Hour, func(context.Context) error {
			out = e.start(e.ctx, newer)
			receive(e, ctx.Done())
			e.pause(2 * timeout)
			return nil
		}))
		e.pause(timeout / 2)
		e.pending(out)
		return nil
	})
	e.matchesOnly(err, ErrLockPreempted)
	e.acquired(out)
	e.NoError(newer.Release(e.ctx))
	e.free(p, e.lockerKey(p))
}

func shieldGivesBackInTime(e *env) {
	p := e.process(WithPreemptionTimeout(time.Hour), WithLockTimeout(time.Hour))
	key := e.lockerKey(p)
	var out <-chan attempt
	newer, err := shielded(e, p, time.Minute, func(_ context.Context, newer <-chan attempt) error {
		out = newer
		return nil
	})
	e.matchesOnly(err, ErrLockPreempted)
	e.acquired(out)
	e.NoError(newer.Release(e.ctx))
	e.free(p, key)
}

func shieldIsBounded(e *env) {
	option, timeout := e.bound(WithPreemptionTimeout, promisedPreemption)
	p := e.process(option, WithLockTimeout(time.Hour))
	key := e.lockerKey(p)
	start := time.Now()
	newer, err := shielded(e, p, 3*timeout, func(inner context.Context, newer <-chan attempt) error {
		receive(e, inner.Done())
		e.took(start, 3*timeout)
		e.matchesOnly(context.Cause(inner), ErrLockPreempted)
		// The newer claim acquires the key, although the step has not ended.
		e.acquired(newer)
		return nil
	})
	e.matchesOnly(err, ErrLockPreempted, ErrLockLost)
	e.NoError(newer.Release(e.ctx))
	e.free(p, key)
}

func shieldDoesNotOutliveSession(e *env) {
	p := e.process()
	l := e.locker(p, "holder")
	err := l.Do(e.ctx, func(outer context.Context) error {
		return l.Shield(outer, time.Hour, func(inner context.Context) error {
			e.loseSession(p)
			receive(e, inner.Done())
			e.matchesOnly(context.Cause(inner), ErrLockLost)
			return nil
		})
	})
	e.matchesOnly(err, ErrLockLost)

	// The same after the notification.
	q := e.process(WithLockTimeout(time.Hour))
	newer, err := shielded(e, q, time.Hour, func(inner context.Context, _ <-chan attempt) error {
		e.loseSession(q)
		receive(e, inner.Done())
		e.matchesOnly(context.Cause(inner), ErrLockLost)
		return nil
	})
	e.matchesOnly(err, ErrLockPreempted, ErrLockLost)
	e.NoError(newer.Release(e.ctx))
}

func shieldRefuses(e *env) {
	p := e.process()
	ran := func(context.Context) error { e.Fail("the step ran"); return nil }
	l := e.locker(p, "holder")
	e.Error(l.Shield(e.ctx, time.Minute, ran), "before Do")
	err := l.Do(e.ctx, func(ctx context.Context) error {
		e.Error(l.Shield(ctx, 0, ran), "no limit")
		e.Error(l.Shield(ctx, -1, ran), "negative limit")
		e.Error(l.Shield(ctx, time.Minute, nil), "no function")
		var none context.Context
		e.Error(l.Shield(none, time.Minute, ran), "no context")
		e.NoError(l.Shield(ctx, time.Minute, func(ctx context.Context) error {
			e.Error(l.Shield(ctx, time.Minute, ran), "nested")
			return nil
		}))
		return nil
	})
	e.NoError(err)
	e.Error(l.Shield(e.ctx, time.Minute, ran), "after Do")
	e.Error((&PreemptiveLocker{}).Shield(e.ctx, time.Minute, ran), "zero value")

	stop := e.locker(p, "stopped")
	err = stop.Do(e.ctx, func(ctx context.Context) error {
		e.announced(p, e.lockerKey(p), "newer")
		receive(e, ctx.Done())
		err := stop.Shield(ctx, time.Minute, ran)
		e.matchesOnly(err, ErrLockPreempted)
		return nil
	})
	e.matchesOnly(err, ErrLockPreempted)

	other := e.locker(&scratch{turn: make(chan struct{}, 1)}, "of a provider without Shield")
	e.NoError(other.Do(e.ctx, func(ctx context.Context) error {
		e.ErrorContains(other.Shield(ctx, time.Minute, ran), "no Shield")
		return nil
	}))
}

func observations(e *env) {
	var mu sync.Mutex
	seen := map[string][]ObservationKind{}
	var errs []error
	option := WithObserver(func(o Observation) {
		mu.Lock()
		defer mu.Unlock()
		seen[o.Event] = append(seen[o.Event], o.Kind)
		errs = append(errs, o.Err)
		e.GreaterOrEqual(o.After, time.Duration(0))
	})
	timeout, _ := e.bound(WithPreemptionTimeout, promisedPreemption)
	p := e.process(option, timeout)
	key := e.key()

	a, chA := e.hold(p, key, "a")
	b := e.announced(p, key, "b")
	lockB := e.start(e.ctx, b)
	e.payload(chA)
	c := e.announced(p, key, "c")
	e.failed(lockB)
	e.NoError(a.Unlock(e.ctx))
	e.acquire(c)
	e.NoError(c.Unlock(e.ctx))

	revoked, ch := e.hold(p, key, "revoked")
	e.announced(p, key, "never locks")
	e.payload(ch)
	e.closed(ch)
	_ = revoked.Unlock(e.ctx)

	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	e.failed(e.start(ctx, e.announced(p, key, "failed")))

	lost, ch := e.hold(p, e.key(), "lost")
	e.loseSession(p)
	e.payload(ch)
	e.closed(ch)
	_ = lost.Unlock(e.ctx)

	want := map[string][]ObservationKind{
		"a":       {ObservedAcquired, ObservedNotified, ObservedReleased},
		"b":       {ObservedSuperseded},
		"c":       {ObservedAcquired, ObservedReleased},
		"revoked": {ObservedAcquired, ObservedNotified, ObservedRevoked},
		"failed":  {ObservedFailed},
		"lost":    {ObservedAcquired, ObservedNotified, ObservedLost},
		"":        {ObservedSuspended},
	}
	e.eventually(func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(seen["lost"]) == 3 && len(seen["revoked"]) == 3
	})
	mu.Lock()
	defer mu.Unlock()
	e.Equal(want, seen)
	names := map[string]bool{}
	for k := range ObservedSkipped + 2 {
		names[k.String()] = true
	}
	e.Len(names, int(ObservedSkipped)+1, "each kind has a name")
}

// C14, C34, C51: a hold is notified and revoked at the moments that a few lines of arithmetic
// predict, in whatever order the claim, Shield, Unshield, the end of the spared time, the max lock
// duration and the loss of the session come.
func TestRevocationMoments(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	upTo := func(most time.Duration) time.Duration { return 1 + time.Duration(random.Int64N(int64(most))) }
	for range 1000 {
		synctest.Test(t, func(t *testing.T) {
			timeout, most, spared := upTo(time.Minute), upTo(2*time.Minute), time.Duration(0)
			claimed, limit := upTo(3*time.Minute), upTo(4*time.Minute)
			// The second Shield begins after the end of the first.
			first := upTo(3 * time.Minute)
			unshield := first + upTo(4*time.Minute)
			second := unshield + upTo(time.Minute)
			lost := time.Hour
			if random.IntN(4) == 0 {
				lost = upTo(6 * time.Minute)
			}
			if random.IntN(2) == 0 {
				spared = max(time.Millisecond, upTo(2*time.Minute).Round(time.Millisecond))
			}

			told := min(most, max(claimed, spared))
			begins := told
			switch {
			case second < told:
				begins = max(told, second+limit)
			case first < told:
				begins = max(told, min(unshield, first+limit))
			}
			ended := min(begins+timeout, lost)
			what := []any{"seed %d: timeout %v, max %v, spared %v, claimed %v, shields %v and %v for %v, unshield %v, lost %v",
				seed, timeout, most, spared, claimed, first, second, limit, unshield, lost}

			options := []LockProviderOption{WithPreemptionTimeout(timeout), WithMaxLockDuration(most)}
			if spared > 0 {
				options = append(options, WithProgress(1, spared))
			}
			e := newFakeEnv(t)
			e.run(func(e *env) {
				p := e.process(options...)
				l := e.lock(p, 1, "holder")
				if spared > 0 {
					before, _ := e.hold(p, 1, "before")
					e.NoError(l.Notify(e.ctx))
					e.NoError(before.Unlock(e.ctx))
				}
				ch := e.acquire(l)
				start := time.Now()
				after := func(d time.Duration, f func()) {
					e.background.Go(func() {
						time.Sleep(d)
						f()
					})
				}
				shield := func() {
					now := time.Since(start)
					require.Equal(t, now < told && now < lost, lockOf(l).Shield(limit) == nil, what...)
				}
				after(claimed, func() { _ = e.lock(p, 1, "newer").Notify(e.ctx) })
				after(first, shield)
				after(unshield, lockOf(l).Unshield)
				after(second, shield)
				after(lost, func() {
					ref, _ := trustOf(p).current()
					lockOf(l).handle(event{kind: evLost, session: ref.generation, cause: errors.New("lost")})
				})
				e.payload(ch)
				require.Equal(t, min(told, lost), time.Since(start), what...)
				e.closed(ch)
				require.Equal(t, ended, time.Since(start), what...)
				e.ErrorIs(l.Unlock(e.ctx), ErrLockLost)
				e.NoError(l.Unlock(e.ctx))
				e.background.Wait()
			})
		})
	}
}
