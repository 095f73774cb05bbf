// Package telemetry exports the events of a provider's locks as OpenTelemetry spans and metrics.
// Copy it into your service.
//
//	t, err := telemetry.New(otel.GetTracerProvider(), otel.GetMeterProvider())
//	…
//	provider, err := locker.NewPostgresProvider(uri, locker.WithObserver(t.Observe))
//	…
//	err = t.WatchStats(provider)
//	…
//	newLocker, err := locker.NewPreemptiveLockerFactory(provider, locker.WithTracer(t.Trace))
package telemetry

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	"go.opentelemetry.io/otel/semconv/v1.37.0/dbconv"
	"go.opentelemetry.io/otel/trace"

	"github.com/preemptable/locker"
)

const name = "github.com/preemptable/locker/examples/opentelemetry"

// The attributes for which there is no convention.
const (
	EventKey   = attribute.Key("locker.event")
	LockKey    = attribute.Key("locker.key")
	TokenKey   = attribute.Key("locker.token")
	KindKey    = attribute.Key("locker.kind")    // see locker.ObservationKind
	OutcomeKey = attribute.Key("locker.outcome") // see locker.Outcome
)

// Telemetry creates these spans and metrics:
//
//	lock, release                 spans, with vcs.owner.name, vcs.repository.name, vcs.change.id, locker.event, locker.key,
//	                              locker.token, locker.outcome and error.type
//	announce, acquire, …          client spans of SQL statements, with db.system.name, db.namespace, db.operation.name,
//	                              db.query.summary, db.query.text, server.address, server.port, db.response.status_code
//	                              and error.type
//	db.client.operation.duration  histogram of these statements
//	locker.wait.duration          histogram of Lock, with locker.kind and locker.outcome
//	locker.hold.duration          histogram of holds, the same
//	locker.events                 counter of the events of locks and sessions, the same
//	locker.held, locker.waiting, locker.queued, locker.connected
//	                              state of the session, see WatchStats
type Telemetry struct {
	tracer     trace.Tracer
	meter      metric.Meter
	statements dbconv.ClientOperationDuration
	wait, hold metric.Float64Histogram
	events     metric.Int64Counter
}

// New creates the instruments.
func New(tracers trace.TracerProvider, meters metric.MeterProvider) (*Telemetry, error) {
	t := &Telemetry{
		tracer: tracers.Tracer(name, trace.WithSchemaURL(semconv.SchemaURL)),
		meter:  meters.Meter(name, metric.WithSchemaURL(semconv.SchemaURL)),
	}
	var failed [4]error
	t.statements, failed[0] = dbconv.NewClientOperationDuration(t.meter,
		metric.WithExplicitBucketBoundaries(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10))
	t.wait, failed[1] = t.meter.Float64Histogram("locker.wait.duration", metric.WithUnit("s"),
		metric.WithDescription("How long Lock waited, by how it ended."),
		metric.WithExplicitBucketBoundaries(0.001, 0.01, 0.1, 1, 5, 10, 30, 60))
	t.hold, failed[2] = t.meter.Float64Histogram("locker.hold.duration", metric.WithUnit("s"),
		metric.WithDescription("How long locks were held, by how the hold ended."),
		metric.WithExplicitBucketBoundaries(0.01, 0.1, 1, 10, 60, 300, 1800))
	t.events, failed[3] = t.meter.Int64Counter("locker.events", metric.WithUnit("{event}"),
		metric.WithDescription("What happened to locks, and why."))
	return t, errors.Join(failed[:]...)
}

// Trace is the function for locker.WithTracer.
func (t *Telemetry) Trace(ctx context.Context, op locker.Operation) (context.Context, func(locker.OperationEnd)) {
	if op.Kind == locker.OperationStatement {
		return t.statement(ctx, op)
	}
	owner, repository := "", op.Repo
	if i := strings.LastIndexByte(op.Repo, '/'); i >= 0 {
		owner, repository = op.Repo[:i], op.Repo[i+1:]
	}
	ctx, span := t.tracer.Start(ctx, op.Kind.String(), trace.WithAttributes(
		semconv.VCSOwnerName(owner), semconv.VCSRepositoryName(repository),
		semconv.VCSChangeID(strconv.FormatUint(uint64(op.PullRequest), 10)), EventKey.String(op.Event)))
	return ctx, func(end locker.OperationEnd) {
		span.SetAttributes(LockKey.Int64(end.Key), TokenKey.Int64(end.Token), OutcomeKey.String(outcomeOf(end.Err)))
		fail(span, end.Err, outcomeOf(end.Err))
		span.End()
	}
}

