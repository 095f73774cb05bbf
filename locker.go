package locker

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"
)

// enclosing says, in the context of a Do's function, which Do that is.
type enclosing struct {
	locker *PreemptiveLocker
	outer  *enclosing // the Do around it
}

type enclosingKey struct{}

// nested reports whether ctx comes from a Do that holds the owner's key.
func nested(ctx context.Context, owner any, key int64) bool {
	e, _ := ctx.Value(enclosingKey{}).(*enclosing)
	for ; e != nil; e = e.outer {
		if e.locker.holds(owner, key) {
			return true
		}
	}
	return false
}

func (p *PreemptiveLocker) holds(owner any, key int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stage == locked && p.gone.Err() == nil && p.key == key && p.owner(p.lock) == owner
}

// owner returns what is equal for the claims of one provider. A lock of this package
// knows the configuration of its provider. Of others it is the provider, or, if that
// cannot be compared, the configuration of the factory.
func (p *PreemptiveLocker) owner(lock PreemptableLock) any {
	if own := ownLock(lock); own != nil {
		return own.conf
	}
	if reflect.ValueOf(p.provider).Comparable() {
		return p.provider
	}
	return p.conf
}

// PreemptiveLocker represents a distributed lock where callers can be preempted
// while waiting for the lock to be released or while holding the lock. High
// level, the algorithm is as follows:
//
//   - Client A calls Lock() which returns immediately, Client A now has the
//     lock. Client A periodically ensures the session is still alive. If Client
//     A dies, the session expires and the lock is automatically released.
//   - Client B calls Lock() which blocks since the lock is held by Client A.
//   - Client A receives a value on the channel returned from the Lock() call
//     indicating Client A should release the lock ASAP
//   - Client C calls Lock() which blocks
//   - Client B's invocation of Lock() returns with an error indicating it was
//     preempted while waiting for the lock to release
//   - Client A calls Unlock()
//   - Client C's invocation of Lock() returns successfully
//
// (Unlock is the method Release here.)
//
// A PreemptiveLocker is created by a [PreemptiveLockerFactory] and is single use. All
// methods may be called concurrently. Release during Lock ends the wait. The methods of
// its zero value return errors.
type PreemptiveLocker struct {
	provider LockProvider
	conf     *PreemptiveLockerConfig // the factory's; it does not change
	repo     string
	pr       uint
	event    string

	mu      sync.Mutex // guards everything below; never held across a call to the provider
	terms   terms
	wait    time.Duration // 0: the provider's lock timeout
	misuse  error         // what Release has to report: a setting that came too late
	stage   stage
	aborted bool                    // locking: Release was called
	calls   context.Context         // see abortable; nil before it is needed
	cancel  context.CancelCauseFunc // ends calls
	lock    PreemptableLock         // nil before there is one; locking: it waits
	left    chan struct{}           // locking: closed when Lock has left; made by the Release that waits for it
	gone    context.Context         // inside Do: ends when the hold does
	key     int64
	token   int64
}

// stage is where a PreemptiveLocker is in its life.
type stage int8

const (
	unlocked stage = iota
	locking
	locked
	released // or failed
)

// PreemptiveLockerFactory creates the [PreemptiveLocker] of one claim. The event says why
// repo's pull request pr is to be locked: holders and waiters that lose to the claim are
// told. Lock checks repo and pr. Repo is compared byte by byte and may be any name:
// docs/webhook.md says which one to take, and what to do without a pull request. A factory
// may be called concurrently: create one for each process.
type PreemptiveLockerFactory func(repo string, pr uint, event string) *PreemptiveLocker

// NewPreemptiveLockerFactory creates a factory on a provider, which may be one of
// your own, see [LockProvider]. The caller closes the provider.
func NewPreemptiveLockerFactory(provider LockProvider, opts ...PreemptiveLockerOption) (PreemptiveLockerFactory, error) {
	if isNil(provider) {
		return nil, errors.New("locker: lock provider is nil")
	}
	conf, err := newPreemptiveLockerConfig(opts)
	if err != nil {
		return nil, err
	}
	return func(repo string, pr uint, event string) *PreemptiveLocker {
		return &PreemptiveLocker{provider: provider, conf: &conf, repo: repo, pr: pr, event: event}
	}, nil
}

