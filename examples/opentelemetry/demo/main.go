// Demo prints the spans and the metrics of both sides of one preemption: a deployment that is
// notified, and the newer one that takes its place. It needs PostgreSQL, which
// scripts/with-postgres finds.
//
//	scripts/with-postgres sh -c 'cd examples/opentelemetry && go run ./demo'
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	semconv "go.opentelemetry.io/otel/semconv/v1.37.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/preemptable/locker"
	telemetry "github.com/preemptable/locker/examples/opentelemetry"
	"github.com/preemptable/locker/internal/pgserver"
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, out io.Writer) error {
	server, err := pgserver.Shared(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = server.Close() }()
	uri, drop, err := server.NewDatabase(ctx)
	if err != nil {
		return err
	}
	defer drop()
	spans, metrics, err := preemption(ctx, uri)
	if err != nil {
		return err
	}
	printSpans(out, spans)
	printMetrics(out, metrics)
	return nil
}

// preemption runs two deployments of one pull request, and returns the exported spans and metrics.
func preemption(ctx context.Context, uri string) (spans tracetest.SpanStubs, metrics metricdata.ResourceMetrics, err error) {
	exporter := tracetest.NewInMemoryExporter()
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))
	reader := sdkmetric.NewManualReader()
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))

	t, err := telemetry.New(tracers, meters)
	if err != nil {
		return nil, metrics, err
	}
	provider, err := locker.NewPostgresProvider(uri, locker.WithObserver(t.Observe))
	if err != nil {
		return nil, metrics, err
	}
	defer func() { err = errors.Join(err, provider.Close()) }()
	if err := t.WatchStats(provider); err != nil {
		return nil, metrics, err
	}
	newLocker, err := locker.NewPreemptiveLockerFactory(provider, locker.WithTracer(t.Trace))
	if err != nil {
		return nil, metrics, err
	}

	// A service has a separate span for each deployment. The lock's span is below it.
	deploy := func(event string, work func(ctx context.Context) error) error {
		ctx, span := tracers.Tracer("demo").Start(ctx, "deploy", trace.WithAttributes(telemetry.EventKey.String(event)))
		defer span.End()
		err := newLocker("org/repo", 7, event).Do(ctx, work)
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		return err
	}
	held, older := make(chan struct{}), make(chan error, 1)
	go func() {
		older <- deploy("push 1", func(ctx context.Context) error {
			close(held)
			// ctx is canceled when a newer push has arrived.
			<-ctx.Done()
			return nil
		})
	}()
	<-held
	newer := deploy("push 2", func(context.Context) error { return nil })
	olderErr := <-older
	if outcome, _ := locker.OutcomeOf(olderErr); outcome != locker.OutcomePreempted {
		return nil, metrics, fmt.Errorf("the older deployment was not preempted, but %v: %w", outcome, olderErr)
	}
	if newer != nil {
		return nil, metrics, newer
	}
	return exporter.GetSpans(), metrics, reader.Collect(ctx, &metrics)
}

// printSpans prints the spans as trees, in the order of their starts. It prints the server of the
// statements once.
func printSpans(out io.Writer, spans tracetest.SpanStubs) {
	slices.SortFunc(spans, func(a, b tracetest.SpanStub) int { return a.StartTime.Compare(b.StartTime) })
	server := map[attribute.Key]string{}
	var under func(parent trace.SpanID, indent string)
	under = func(parent trace.SpanID, indent string) {
		for _, s := range spans {
			if s.Parent.SpanID() != parent {
				continue
			}
			fmt.Fprintf(out, "%s%s  %v", indent, s.Name, s.EndTime.Sub(s.StartTime).Round(100*time.Microsecond))
			if s.Status.Code == codes.Error {
				fmt.Fprintf(out, "  ERROR %s", s.Status.Description)
			}
			fmt.Fprintln(out)
			for _, a := range s.Attributes {
				switch a.Key {
				case semconv.DBSystemNameKey, semconv.DBNamespaceKey, semconv.ServerAddressKey, semconv.ServerPortKey:
					if server[a.Key] == a.Value.Emit() {
						continue
					}
					server[a.Key] = a.Value.Emit()
				}
				fmt.Fprintf(out, "%s    %s = %s\n", indent, a.Key, short(a.Value.Emit()))
			}
			under(s.SpanContext.SpanID(), indent+"  ")
		}
	}
	under(trace.SpanID{}, "")
}

func short(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > 60 {
		text = text[:60] + "…"
	}
	return text
}

// printMetrics prints one line for each series, with counts, and sums in seconds.
func printMetrics(out io.Writer, metrics metricdata.ResourceMetrics) {
	fmt.Fprintln(out)
	labels := func(set attribute.Set) string {
		return short(set.Encoded(attribute.DefaultEncoder()))
	}
	var lines []string
	for _, scope := range metrics.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, point := range data.DataPoints {
					lines = append(lines, fmt.Sprintf("%s{%s}  %d", m.Name, labels(point.Attributes), point.Value))
				}
			case metricdata.Histogram[float64]:
				for _, point := range data.DataPoints {
					set, _ := point.Attributes.Filter(func(a attribute.KeyValue) bool {
						return a.Key == telemetry.KindKey || a.Key == telemetry.OutcomeKey || a.Key == semconv.ErrorTypeKey || a.Key == semconv.DBOperationNameKey
					})
					lines = append(lines, fmt.Sprintf("%s{%s}  count %d, sum %.4f s", m.Name, labels(set), point.Count, point.Sum))
				}
			}
		}
	}
	slices.Sort(lines)
	fmt.Fprintln(out, strings.Join(lines, "\n"))
}
