package locker

import (
	"context"
	"testing"
	"time"

	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/require"
)

// TestStalledCommit: a synchronous standby that is gone makes commits wait for
// ever. That fails the locks that are being acquired; those that are held stay
// held for longer than the session's loss bound (C24).
func TestStalledCommit(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	server, err := pgserver.Start(ctx, pgserver.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	uri, err := server.CreateDatabase(ctx, "stall")
	require.NoError(t, err)
	p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(uri, ""), WithLockTimeout(soon))
	require.NoError(t, err)
	defer func() { require.NoError(t, p.(*PostgresLockProvider).Close()) }()
	newLocker, err := NewPreemptiveLockerFactory(p)
	require.NoError(t, err)

	held := newLocker("r", 1, "held before")
	stop, err := held.Lock(ctx)
	require.NoError(t, err)
	_, err = p.LockKey(ctx, "r", 2)
	require.NoError(t, err)

	require.NoError(t, server.Set(ctx, "synchronous_standby_names", "nobody"))
	attempt := func() error { // the setting takes effect a moment later
		l := newLocker("r", 2, "acquired meanwhile")
		if _, err := l.Lock(ctx); err != nil {
			return err
		}
		return l.Release(ctx)
	}
	require.Eventually(t, func() bool { return attempt() != nil }, soon, time.Millisecond)
	for start := time.Now(); time.Since(start) < lossBound+heartbeatInterval; {
		require.ErrorIs(t, attempt(), errStalled)
	}
	select {
	case n := <-stop:
		t.Fatalf("the held lock was disturbed: %+v", n)
	default:
	}

	require.NoError(t, server.Set(ctx, "synchronous_standby_names", ""))
	require.Eventually(t, func() bool { return attempt() == nil }, soon, time.Millisecond)
	require.NoError(t, held.Release(ctx))
}