// NewPostgresPreemptiveLockerFactory will create a PreemptiveLockerFactory that
// makes use of a PostgresLockProvider. With a non-empty apmServiceName both the
// locker and the SQL below it are traced under that name, unless an option says
// otherwise. The provider lives as long as the process. To close it, create it with
// [NewPostgresProvider] and pass it to [NewPreemptiveLockerFactory].
func NewPostgresPreemptiveLockerFactory(postgresURI, apmServiceName string, providerOpts []LockProviderOption, lockerOpts ...PreemptiveLockerOption) (PreemptiveLockerFactory, error) {
	provider, err := NewLockProvider(PostgresLockProviderKind,
		append([]LockProviderOption{WithPostgresBackend(postgresURI, apmServiceName)}, providerOpts...)...)
	if err != nil {
		return nil, err
	}
	return NewPreemptiveLockerFactory(provider,
		append([]PreemptiveLockerOption{WithAPMServiceName(apmServiceName)}, lockerOpts...)...)
}

// NewFakePreemptiveLockerFactory will create a PreemptiveLockerFactory that
// makes use of a FakeLockProvider. This is suitable for tests, where postgres
// might not be available or wanted.
func NewFakePreemptiveLockerFactory(providerOpts []LockProviderOption, lockerOpts ...PreemptiveLockerOption) (PreemptiveLockerFactory, error) {
	provider, err := NewLockProvider(FakeLockProviderKind, providerOpts...)
	if err != nil {
		return nil, err
	}
	return NewPreemptiveLockerFactory(provider, lockerOpts...)
}

// Sequence gives the claim its place among those of its pull request, whenever it
// arrives: a number that grows with the order of the events and differs between them,
// such as a counter of pushes. (GitHub's updated_at alone has only seconds: see
// docs/webhook.md.) Every int64 is allowed, also zero and negative numbers. Lock returns
// [ErrClaimOutdated] immediately, and disturbs no other claim, if a claim with a higher
// number was announced, or one with the same number that still waits or holds: a
// redelivery. The highest is never forgotten: after a wrong one, or after a change to a
// smaller unit, use [PostgresLockProvider.ResetSequence]. Without Sequence the newest
// arrival wins.
//
// Sequence, Mode, Labels and Wait return the PreemptiveLocker itself. They come before
// Lock. After it they have no effect, and Release returns an error that says so.
func (p *PreemptiveLocker) Sequence(sequence int64) *PreemptiveLocker {
	return p.set("Sequence", func() { p.terms.sequence = &sequence })
}

// Mode says what the claim does to others, instead of the factory's default
// ([WithClaimMode]). An unknown mode is an error of Lock.
func (p *PreemptiveLocker) Mode(mode ClaimMode) *PreemptiveLocker {
	return p.set("Mode", func() { p.terms.mode, p.terms.moded = mode, true })
}

// Labels gives the claim labels, such as a commit, a URL and an actor. They come back in
// the [ConflictError] of a claim that loses to this one, in observations, and in what
// operators see. As JSON they take 1,024 bytes at most: more are an error of Lock. In
// keys and values, bytes that are not valid UTF-8 are replaced.
func (p *PreemptiveLocker) Labels(labels map[string]string) *PreemptiveLocker {
	text := encodeLabels(labels)
	return p.set("Labels", func() { p.terms.labels = text })
}

// Wait bounds how long Lock waits for the key, instead of the provider's lock timeout,
// and unlike the end of its context it does not end the hold. After it Lock returns
// [ErrLockTimeout]. Zero means the lock timeout, and a negative duration is an error of
// Lock.
func (p *PreemptiveLocker) Wait(d time.Duration) *PreemptiveLocker {
	return p.set("Wait", func() { p.wait = d })
}

func (p *PreemptiveLocker) set(method string, f func()) *PreemptiveLocker {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.stage == unlocked:
		f()
	case p.misuse == nil:
		p.misuse = errors.New(method + " was called after Lock, and had no effect")
	}
	return p
}

