// Package metrics exports the events of a provider's locks as Prometheus metrics. Copy it into your
// service.
//
//	m := metrics.New(registry)
//	provider, err := locker.NewPostgresProvider(uri, locker.WithObserver(m.Observe))
//	…
//	m.WatchStats(provider)
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/preemptable/locker"
)

// Metrics counts and times the events of locks.
//
//	locker_events_total{kind,outcome}  counter, by the names of locker.ObservationKind and locker.Outcome
//	locker_wait_seconds{kind}          histogram of Lock: acquired, superseded, failed, skipped
//	locker_hold_seconds{kind}          histogram of holds: released, revoked, lost
//
// The outcome is that of the observation's error. It is the reason why a claim was superseded,
// failed or was skipped, why a holder was notified, and why a released hold had been notified.
// Without an error it is "completed".
//
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
		}, []string{"kind", "outcome"}),
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

// Observe is the function for locker.WithObserver. No label of a metric contains a repo, an event,
// a key, or a claim's own labels (o.Labels: a commit, a URL), because every value would create a
// time series that never ends. They belong into a log.
func (m *Metrics) Observe(o locker.Observation) {
	kind := o.Kind.String()
	outcome, _ := locker.OutcomeOf(o.Err)
	m.events.WithLabelValues(kind, outcome.String()).Inc()
	switch o.Kind {
	case locker.ObservedAcquired, locker.ObservedSuperseded, locker.ObservedFailed, locker.ObservedSkipped:
		m.wait.WithLabelValues(kind).Observe(o.After.Seconds())
	case locker.ObservedReleased, locker.ObservedRevoked, locker.ObservedLost:
		m.hold.WithLabelValues(kind).Observe(o.After.Seconds())
	}
}

// WatchStats adds gauges of a provider's session. Providers without Stats, such as the fake, have
// none.
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
