package locker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"
)

// phase is the state of a lock. It only moves forward.
//
//	fresh → waiting → held → notified → ended
//
// If the wait fails, waiting is followed by ended. If the lock is released or lost, held is followed
// by ended.
type phase int8

const (
	fresh phase = iota
	waiting
	held
	notified
	ended
)

// lock is the state machine of both providers' locks. It has no goroutine. Timers, the caller's
// context and the backend's events drive it, each from another goroutine, and mu decides which
// comes first.
type lock struct {
	// These are set when the lock is created.
	backend backend
	conf    *LockProviderConfig // of the provider, never changed
	claim   claim
	pull    *pullRequest // of the PreemptiveLocker, for errors, or nil
	onOver  func()       // closes what belongs to this lock alone, or nil for the locks of a provider

	// The list of the key's locks. It is guarded by the hub's mu.
	next, prev *lock
	// The place among the hub's holds, from 1. It is guarded by the hub's mu.
	place int
	// When expire is called, if queued is not 0. It is guarded by the alarms' mu.
	alarm time.Time
	// The place in the alarms' queue, from 1. It is guarded by the alarms' mu.
	queued int

	// mu guards everything below. It is not held across I/O or a statement. The hub's mu and the
	// alarms' mu may be locked while it is held, but not the other way round.
	mu    sync.Mutex
	phase phase
	// Whether the claim was announced.
	announced bool
	// Waiting: whether Notify has announced the claim meanwhile.
	renewed bool
	// Whether the claim lets the holder finish.
	finish bool
	// Whether standing is set: by Notify, or by the first result for a claim that was never
	// announced.
	placed bool
	// Waiting: there was a reason to try again before wake was created.
	woken bool
	// Waiting: the key was taken from the claim, so a grant since the last request does not count.
	keyLost bool
	// Ended: the row may still name the hold, until Unlock.
	unreleased bool
	// The labels of the claim, by Notify or Lock.
	labels string
	// When Lock was called. Once the lock is held, when the hold began.
	began time.Time
	// When expire ends the phase.
	deadline time.Time
	// The preemption timeout does not begin before this time.
	shielded time.Time
	// Held: claims do not notify the holder before this time.
	spared   time.Time
	standing standing
	// Created when the lock is held. It has capacity 1, gets at most one payload, and is closed
	// when the hold ends.
	ch chan NotificationPayload
	// The generation of the session that holds the key.
	session uint64
	token   int64
	// Sessions up to this generation are lost.
	lostUpTo uint64
	// The cause of the holder's notification.
	cause error
	// The error that the next Unlock returns, once.
	lost error
	// Held: stops watching the caller's context.
	unwatch func() bool
	// Waiting: why the wait has ended, or nil.
	waitError error
	// Waiting: closed when waitError is set. Ended: closed when Unlock has waited for long enough.
	stop chan struct{}
	// A claim that asks the holder to stop. Waiting: the newest that is known, which may be newer
	// than the grant. Held: the one that waits for spared.
	missed *event
	// Waiting: the newer claim whose notification arrived last. Other locks share it.
	heard *ClaimInfo
	// Waiting: capacity 1, receives a reason to try again. Lock creates it when it sleeps for the
	// first time.
	wake chan struct{}
	// Waiting: closed when Lock has returned. The Unlock that waits for it creates it.
	returned chan struct{}
}

// Notify announces the lock's claim. From then on no older claim can acquire the key, waiters with
// an older claim are superseded, and the holder, if there is one, is notified. A further call makes
// the claim the newest again.
//
// [ContextWithMode], [ContextWithSequence] and [ContextWithLabels] set the mode, the sequence
// number and the labels of the claim. In the mode [LetFinish] the holder is not notified. In the
// mode [SkipIfBusy] Notify does nothing.
//
// The error matches
//
//   - [ErrClaimOutdated] when the sequence number is too low. No holder is notified and no waiter
//     is superseded.
//   - [ErrLockNested] inside a [PreemptiveLocker.Do] that holds the key,
//   - [ErrLockTimeout] when the database could not be reached within the lock timeout,
//   - [ErrProviderClosed] when the provider is closed,
//   - ctx's own error when ctx is done.
//
// Notify may be called concurrently with every other method.
func (l *lock) Notify(ctx context.Context) error {
	if err := l.usable(ctx); err != nil {
		return err
	}
	t := termsFromContext(ctx)
	err := t.check()
	if err == nil {
		err = checkUse(ctx, l.backend.events())
	}
	if err == nil && nested(ctx, l.conf, l.claim.key) {
		err = ErrLockNested
	}
	if err == nil && t.mode != SkipIfBusy {
		err = within(ctx, l.conf.lockTimeout, func(stop <-chan struct{}) error {
			_, err := l.announce(ctx, stop, announcement{asked: time.Now(), terms: t})
			return err
		})
	}
	// Lock makes all other observations, but is not called after this error.
	if errors.Is(err, ErrClaimOutdated) {
		l.observe(ObservedSuperseded, 0, err)
	}
	return annotate(err, "locker: announce %q on key %d", l.claim.event, l.claim.key)
}