// Lock locks the lock and returns a channel used to signal if the lock should be
// released ASAP. If the lock is currently in use, this method will block until
// the lock is released. If the caller is preempted while waiting for the lock to
// be released, an error is returned.
//
// In detail: Lock announces a claim, waits for the key and then for the lock delay. The
// channel carries at most one payload and is closed when the hold is over. The caller
// need not read it. **ctx belongs to the hold, not to the call, like that of BeginTx**:
// when it is done, the holder is notified. Bound the wait alone with
// [PreemptiveLocker.Wait].
//
// The error matches
//
//   - [ErrLockPreempted] if a newer claim was announced,
//   - [ErrClaimOutdated], too, if the claim came too late by its sequence number,
//   - [ErrLockBusy] if the key is held or waited for and the mode is [SkipIfBusy],
//   - [ErrLockNested] inside a [PreemptiveLocker.Do] that holds the same key,
//   - [ErrLockTimeout] after the lock timeout, or that of [PreemptiveLocker.Wait],
//   - ctx's own error if ctx is done, and [ErrProviderClosed],
//   - during the lock delay also the causes of a holder: [ErrLockLost],
//     [ErrMaxLockDuration] and [ErrStopRequested].
//
// Other errors come from the input or from the database. A [ConflictError] in it says
// which claim is in the way. A Lock that failed leaves nothing behind. A second Lock is
// an error.
func (p *PreemptiveLocker) Lock(ctx context.Context) (ch <-chan NotificationPayload, err error) {
	if err := p.usable(ctx); err != nil {
		return nil, err
	}
	ctx, end := p.traceCall(ctx, OperationLock)
	defer func() { p.traceEnd(end, err) }()

	if err := p.begin(); err != nil {
		return nil, err
	}
	lock, ch, err := p.acquire(ctx, time.Now())
	if err == nil {
		err = p.delay(ctx, lock, ch)
	}
	err = p.arrive(lock, err)
	if err != nil {
		p.abort(nil)
		if lock != nil {
			_ = unlockDetached(ctx, lock)
		}
		p.leave()
		return nil, annotate(err, "locker: lock %q#%d for %q", p.repo, p.pr, p.event)
	}
	return ch, nil
}

// Release ends the hold, or the Lock that has not returned yet. It blocks until the key
// is free, for at most 5 s and at most until ctx is done. The key is given back all the
// same, even if ctx is done already. Before Lock it is an error. If the hold had ended by
// loss or revocation, the first Release returns an error that matches [ErrLockLost]. A
// second Release, and one after a Lock that failed, return nil.
func (p *PreemptiveLocker) Release(ctx context.Context) (err error) {
	if err := p.usable(ctx); err != nil {
		return err
	}
	ctx, end := p.traceCall(ctx, OperationRelease)
	defer func() { p.traceEnd(end, err) }()

	p.mu.Lock()
	stage := p.stage
	var left chan struct{}
	lock, misuse := p.lock, p.misuse
	if stage != unlocked {
		p.misuse = nil
	}
	switch stage {
	case locking:
		if p.left == nil {
			p.left = make(chan struct{})
		}
		left = p.left
		p.aborted = true
	case locked:
		p.stage = released
	}
	p.mu.Unlock()

	switch stage {
	case unlocked:
		err = errors.New("Release before Lock")
	case locking:
		start := time.Now()
		p.abort(nil)
		if lock != nil {
			if own := ownLock(lock); own != nil {
				own.abandon()
			}
			_ = unlockBounded(ctx, lock) // whatever is left, Lock itself cleans up
		}
		err = await(ctx, releaseTimeout-time.Since(start), left)
	case locked:
		err = unlockBounded(ctx, lock)
		p.abort(nil)
	}
	if stage != unlocked {
		err = joinErrors(err, misuse)
	}
	return annotate(err, "locker: release %q#%d", p.repo, p.pr)
}

