package main

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/preemptable/locker"
)

// lockerClient uses this library, with one provider for the process.
type lockerClient struct {
	provider locker.LockProvider
	factory  locker.PreemptiveLockerFactory
}

func openLocker(_ context.Context, uri string, o options) (client, error) {
	p, err := locker.NewLockProvider(locker.PostgresLockProviderKind, locker.WithPostgresBackend(uri, ""),
		locker.WithSessionTimeout(o.TTL), locker.WithLockTimeout(time.Minute))
	if err != nil {
		return nil, err
	}
	f, err := locker.NewPreemptiveLockerFactory(p)
	if err != nil {
		return nil, errors.Join(err, p.(io.Closer).Close())
	}
	return &lockerClient{provider: p, factory: f}, nil
}

func (c *lockerClient) take(ctx context.Context, l *locker.PreemptiveLocker) (hold, error) {
	ch, err := l.Lock(ctx)
	if err != nil {
		return nil, err
	}
	return &lockerHold{lock: l, stop: ch}, nil
}

func (c *lockerClient) lock(ctx context.Context, key int) (hold, error) {
	return c.take(ctx, c.factory("org/repo", uint(key), "benchmark"))
}

// try does not notify the holder. A key whose holder's session is dead counts as busy while it is
// watched.
func (c *lockerClient) try(ctx context.Context, key int) (hold, error) {
	h, err := c.take(ctx, c.factory("org/repo", uint(key), "benchmark").Mode(locker.SkipIfBusy))
	if errors.Is(err, locker.ErrLockBusy) {
		return nil, errHeld
	}
	return h, err
}

func (c *lockerClient) Close() error { return c.provider.(io.Closer).Close() }

type lockerHold struct {
	lock *locker.PreemptiveLocker
	stop <-chan locker.NotificationPayload
}

func (h *lockerHold) release(ctx context.Context) error { return h.lock.Release(ctx) }
func (h *lockerHold) token() int64                      { return h.lock.Token() }

func (h *lockerHold) alive(context.Context) bool {
	select {
	// The channel has a notification, or was closed by the end of the hold.
	case <-h.stop:
		return false
	default:
		return true
	}
}