// announce announces the claim, and records its standing.
func (l *lock) announce(ctx context.Context, stop <-chan struct{}, how announcement) (answer, error) {
	how.claim, how.terms.labels = l.claim, l.labelsWith(how.terms)
	a, err := l.backend.announce(ctx, stop, how)
	if err != nil {
		if c := (*ConflictError)(nil); errors.As(err, &c) {
			l.complete(c)
		}
		return a, err
	}
	l.mu.Lock()
	l.placeLocked(a.newest)
	l.announced, l.finish = true, how.terms.mode == LetFinish
	l.renewed = l.renewed || l.phase == waiting && !how.acquire
	over := l.phase == ended
	l.mu.Unlock()
	// The end of the wait or of the hold has not withdrawn this claim.
	if over {
		l.backend.withdraw(l.claim)
	}
	return a, nil
}

// placeLocked sets the standing of the claim. A result that arrives late does not replace that of a
// later Notify.
func (l *lock) placeLocked(s standing) {
	if !l.placed || s.number > l.standing.number {
		l.standing = s
	}
	l.placed = true
}

// labelsWith returns the labels of the terms, which replace those of the claim, or those of the
// claim if the terms have none.
func (l *lock) labelsWith(t terms) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.labels != "" {
		l.labels = t.labels
	}
	return l.labels
}

// Lock waits for the key and returns a channel. The channel receives at most one payload, when the
// holder is notified, and is closed when the hold ends. It is buffered, so the caller need not read
// it. ctx must live as long as the hold: when it is done, the holder is notified.
//
// The error matches
//
//   - [ErrLockPreempted] when a newer claim is announced,
//   - [ErrLockTimeout] when the lock timeout has passed,
//   - [ErrLockBusy] when the mode ([ContextWithMode]) is [SkipIfBusy], and the key is held or
//     waited for,
//   - [ErrLockNested] inside a [PreemptiveLocker.Do] that holds the key,
//   - [ErrProviderClosed] when the provider is closed,
//   - ctx's own error when ctx is done.
//
// Any other error comes from the database. A Lock that fails leaves nothing behind. A second Lock
// returns an error.
func (l *lock) Lock(ctx context.Context) (<-chan NotificationPayload, error) {
	if err := l.usable(ctx); err != nil {
		return nil, err
	}
	ch, err := l.lockKey(ctx, lockCall{asked: time.Now(), terms: termsFromContext(ctx)})
	return ch, annotate(err, "locker: lock key %d", l.claim.key)
}

// lockCall is a call of Lock.
type lockCall struct {
	asked time.Time // when the caller called
	terms terms
	// Whether the call is Notify and Lock in one. A key that is free then costs one statement.
	announce bool
	// With announce: the call fails with errKeyMoved if this pull request has another key.
	pull *pullRequest
}

// lockKey is Lock, with the settings of a call, and without a description of the call in its error.
func (l *lock) lockKey(ctx context.Context, call lockCall) (<-chan NotificationPayload, error) {
	if err := l.begin(call); err != nil {
		if err != errLockTwice {
			l.observe(ObservedFailed, time.Since(call.asked), err)
		}
		return nil, err
	}
	ch, doubt, err := l.acquire(ctx, call)
	if err != nil {
		// The release is queued before the lock leaves, because Close waits for queued operations.
		if doubt {
			l.backend.release(ctx, l.claim)
		}
		l.backend.events().unsubscribe(l)
		l.leave(ctx, err)
		return nil, err
	}
	return ch, nil
}