// Do locks, runs f and releases. The context given to f is derived from ctx. It is
// canceled when the holder is notified, and context.Cause then matches the sentinel of
// the cause: [ErrLockPreempted], [ErrMaxLockDuration], [ErrLockLost],
// [ErrProviderClosed] or [ErrStopRequested]. If ctx is done, it is ctx's own cause. f should
// return soon after that, with the error or the cause of its context: once the preemption
// timeout has passed the lock is taken away. [TokenFromContext] returns the fencing token.
//
// Do returns when f has returned, and releases whatever ctx is. Its error matches f's
// error and, if f was disturbed, the cause, also if f returned nil. It can match several
// sentinels: read it with [OutcomeOf]. If f panics, the lock is released and the panic
// goes on.
//
// A claim of the same key by the same provider inside f is an error that matches
// [ErrLockNested], if it is made with f's context or one derived from it. With another
// context it cannot be distinguished from a newer claim of another caller: it
// notifies f, and waits for it.
func (p *PreemptiveLocker) Do(ctx context.Context, f func(ctx context.Context) error) (err error) {
	if f == nil {
		return errors.New("locker: function is nil")
	}
	ch, err := p.Lock(ctx)
	if err != nil {
		return err
	}
	outer, _ := ctx.Value(enclosingKey{}).(*enclosing)
	fctx, cancel := context.WithCancelCause(context.WithValue(ctx, enclosingKey{}, &enclosing{p, outer}))
	gone, lose := context.WithCancelCause(context.Background())
	p.mu.Lock()
	p.gone = gone
	p.mu.Unlock()
	returned := make(chan struct{})
	watched := make(chan error, 1)
	go func() { // ends when f has returned, or before
		watched <- p.watch(ctx, ch, returned, cancel, lose)
	}()
	defer func() { // also on a panic and on runtime.Goexit
		close(returned)
		parts := doError{hold: fmt.Sprintf("%q#%d for %q", p.repo, p.pr, p.event), work: err, cause: <-watched}
		parts.told = context.Cause(fctx)
		cancel(nil)
		lose(nil)
		parts.release = p.Release(context.WithoutCancel(ctx))
		err = parts.error()
	}()
	return f(fctx)
}

// watch cancels f's context at the notification, and ends lose's context when the hold
// is over. It returns why f was disturbed, or nil if it returned undisturbed.
func (p *PreemptiveLocker) watch(ctx context.Context, ch <-chan NotificationPayload, returned <-chan struct{}, cancel, lose context.CancelCauseFunc) error {
	select {
	case n, ok := <-ch:
		cause := p.disturbed(n, ok)
		cancel(cause)
		if ok {
			select {
			case <-ch: // closed
			case <-returned:
				return cause
			}
		}
		lose(annotate(ErrLockLost, "the hold is over"))
		return cause
	case <-returned:
	}
	select {
	case n, ok := <-ch: // notified at the moment when f returned
		return p.disturbed(n, ok)
	default:
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	return nil
}

// Shield runs a step that must not be cut in half, such as a schema migration, inside
// Do's function. ctx is that function's context. A notification does not cancel the
// context that f gets before limit has passed. It cancels ctx immediately all the same,
// and the holder has to stop when f returns. Meanwhile, and for no longer than limit, the
// lock is not revoked. A claim that waits for the lock waits that much longer, so its lock
// timeout should be above limit.
//
// If the hold has been notified already, f is not run and Shield returns the cause. When
// limit passes after a notification, f's context is canceled with the cause. If the
// session is lost, the hold is over and f's context is canceled immediately: nothing can
// put that off. Otherwise Shield returns f's error.
//
// Shields do not nest. A second one while one runs, also on another goroutine, is an
// error. So is a limit that is not positive, a call outside of Do, and a provider whose
// locks have no Shield.
func (p *PreemptiveLocker) Shield(ctx context.Context, limit time.Duration, f func(ctx context.Context) error) error {
	if err := p.usable(ctx); err != nil {
		return err
	}
	if f == nil {
		return errors.New("locker: function is nil")
	}
	if limit <= 0 {
		return fmt.Errorf("locker: shield limit is not positive: %v", limit)
	}
	p.mu.Lock()
	gone, lock, stage := p.gone, p.lock, p.stage
	p.mu.Unlock()
	if gone == nil || stage != locked {
		return errors.New("locker: Shield outside of Do")
	}
	shield, ok := lock.(interface {
		Shield(limit time.Duration) error
		Unshield()
	})
	if !ok {
		return errors.New("locker: the provider's locks have no Shield")
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	begin := shield.Shield
	if own := ownLock(lock); own != nil { // whose error needs no key
		begin = own.shield
	}
	if err := begin(limit); err != nil {
		return annotate(err, "locker: shield %q#%d", p.repo, p.pr)
	}
	defer shield.Unshield()

	end := time.Now().Add(limit)
	fctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer context.AfterFunc(gone, func() { cancel(context.Cause(gone)) })()
	defer context.AfterFunc(ctx, func() { // runs until limit or f's end
		timer := time.NewTimer(time.Until(end))
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel(context.Cause(ctx))
		case <-fctx.Done():
		}
	})()
	return f(fctx)
}

// disturbed returns why a notification came, from what was read from the channel.
func (p *PreemptiveLocker) disturbed(n NotificationPayload, ok bool) error {
	p.mu.Lock()
	lock, stage := p.lock, p.stage
	p.mu.Unlock()
	if !ok && stage == released {
		return nil // by our own Release
	}
	return causeOf(lock, n, ok)
}

// Token returns the fencing token of the hold: 0 before the lock is held, and then a
// number that is larger than that of every earlier hold of the same key, in any process,
// across crashes of holders and of the database server. Send it with every write to a
// resource that can refuse an older one. It stays 0 with a provider of your own whose
// locks have no Token() int64.
func (p *PreemptiveLocker) Token() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.token
}

