package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/preemptable/locker/internal/pgserver"
)

// TestPreemption tests both sides of a preemption, as the SDK exports them.
func TestPreemption(t *testing.T) {
	server, err := pgserver.Shared(t.Context())
	require.NoError(t, err)
	defer func() { require.NoError(t, server.Close()) }()
	uri, drop, err := server.NewDatabase(t.Context())
	require.NoError(t, err)
	defer drop()
	spans, metrics, err := preemption(t.Context(), uri)
	require.NoError(t, err)

	slices.SortFunc(spans, func(a, b tracetest.SpanStub) int { return a.StartTime.Compare(b.StartTime) })
	under := func(parent tracetest.SpanStub) (found tracetest.SpanStubs) {
		for _, s := range spans {
			if s.Parent.SpanID() == parent.SpanContext.SpanID() {
				found = append(found, s)
			}
		}
		return found
	}
	deployments := under(tracetest.SpanStub{})
	require.Len(t, deployments, 2)
	require.Equal(t, codes.Error, deployments[0].Status.Code)
	require.Contains(t, deployments[0].Status.Description, "push 2")
	require.Equal(t, codes.Unset, deployments[1].Status.Code)
	tokens := map[int64]bool{}
	statements := map[string]int{}
	for i, deployment := range deployments {
		calls := under(deployment)
		require.Len(t, calls, 2)
		for j, call := range calls {
			require.Equal(t, []string{"lock", "release"}[j], call.Name)
			require.Equal(t, trace.SpanKindInternal, call.SpanKind)
			require.Equal(t, codes.Unset, call.Status.Code)
			is := attributesOf(call.Attributes)
			require.Equal(t, "org", is["vcs.owner.name"].AsString())
			require.Equal(t, "repo", is["vcs.repository.name"].AsString())
			require.Equal(t, "7", is["vcs.change.id"].AsString())
			require.Equal(t, []string{"push 1", "push 2"}[i], is["locker.event"].AsString())
			require.NotZero(t, is["locker.key"].AsInt64())
			tokens[is["locker.token"].AsInt64()] = true
			require.NotEmpty(t, under(call))
			for _, s := range under(call) {
				require.Equal(t, trace.SpanKindClient, s.SpanKind)
				is := attributesOf(s.Attributes)
				require.Equal(t, s.Name, is["db.query.summary"].AsString())
				require.Equal(t, s.Name, is["db.operation.name"].AsString())
				require.Equal(t, "postgresql", is["db.system.name"].AsString())
				require.True(t, strings.HasSuffix(strings.Split(uri, "?")[0], "/"+is["db.namespace"].AsString()))
				require.Contains(t, uri, is["server.address"].AsString()+":"+is["server.port"].Emit())
				require.NotEmpty(t, is["db.query.text"].AsString())
				require.NotContains(t, is, attribute.Key("error.type"))
				statements[s.Name]++
			}
		}
	}
	require.Len(t, tokens, 2)
	require.Equal(t, 2, statements["announce"])
	require.Equal(t, 2, statements["release keys"])

	seen := map[string]int64{}
	measured := map[string]int{}
	for _, scope := range metrics.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, point := range data.DataPoints {
					seen[m.Name+" "+point.Attributes.Encoded(attribute.DefaultEncoder())] = point.Value
				}
			case metricdata.Histogram[float64]:
				for _, point := range data.DataPoints {
					if name, ok := point.Attributes.Value("db.operation.name"); ok {
						measured[name.AsString()] += int(point.Count)
						_, has := point.Attributes.Value("db.query.text")
						require.False(t, has, "there would be a series for each text")
						continue
					}
					seen[m.Name+" "+point.Attributes.Encoded(attribute.DefaultEncoder())] = int64(point.Count)
				}
			}
		}
	}
	require.Equal(t, statements, measured)
	require.Equal(t, map[string]int64{
		"locker.events locker.kind=acquired,locker.outcome=completed":        2,
		"locker.events locker.kind=notified,locker.outcome=preempted":        1,
		"locker.events locker.kind=released,locker.outcome=preempted":        1,
		"locker.events locker.kind=released,locker.outcome=completed":        1,
		"locker.wait.duration locker.kind=acquired,locker.outcome=completed": 2,
		"locker.hold.duration locker.kind=released,locker.outcome=preempted": 1,
		"locker.hold.duration locker.kind=released,locker.outcome=completed": 1,
		"locker.held ": 0, "locker.waiting ": 0, "locker.queued ": 0, "locker.connected ": 1,
	}, seen)

	var out strings.Builder
	printSpans(&out, spans)
	printMetrics(&out, metrics)
	require.Equal(t, 1, strings.Count(out.String(), "db.system.name = postgresql"))
	t.Log(out.String())
}

func attributesOf(all []attribute.KeyValue) map[attribute.Key]attribute.Value {
	is := map[attribute.Key]attribute.Value{}
	for _, a := range all {
		is[a.Key] = a.Value
	}
	return is
}