// over closes what belongs to this lock alone. It waits for that, but no longer than ctx and bound.
func (l *lock) over(ctx context.Context, bound time.Duration) {
	if l.onOver == nil {
		return
	}
	closed := make(chan struct{})
	// The goroutine ends when onOver has returned, which may have to wait for a silent server.
	go func() {
		defer close(closed)
		l.onOver()
	}()
	// The bound of the caller decides.
	_ = await(ctx, bound, closed)
}

// Unlock ends the hold, or the wait of a Lock that has not returned. It blocks until the key is
// free, but no longer than 5 s and no longer than ctx. If it returns an error because of that, the
// release continues in the background. The key is given back even if ctx is done already.
//
// Unlock before Lock returns an error. If the hold had ended by loss or revocation, the first
// Unlock returns an error that matches [ErrLockLost]. Every further Unlock returns nil. Unlock may
// be called concurrently with every other method.
func (l *lock) Unlock(ctx context.Context) error {
	if err := l.usable(ctx); err != nil {
		return err
	}
	start := time.Now()
	err := l.unlock(ctx)
	l.over(ctx, releaseTimeout-time.Since(start))
	return annotate(err, "locker: unlock key %d", l.claim.key)
}

// Token returns the fencing token of the hold. It returns 0 before the lock is held, and then a
// number that is larger than the token of every earlier hold of the key. It keeps returning that
// number after the hold has ended.
func (l *lock) Token() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token
}

// Cause returns the cause of the holder's notification, or nil if the holder has not been notified.
// It matches [ErrLockPreempted], [ErrMaxLockDuration], [ErrLockLost], [ErrProviderClosed],
// [ErrStopRequested] or a context's error.
func (l *lock) Cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cause
}

// usable returns an error for a lock with a zero value, or if ctx is nil.
func (l *lock) usable(ctx context.Context) error {
	if l.backend == nil {
		return errLockZero
	}
	if ctx == nil {
		return errContextNil
	}
	return nil
}

// begin moves the lock from fresh to waiting, and sets the deadline of the wait.
func (l *lock) begin(call lockCall) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waitError != nil {
		// The lock was abandoned.
		return l.waitError
	}
	if l.phase != fresh {
		return errLockTwice
	}
	l.phase = waiting
	l.began = call.asked
	l.stop = make(chan struct{})
	l.armLocked(l.began.Add(l.conf.waitFor(call.terms, l.finish)))
	return nil
}

// waitFor returns how long a claim with the terms waits for its key. finish reports whether it was
// announced to let the holder finish.
func (c *LockProviderConfig) waitFor(t terms, finish bool) time.Duration {
	switch {
	case t.wait > 0:
		return t.wait
	case t.mode == LetFinish || finish:
		return c.finishTimeout
	}
	return c.lockTimeout
}

// abandon makes a later Lock fail. Unlock cannot do that, because it has no effect before Lock.
func (l *lock) abandon() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.phase == fresh {
		l.waitError = errReleasedWait
	}
}

// armLocked sets the deadline of the phase.
func (l *lock) armLocked(deadline time.Time) {
	l.deadline = deadline
	l.backend.events().alarms.set(l, l.deadline)
}

// expire ends the phase if its deadline has passed. A goroutine of the alarms calls it.
func (l *lock) expire() {
	l.mu.Lock()
	// The alarm was meant for an earlier phase.
	if time.Now().Before(l.deadline) {
		l.mu.Unlock()
		return
	}
	var report func()
	switch l.phase {
	case waiting:
		l.endWaitLocked(ErrLockTimeout)
	case held:
		missed := l.missed
		switch {
		case missed == nil || time.Since(l.began) >= l.conf.maxLockDuration:
			report = l.notifyLocked(ErrMaxLockDuration, l.ownPayload(ErrMaxLockDuration))
		case missed.from.number > l.standing.number:
			// The holder was spared until now.
			report = l.preemptLocked(*missed)
		default:
			// The holder has announced its claim again.
			l.missed = nil
			l.armLocked(l.began.Add(l.conf.maxLockDuration))
		}
	case notified:
		l.lost = annotate(ErrLockLost, "revoked: not released within %v", l.conf.preemptionTimeout)
		l.endLocked()
		report = l.revoke
	case ended:
		l.stopLocked()
	}
	l.mu.Unlock()
	if report != nil {
		report()
	}
}

