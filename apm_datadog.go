//go:build !nodatadog

package locker

import (
	"context"
	"strconv"

	"gopkg.in/DataDog/dd-trace-go.v1/ddtrace/ext"
	"gopkg.in/DataDog/dd-trace-go.v1/ddtrace/tracer"
)

// apmTracer returns a tracer that records operations as spans of a Datadog service. It returns nil
// if the name is empty. A statement is recorded only under another span.
func apmTracer(service string) (Tracer, error) {
	if service == "" {
		return nil, nil
	}
	return func(ctx context.Context, op Operation) (context.Context, func(OperationEnd)) {
		if op.Kind == OperationStatement {
			if _, ok := tracer.SpanFromContext(ctx); !ok {
				return ctx, nil
			}
			span, ctx := tracer.StartSpanFromContext(ctx, "postgres.query", statementTags(service, op)...)
			return ctx, func(e OperationEnd) { span.Finish(tracer.WithError(e.Err)) }
		}
		span, ctx := tracer.StartSpanFromContext(ctx, op.Kind.String(),
			tracer.ServiceName(service),
			tracer.Tag("repo", op.Repo), tracer.Tag("pr", op.PullRequest), tracer.Tag("event", op.Event))
		return ctx, func(e OperationEnd) {
			// As a number the key would be rounded.
			span.SetTag("lock_key", strconv.FormatInt(e.Key, 10))
			span.SetTag("token", e.Token)
			span.Finish(tracer.WithError(e.Err))
		}
	}, nil
}

// statementTags returns the tags that Datadog's own tracing of database/sql sets.
func statementTags(service string, op Operation) []tracer.StartSpanOption {
	queryType := "Exec"
	if op.returnsRows {
		queryType = "Query"
	}
	tags := []tracer.StartSpanOption{
		tracer.ServiceName(service), tracer.SpanType(ext.SpanTypeSQL), tracer.ResourceName(op.Query),
		tracer.Tag(ext.Component, "database/sql"), tracer.Tag(ext.SpanKind, ext.SpanKindClient),
		tracer.Tag(ext.DBSystem, ext.DBSystemPostgreSQL), tracer.Tag("sql.query_type", queryType),
		tracer.Tag(ext.DBName, op.Database), tracer.Tag(ext.TargetHost, op.Host),
	}
	if op.Port != 0 {
		tags = append(tags, tracer.Tag(ext.TargetPort, strconv.Itoa(op.Port)))
	}
	return tags
}
