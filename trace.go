package locker

import (
	"cmp"
	"context"
	"net"
	"strconv"

	"github.com/lib/pq"
)

// A Tracer is called at the start of an [Operation]. A Tracer that [WithTracer] has registered is
// called for every Lock and Release of a [PreemptiveLocker], and for every SQL statement that
// serves them.
//
// It returns a context derived from ctx, under which the operation runs, and a function that is
// called once, when the operation has ended. If the context is nil, the operation runs under ctx.
// If the function is nil, the end is not reported.
//
// A Tracer and the functions that it returns must be safe for concurrent use. They are called on
// the caller's goroutine for a Lock or a Release, and on the provider's for a statement. The
// operation waits for them, so they must return immediately.
//
// One statement serves all calls that have queued up since the previous one. It is reported under
// one of them. A statement that serves no call, such as a heartbeat, is not reported. Neither is
// the opening of a connection.
type Tracer func(ctx context.Context, op Operation) (context.Context, func(OperationEnd))

// An Operation describes an operation to a [Tracer], at its start.
type Operation struct {
	Kind OperationKind

	// For a lock and a release.
	Repo        string
	PullRequest uint
	Event       string // valid UTF-8, and no longer than a notification allows

	// For a statement, on PostgreSQL. No field contains an argument or a password.
	Statement string // a short name, one of a few
	Query     string // the SQL text, in its form for any number of rows
	Database  string
	Host      string // as in the connection string, or the path of a Unix socket
	Port      int    // 0 for a Unix socket

	returnsRows bool
}

// An OperationEnd describes an operation to a [Tracer], at its end.
type OperationEnd struct {
	Err error // nil if the operation succeeded

	// For a lock and a release. 0 means that the value is not known.
	Key   int64
	Token int64
}

// An OperationKind is a kind of [Operation].
type OperationKind int

const (
	// OperationLock is a call of [PreemptiveLocker.Lock], including those by [PreemptiveLocker.Do].
	OperationLock OperationKind = iota + 1
	// OperationRelease is a call of [PreemptiveLocker.Release], including those by
	// [PreemptiveLocker.Do].
	OperationRelease
	// OperationStatement is an SQL statement.
	OperationStatement
)

// String returns "lock", "release" or "statement", for the name of a span.
func (k OperationKind) String() string {
	names := [...]string{"unknown", "lock", "release", "statement"}
	if k < 0 || int(k) >= len(names) {
		k = 0
	}
	return names[k]
}

// start calls the tracer.
func (t Tracer) start(ctx context.Context, op Operation) (context.Context, func(OperationEnd)) {
	under, end := t(ctx, op)
	if under == nil {
		under = ctx
	}
	return under, end
}

// finishTrace calls the function that start has returned, unless it is nil.
func finishTrace(end func(OperationEnd), e OperationEnd) {
	if end != nil {
		end(e)
	}
}

// bothTracers returns a tracer that calls two tracers, each of which may be nil.
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

// tracerKey is the key of a value in the context of a traced call: the tracer of the statements
// that serve the call.
type tracerKey struct{}

// traceCall starts the operation that a call of the locker is.
func (p *PreemptiveLocker) traceCall(ctx context.Context, kind OperationKind) (context.Context, func(OperationEnd)) {
	if p.conf.calls == nil {
		return ctx, nil
	}
	ctx, end := p.conf.calls.start(ctx, Operation{Kind: kind, Repo: p.pull.repo, PullRequest: p.pull.pr, Event: cleanEvent(p.event)})
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

// trace starts the operation that a statement of the link is.
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

// leadsTo returns an operation with the server and the database of the link, which is connected.
func (l *link) leadsTo(cfg pq.Config) Operation {
	l.mu.Lock()
	network, address := l.dialed[0], l.dialed[1]
	l.mu.Unlock()
	// The user's name is the server's default for the database.
	op := Operation{Host: address, Database: cmp.Or(cfg.Database, cfg.User)}
	if host, port, err := net.SplitHostPort(address); err == nil && network != "unix" {
		op.Host = host
		// The port has just been dialed, so it is a number.
		op.Port, _ = strconv.Atoi(port)
	}
	return op
}