// Shield postpones the preemption timeout of a hold that is notified from now on. The timeout then
// begins when Unshield is called or limit has passed. If the holder has been notified already, Shield returns the cause, and
// the caller must not start its step. Shield returns an error if the lock is not held or is
// shielded already. It does not postpone the loss of the session.
func (l *lock) Shield(limit time.Duration) error {
	return annotate(l.shield(limit), "locker: shield key %d", l.claim.key)
}

// shield is Shield, without a description of the call in its error.
func (l *lock) shield(limit time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.phase == held && limit <= 0:
		return fmt.Errorf("the limit is not positive: %v", limit)
	case l.phase == held && l.shielded.IsZero():
		l.shielded = time.Now().Add(limit)
		return nil
	case l.phase == held:
		return errors.New("the lock is shielded already")
	case l.cause != nil:
		return l.cause
	}
	return errors.New("the lock is not held")
}

// Unshield ends the effect of Shield. If the holder has been notified meanwhile, the preemption
// timeout begins now.
func (l *lock) Unshield() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.phase == notified && now.Before(l.shielded) {
		l.armLocked(now.Add(l.conf.preemptionTimeout))
	}
	l.shielded = time.Time{}
}

// leave ends a wait that has failed.
func (l *lock) leave(ctx context.Context, err error) {
	l.mu.Lock()
	l.phase = ended
	waited := time.Since(l.began)
	l.backend.events().alarms.drop(l)
	returned := l.returned
	// A claim that is superseded waits no longer, unless it has become the newest again.
	withdraw := l.announced && (l.renewed || !errors.Is(err, ErrLockPreempted))
	l.mu.Unlock()
	if withdraw {
		l.backend.withdraw(l.claim)
	}
	switch {
	case errors.Is(err, errKeyMoved):
		// The claim was for the wrong key, and another lock is tried next.
	case errors.Is(err, ErrLockPreempted):
		l.observe(ObservedSuperseded, waited, err)
	case errors.Is(err, ErrLockBusy):
		l.observe(ObservedSkipped, waited, err)
	default:
		l.observe(ObservedFailed, waited, err)
	}
	l.over(context.WithoutCancel(ctx), explainTimeout)
	if returned != nil {
		close(returned)
	}
}

// acquire announces the claim, if asked to, and tries to acquire the key until it succeeds or the
// wait has ended. The hints that wake it are only reasons to ask the database again. The result
// doubt reports whether acquire has failed although the database may have granted the key.
func (l *lock) acquire(ctx context.Context, call lockCall) (_ <-chan NotificationPayload, doubt bool, _ error) {
	if err := call.terms.check(); err != nil {
		return nil, false, err
	}
	if nested(ctx, l.conf, l.claim.key) {
		return nil, false, ErrLockNested
	}
	if err := l.backend.events().subscribe(l); err != nil {
		return nil, false, err
	}
	// trouble is the reason for which the database could not be asked the last time.
	var trouble error
	var blocker int64
	// At retryAt the session of the holder, which is dead, may be taken over.
	var retryAt time.Time
	skip, announce := call.terms.mode == SkipIfBusy, call.announce
	for inVain := 0; ; {
		if err := l.waitEnded(ctx, trouble); err != nil {
			if err == ErrLockTimeout {
				err = l.explained(ctx, ErrLockTimeout)
			}
			return nil, doubt, err
		}
		var a answer
		var err error
		ripe := blocker != 0 && !time.Now().Before(retryAt)
		if announce && !skip {
			announce = false
			a, err = l.announce(ctx, l.stop, announcement{asked: call.asked, terms: call.terms, acquire: true, pull: call.pull})
			if s := (stopped{}); err != nil && !errors.As(err, &s) {
				// The reason that has ended the wait decides, and the error explains it.
				if reason := l.waitEnded(ctx, err); reason != nil {
					err = reason
				}
				return nil, doubt || a.doubt, annotate(err, "announce %q", l.claim.event)
			}
		} else {
			a, err = l.backend.acquire(ctx, l.stop, l.request(call.terms, blocker))
		}
		doubt = doubt || a.doubt
		if s := (stopped{}); errors.As(err, &s) {
			trouble = s.trouble
			continue
		}
		if err != nil {
			return nil, doubt, err
		}
		if ripe && a.blocker == blocker {
			// The dead session is not the only obstacle.
			a.retryAt = time.Time{}
		}
		trouble, blocker, retryAt = nil, a.blocker, a.retryAt
		switch a.outcome {
		case granted:
			ch, err := l.hold(ctx, a)
			if err != nil {
				return nil, true, err
			}
			if ch != nil {
				return ch, false, nil
			}
			doubt = true
			// The hold was lost before it began.
			continue
		case superseded:
			return nil, doubt, l.supersededBy(ctx, a)
		}
		// A claim that was not announced is superseded by claims that are newer than those that it
		// has found. A claim that skips is compared with no other claim.
		if !skip {
			l.mu.Lock()
			// Notify may have announced it meanwhile.
			if !l.placed {
				l.placeLocked(a.newest)
			}
			l.mu.Unlock()
		}
		if a.outcome == again {
			if inVain++; inVain < maxInVain {
				continue
			}
		} else if skip && (retryAt.IsZero() || time.Now().Before(retryAt)) {
			return nil, doubt, l.explained(ctx, ErrLockBusy)
		}
		inVain = 0
		l.sleep(ctx, a.retryAt)
	}
}

