package metrics_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"

	"github.com/preemptable/locker"
	metrics "github.com/preemptable/locker/examples/prometheus"
)

// withStats adds the Stats of a provider on PostgreSQL to the fake.
type withStats struct {
	locker.LockProvider
	stats locker.Stats
}

func (p *withStats) Stats() locker.Stats { return p.stats }

// TestScrape scrapes the metrics over HTTP, as Prometheus does. There is a holder, a waiter that is
// superseded by a third claim, a late claim, one that is skipped, and one that has to wait for too
// long.
func TestScrape(t *testing.T) {
	registry := prometheus.NewRegistry()
	m := metrics.New(registry)
	fake, err := locker.NewFakeProvider(locker.WithObserver(m.Observe))
	require.NoError(t, err)
	defer func() { require.NoError(t, fake.Close()) }()
	// The fake has no Stats.
	m.WatchStats(fake)
	provider := &withStats{fake, locker.Stats{Queued: 3, Held: 1, Waiting: 2, Connected: true, Listening: true}}
	m.WatchStats(provider)

	newLocker, err := locker.NewPreemptiveLockerFactory(provider)
	require.NoError(t, err)
	ctx := context.Background()
	first := newLocker("o/r", 1, "first").Sequence(1)
	told, err := first.Lock(ctx)
	require.NoError(t, err)
	second, third := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := newLocker("o/r", 1, "second").Sequence(2).Lock(ctx)
		second <- err
	}()
	// The second claim has been announced.
	<-told
	last := newLocker("o/r", 1, "third").Sequence(3)
	go func() {
		_, err := last.Lock(ctx)
		third <- err
	}()
	require.ErrorIs(t, <-second, locker.ErrLockPreempted)
	_, err = newLocker("o/r", 1, "late").Sequence(2).Lock(ctx)
	require.ErrorIs(t, err, locker.ErrClaimOutdated)
	require.NoError(t, first.Release(ctx))
	require.NoError(t, <-third)
	_, err = newLocker("o/r", 1, "test").Mode(locker.SkipIfBusy).Labels(map[string]string{"commit": "ec26c3e"}).Lock(ctx)
	require.ErrorIs(t, err, locker.ErrLockBusy)
	_, err = newLocker("o/r", 1, "patient").Mode(locker.LetFinish).Wait(time.Millisecond).Lock(ctx)
	require.ErrorIs(t, err, locker.ErrLockTimeout)
	require.NoError(t, last.Release(ctx))

	server := httptest.NewServer(promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	defer server.Close()
	res, err := http.Get(server.URL)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	for _, line := range []string{
		`locker_events_total{kind="acquired",outcome="completed"} 2`,
		`locker_events_total{kind="superseded",outcome="superseded"} 1`,
		`locker_events_total{kind="superseded",outcome="outdated"} 1`,
		`locker_events_total{kind="skipped",outcome="busy"} 1`,
		`locker_events_total{kind="failed",outcome="timeout"} 1`,
		`locker_events_total{kind="notified",outcome="preempted"} 1`,
		`locker_events_total{kind="released",outcome="preempted"} 1`,
		`locker_events_total{kind="released",outcome="completed"} 1`,
		`locker_wait_seconds_count{kind="skipped"} 1`,
		`locker_wait_seconds_count{kind="acquired"} 2`,
		`locker_hold_seconds_count{kind="released"} 2`,
		`locker_queue 3`,
		`locker_held 1`,
		`locker_waiting 2`,
		`locker_connected 1`,
		`locker_suspended_seconds 0`,
		`locker_listening 1`,
	} {
		require.Contains(t, string(body), line+"\n", "%s", body)
	}
	require.NotContains(t, string(body), "ec26c3e", "a label of a claim is none of a metric")
	t.Logf("%s", body)
}
