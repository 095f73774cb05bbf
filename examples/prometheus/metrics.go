// Package metrics exports what the locks of a provider do as Prometheus metrics. Copy it into your service.
//
//	m := metrics.New(registry)
//	provider, err := locker.NewLockProvider(locker.PostgresLockProviderKind,
//		locker.WithPostgresBackend(uri, ""), locker.WithObserver(m.Observe))
//	…
//	m.WatchStats(provider)
package metrics

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/preemptable/locker"
)

// Metrics counts and times what happens to locks.
//
//	locker_events_total{kind,cause}  counter; kind as in locker.ObservationKind, cause as in causeOf
//	locker_wait_seconds{kind}        histogram of Lock: acquired, displaced, failed
//	locker_hold_seconds{kind}        histogram of holds: released, revoked, lost
//	locker_queue, locker_held, locker_waiting, locker_connected, locker_suspended_seconds,
//	locker_listening                 gauges of the provider, see WatchStats
type Metrics struct {
	registry prometheus.Registerer
	events   *prometheus.CounterVec
	wait     *prometheus.HistogramVec
	hold     *prometheus.HistogramVec
}

// New registers the metrics. It panics if they are registered already.
func New(registry prometheus.Registerer) *Metrics {
	m := &Metrics{
		registry: registry,
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "locker_events_total", Help: "What happened to locks, and why.",
		}, []string{"kind", "cause"}),
		wait: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "locker_wait_seconds", Help: "How long Lock waited, by how it ended.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 9), // 1 ms … 65 s
		}, []string{"kind"}),
		hold: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "locker_hold_seconds", Help: "How long locks were held, by how the hold ended.",
			Buckets: prometheus.ExponentialBuckets(0.01, 4, 10), // 10 ms … 44 min
		}, []string{"kind"}),
	}
	registry.MustRegister(m.events, m.wait, m.hold)
	return m
}

// Observe is for locker.WithObserver. No label holds a repo, an event or a key: there would be no end of them.
func (m *Metrics) Observe(o locker.Observation) {
	kind := o.Kind.String()
	m.events.WithLabelValues(kind, causeOf(o.Err)).Inc()
	switch o.Kind {
	case locker.ObservedAcquired, locker.ObservedDisplaced, locker.ObservedFailed:
		m.wait.WithLabelValues(kind).Observe(o.After.Seconds())
	case locker.ObservedReleased, locker.ObservedRevoked, locker.ObservedLost:
		m.hold.WithLabelValues(kind).Observe(o.After.Seconds())
	}
}

// causeOf is a short name of an error, one of a few.
func causeOf(err error) string {
	for _, c := range []struct {
		sentinel error
		name     string
	}{
		{locker.ErrLockLost, "lost"}, // before the others: the error of a loss may quote them
		{locker.ErrClaimOutdated, "outdated"},
		{locker.ErrLockPreempted, "preempted"},
		{locker.ErrLockTimeout, "timeout"},
		{locker.ErrLockNested, "nested"},
		{locker.ErrMaxLockDuration, "too_long"},
		{locker.ErrStopRequested, "asked"},
		{locker.ErrProviderClosed, "closed"},
	} {
		if errors.Is(err, c.sentinel) {
			return c.name
		}
	}
	if err == nil {
		return "none"
	}
	return "other" // a context that ended, or the database
}

// WatchStats adds gauges of a provider's session. Providers without Stats, such as the fake, have none.
func (m *Metrics) WatchStats(provider locker.LockProvider) {
	p, ok := provider.(interface{ Stats() locker.Stats })
	if !ok {
		return
	}
	gauge := func(name, help string, value func(locker.Stats) float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return value(p.Stats()) }))
	}
	gauge("locker_queue", "Operations that wait for the database.", func(s locker.Stats) float64 { return float64(s.Queued) })
	gauge("locker_held", "Keys that the provider's locks hold.", func(s locker.Stats) float64 { return float64(s.Held) })
	gauge("locker_waiting", "Locks that wait for a key.", func(s locker.Stats) float64 { return float64(s.Waiting) })
	gauge("locker_connected", "1 while the session is connected.", func(s locker.Stats) float64 { return number(s.Connected) })
	gauge("locker_suspended_seconds", "For how long the session has been suspended; 0 if it is not.", func(s locker.Stats) float64 {
		if s.Suspended.IsZero() {
			return 0
		}
		return time.Since(s.Suspended).Seconds()
	})
	gauge("locker_listening", "1 while notifications arrive.", func(s locker.Stats) float64 { return number(s.Listening) })
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