// explainTimeout bounds by how much an error is delayed so that it can name the holder.
const explainTimeout = 500 * time.Millisecond

// explained returns the error of a wait that has ended with the sentinel. It names the holder if
// the database responds soon.
func (l *lock) explained(ctx context.Context, sentinel error) error {
	k := l.explain(ctx)
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if !k.open {
		k.newest = nil
	}
	detail := ""
	switch {
	case k.holder != nil:
		dead := ""
		if !k.alive {
			dead = ", whose session is not connected"
		}
		detail = fmt.Sprintf("held for %v by %v%s, token %d", k.heldFor.Round(time.Millisecond), k.holder, dead, k.holder.Token)
	case k.foreign != nil:
		detail = fmt.Sprintf("the advisory lock of the key is held by the server process %d (application %q, user %q), which does not use this library",
			k.foreign.PID, k.foreign.Application, k.foreign.User)
	case k.newest != nil && k.newest.ID != l.claim.id:
		detail = fmt.Sprintf("waited for by %v", k.newest)
	}
	return l.conflict(sentinel, k, detail)
}

// supersededBy returns the error of a wait that a newer claim has ended. The newer claim is usually
// known from its notification. If that was lost, the database is asked.
func (l *lock) supersededBy(ctx context.Context, a answer) error {
	winner := a.winner
	if winner == nil {
		l.mu.Lock()
		if l.heard != nil && l.heard.ID == a.newest.id {
			winner = l.heard.clone()
		}
		l.mu.Unlock()
	}
	if winner == nil {
		winner = l.explain(ctx).newest
	}
	return l.conflict(ErrLockPreempted, keyState{newest: winner}, "")
}

// explain returns the database's state of the key. It is empty if the database does not respond
// soon.
func (l *lock) explain(ctx context.Context) (k keyState) {
	err := within(ctx, explainTimeout, func(stop <-chan struct{}) (err error) {
		k, err = l.backend.explain(ctx, stop, l.claim.key)
		return err
	})
	if err != nil {
		return keyState{}
	}
	return k
}

// conflict returns an error that matches the sentinel and describes the other claims. The caller of
// Lock may modify these, so k must not be shared.
func (l *lock) conflict(sentinel error, k keyState, detail string) error {
	c := &ConflictError{Key: l.claim.key, Holder: k.holder, Foreign: k.foreign, Err: sentinel, detail: detail}
	switch {
	case k.newest == nil, k.newest.ID == l.claim.id, k.holder != nil && k.newest.ID == k.holder.ID:
	case sentinel == ErrLockPreempted:
		c.Winner = k.newest
	default:
		c.Waiter = k.newest
	}
	l.complete(c)
	return c
}

// complete adds the lock's pull request.
func (l *lock) complete(c *ConflictError) {
	if l.pull != nil {
		c.Repo, c.PullRequest = l.pull.repo, l.pull.pr
	}
}

// maxInVain is how often a claim tries again immediately, because the row has changed concurrently,
// before it sleeps.
const maxInVain = 5

