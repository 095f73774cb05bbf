package locker

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"
)

// enclosing identifies a Do in the context of its function.
type enclosing struct {
	locker *PreemptiveLocker
	outer  *enclosing      // the Do around it
	hold   context.Context // ends when the hold does
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

// holds reports whether the Do of p holds the key, and the owner is the same.
func (p *PreemptiveLocker) holds(owner any, key int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stage == locked && p.do.hold.Err() == nil && p.key == key && p.owner(p.lock) == owner
}

// owner returns a value that is equal for all claims of one provider. For a lock of this package it
// is the configuration of its provider. For any other lock it is the provider or, if that cannot be
// compared, the configuration of the factory.
func (p *PreemptiveLocker) owner(lock PreemptableLock) any {
	if own := ownLock(lock); own != nil {
		return own.conf
	}
	if reflect.ValueOf(p.provider).Comparable() {
		return p.provider
	}
	return p.conf
}

// A PreemptiveLocker is a distributed lock whose holder and waiters can be preempted by a newer
// claim. In short:
//
//   - Client A calls Lock, which returns immediately. A holds the lock, and its provider sends
//     heartbeats. If A dies, its session expires, and the lock becomes free.
//   - Client B calls Lock, which blocks because A holds the lock.
//   - Client A receives a value from the channel that Lock returned: A should stop as soon as
//     possible.
//   - Client C calls Lock, which blocks.
//   - Lock of client B returns an error that matches [ErrLockPreempted], because C's claim is
//     newer.
//   - Client A calls Release.
//   - Lock of client C returns.
//
// A [PreemptiveLockerFactory] creates a PreemptiveLocker for one claim. It is used once. All
// methods are safe for concurrent use. The methods of the zero value return errors.
type PreemptiveLocker struct {
	provider LockProvider
	conf     *PreemptiveLockerConfig // of the factory, never changed
	pull     pullRequest
	event    string

	// mu guards everything below. It is not held across a call to the provider.
	mu       sync.Mutex
	settings *claimSettings // nil until one of its methods is called
	stage    stage
	aborted  bool                    // locking: Release was called
	calls    context.Context         // see abortable
	cancel   context.CancelCauseFunc // ends calls
	// Nil until it exists. While locking, the lock may be waiting.
	lock PreemptableLock
	// Locking: closed when Lock has returned. The Release that waits for it creates it.
	returned chan struct{}
	do       *enclosing // nil outside of Do
	key      int64
	token    int64
}

// claimSettings are the values of Sequence, Mode, Labels and Wait.
type claimSettings struct {
	terms  terms
	misuse error // returned by Release: one of them was called too late
}

// stage is the state of a PreemptiveLocker. It only moves forward.
type stage int8

const (
	unlocked stage = iota
	locking
	locked
	released // or Lock has failed
)

// A PreemptiveLockerFactory creates the [PreemptiveLocker] of one claim for repo's pull request pr.
// The event is the reason for the claim. It is shown to the holders and waiters that lose to the
// claim.
//
// Repo may be any name of up to 2,000 bytes in valid UTF-8 without NUL, even the empty one, and is
// compared byte by byte. See docs/webhook.md in the repository for the choice of a name, and for
// locks without a pull request. The factory returns no error: Lock returns one if repo or pr is not
// valid.
//
// A factory is safe for concurrent use. Create one for each process.
type PreemptiveLockerFactory func(repo string, pr uint, event string) *PreemptiveLocker

// NewPreemptiveLockerFactory returns a factory whose lockers use the provider, which may be a
// custom one: see [LockProvider]. It returns an error if the provider is nil or an option is not
// valid. The caller closes the provider.
func NewPreemptiveLockerFactory(provider LockProvider, opts ...PreemptiveLockerOption) (PreemptiveLockerFactory, error) {
	if isNil(provider) {
		return nil, errors.New("locker: lock provider is nil")
	}
	conf, err := newPreemptiveLockerConfig(opts)
	if err != nil {
		return nil, err
	}
	return func(repo string, pr uint, event string) *PreemptiveLocker {
		return &PreemptiveLocker{provider: provider, conf: &conf, pull: pullRequest{repo, pr}, event: event}
	}, nil
}

// NewPostgresPreemptiveLockerFactory returns a factory whose lockers use a new
// [PostgresLockProvider]. [WithPostgresBackend] describes postgresURI. With a non-empty
// apmServiceName the calls of lockers and their SQL statements are traced under that name, unless
// an option sets another one. It returns an error if an argument is not valid, and needs no server.
//
// The provider lives as long as the process. To close it, create it with [NewPostgresProvider] and
// pass it to [NewPreemptiveLockerFactory].
func NewPostgresPreemptiveLockerFactory(postgresURI, apmServiceName string, providerOpts []LockProviderOption, lockerOpts ...PreemptiveLockerOption) (PreemptiveLockerFactory, error) {
	provider, err := NewLockProvider(PostgresLockProviderKind,
		append([]LockProviderOption{WithPostgresBackend(postgresURI, apmServiceName)}, providerOpts...)...)
	if err != nil {
		return nil, err
	}
	return NewPreemptiveLockerFactory(provider,
		append([]PreemptiveLockerOption{WithAPMServiceName(apmServiceName)}, lockerOpts...)...)
}

// NewFakePreemptiveLockerFactory returns a factory whose lockers use a new [FakeLockProvider], for
// unit tests without PostgreSQL. It returns an error if an option is not valid.
func NewFakePreemptiveLockerFactory(providerOpts []LockProviderOption, lockerOpts ...PreemptiveLockerOption) (PreemptiveLockerFactory, error) {
	provider, err := NewLockProvider(FakeLockProviderKind, providerOpts...)
	if err != nil {
		return nil, err
	}
	return NewPreemptiveLockerFactory(provider, lockerOpts...)
}

// Sequence sets the claim's place among the claims of its pull request, whenever it arrives. The
// number must grow with the order of the events and differ between them, such as a counter of
// pushes. (GitHub's updated_at alone has a resolution of a second: see docs/webhook.md.) Every
// int64 is valid, including negative numbers and zero. Without Sequence the newest arrival wins. A
// claim in the mode [SkipIfBusy] cannot have a number.
//
// Lock returns [ErrClaimOutdated] immediately if a claim with a higher number was announced, or if
// one with the same number still waits or holds, which is a redelivery. Such a claim notifies no
// holder and supersedes no waiter. The highest number is never forgotten. After a wrong one, or
// after a change to a smaller unit, use [PostgresLockProvider.ResetSequence].
//
// Sequence, Mode, Labels and Wait return p. Call them before Lock. After Lock they have no effect,
// and Release returns an error that says so.
func (p *PreemptiveLocker) Sequence(sequence int64) *PreemptiveLocker {
	return p.set("Sequence", func(t *terms) { t.sequence = &sequence })
}

// Mode sets what the claim does to older claims, instead of the mode of the context
// ([ContextWithMode]) and the factory's default ([WithClaimMode]). Lock returns an error if the
// mode is unknown. Mode returns p. Call it before Lock.
func (p *PreemptiveLocker) Mode(mode ClaimMode) *PreemptiveLocker {
	return p.set("Mode", func(t *terms) { t.mode, t.moded = mode, true })
}

// Labels sets labels of the claim, such as a commit, a URL and an actor. They are in the
// [ConflictError] of claims that lose to this one, in observations, and in [LockStatus]. Bytes in
// keys and values that are not valid UTF-8 are replaced. Lock returns an error if the labels take
// more than 1,024 bytes as JSON. Labels returns p. Call it before Lock.
func (p *PreemptiveLocker) Labels(labels map[string]string) *PreemptiveLocker {
	text := encodeLabels(labels)
	return p.set("Labels", func(t *terms) { t.labels = text })
}

// Wait bounds how long Lock waits for the key, instead of the provider's lock timeout. After d Lock
// returns [ErrLockTimeout]. Unlike the end of Lock's context, it does not end the hold. Zero means
// the lock timeout. Lock returns an error if d is negative. Wait returns p. Call it before Lock.
func (p *PreemptiveLocker) Wait(d time.Duration) *PreemptiveLocker {
	return p.set("Wait", func(t *terms) { t.wait = d })
}

// set calls f before Lock. After Lock it records that the method was called too late.
func (p *PreemptiveLocker) set(method string, f func(t *terms)) *PreemptiveLocker {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.settings == nil {
		p.settings = &claimSettings{}
	}
	switch {
	case p.stage == unlocked:
		f(&p.settings.terms)
	case p.settings.misuse == nil:
		p.settings.misuse = errors.New(method + " was called after Lock, and had no effect")
	}
	return p
}

// Lock announces a claim, waits for the key and then for the lock delay ([WithLockDelay]), and
// returns a channel. The channel receives at most one payload, when the holder should stop, and is
// closed when the hold ends. It is buffered, so the caller need not read it. [PreemptiveLocker.Do]
// is easier to use.
//
// ctx must live as long as the hold, like that of BeginTx in database/sql: when it is done, the
// holder is notified. [PreemptiveLocker.Wait] bounds the wait alone.
//
// The error matches
//
//   - [ErrLockPreempted] when a newer claim was announced,
//   - [ErrClaimOutdated], and ErrLockPreempted, when the claim came too late by its sequence
//     number,
//   - [ErrLockBusy] when the mode is [SkipIfBusy], and the key is held or waited for,
//   - [ErrLockNested] inside a [PreemptiveLocker.Do] that holds the same key,
//   - [ErrLockTimeout] when the lock timeout, or the bound of [PreemptiveLocker.Wait], has passed,
//   - [ErrProviderClosed] when the provider is closed,
//   - ctx's own error when ctx is done,
//   - during the lock delay also the causes of a holder: [ErrLockLost], [ErrMaxLockDuration] and
//     [ErrStopRequested].
//
// Other errors come from the input or from the database. A [ConflictError] in the error names the
// claim that is in the way. A Lock that fails leaves nothing behind. A second Lock returns an
// error.
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
		return nil, annotate(err, "locker: lock %q#%d for %q", p.pull.repo, p.pull.pr, p.event)
	}
	return ch, nil
}

