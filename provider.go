package locker

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// LockProvider describes an object capable of creating distributed locks. You
// may provide your own int64 key or obtain one for a given Repo/PR.
//
// The providers of this package are safe for concurrent use and are also
// io.Closers. A provider of your own works with [NewPreemptiveLockerFactory]. If its locks
// have the optional methods Token() int64, Cause() error, or both
// Shield(time.Duration) error and Unshield(), they are used. A lock that wraps one of this
// package has to forward all of them. Without Token it has no fencing token. Without Cause
// every payload counts as a newer claim's. Without Shield the method Shield is an error.
//
// What a caller has said about its claim is in the context of Notify and Lock: see
// [ModeFromContext], [SequenceFromContext] and [LabelsFromContext]. With the mode
// [SkipIfBusy] Notify is not called, and Lock should return [ErrLockBusy] instead of
// waiting.
type LockProvider interface {
	// New creates a lock for key. The event says why the lock is wanted: holders and
	// waiters that lose to it are told.
	New(ctx context.Context, key int64, event string) (PreemptableLock, error)
	// LockKey returns the key of a repo's pull request.
	LockKey(ctx context.Context, repo string, pr uint) (int64, error)
}

// PreemptableLock describes an object that acts as a Lock that can signal to
// peers that they should unlock. Preemptable locks are single use. Once you
// unlock the lock, underlying resources will be cleaned up.
type PreemptableLock interface {
	// Lock locks the preemptable lock. If it fails to lock, or is preempted
	// before locking, it should return an error. The channel carries at most
	// one payload, when the holder has to stop, and is closed when the hold is
	// over.
	Lock(ctx context.Context) (<-chan NotificationPayload, error)
	// Unlock unlocks the preemptable lock. It should clean up any underlying
	// resources.
	Unlock(ctx context.Context) error
	// Notify informs the current lock holder that they should unlock the lock.
	Notify(ctx context.Context) error
}

// LockProviderKind enumerates the different LockProvider implementations.
type LockProviderKind int

const (
	// UnknownLockProviderKind is the default kind and is not implemented:
	// NewLockProvider refuses it.
	UnknownLockProviderKind = iota
	// PostgresLockProviderKind represents an implementation of the
	// LockProvider interface that uses Postgres as the underlying store.
	PostgresLockProviderKind
	// FakeLockProviderKind represents an implementation of the LockProvider
	// interface that uses an in-memory store, suitable for tests.
	FakeLockProviderKind
)

var (
	_ io.Closer = (*FakeLockProvider)(nil)
	_ io.Closer = (*PostgresLockProvider)(nil)
)

// NewLockProvider returns an implementation of the LockProvider interface. It
// accepts an arbitrary number of LockProviderOptions and sets some opinionated
// default values if the option is not explicitly set: lock timeout 20 s, max
// lock duration 30 min 30 s, preemption timeout 10 s, session timeout 10 s, no logging.
//
// Bad options are an error. No server is needed: the postgres provider connects when it
// is first used. The provider is an io.Closer: close it when the service ends.
// [NewPostgresProvider] and [NewFakeProvider] return the provider's own type.
func NewLockProvider(kind LockProviderKind, options ...LockProviderOption) (LockProvider, error) {
	conf, err := newLockProviderConfig(options)
	if err != nil {
		return nil, err
	}
	switch kind {
	case PostgresLockProviderKind:
		// Not the call's result itself: a nil *PostgresLockProvider would make
		// a LockProvider that is not nil.
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

// NewPostgresProvider returns a provider that uses the PostgreSQL server that uri names,
// in one of the forms that [WithPostgresBackend] accepts. The options are applied after
// it. With [WithPostgresURI] uri is empty. Like [NewLockProvider] it checks its arguments
// and needs no server. Close the provider when the service ends.
func NewPostgresProvider(uri string, options ...LockProviderOption) (*PostgresLockProvider, error) {
	conf, err := newLockProviderConfig(append([]LockProviderOption{WithPostgresBackend(uri, "")}, options...))
	if err != nil {
		return nil, err
	}
	return newPostgresLockProvider(conf)
}

// NewFakeProvider returns a provider whose locks are in memory, for unit tests. Every
// provider has a memory of its own: give one to all parts of a test that share locks.
func NewFakeProvider(options ...LockProviderOption) (*FakeLockProvider, error) {
	conf, err := newLockProviderConfig(options)
	if err != nil {
		return nil, err
	}
	return &FakeLockProvider{conf: conf}, nil
}

// newLock fills in a lock, for New of both providers.
func newLock(ctx context.Context, l *lock, b backend, conf *LockProviderConfig, key int64, event string) error {
	if err := checkUse(ctx, b.events()); err != nil {
		return annotate(err, "locker: new lock on key %d", key)
	}
	l.backend = b
	l.conf = conf
	l.claim = claim{key: key, id: b.newID(), event: cleanEvent(event)}
	return nil
}

// ownLock returns what is behind a lock of this package, or nil for every other one, also
// for one that embeds a lock of this package.
func ownLock(l PreemptableLock) *lock {
	switch l := l.(type) {
	case *PostgresLock:
		return &l.lock
	case *FakePreemptableLock:
		return &l.lock
	}
	return nil
}

// checkLockKey refuses what LockKey of both providers refuses.
func checkLockKey(ctx context.Context, h *hub, repo string, pr uint) error {
	if err := checkRepo(repo, pr); err != nil {
		return err
	}
	if err := checkUse(ctx, h); err != nil {
		return annotate(err, "locker: lock key of %q#%d", repo, pr)
	}
	return nil
}

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