// sleep waits for a reason to ask the database again, or until retryAt.
func (l *lock) sleep(ctx context.Context, retryAt time.Time) {
	l.mu.Lock()
	if l.wake == nil {
		l.wake = make(chan struct{}, 1)
		if l.woken {
			l.wake <- struct{}{}
		}
	}
	l.mu.Unlock()
	pause := pollInterval
	if !retryAt.IsZero() {
		pause = min(pause, max(0, time.Until(retryAt)))
	}
	poll := time.NewTimer(pause)
	defer poll.Stop()
	select {
	case <-l.wake:
	case <-poll.C:
	case <-l.stop:
	case <-ctx.Done():
	}
}

// waitEnded returns why a wait has ended before the database has decided, or nil if it has not. The
// error contains trouble.
func (l *lock) waitEnded(ctx context.Context, trouble error) error {
	l.mu.Lock()
	err := l.waitError
	l.mu.Unlock()
	if ctx.Err() != nil {
		err = contextError(ctx)
	}
	switch {
	case err == nil || trouble == nil:
		return err
	case err == ErrLockTimeout:
		return l.conflict(ErrLockTimeout, keyState{}, trouble.Error())
	}
	return annotate(err, "%v", trouble)
}

// request returns the next attempt to acquire the key.
func (l *lock) request(t terms, blocker int64) request {
	labels := l.labelsWith(t)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keyLost = false
	return request{claim: l.claim, labels: labels, standing: l.standing, first: !l.placed, skip: t.mode == SkipIfBusy, finish: l.finish, blocker: blocker}
}

// hold moves the lock from waiting to held. It returns no channel if the session that was granted
// the key is lost already, or if the key was taken from the claim. It returns an error if the wait
// has ended meanwhile: then the key must be given back.
func (l *lock) hold(ctx context.Context, a answer) (ch <-chan NotificationPayload, _ error) {
	var report func()
	var waited time.Duration
	defer func() {
		if ch != nil {
			l.observe(ObservedAcquired, waited, nil)
		}
		if report != nil {
			report()
		}
	}()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case a.session <= l.lostUpTo, l.keyLost:
		return nil, nil
	case l.waitError == ErrLockTimeout:
		return nil, l.conflict(ErrLockTimeout, keyState{}, "")
	case l.waitError != nil:
		return nil, l.waitError
	case ctx.Err() != nil:
		return nil, contextError(ctx)
	}
	now := time.Now()
	waited = now.Sub(l.began)
	l.began = now
	l.phase = held
	l.placeLocked(a.newest)
	l.session = a.session
	l.token = a.token
	l.ch = make(chan NotificationPayload, 1)
	l.backend.events().hold(l)
	if a.spared {
		l.spared = now.Add(l.conf.progress.max)
	}
	l.armLocked(now.Add(l.conf.maxLockDuration))
	if ctx.Done() != nil {
		l.unwatch = context.AfterFunc(ctx, func() { l.tell(contextError(ctx)) })
	}
	if missed := l.missed; missed != nil {
		l.missed = nil
		_, report = l.handleHeldLocked(*missed)
	}
	return l.ch, nil
}

// tell notifies the holder of a cause that is not another claim.
func (l *lock) tell(cause error) {
	l.mu.Lock()
	var report func()
	if l.phase == held {
		report = l.notifyLocked(cause, l.ownPayload(cause))
	}
	l.mu.Unlock()
	if report != nil {
		report()
	}
}

// ownPayload returns the payload for a cause that is not another claim. It has the lock's own ID.
func (l *lock) ownPayload(cause error) NotificationPayload {
	return NotificationPayload{ID: l.claim.id, Message: cause.Error(), LockKey: l.claim.key}
}

// notifyLocked moves the lock from held to notified. The preemption timeout begins now or, if the
// lock is shielded, at the end of the shield. It returns a function that the caller must call after releasing mu.
func (l *lock) notifyLocked(cause error, payload NotificationPayload) func() {
	l.phase = notified
	l.cause = cause
	l.unwatchLocked()
	begins := time.Now()
	if begins.Before(l.shielded) {
		begins = l.shielded
	}
	l.armLocked(begins.Add(l.conf.preemptionTimeout))
	// This never blocks: the capacity is 1, and a lock is notified once.
	l.ch <- payload
	after := time.Since(l.began)
	return func() { l.observe(ObservedNotified, after, cause) }
}

