package locker

import (
	"cmp"
	"context"
	"net"
	"strconv"

	"github.com/lib/pq"
)

// Tracer is called at the start of an [Operation], for tracing: with
// [WithTracer] for every Lock and Release of a [PreemptiveLocker], and for every SQL
// statement that serves them. It returns the context of everything that happens under
// the operation, derived from ctx, and a function that is called once, when the
// operation has ended. Both may be nil: then the context stays as it is, and the end is
// not reported.
//
// A Tracer and the functions that it returns are called concurrently, from the caller's
// goroutine for a Lock or a Release, and from the provider's for a statement. They must
// return immediately: the operation waits for them.
//
// A statement serves all calls that have come together since the last one. It is
// reported under one of them. A statement that serves no call, such as a heartbeat, is
// not reported, nor is the opening of a connection.
type Tracer func(ctx context.Context, op Operation) (context.Context, func(OperationEnd))

// Operation is what a [Tracer] is told at the start of an operation.
type Operation struct {
	Kind OperationKind

	// Of a lock and a release.
	Repo        string
	PullRequest uint
	Event       string // valid UTF-8, and no longer than a notification takes

	// Of a statement, on PostgreSQL. No field holds an argument or a password.
	Statement string // a short name, one of a few
	Query     string // the SQL text
	Database  string
	Host      string // as the connection string names it, or the path of a Unix socket
	Port      int    // 0 for a Unix socket

	returnsRows bool
}

// OperationEnd is what a [Tracer] is told at the end of an operation.
type OperationEnd struct {
	Err error // nil if the operation succeeded

	// Of a lock and a release. 0 means that it is not known.
	Key   int64
	Token int64
}

// OperationKind enumerates the operations that a [Tracer] is told of.
type OperationKind int

const (
	// OperationLock is a call of [PreemptiveLocker.Lock], also by [PreemptiveLocker.Do].
	OperationLock OperationKind = iota + 1
	// OperationRelease is a call of [PreemptiveLocker.Release], also by [PreemptiveLocker.Do].
	OperationRelease
	// OperationStatement is an SQL statement.
	OperationStatement
)

// String returns a name fit for a span: lock, release or statement.
func (k OperationKind) String() string {
	names := [...]string{"unknown", "lock", "release", "statement"}
	if k < 0 || int(k) >= len(names) {
		k = 0
	}
	return names[k]
}

// start calls a tracer that may be nil.
func (t Tracer) start(ctx context.Context, op Operation) (context.Context, func(OperationEnd)) {
	if t == nil {
		return ctx, nil
	}
	under, end := t(ctx, op)
	if under == nil {
		under = ctx
	}
	return under, end
}

// finishTrace calls what start has returned.
func finishTrace(end func(OperationEnd), e OperationEnd) {
	if end != nil {
		end(e)
	}
}

// bothTracers returns a tracer that calls two, each of which may be nil.
func bothTracers(outer, inner Tracer) Tracer {
	switch {
	case outer == nil:
		return inner
	case inner == nil:
		return outer
	}
	return func(ctx context.Context, op Operation) (context.Context, func(OperationEnd)) {
		ctx, endOuter := outer.start(ctx, op)
		ctx, endInner := inner.start(ctx, op)
		return ctx, func(e OperationEnd) {
			finishTrace(endInner, e)
			finishTrace(endOuter, e)
		}
	}
}

// tracerKey is the key of the tracer of the statements that serve a call, in the call's
// context. A context without it is that of no traced call.
type tracerKey struct{}

// traceCall starts the operation that is a call of the locker's.
func (p *PreemptiveLocker) traceCall(ctx context.Context, kind OperationKind) (context.Context, func(OperationEnd)) {
	if p.conf.calls == nil {
		return ctx, nil
	}
	ctx, end := p.conf.calls.start(ctx, Operation{Kind: kind, Repo: p.repo, PullRequest: p.pr, Event: cleanEvent(p.event)})
	if p.conf.tracer != nil {
		ctx = context.WithValue(ctx, tracerKey{}, p.conf.tracer)
	}
	return ctx, end
}

func (p *PreemptiveLocker) traceEnd(end func(OperationEnd), err error) {
	if end == nil {
		return
	}
	p.mu.Lock()
	key, token := p.key, p.token
	p.mu.Unlock()
	end(OperationEnd{Err: err, Key: key, Token: token})
}

// trace starts the operation that is a statement of the link's.
func (l *link) trace(ctx context.Context, text string, returnsRows bool) (context.Context, func(OperationEnd)) {
	ofCall, _ := ctx.Value(tracerKey{}).(Tracer)
	if l.tracer == nil && ofCall == nil {
		return ctx, nil
	}
	name, ok := statementNames[text]
	if !ok {
		name = OperationStatement.String()
	}
	op := l.server
	op.Kind, op.Statement, op.Query, op.returnsRows = OperationStatement, name, text, returnsRows
	return bothTracers(l.tracer, ofCall).start(ctx, op)
}

// leadsTo returns the part of an operation that says where the link leads to, once it
// is connected.
func (l *link) leadsTo(dsn string) Operation {
	l.mu.Lock()
	network, address := l.dialed[0], l.dialed[1]
	l.mu.Unlock()
	op := Operation{Host: address}
	if host, port, err := net.SplitHostPort(address); err == nil && network != "unix" {
		op.Host = host
		op.Port, _ = strconv.Atoi(port) // it has just been dialed
	}
	if cfg, err := pq.NewConfig(dsn); err == nil {
		op.Database = cmp.Or(cfg.Database, cfg.User) // the server's default
	}
	return op
}
