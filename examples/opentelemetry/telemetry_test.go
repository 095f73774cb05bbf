package telemetry_test

import (
	"context"
	"errors"
	"testing"

	"github.com/lib/pq"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric/noop"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/preemptable/locker"
	telemetry "github.com/preemptable/locker/examples/opentelemetry"
)

// What an operation that failed looks like.
func TestErrors(t *testing.T) {
	for _, test := range []struct {
		kind        locker.OperationKind
		err         error
		errorType   string
		status      codes.Code
		description string
	}{
		{locker.OperationLock, nil, "", codes.Unset, ""},
		{locker.OperationLock, locker.ErrLockPreempted, "preempted", codes.Error, locker.ErrLockPreempted.Error()},
		{locker.OperationLock, locker.ErrClaimOutdated, "outdated", codes.Error, locker.ErrClaimOutdated.Error()},
		{locker.OperationLock, locker.ErrLockTimeout, "timeout", codes.Error, locker.ErrLockTimeout.Error()},
		{locker.OperationRelease, locker.ErrLockLost, "lost", codes.Error, locker.ErrLockLost.Error()},
		{locker.OperationLock, context.Canceled, "canceled", codes.Error, context.Canceled.Error()},
		{locker.OperationLock, errors.New("boom"), "_OTHER", codes.Error, "boom"},
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
		if test.kind == locker.OperationStatement {
			require.Equal(t, "/run/.s.PGSQL.5432", is["server.address"])
			require.NotContains(t, is, attribute.Key("server.port"))
			if test.errorType == "55P03" {
				require.Equal(t, "55P03", is["db.response.status_code"])
			}
		}
	}
}

// The fake has no Stats.
func TestWatchFake(t *testing.T) {
	tel, err := telemetry.New(sdktrace.NewTracerProvider(), noop.NewMeterProvider())
	require.NoError(t, err)
	require.NoError(t, tel.WatchStats(&locker.FakeLockProvider{}))
}