// observe calls the observer, if there is one. It must be called without mu.
func (l *lock) observe(kind ObservationKind, after time.Duration, err error) {
	if f := l.conf.observer; f != nil {
		f(Observation{Kind: kind, Key: l.claim.key, Event: l.claim.event, Labels: decodeLabels(l.labelsWith(terms{})), After: after, Err: err})
	}
}

// endLocked moves a hold to ended and closes the channel. Neither the alarm nor the context has an
// effect from then on.
func (l *lock) endLocked() {
	l.phase = ended
	l.backend.events().alarms.drop(l)
	l.unwatchLocked()
	close(l.ch)
}

// unwatchLocked stops watching the caller's context.
func (l *lock) unwatchLocked() {
	if l.unwatch != nil {
		l.unwatch()
		l.unwatch = nil
	}
}

// revoke releases the key of a holder that did not release it in time. The lock has moved to
// ended already.
func (l *lock) revoke() {
	release := l.backend.release(context.Background(), l.claim)
	// The release is queued before: Close ends the session when the last lock has left.
	l.backend.events().unsubscribe(l)
	l.conf.logger.Warn("locker: lock revoked: its holder did not release it in time",
		slog.String("key", strconv.FormatInt(l.claim.key, 10)), slog.String("event", l.claim.event),
		slog.Duration("after", l.conf.preemptionTimeout), slog.String("cause", l.Cause().Error()))
	l.observe(ObservedRevoked, time.Since(l.began), l.Cause())
	if l.onOver != nil {
		_ = await(context.Background(), releaseTimeout, release.done)
		l.onOver()
	}
}

// unlock is Unlock, without a description of the call in its error.
func (l *lock) unlock(ctx context.Context) error {
	l.mu.Lock()
	switch l.phase {
	case fresh:
		announced := l.announced
		// The lock's own session is closed now, so a later Lock must fail.
		if l.onOver != nil {
			l.waitError = ErrProviderClosed
		}
		l.mu.Unlock()
		if announced {
			l.backend.withdraw(l.claim)
		}
		return errNotLocked

	case waiting:
		if l.returned == nil {
			l.returned = make(chan struct{})
		}
		returned := l.returned
		l.endWaitLocked(errReleasedWait)
		l.mu.Unlock()
		return await(ctx, releaseTimeout, returned)

	case held, notified:
		l.endLocked()
		now := time.Now()
		lasted, limit, cause := now.Sub(l.began), now.Add(releaseTimeout), l.cause
		// An alarm that is about to call expire was meant for the hold.
		l.deadline = limit
		l.mu.Unlock()
		release := l.backend.release(ctx, l.claim)
		// The release is queued before: Close ends the session when the last lock has left.
		l.backend.events().unsubscribe(l)
		var err error
		switch {
		case release != nil:
			l.backend.events().alarms.set(l, limit)
			if err = awaitUntil(ctx, l.stop, release.done); err == nil {
				err = release.recycle().err
			}
			l.backend.events().alarms.drop(l)
		case ctx.Err() != nil:
			err = contextError(ctx)
		}
		if errors.Is(err, ErrLockLost) {
			l.observe(ObservedLost, lasted, err)
		} else {
			l.observe(ObservedReleased, lasted, cause)
		}
		return err

	default: // ended
		err, unreleased := l.lost, l.unreleased
		l.lost, l.unreleased = nil, false
		l.mu.Unlock()
		// Then the successor does not have to wait any longer.
		if unreleased {
			l.backend.release(ctx, l.claim)
		}
		return err
	}
}

// endWaitLocked ends the wait with an error, unless it has ended already.
func (l *lock) endWaitLocked(reason error) {
	if l.waitError == nil {
		l.waitError = reason
		l.stopLocked()
	}
}

// stopLocked closes stop, unless it is closed.
func (l *lock) stopLocked() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
}