// TokenFromContext returns the fencing token of the hold whose [PreemptiveLocker.Do]
// has given ctx, or a context from which ctx is derived, to its function. With Do inside
// Do it is the token of the innermost. It is 0 outside of Do, and with a provider of
// your own whose locks have no Token() int64.
func TokenFromContext(ctx context.Context) int64 {
	if e, ok := ctx.Value(enclosingKey{}).(*enclosing); ok {
		return e.locker.Token()
	}
	return 0
}

func (p *PreemptiveLocker) usable(ctx context.Context) error {
	if p.provider == nil {
		return errors.New("locker: PreemptiveLocker was not made by a factory")
	}
	if ctx == nil {
		return errContextNil
	}
	return nil
}

func (p *PreemptiveLocker) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stage != unlocked {
		return fmt.Errorf("locker: lock %q#%d: Lock was called before on this PreemptiveLocker (it is single use)", p.repo, p.pr)
	}
	p.stage = locking
	return nil
}

// abortable is ctx, and ends with Release, too. What does not block needs none, nor
// does the wait of this package's own locks, which Unlock ends.
func (p *PreemptiveLocker) abortable(ctx context.Context) context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.calls == nil {
		p.calls, p.cancel = context.WithCancelCause(ctx)
		if p.aborted {
			p.cancel(nil)
		}
	}
	return p.calls
}

// abort ends what abortable has returned.
func (p *PreemptiveLocker) abort(cause error) {
	p.mu.Lock()
	cancel := p.cancel
	p.mu.Unlock()
	if cancel != nil {
		cancel(cause)
	}
}

// acquire claims the key and waits for it. It returns the lock, once there is one, also
// with an error.
func (p *PreemptiveLocker) acquire(ctx context.Context, asked time.Time) (PreemptableLock, <-chan NotificationPayload, error) {
	p.mu.Lock()
	call := lockCall{asked: asked, wait: p.wait, announce: true,
		terms: p.terms.over(termsFromContext(ctx)).over(terms{mode: p.conf.mode})}
	p.mu.Unlock()
	if err := checkRepo(p.repo, p.pr); err != nil {
		return nil, nil, err
	}
	if err := call.terms.check(); err != nil {
		return nil, nil, err
	}
	if call.wait < 0 {
		return nil, nil, fmt.Errorf("the bound of the wait is negative: %v", call.wait)
	}
	var key int64
	var err error
	switch own := p.provider.(type) {
	case *PostgresLockProvider:
		pull := pullRequest{p.repo, p.pr}
		if key, ok := own.hints.get(pull); ok && call.terms.mode != SkipIfBusy { // which does not check that the hint is right
			call.pull = &pull
			lock, ch, err := p.claim(ctx, ctx, key, call)
			if !errors.Is(err, errKeyMoved) {
				return lock, ch, err
			}
			call.pull = nil
		}
		key, err = own.lockKey(p.abortable(ctx), p.repo, p.pr, call.wait)
		if err != nil {
			return nil, nil, err
		}
		return p.claim(ctx, p.abortable(ctx), key, call)
	case *FakeLockProvider: // does not block
		if key, err = own.LockKey(ctx, p.repo, p.pr); err != nil {
			return nil, nil, err
		}
		return p.claim(ctx, ctx, key, call)
	}

	calls := p.abortable(ctx)
	var timer *time.Timer
	if call.wait > 0 {
		timer = time.AfterFunc(time.Until(asked.Add(call.wait)), func() { p.abort(ErrLockTimeout) })
	}
	key, err = p.provider.LockKey(calls, p.repo, p.pr)
	var lock PreemptableLock
	var ch <-chan NotificationPayload
	if err == nil {
		lock, ch, err = p.claim(ctx, calls, key, call)
	}
	if timer != nil && !timer.Stop() { // the calls were canceled, or will be
		switch classify(err) {
		case OutcomeFailed, OutcomeCanceled:
			err = ErrLockTimeout
		}
	}
	return lock, ch, err
}