// Release ends the hold, or the wait of a Lock that has not returned. It blocks until the key is
// free, but no longer than 5 s and no longer than ctx. If it returns an error because of that, the
// release continues in the background. The key is given back even if ctx is done already.
//
// Release before Lock returns an error. If the hold had ended by loss or revocation, the first
// Release returns an error that matches [ErrLockLost]. If Sequence, Mode, Labels or Wait was called
// after Lock, the first Release returns an error that says so. A second Release, and one after a
// Lock that failed, return nil.
func (p *PreemptiveLocker) Release(ctx context.Context) (err error) {
	if err := p.usable(ctx); err != nil {
		return err
	}
	ctx, end := p.traceCall(ctx, OperationRelease)
	defer func() { p.traceEnd(end, err) }()

	p.mu.Lock()
	stage := p.stage
	var returned chan struct{}
	lock := p.lock
	var misuse error
	if p.settings != nil && stage != unlocked {
		misuse, p.settings.misuse = p.settings.misuse, nil
	}
	switch stage {
	case locking:
		if p.returned == nil {
			p.returned = make(chan struct{})
		}
		returned = p.returned
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
			// The error does not matter: Lock cleans up after itself.
			_ = unlockBounded(ctx, lock)
		}
		err = await(ctx, releaseTimeout-time.Since(start), returned)
	case locked:
		err = unlockBounded(ctx, lock)
		p.abort(nil)
	}
	return annotate(joinErrors(err, misuse), "locker: release %q#%d", p.pull.repo, p.pull.pr)
}