// handle processes an event of the key. The backend calls it, from any goroutine.
func (l *lock) handle(ev event) {
	l.mu.Lock()
	lost := false
	var report func()
	switch l.phase {
	case waiting:
		l.handleWaitingLocked(ev)
	case held, notified:
		lost, report = l.handleHeldLocked(ev)
	}
	cause := l.lost
	l.mu.Unlock()
	if report != nil {
		report()
	}
	if !lost {
		return
	}
	// Its row may still show the claim as one that waits.
	if ev.kind == evGone {
		l.backend.withdraw(l.claim)
	}
	l.backend.events().unsubscribe(l)
	l.observe(ObservedLost, time.Since(l.began), cause)
	if l.onOver != nil {
		// This needs a goroutine, because onOver stops the session, which has called handle. It
		// ends when onOver has returned.
		go l.onOver()
	}
}

// handleWaitingLocked ends the wait, or wakes it if another attempt may succeed.
func (l *lock) handleWaitingLocked(ev event) {
	switch ev.kind {
	case evClosed:
		l.endWaitLocked(ErrProviderClosed)
		return
	case evManual:
		return
	case evGone:
		l.keyLost = l.keyLost || ev.hold == l.claim.id
		return
	case evLost:
		l.lostUpTo = max(l.lostUpTo, ev.session)
	case evClaimed:
		if ev.from.id == l.claim.id {
			return
		}
		l.heard = ev.claim
		if !ev.finish && (l.missed == nil || ev.from.number > l.missed.from.number) {
			// Only this copy is kept, so ev itself does not escape.
			newest := ev
			l.missed = &newest
		}
	}
	if l.wake == nil {
		l.woken = true
		return
	}
	select {
	case l.wake <- struct{}{}:
	default:
		// The waiter has been woken already.
	}
}

// handleHeldLocked reports whether the hold is lost. It returns a function that the caller must
// call after releasing mu, or nil.
func (l *lock) handleHeldLocked(ev event) (lost bool, report func()) {
	switch {
	case ev.kind == evLost && ev.session < l.session, (ev.kind == evGone || ev.kind == evNewest) && ev.hold != l.claim.id:
		return false, nil
	case ev.kind == evLost, ev.kind == evGone:
		what := "key taken away"
		if ev.kind == evLost {
			what, l.unreleased = "session lost", true
		}
		l.lost = annotate(ErrLockLost, "%s (%v)", what, ev.cause)
		if l.phase == held {
			report = l.notifyLocked(l.lost, l.ownPayload(l.lost))
		}
		l.endLocked()
		return true, report
	case l.phase == notified:
	case ev.kind == evClosed:
		report = l.notifyLocked(ErrProviderClosed, l.ownPayload(ErrProviderClosed))
	case ev.kind == evManual:
		report = l.notifyLocked(annotate(ErrStopRequested, "%q", ev.message),
			NotificationPayload{ID: l.claim.id, Message: ev.message, LockKey: l.claim.key})
	case ev.from.id == l.claim.id:
	case ev.kind == evNewest, ev.kind == evClaimed && !ev.finish && ev.from.number > l.standing.number:
		report = l.preemptLocked(ev)
	}
	return false, report
}

// preemptLocked notifies the holder of a claim. While the holder is spared, it remembers the claim
// and sets an alarm for the end of that time, unless the max lock duration is reached before. It
// returns a function that the caller must call after releasing mu, or nil.
func (l *lock) preemptLocked(ev event) func() {
	if time.Now().Before(l.spared) {
		if l.missed == nil || ev.from.number > l.missed.from.number {
			l.missed = &ev
		}
		if l.spared.Before(l.deadline) {
			l.armLocked(l.spared)
		}
		return nil
	}
	self := &ClaimInfo{ID: l.claim.id, Event: l.claim.event, Labels: decodeLabels(l.labels),
		Host: hostName, PID: processID, Since: l.began, Token: l.token}
	cause := l.conflict(ErrLockPreempted, keyState{newest: ev.claim.clone(), holder: self}, "")
	return l.notifyLocked(cause, NotificationPayload{ID: ev.from.id, Message: ev.claim.Event, LockKey: l.claim.key})
}

// await waits for done, within the bounds of C18.
func await(ctx context.Context, bound time.Duration, done <-chan struct{}) error {
	limit := make(chan struct{})
	defer time.AfterFunc(bound, func() { close(limit) }).Stop()
	return awaitUntil(ctx, limit, done)
}

// awaitUntil waits for done, until ctx is done or limit is closed.
func awaitUntil(ctx context.Context, limit, done <-chan struct{}) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	case <-limit:
		return errors.New("not confirmed in time; it goes on in the background")
	}
}
