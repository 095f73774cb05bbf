//go:build nodatadog

package locker

import (
	"context"
	"testing"

	"github.com/jmoiron/sqlx"
	"github.com/stretchr/testify/require"
)

// Without Datadog a service name is rejected by the call that it was given to, and everything else
// works (C41).
func TestAPMLeftOut(t *testing.T) {
	const uri, reason = "postgres://user:" + secret + "@127.0.0.1:1/db?sslmode=disable", "built with the tag nodatadog"
	for _, kind := range []LockProviderKind{PostgresLockProviderKind, FakeLockProviderKind} {
		_, err := NewLockProvider(kind, WithPostgresBackend(uri, "the-service"))
		requireRefused(t, err, reason)
		require.ErrorContains(t, err, `"the-service"`)
		require.ErrorContains(t, err, "WithTracer")
	}
	requireRefused(t, second(NewPostgresPreemptiveLockerFactory(uri, "the-service", nil)), reason)
	requireRefused(t, second(NewFakePreemptiveLockerFactory(nil, WithAPMServiceName("the-service"))), reason)
	var conf LockProviderConfig
	WithPostgresBackend(uri, "the-service")(&conf)
	db, err := sqlx.Open("postgres", uri)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	requireRefused(t, second(NewPostgresLock(t.Context(), db, 1, uri, "opened", conf)), reason)

	_, err = NewPostgresPreemptiveLockerFactory(uri, "", nil)
	require.NoError(t, err)
	factory, err := NewFakePreemptiveLockerFactory(nil, WithAPMServiceName(""))
	require.NoError(t, err)
	require.NoError(t, factory("a/b", 1, "opened").Do(t.Context(), func(context.Context) error { return nil }))
}
