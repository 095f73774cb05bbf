package locker

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// A LockProvider creates distributed locks on int64 keys. The caller may choose a key, or get the
// key of a pull request from LockKey.
//
// The providers of this package are safe for concurrent use, and are also io.Closers.
// [NewPreemptiveLockerFactory] accepts a custom provider as well.
//
// A [PreemptiveLocker] uses these optional methods of a custom provider's locks:
//
//   - Token() int64 returns the fencing token. Without it [PreemptiveLocker.Token] is 0.
//   - Cause() error returns why the holder was notified. Without it every payload counts as that of
//     a newer claim.
//   - Shield(time.Duration) error and Unshield(), only together, postpone the revocation. Without
//     them [PreemptiveLocker.Shield] returns an error.
//
// A lock that wraps one of this package's locks should forward all of them.
//
// The context that is given to Notify and Lock carries the mode, the sequence number and the labels
// of the claim: see [ModeFromContext], [SequenceFromContext] and [LabelsFromContext]. In the mode
// [SkipIfBusy] Notify is not called, and Lock should return [ErrLockBusy] instead of waiting.
type LockProvider interface {
	// New creates a lock for key. The event is the reason for the claim. It is shown to the holders
	// and waiters that lose to the claim.
	New(ctx context.Context, key int64, event string) (PreemptableLock, error)
	// LockKey returns the key of a repo's pull request.
	LockKey(ctx context.Context, repo string, pr uint) (int64, error)
}

// A PreemptableLock is a lock that can ask its holder to unlock it. It is used once. Unlock frees
// its resources.
type PreemptableLock interface {
	// Lock waits for the key. It returns an error if it does not acquire the key, for example
	// because a newer claim has superseded this one. The channel carries at most one payload, when
	// the holder must stop, and is closed when the hold ends.
	Lock(ctx context.Context) (<-chan NotificationPayload, error)
	// Unlock ends the hold, or the wait of a Lock that has not returned, and frees the lock's
	// resources.
	Unlock(ctx context.Context) error
	// Notify announces the lock's claim: it supersedes older claims that wait, and asks the holder
	// to stop.
	Notify(ctx context.Context) error
}

// A LockProviderKind selects an implementation of [LockProvider].
type LockProviderKind int

const (
	// UnknownLockProviderKind is the zero value. [NewLockProvider] returns an error for it.
	UnknownLockProviderKind = iota
	// PostgresLockProviderKind selects the implementation that uses PostgreSQL, a
	// [PostgresLockProvider]. It needs [WithPostgresBackend] or [WithPostgresURI].
	PostgresLockProviderKind
	// FakeLockProviderKind selects the implementation in memory, a [FakeLockProvider]. It is for
	// unit tests.
	FakeLockProviderKind
)

var (
	_ io.Closer = (*FakeLockProvider)(nil)
	_ io.Closer = (*PostgresLockProvider)(nil)
)

// NewLockProvider returns a provider of the given kind. An option that is not given has its
// default: lock timeout 20 s, max lock duration 30 min 30 s, preemption timeout 10 s, session
// timeout 10 s, no logging.
//
// NewLockProvider returns an error if an option or the kind is not valid. It needs no server: the
// postgres provider connects when it is first used. The provider is an io.Closer. Close it when the
// service ends. [NewPostgresProvider] and [NewFakeProvider] return the provider's own type.
func NewLockProvider(kind LockProviderKind, options ...LockProviderOption) (LockProvider, error) {
	conf, err := newLockProviderConfig(options)
	if err != nil {
		return nil, err
	}
	switch kind {
	case PostgresLockProviderKind:
		// The result is not returned directly: a nil *PostgresLockProvider would become a
		// LockProvider that is not nil.
		plp, err := newPostgresLockProvider(conf)
		if err != nil {
			return nil, err
		}
		return plp, nil
	case FakeLockProviderKind:
		return &FakeLockProvider{conf: conf}, nil
	case UnknownLockProviderKind:
		return nil, errors.New("locker: lock provider kind is UnknownLockProviderKind: choose PostgresLockProviderKind or FakeLockProviderKind")
	}
	return nil, fmt.Errorf("locker: unknown lock provider kind %d", kind)
}

// NewPostgresProvider returns a provider that uses the PostgreSQL server that uri names.
// [WithPostgresBackend] describes uri. With [WithPostgresURI] uri must be empty. The options are
// applied afterwards. Like [NewLockProvider] it returns an error if an argument is not valid, and
// needs no server. Close the provider when the service ends.
func NewPostgresProvider(uri string, options ...LockProviderOption) (*PostgresLockProvider, error) {
	conf, err := newLockProviderConfig(append([]LockProviderOption{WithPostgresBackend(uri, "")}, options...))
	if err != nil {
		return nil, err
	}
	return newPostgresLockProvider(conf)
}

// NewFakeProvider returns a provider whose locks are in memory, for unit tests. Each provider has a
// separate memory: parts of a test that share locks must share the provider. NewFakeProvider
// returns an error if an option is not valid.
func NewFakeProvider(options ...LockProviderOption) (*FakeLockProvider, error) {
	conf, err := newLockProviderConfig(options)
	if err != nil {
		return nil, err
	}
	return &FakeLockProvider{conf: conf}, nil
}

// newLock fills in a lock. New of both providers calls it.
func newLock(ctx context.Context, l *lock, b backend, conf *LockProviderConfig, key int64, event string) error {
	if err := checkUse(ctx, b.events()); err != nil {
		return annotate(err, "locker: new lock on key %d", key)
	}
	l.backend = b
	l.conf = conf
	l.claim = claim{key: key, id: b.newID(), event: cleanEvent(event)}
	return nil
}

// ownLock returns the lock inside a lock of this package. For any other lock it returns nil, even
// if that embeds a lock of this package.
func ownLock(l PreemptableLock) *lock {
	switch l := l.(type) {
	case *PostgresLock:
		return &l.lock
	case *FakePreemptableLock:
		return &l.lock
	}
	return nil
}

// checkLockKey returns the errors of LockKey that both providers have in common.
func checkLockKey(ctx context.Context, h *hub, repo string, pr uint) error {
	if err := checkRepo(repo, pr); err != nil {
		return err
	}
	if err := checkUse(ctx, h); err != nil {
		return annotate(err, "locker: lock key of %q#%d", repo, pr)
	}
	return nil
}

// checkUse returns an error if ctx is nil or done, or if the hub is closed.
func checkUse(ctx context.Context, h *hub) error {
	if ctx == nil {
		return errContextNil
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return ErrProviderClosed
	}
	return nil
}