// statement follows the conventions for PostgreSQL. The span's name is the summary of the query.
func (t *Telemetry) statement(ctx context.Context, op locker.Operation) (context.Context, func(locker.OperationEnd)) {
	attributes := []attribute.KeyValue{
		semconv.DBSystemNamePostgreSQL, semconv.DBNamespace(op.Database),
		semconv.DBOperationName(op.Statement), semconv.DBQuerySummary(op.Statement), semconv.ServerAddress(op.Host),
	}
	if op.Port != 0 {
		attributes = append(attributes, semconv.ServerPort(op.Port))
	}
	start := time.Now()
	ctx, span := t.tracer.Start(ctx, op.Statement, trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(start),
		trace.WithAttributes(attributes...), trace.WithAttributes(semconv.DBQueryText(strings.TrimSpace(op.Query))))
	return ctx, func(end locker.OperationEnd) {
		// This is the type of an error of the connection.
		errorType := semconv.ErrorTypeOther.Value.AsString()
		var server interface{ SQLState() string }
		if errors.As(end.Err, &server) {
			errorType = server.SQLState()
			code := semconv.DBResponseStatusCode(errorType)
			span.SetAttributes(code)
			attributes = append(attributes, code)
		}
		if end.Err != nil {
			attributes = append(attributes, semconv.ErrorTypeKey.String(errorType))
		}
		fail(span, end.Err, errorType)
		span.End()
		t.statements.Inst().Record(ctx, time.Since(start).Seconds(), metric.WithAttributes(attributes...))
	}
}

func fail(span trace.Span, err error, errorType string) {
	if err != nil {
		span.SetAttributes(semconv.ErrorTypeKey.String(errorType))
		span.SetStatus(codes.Error, err.Error())
	}
}

// Observe is the function for locker.WithObserver. No attribute of a metric contains a repo, an
// event, a key, or the claim's labels (o.Labels: a commit, a URL), because every value would create
// a time series that never ends. They can be attributes of a span: set them on the service's own
// spans.
func (t *Telemetry) Observe(o locker.Observation) {
	ctx := context.Background()
	with := metric.WithAttributes(KindKey.String(o.Kind.String()), OutcomeKey.String(outcomeOf(o.Err)))
	t.events.Add(ctx, 1, with)
	switch o.Kind {
	case locker.ObservedAcquired, locker.ObservedSuperseded, locker.ObservedFailed, locker.ObservedSkipped:
		t.wait.Record(ctx, o.After.Seconds(), with)
	case locker.ObservedReleased, locker.ObservedRevoked, locker.ObservedLost:
		t.hold.Record(ctx, o.After.Seconds(), with)
	}
}

func outcomeOf(err error) string {
	outcome, _ := locker.OutcomeOf(err)
	return outcome.String()
}

// WatchStats adds the state of a provider's session. Providers without Stats, such as the fake, have
// none.
func (t *Telemetry) WatchStats(provider locker.LockProvider) error {
	p, ok := provider.(interface{ Stats() locker.Stats })
	if !ok {
		return nil
	}
	var instruments [4]metric.Int64ObservableUpDownCounter
	var failed [5]error
	for i, counter := range [][3]string{
		{"locker.held", "{lock}", "Keys that the provider's locks hold."},
		{"locker.waiting", "{lock}", "Locks that wait for a key."},
		{"locker.queued", "{operation}", "Operations that wait for the database."},
		{"locker.connected", "{session}", "1 while the session is connected."},
	} {
		instruments[i], failed[i] = t.meter.Int64ObservableUpDownCounter(counter[0], metric.WithUnit(counter[1]), metric.WithDescription(counter[2]))
	}
	_, failed[4] = t.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := p.Stats()
		connected := 0
		if s.Connected {
			connected = 1
		}
		for i, value := range [...]int{s.Held, s.Waiting, s.Queued, connected} {
			o.ObserveInt64(instruments[i], int64(value))
		}
		return nil
	}, instruments[0], instruments[1], instruments[2], instruments[3])
	return errors.Join(failed[:]...)
}
