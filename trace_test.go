package locker

import (
	"cmp"
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// traceLog records the calls of a tracer.
type traceLog struct {
	mu  sync.Mutex // guards everything, including the entries
	all []*traceEntry
}

type traceEntry struct {
	Operation
	parent *traceEntry
	end    OperationEnd
	ends   int
}

type traceEntryKey struct{}

func (log *traceLog) tracer(ctx context.Context, op Operation) (context.Context, func(OperationEnd)) {
	entry := &traceEntry{Operation: op}
	entry.parent, _ = ctx.Value(traceEntryKey{}).(*traceEntry)
	log.mu.Lock()
	defer log.mu.Unlock()
	log.all = append(log.all, entry)
	return context.WithValue(ctx, traceEntryKey{}, entry), func(end OperationEnd) {
		log.mu.Lock()
		defer log.mu.Unlock()
		entry.end, entry.ends = end, entry.ends+1
	}
}

// of returns the entries of a kind that have begun so far.
func (log *traceLog) of(kind OperationKind) (found []traceEntry) {
	log.mu.Lock()
	defer log.mu.Unlock()
	for _, entry := range log.all {
		if entry.Kind == kind {
			found = append(found, *entry)
		}
	}
	return found
}

// tracedCalls is the case of TestContract for C40.
func tracedCalls(e *env) {
	var log traceLog
	p := e.process()
	key := e.lockerKey(p)
	first, second, third := e.locker(p, "first", WithTracer(log.tracer)), e.locker(p, "second", WithTracer(log.tracer)), e.locker(p, "third", WithTracer(log.tracer))
	ch := e.acquire(first)
	displaced := e.start(e.ctx, second)
	e.payload(ch)
	last := e.start(e.ctx, third)
	e.failed(displaced)
	e.Len(log.of(OperationLock), 3)
	e.NoError(first.Release(e.ctx))
	e.acquired(last)
	e.NoError(third.Release(e.ctx))
	e.Error(e.locker(p, "never locked", WithTracer(log.tracer)).Release(e.ctx))
	e.NoError(e.locker(p, "not traced", WithTracer(nil)).Do(e.ctx, func(context.Context) error { return nil }))

	locks := log.of(OperationLock)
	e.Len(locks, 3)
	for i, l := range []*PreemptiveLocker{first, second, third} {
		e.Equal(Operation{Kind: OperationLock, Repo: repo, PullRequest: number, Event: l.event}, locks[i].Operation)
		e.Equal(1, locks[i].ends, l.event)
		e.Equal(key, locks[i].end.Key, l.event)
		e.Equal(l.Token(), locks[i].end.Token, l.event)
	}
	e.NoError(locks[0].end.Err)
	e.NotZero(locks[0].end.Token)
	e.matchesOnly(locks[1].end.Err, ErrLockPreempted)
	e.Zero(locks[1].end.Token)
	e.NoError(locks[2].end.Err)

	releases := log.of(OperationRelease)
	e.Len(releases, 3)
	for i, l := range []*PreemptiveLocker{first, third} {
		e.Equal(Operation{Kind: OperationRelease, Repo: repo, PullRequest: number, Event: l.event}, releases[i].Operation)
		e.Equal(1, releases[i].ends, l.event)
		e.Equal(OperationEnd{Key: key, Token: l.Token()}, releases[i].end)
	}
	e.ErrorContains(releases[2].end.Err, "Release before Lock")

	own := e.locker(&scratch{turn: make(chan struct{}, 1)}, "own provider", WithTracer(log.tracer))
	e.NoError(own.Do(e.ctx, func(context.Context) error { return nil }))
	e.Len(log.of(OperationLock), 4)
	e.Len(log.of(OperationRelease), 4)

	statements := log.of(OperationStatement)
	e.Equal(e.fake(), len(statements) == 0)
	for _, s := range statements {
		e.NotNil(s.parent, s.Statement)
	}
}

// A tracer may return nil for the context and for the function.
func TestTracerReturnsNothing(t *testing.T) {
	calls := 0
	ending := func(ctx context.Context, _ Operation) (context.Context, func(OperationEnd)) {
		return nil, func(OperationEnd) { calls++ }
	}
	factory, err := NewFakePreemptiveLockerFactory(nil, WithTracer(ending))
	require.NoError(t, err)
	require.NoError(t, factory("a/b", 1, "opened").Do(t.Context(), func(context.Context) error { return nil }))
	require.Equal(t, 2, calls)

	none := func(ctx context.Context, _ Operation) (context.Context, func(OperationEnd)) { return ctx, nil }
	for _, tracer := range []Tracer{none, bothTracers(none, nil), bothTracers(nil, none), bothTracers(none, none)} {
		factory, err = NewFakePreemptiveLockerFactory(nil, WithTracer(tracer))
		require.NoError(t, err)
		require.NoError(t, factory("a/b", 1, "opened").Do(t.Context(), func(context.Context) error { return nil }))
	}
}

// The operations of the second of two tracers are below those of the first.
func TestTracerBoth(t *testing.T) {
	var told []string
	named := func(name string) Tracer {
		return func(ctx context.Context, _ Operation) (context.Context, func(OperationEnd)) {
			before, _ := ctx.Value(traceEntryKey{}).(string)
			told = append(told, fmt.Sprintf("start of %s under %q", name, before))
			return context.WithValue(ctx, traceEntryKey{}, before+name), func(OperationEnd) { told = append(told, "end of "+name) }
		}
	}
	ctx, end := bothTracers(named("a"), named("b")).start(t.Context(), Operation{})
	finishTrace(end, OperationEnd{})
	require.Equal(t, "ab", ctx.Value(traceEntryKey{}))
	require.Equal(t, []string{`start of a under ""`, `start of b under "a"`, "end of b", "end of a"}, told)
}

// The event is as it is on the wire (C30).
func TestTracerEvent(t *testing.T) {
	var log traceLog
	factory, err := NewFakePreemptiveLockerFactory(nil, WithTracer(log.tracer))
	require.NoError(t, err)
	event := "\xff\x00" + strings.Repeat("x", 10_000)
	require.NoError(t, factory("a/b", 1, event).Do(t.Context(), func(context.Context) error { return nil }))
	require.Len(t, log.all, 2)
	for _, entry := range log.all {
		require.Equal(t, cleanEvent(event), entry.Event)
	}
}

// Statements are reported under the call that they serve, with the address of the server. Other
// statements are not reported: heartbeats, checks of rows, and those of calls without a tracer.
func TestTracerStatements(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	u, err := url.Parse(uri)
	require.NoError(t, err)
	password, has := u.User.Password()
	// The server asks for no password, and accepts any.
	if !has {
		password = "sw0rdfish-of-the-traces"
		u.User = url.UserPassword(u.User.Username(), password)
	}
	var log, other traceLog
	p := pgProvider(t, u.String(), WithSessionTimeout(minSessionTimeout))
	traced := pgLocker(t, p, WithTracer(log.tracer))
	ctx := t.Context()

	l := traced("a/b", 1, "first")
	_, err = l.Lock(ctx)
	require.NoError(t, err)
	before := log.of(OperationStatement)
	beat := p.Stats().LastHeartbeat
	pgUntil(t, "a check of rows", func() bool { return p.Stats().LastHeartbeat.Sub(beat) >= 2*heartbeatInterval(minSessionTimeout) })
	_, err = p.LockKey(ctx, "a/b", 2)
	require.NoError(t, err)
	require.NoError(t, pgLocker(t, p)("a/b", 2, "not traced").Do(ctx, func(context.Context) error { return nil }))
	require.NoError(t, pgLocker(t, p, WithTracer(other.tracer))("a/b", 2, "traced by another").Do(ctx, func(context.Context) error { return nil }))
	require.Equal(t, before, log.of(OperationStatement))
	require.NotEmpty(t, other.of(OperationStatement))
	require.NoError(t, l.Release(ctx))

	names := map[OperationKind][]string{}
	for _, s := range log.of(OperationStatement) {
		names[s.parent.Kind] = append(names[s.parent.Kind], s.Statement)
		require.Equal(t, 1, s.ends)
		require.Equal(t, OperationEnd{}, s.end)
		require.NotEmpty(t, s.Query)
		require.Equal(t, strings.TrimPrefix(u.Path, "/"), s.Database)
		require.Equal(t, u.Hostname(), s.Host)
		require.Equal(t, cmp.Or(u.Port(), "5432"), strconv.Itoa(s.Port))
		require.NotContains(t, fmt.Sprintf("%+v", s), password)
	}
	require.Equal(t, map[OperationKind][]string{
		OperationLock:    {"look up keys", "add keys", "look up keys", "ask for the time", "announce"},
		OperationRelease: {"release keys"},
	}, names)
}

// A statement that the server rejects is reported with the server's error, and so is its repeat.
func TestTracerStatementFails(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	p := pgProvider(t, uri)
	_, err := p.LockKey(t.Context(), "a/b", 1)
	require.NoError(t, err)
	tx, err := db.BeginTx(t.Context(), nil)
	require.NoError(t, err)
	pgExec(t, tx, `LOCK TABLE env_lock_state IN ACCESS EXCLUSIVE MODE`)

	var log traceLog
	locked := make(chan error, 1)
	l := pgLocker(t, p, WithTracer(log.tracer))("a/b", 1, "waits for the table")
	go func() { locked <- second(l.Lock(t.Context())) }()
	failed := func() (found []traceEntry) {
		return slices.DeleteFunc(log.of(OperationStatement), func(s traceEntry) bool { return s.end.Err == nil })
	}
	pgUntil(t, "two attempts that fail", func() bool { return len(failed()) >= 2 })
	require.NoError(t, tx.Rollback())
	require.NoError(t, pgReceive(t, "the lock", locked))
	for _, s := range failed() {
		require.Equal(t, "55P03", sqlState(s.end.Err), "%v", s.end.Err)
		require.Equal(t, "announce", s.Statement)
		require.Equal(t, OperationLock, s.parent.Kind)
	}
	require.NoError(t, log.of(OperationLock)[0].end.Err)
	require.NoError(t, l.Release(t.Context()))
}

// leadsTo returns the server of a connection, including one through a Unix socket or without a
// database.
func TestTracerServer(t *testing.T) {
	for _, test := range []struct {
		network, address, dsn string
		want                  Operation
	}{
		{"tcp", "db.example:5433", "host=a,b dbname=d user=u password=" + secret, Operation{Host: "db.example", Port: 5433, Database: "d"}},
		{"tcp", "[::1]:5432", "postgres://u:" + secret + "@[::1]/", Operation{Host: "::1", Port: 5432, Database: "u"}},
		{"unix", "/run/postgresql/.s.PGSQL.5432", "host=/run/postgresql user=u dbname=d", Operation{Host: "/run/postgresql/.s.PGSQL.5432", Database: "d"}},
		{"unix", "/run/a:b/.s.PGSQL.5432", "host=/run/a:b user=u dbname=d", Operation{Host: "/run/a:b/.s.PGSQL.5432", Database: "d"}},
	} {
		l := &link{dialed: [2]string{test.network, test.address}}
		require.Equal(t, test.want, l.leadsTo(configOf(t, test.dsn)))
	}
}

// Without a tracer there is no allocation.
func TestTracerCost(t *testing.T) {
	p, l, ctx := &PreemptiveLocker{conf: &PreemptiveLockerConfig{}}, &link{}, t.Context()
	require.Zero(t, testing.AllocsPerRun(100, func() {
		under, end := p.traceCall(ctx, OperationLock)
		p.traceEnd(end, nil)
		_, end = l.trace(under, sqlAcquire, true)
		finishTrace(end, OperationEnd{})
	}))
}

// Every statement of a link has a name. The methods exec and each of a link take a context, and
// those of a line take a duration.
func TestTracerStatementNames(t *testing.T) {
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	named, used := map[string]bool{}, map[string]bool{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				if n.Names[0].Name == "statementNames" {
					for _, e := range n.Values[0].(*ast.CompositeLit).Elts {
						named[e.(*ast.KeyValueExpr).Key.(*ast.Ident).Name] = true
					}
				}
			case *ast.CallExpr:
				method, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || method.Sel.Name != "exec" && method.Sel.Name != "each" {
					return true
				}
				if first, ok := n.Args[0].(*ast.Ident); ok && first.Name == "ctx" {
					used[n.Args[1].(*ast.Ident).Name] = true
				}
			}
			return true
		})
	}
	require.True(t, used["text"], "announceClaims")
	delete(used, "text")
	used["sqlAnnouncePlain"], used["sqlAnnounceFull"] = true, true
	require.Equal(t, used, named)
	seen := map[string]bool{}
	for _, name := range statementNames {
		require.False(t, seen[name], name)
		seen[name] = true
	}
}
