package telemetry_test

import (
	"cmp"
	"context"
	"errors"
	"testing"

	"github.com/lib/pq"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/preemptable/locker"
	telemetry "github.com/preemptable/locker/examples/opentelemetry"
)

// TestErrors tests the span of an operation that failed.
func TestErrors(t *testing.T) {
	for _, test := range []struct {
		kind        locker.OperationKind
		err         error
		errorType   string
		status      codes.Code
		description string
	}{
		{locker.OperationLock, nil, "", codes.Unset, ""},
		{locker.OperationLock, locker.ErrLockPreempted, "superseded", codes.Error, locker.ErrLockPreempted.Error()},
		{locker.OperationLock, locker.ErrClaimOutdated, "outdated", codes.Error, locker.ErrClaimOutdated.Error()},
		{locker.OperationLock, locker.ErrLockTimeout, "timeout", codes.Error, locker.ErrLockTimeout.Error()},
		{locker.OperationLock, locker.ErrLockBusy, "busy", codes.Error, locker.ErrLockBusy.Error()},
		{locker.OperationRelease, locker.ErrLockLost, "lost", codes.Error, locker.ErrLockLost.Error()},
		{locker.OperationLock, context.Canceled, "canceled", codes.Error, context.Canceled.Error()},
		{locker.OperationLock, errors.New("boom"), "failed", codes.Error, "boom"},
		{locker.OperationStatement, nil, "", codes.Unset, ""},
		{locker.OperationStatement, &pq.Error{Code: "55P03", Message: "canceled"}, "55P03", codes.Error, "pq: canceled (55P03)"},
		{locker.OperationStatement, errors.New("boom"), "_OTHER", codes.Error, "boom"},
	} {
		exporter := tracetest.NewInMemoryExporter()
		tel, err := telemetry.New(sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter)), noop.NewMeterProvider())
		require.NoError(t, err)
		_, end := tel.Trace(t.Context(), locker.Operation{Kind: test.kind, Repo: "repo", Statement: "announce", Host: "/run/.s.PGSQL.5432"})
		end(locker.OperationEnd{Err: test.err})
		span := exporter.GetSpans()[0]
		require.Equal(t, test.status, span.Status.Code)
		require.Equal(t, test.description, span.Status.Description)
		is := map[attribute.Key]string{}
		for _, a := range span.Attributes {
			is[a.Key] = a.Value.Emit()
		}
		require.Equal(t, test.errorType, is["error.type"])
		if test.kind != locker.OperationStatement {
			require.Equal(t, cmp.Or(test.errorType, "completed"), is["locker.outcome"])
		}
		if test.kind == locker.OperationStatement {
			require.Equal(t, "/run/.s.PGSQL.5432", is["server.address"])
			require.NotContains(t, is, attribute.Key("server.port"))
			if test.errorType == "55P03" {
				require.Equal(t, "55P03", is["db.response.status_code"])
			}
		}
	}
}

// Skipped claims are counted and timed. The labels of a claim are in no metric.
func TestSkipped(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	tel, err := telemetry.New(sdktrace.NewTracerProvider(), sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)))
	require.NoError(t, err)
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{locker.WithObserver(tel.Observe)})
	require.NoError(t, err)
	err = newLocker("o/r", 1, "push").Do(t.Context(), func(context.Context) error {
		_, err := newLocker("o/r", 1, "test").Mode(locker.SkipIfBusy).Labels(map[string]string{"commit": "ec26c3e"}).Lock(context.Background())
		require.ErrorIs(t, err, locker.ErrLockBusy)
		return nil
	})
	require.NoError(t, err)
	var metrics metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &metrics))
	var seen []string
	for _, m := range metrics.ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Sum[int64]:
			for _, point := range data.DataPoints {
				seen = append(seen, m.Name+" "+point.Attributes.Encoded(attribute.DefaultEncoder()))
			}
		case metricdata.Histogram[float64]:
			for _, point := range data.DataPoints {
				seen = append(seen, m.Name+" "+point.Attributes.Encoded(attribute.DefaultEncoder()))
			}
		}
	}
	require.ElementsMatch(t, []string{
		"locker.events locker.kind=acquired,locker.outcome=completed",
		"locker.events locker.kind=skipped,locker.outcome=busy",
		"locker.events locker.kind=released,locker.outcome=completed",
		"locker.wait.duration locker.kind=acquired,locker.outcome=completed",
		"locker.wait.duration locker.kind=skipped,locker.outcome=busy",
		"locker.hold.duration locker.kind=released,locker.outcome=completed",
	}, seen)
}

// The fake has no Stats.
func TestWatchFake(t *testing.T) {
	tel, err := telemetry.New(sdktrace.NewTracerProvider(), noop.NewMeterProvider())
	require.NoError(t, err)
	require.NoError(t, tel.WatchStats(&locker.FakeLockProvider{}))
}