// Do locks, calls f and releases. The context given to f is derived from ctx, which must live as
// long as the hold. It is canceled when the holder is notified. Then [context.Cause] matches
// [ErrLockPreempted], [ErrMaxLockDuration], [ErrLockLost], [ErrProviderClosed] or
// [ErrStopRequested], or, if ctx is done, is the cause of ctx. f should then return soon, with the
// error or the cause of its context: the lock is revoked when the preemption timeout has passed.
// [TokenFromContext] returns the fencing token inside f.
//
// Do returns when f has returned. It releases the lock even if ctx is done. If Lock fails, Do
// returns its error and does not call f. Otherwise the error of Do matches the error of f and, if
// the holder was notified, the cause, even if f returned nil. It can match several sentinels: read
// it with [OutcomeOf]. If f panics, Do releases the lock, and the panic continues.
//
// If f, with its context or one derived from it, makes a claim for the same key by the same
// provider, that claim fails with [ErrLockNested]. With another context the claim cannot be
// distinguished from a newer claim of another caller: it notifies f, and waits for it.
func (p *PreemptiveLocker) Do(ctx context.Context, f func(ctx context.Context) error) (err error) {
	if f == nil {
		return errors.New("locker: function is nil")
	}
	ch, err := p.Lock(ctx)
	if err != nil {
		return err
	}
	outer, _ := ctx.Value(enclosingKey{}).(*enclosing)
	hold, lose := context.WithCancelCause(context.Background())
	do := &enclosing{p, outer, hold}
	fctx, cancel := context.WithCancelCause(context.WithValue(ctx, enclosingKey{}, do))
	p.mu.Lock()
	p.do = do
	p.mu.Unlock()
	returned := make(chan struct{})
	watched := make(chan error, 1)
	// The goroutine ends when f has returned, or before.
	go func() {
		watched <- p.watch(ctx, ch, returned, cancel, lose)
	}()
	// This runs even on a panic and on runtime.Goexit.
	defer func() {
		close(returned)
		parts := doError{hold: fmt.Sprintf("%q#%d for %q", p.pull.repo, p.pull.pr, p.event), work: err, cause: <-watched}
		parts.told = context.Cause(fctx)
		cancel(nil)
		lose(nil)
		parts.release = p.Release(context.WithoutCancel(ctx))
		err = parts.error()
	}()
	return f(fctx)
}