func (p *PreemptiveLocker) claim(ctx, calls context.Context, key int64, call lockCall) (PreemptableLock, <-chan NotificationPayload, error) {
	p.mu.Lock()
	p.key = key
	p.mu.Unlock()
	lock, err := p.provider.New(calls, key, p.event)
	if err != nil {
		return nil, nil, err
	}
	if isNil(lock) {
		return nil, nil, errors.New("lock provider returned no lock")
	}
	ch, err := p.announceAndLock(ctx, lock, call)
	return lock, ch, err
}

// announceAndLock announces the claim and waits for the key. A lock of this package
// does both in one statement.
func (p *PreemptiveLocker) announceAndLock(ctx context.Context, lock PreemptableLock, call lockCall) (<-chan NotificationPayload, error) {
	own := ownLock(lock)
	if own == nil {
		p.mu.Lock()
		key := p.key
		p.mu.Unlock()
		if nested(ctx, p.owner(lock), key) {
			return nil, ErrLockNested
		}
		if call.terms.mode != SkipIfBusy {
			if err := lock.Notify(contextWithTerms(p.abortable(ctx), call.terms)); err != nil {
				return nil, err
			}
		}
	} else {
		own.pull = &pullRequest{p.repo, p.pr}
	}
	p.mu.Lock()
	p.lock = lock
	aborted := p.aborted
	p.mu.Unlock()
	switch {
	case aborted:
		return nil, errReleasedWait
	case own != nil:
		return own.lockKey(ctx, call)
	}
	if call.wait > 0 {
		call.terms.wait = max(1, time.Until(call.asked.Add(call.wait)))
	}
	return lock.Lock(contextWithTerms(p.abortable(ctx), call.terms))
}

// delay waits for the lock delay.
func (p *PreemptiveLocker) delay(ctx context.Context, lock PreemptableLock, ch <-chan NotificationPayload) error {
	d := p.conf.lockDelay
	if d <= 0 {
		return nil
	}
	ctx = p.abortable(ctx)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case n, ok := <-ch:
		return &delayError{causeOf(lock, n, ok)}
	case <-ctx.Done():
		return contextError(ctx)
	}
}

// arrive moves from locking to locked, unless Lock has failed or Release was
// called meanwhile.
func (p *PreemptiveLocker) arrive(lock PreemptableLock, err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.aborted {
		return errReleasedWait
	}
	if err != nil {
		return err
	}
	p.stage = locked
	if l, ok := lock.(interface{ Token() int64 }); ok {
		p.token = l.Token()
	}
	return nil
}

// leave ends a Lock that failed.
func (p *PreemptiveLocker) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stage = released
	if p.left != nil {
		close(p.left)
	}
}

// causeOf returns why a holder was notified, from what was read from its channel and
// from what the lock knows.
func causeOf(lock PreemptableLock, n NotificationPayload, ok bool) error {
	if l, has := lock.(interface{ Cause() error }); has {
		if cause := l.Cause(); cause != nil {
			return cause
		}
	}
	if !ok {
		return annotate(ErrLockLost, "the lock's channel was closed")
	}
	return annotate(ErrLockPreempted, "notified: %q", n.Message)
}

// unlockBounded unlocks a lock of any provider within the bounds of Release.
func unlockBounded(ctx context.Context, lock PreemptableLock) error {
	if ownLock(lock) != nil { // it keeps them itself
		return lock.Unlock(ctx)
	}
	if ctx.Err() != nil {
		go func() { _ = unlockDetached(ctx, lock) }() // ends within releaseTimeout
		return contextError(ctx)
	}
	bounded, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	return lock.Unlock(bounded)
}

// unlockDetached unlocks whether or not ctx is done.
func unlockDetached(ctx context.Context, lock PreemptableLock) error {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	return lock.Unlock(bounded)
}

// isNil also sees a nil pointer or function in an interface.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	r := reflect.ValueOf(v)
	return (r.Kind() == reflect.Pointer || r.Kind() == reflect.Func) && r.IsNil()
}