// watch cancels f's context at the notification, and ends the context of lose when the hold has
// ended. It returns the cause of the notification, or nil if f returned first.
func (p *PreemptiveLocker) watch(ctx context.Context, ch <-chan NotificationPayload, returned <-chan struct{}, cancel, lose context.CancelCauseFunc) error {
	select {
	case n, ok := <-ch:
		cause := p.disturbed(n, ok)
		cancel(cause)
		if ok {
			select {
			// The channel was closed, so the hold has ended.
			case <-ch:
			case <-returned:
				return cause
			}
		}
		lose(annotate(ErrLockLost, "the hold is over"))
		return cause
	case <-returned:
	}
	select {
	case n, ok := <-ch:
		// The holder was notified at the moment when f returned.
		return p.disturbed(n, ok)
	default:
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	return nil
}

// Shield calls f, a step that must not be cut in half, such as a schema migration. Call it inside
// Do's function, with that function's context. A notification does not cancel the context that f
// gets before limit has passed. It cancels ctx immediately as usual, and the function should return
// after f. The preemption timeout ([WithPreemptionTimeout]) begins when f has returned or limit has
// passed, so there is time to clean up and to release the lock.
//
// If the holder has been notified already, Shield does not call f and returns the cause. When limit
// passes after a notification, f's context is canceled with the cause. A loss of the hold cannot be
// postponed: it cancels f's context immediately. Otherwise Shield returns the error of f.
//
// A claim that waits for the lock waits up to limit longer. Its lock timeout ([WithLockTimeout])
// must be longer than limit and the preemption timeout together, or it returns [ErrLockTimeout].
//
// Shield returns an error outside of Do, if limit is not positive, if another Shield of the hold is
// running, even on another goroutine, and if the provider's locks have no method Shield.
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
	do, lock, stage := p.do, p.lock, p.stage
	p.mu.Unlock()
	if do == nil || stage != locked {
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
	// The error of shield does not name the key: the annotation names the pull request instead.
	if own := ownLock(lock); own != nil {
		begin = own.shield
	}
	if err := begin(limit); err != nil {
		return annotate(err, "locker: shield %q#%d", p.pull.repo, p.pull.pr)
	}
	defer shield.Unshield()

	end := time.Now().Add(limit)
	fctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer context.AfterFunc(do.hold, func() { cancel(context.Cause(do.hold)) })()
	// The goroutine ends at the limit, or when f has returned.
	defer context.AfterFunc(ctx, func() {
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

// disturbed returns the cause of a notification, given the result of a receive from the channel.
func (p *PreemptiveLocker) disturbed(n NotificationPayload, ok bool) error {
	p.mu.Lock()
	lock, stage := p.lock, p.stage
	p.mu.Unlock()
	if !ok && stage == released {
		// Release of this locker has closed the channel.
		return nil
	}
	return causeOf(lock, n, ok)
}

// Token returns the fencing token of the hold. It returns 0 before the lock is held, and then a
// number that is larger than that of every earlier hold of the key, in any process, across crashes
// of holders and of the database server. Send it with every write to a resource that can reject an
// older one. With a custom provider whose locks have no method Token it returns 0.
func (p *PreemptiveLocker) Token() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.token
}

// TokenFromContext returns the fencing token of the hold of the [PreemptiveLocker.Do] whose
// function was given ctx, or a context from which ctx is derived. If a Do is inside another one, it
// is the token of the innermost. Outside of Do, and with a custom provider whose locks have no
// method Token, it returns 0.
func TokenFromContext(ctx context.Context) int64 {
	if e, ok := ctx.Value(enclosingKey{}).(*enclosing); ok {
		return e.locker.Token()
	}
	return 0
}

// usable returns an error for a locker with a zero value, or if ctx is nil.
func (p *PreemptiveLocker) usable(ctx context.Context) error {
	if p.provider == nil {
		return errors.New("locker: PreemptiveLocker was not made by a factory")
	}
	if ctx == nil {
		return errContextNil
	}
	return nil
}

// begin moves p from unlocked to locking, or returns an error if Lock was called before.
func (p *PreemptiveLocker) begin() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stage != unlocked {
		return fmt.Errorf("locker: lock %q#%d: Lock was called before on this PreemptiveLocker (it is single use)", p.pull.repo, p.pull.pr)
	}
	p.stage = locking
	return nil
}

// abortable returns a context derived from ctx that Release cancels. Calls that do not block do not
// need it. Neither does the wait of this package's own locks, which Unlock ends.
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

// abort cancels the context that abortable has returned, if there is one.
func (p *PreemptiveLocker) abort(cause error) {
	p.mu.Lock()
	cancel := p.cancel
	p.mu.Unlock()
	if cancel != nil {
		cancel(cause)
	}
}

// acquire claims the key and waits for it. It returns the lock if it was created, even with an
// error.
func (p *PreemptiveLocker) acquire(ctx context.Context, asked time.Time) (lock PreemptableLock, ch <-chan NotificationPayload, err error) {
	var set terms
	p.mu.Lock()
	if p.settings != nil {
		set = p.settings.terms
	}
	p.mu.Unlock()
	call := lockCall{asked: asked, announce: true, terms: set.orElse(termsFromContext(ctx)).orElse(terms{mode: p.conf.mode})}
	wait := call.terms.wait
	defer func() {
		// A lock observes the failure of its Lock.
		if err != nil && lock == nil {
			p.observeFailed(asked, call.terms, err)
		}
	}()
	if err := checkRepo(p.pull.repo, p.pull.pr); err != nil {
		return nil, nil, err
	}
	if err := call.terms.check(); err != nil {
		return nil, nil, err
	}
	if wait < 0 {
		return nil, nil, fmt.Errorf("the bound of the wait is negative: %v", wait)
	}
	var key int64
	switch own := p.provider.(type) {
	case *PostgresLockProvider:
		// A claim that skips is not announced, so no statement checks that its hint is right.
		if key, ok := own.hints.get(p.pull); ok && call.terms.mode != SkipIfBusy {
			call.pull = &p.pull
			lock, ch, err := p.claim(ctx, ctx, key, call)
			if !errors.Is(err, errKeyMoved) {
				return lock, ch, err
			}
			call.pull = nil
		}
		left := time.Until(asked.Add(own.conf.waitFor(call.terms, false)))
		key, err = own.lockKey(p.abortable(ctx), p.pull.repo, p.pull.pr, max(1, left))
		if err != nil {
			return nil, nil, err
		}
		return p.claim(ctx, p.abortable(ctx), key, call)
	case *FakeLockProvider:
		// The calls of this provider do not block.
		if key, err = own.LockKey(ctx, p.pull.repo, p.pull.pr); err != nil {
			return nil, nil, err
		}
		return p.claim(ctx, ctx, key, call)
	}

	calls := p.abortable(ctx)
	var timer *time.Timer
	if wait > 0 {
		timer = time.AfterFunc(time.Until(asked.Add(wait)), func() { p.abort(ErrLockTimeout) })
	}
	key, err = p.provider.LockKey(calls, p.pull.repo, p.pull.pr)
	if err == nil {
		lock, ch, err = p.claim(ctx, calls, key, call)
	}
	// The calls were canceled by the timer, or are about to be.
	if timer != nil && !timer.Stop() {
		switch classify(err) {
		case OutcomeCompleted, OutcomeFailed, OutcomeCanceled:
			err = ErrLockTimeout
		}
	}
	return lock, ch, err
}

// observeFailed calls the observer of the provider, if there is one, for a Lock that has failed
// before there was a lock.
func (p *PreemptiveLocker) observeFailed(asked time.Time, t terms, err error) {
	var observe func(Observation)
	switch own := p.provider.(type) {
	case *PostgresLockProvider:
		observe = own.conf.observer
	case *FakeLockProvider:
		own.init()
		observe = own.conf.observer
	}
	if observe != nil {
		observe(Observation{Kind: ObservedFailed, Event: p.event, Labels: decodeLabels(t.labels), After: time.Since(asked), Err: err})
	}
}

// claim creates the lock, announces the claim and waits for the key. It returns the lock if it was
// created, even with an error.
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

// announceAndLock announces the claim and waits for the key. A lock of this package does both with
// one statement.
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
		own.pull = &p.pull
	}
	p.mu.Lock()
	p.lock = lock
	aborted := p.aborted
	p.mu.Unlock()
	if own != nil {
		if aborted {
			own.abandon()
		}
		return own.lockKey(ctx, call)
	}
	if aborted {
		return nil, errReleasedWait
	}
	if wait := call.terms.wait; wait > 0 {
		call.terms.wait = max(1, time.Until(call.asked.Add(wait)))
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

// arrive moves p from locking to locked, unless Lock has failed or Release was called meanwhile. It
// returns the error of Lock.
func (p *PreemptiveLocker) arrive(lock PreemptableLock, err error) error {
	var cancel context.CancelCauseFunc
	defer func() {
		if cancel != nil {
			cancel(nil)
		}
	}()
	var token int64
	if l, ok := lock.(interface{ Token() int64 }); ok && err == nil {
		token = l.Token()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.aborted {
		return errReleasedWait
	}
	if err != nil {
		return err
	}
	p.stage, p.token = locked, token
	// The hold of a lock of another provider may need the context of its Lock.
	if ownLock(lock) != nil {
		cancel, p.calls, p.cancel = p.cancel, nil, nil
	}
	return nil
}

// leave ends a Lock that has failed.
func (p *PreemptiveLocker) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stage = released
	if p.returned != nil {
		close(p.returned)
	}
}

// causeOf returns the cause of a holder's notification: that of the lock, if it knows it, and
// otherwise one made from the result of a receive from its channel.
func causeOf(lock PreemptableLock, n NotificationPayload, ok bool) error {
	if l, has := lock.(interface{ Cause() error }); has {
		if cause := l.Cause(); cause != nil {
			return cause
		}
	}
	if !ok {
		return annotate(ErrLockLost, "the lock's channel was closed")
	}
	return &ConflictError{Winner: &ClaimInfo{ID: n.ID, Event: n.Message}, Holder: &ClaimInfo{}, Key: n.LockKey, Err: ErrLockPreempted, detail: fmt.Sprintf("notified: %q", n.Message)}
}

// unlockBounded unlocks a lock of any provider, and returns within the bounds of Release.
func unlockBounded(ctx context.Context, lock PreemptableLock) error {
	// Unlock of this package's locks keeps the bounds itself.
	if ownLock(lock) != nil {
		return lock.Unlock(ctx)
	}
	if ctx.Err() != nil {
		// The goroutine ends within releaseTimeout.
		go func() { _ = unlockDetached(ctx, lock) }()
		return contextError(ctx)
	}
	bounded, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	return lock.Unlock(bounded)
}

// unlockDetached unlocks a lock, even if ctx is done.
func unlockDetached(ctx context.Context, lock PreemptableLock) error {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	return lock.Unlock(bounded)
}

// isNil reports whether v is nil, or an interface that contains a nil pointer or function.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	r := reflect.ValueOf(v)
	return (r.Kind() == reflect.Pointer || r.Kind() == reflect.Func) && r.IsNil()
}
