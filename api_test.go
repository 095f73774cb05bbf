package locker_test

import (
	"context"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/preemptable/locker"
	"github.com/stretchr/testify/require"
)

// This file uses every exported name with its type. A change that breaks the code of users breaks
// the compilation of this file.

// The kinds are untyped constants, so each of them is an int as well as a
// LockProviderKind.
var (
	_ int                     = locker.UnknownLockProviderKind
	_ int                     = locker.PostgresLockProviderKind
	_ int                     = locker.FakeLockProviderKind
	_ locker.LockProviderKind = locker.UnknownLockProviderKind
	_ locker.LockProviderKind = locker.PostgresLockProviderKind
	_ locker.LockProviderKind = locker.FakeLockProviderKind
)

// These are pointers, because an assignment would accept any type that implements error.
var (
	_ *error = &locker.ErrLockPreempted
	_ *error = &locker.ErrLockTimeout
	_ *error = &locker.ErrLockLost
	_ *error = &locker.ErrMaxLockDuration
	_ *error = &locker.ErrProviderClosed
	_ *error = &locker.ErrStopRequested
	_ *error = &locker.ErrClaimOutdated
	_ *error = &locker.ErrLockNested

	_ *string = &locker.SchemaSQL
)

// The functions and methods. This function is never called. It keeps the short names local.
func _() {
	type (
		ctx         = context.Context
		lock        = locker.PreemptableLock
		payloads    = <-chan locker.NotificationPayload
		factory     = locker.PreemptiveLockerFactory
		providerOpt = locker.LockProviderOption
		lockerOpt   = locker.PreemptiveLockerOption

		postgresProvider = *locker.PostgresLockProvider
		postgresLock     = *locker.PostgresLock
		fakeProvider     = *locker.FakeLockProvider
		fakeLock         = *locker.FakePreemptableLock
		preemptiveLocker = *locker.PreemptiveLocker
	)

	var (
		_ func(kind locker.LockProviderKind, options ...providerOpt) (locker.LockProvider, error) = locker.NewLockProvider

		_ func(provider locker.LockProvider, opts ...lockerOpt) (factory, error)                                                     = locker.NewPreemptiveLockerFactory
		_ func(postgresURI, apmServiceName string, providerOpts []providerOpt, lockerOpts ...lockerOpt) (factory, error)             = locker.NewPostgresPreemptiveLockerFactory
		_ func(providerOpts []providerOpt, lockerOpts ...lockerOpt) (factory, error)                                                 = locker.NewFakePreemptiveLockerFactory
		_ func(c ctx, db *sqlx.DB, key int64, connInfo, message string, conf locker.LockProviderConfig) (pl postgresLock, err error) = locker.NewPostgresLock

		_ func(lockWait time.Duration) providerOpt             = locker.WithLockTimeout
		_ func(duration time.Duration) providerOpt             = locker.WithMaxLockDuration
		_ func(duration time.Duration) providerOpt             = locker.WithPreemptionTimeout
		_ func(timeout time.Duration) providerOpt              = locker.WithSessionTimeout
		_ func(timeout time.Duration) providerOpt              = locker.WithIdleTimeout
		_ func() providerOpt                                   = locker.WithOriginalReplicas
		_ func(postgresURI, apmServiceName string) providerOpt = locker.WithPostgresBackend
		_ func(logger *slog.Logger) providerOpt                = locker.WithLogger

		_ func(f func(c ctx) (string, error)) providerOpt = locker.WithPostgresURI

		_ func(c ctx, order int64) ctx       = locker.ContextWithSequence
		_ func(c ctx) (order int64, ok bool) = locker.SequenceFromContext

		_ func(c ctx, mode locker.ClaimMode) ctx    = locker.ContextWithMode
		_ func(c ctx) locker.ClaimMode              = locker.ModeFromContext
		_ func(c ctx, labels map[string]string) ctx = locker.ContextWithLabels
		_ func(c ctx) map[string]string             = locker.LabelsFromContext
		_ func(c ctx) int64                         = locker.TokenFromContext

		_ func(err error) (outcome locker.Outcome, finished bool) = locker.OutcomeOf

		_ func(uri string, opts ...providerOpt) (postgresProvider, error) = locker.NewPostgresProvider
		_ func(opts ...providerOpt) (fakeProvider, error)                 = locker.NewFakeProvider

		_ func(n int, max time.Duration) providerOpt = locker.WithProgress
		_ func(mode locker.ClaimMode) lockerOpt      = locker.WithClaimMode

		_ func(f func(locker.Observation)) providerOpt = locker.WithObserver

		_ func(lockDelay time.Duration) lockerOpt = locker.WithLockDelay
		_ func(name string) lockerOpt             = locker.WithAPMServiceName
		_ func(tracer locker.Tracer) lockerOpt    = locker.WithTracer
	)

	var (
		_ func(preemptiveLocker, ctx) (payloads, error)                                     = (*locker.PreemptiveLocker).Lock
		_ func(preemptiveLocker, ctx) error                                                 = (*locker.PreemptiveLocker).Release
		_ func(preemptiveLocker, ctx, func(ctx context.Context) error) error                = (*locker.PreemptiveLocker).Do
		_ func(preemptiveLocker, int64) preemptiveLocker                                    = (*locker.PreemptiveLocker).Sequence
		_ func(preemptiveLocker, locker.ClaimMode) preemptiveLocker                         = (*locker.PreemptiveLocker).Mode
		_ func(preemptiveLocker, map[string]string) preemptiveLocker                        = (*locker.PreemptiveLocker).Labels
		_ func(preemptiveLocker, time.Duration) preemptiveLocker                            = (*locker.PreemptiveLocker).Wait
		_ func(preemptiveLocker, ctx, time.Duration, func(ctx context.Context) error) error = (*locker.PreemptiveLocker).Shield
		_ func(preemptiveLocker) int64                                                      = (*locker.PreemptiveLocker).Token

		_ func(postgresProvider, ctx, int64, string) (lock, error)                                     = (*locker.PostgresLockProvider).New
		_ func(postgresProvider, ctx, string, uint) (int64, error)                                     = (*locker.PostgresLockProvider).LockKey
		_ func(postgresProvider) error                                                                 = (*locker.PostgresLockProvider).Close
		_ func(postgresProvider, ctx) ([]locker.LockStatus, error)                                     = (*locker.PostgresLockProvider).ListLocks
		_ func(p postgresProvider, c ctx, repo string, pr uint, reason string) (asked bool, err error) = (*locker.PostgresLockProvider).RequestStop
		_ func(postgresProvider, ctx) error                                                            = (*locker.PostgresLockProvider).Ping
		_ func(p postgresProvider, c ctx, repo string, pr uint) (known bool, err error)                = (*locker.PostgresLockProvider).ResetSequence
		_ func(postgresProvider) locker.Stats                                                          = (*locker.PostgresLockProvider).Stats

		_ func(fakeProvider, ctx, int64, string) (lock, error) = (*locker.FakeLockProvider).New
		_ func(fakeProvider, ctx, string, uint) (int64, error) = (*locker.FakeLockProvider).LockKey
		_ func(fakeProvider, ctx) error                        = (*locker.FakeLockProvider).Ping
		_ func(fakeProvider) error                             = (*locker.FakeLockProvider).Close

		_ func(postgresLock, ctx) (payloads, error) = (*locker.PostgresLock).Lock
		_ func(postgresLock, ctx) error             = (*locker.PostgresLock).Unlock
		_ func(postgresLock, ctx) error             = (*locker.PostgresLock).Notify
		_ func(postgresLock) int64                  = (*locker.PostgresLock).Token
		_ func(postgresLock) error                  = (*locker.PostgresLock).Cause
		_ func(postgresLock, time.Duration) error   = (*locker.PostgresLock).Shield
		_ func(postgresLock)                        = (*locker.PostgresLock).Unshield

		_ func(fakeLock, ctx) (payloads, error) = (*locker.FakePreemptableLock).Lock
		_ func(fakeLock, ctx) error             = (*locker.FakePreemptableLock).Unlock
		_ func(fakeLock, ctx) error             = (*locker.FakePreemptableLock).Notify
		_ func(fakeLock) int64                  = (*locker.FakePreemptableLock).Token
		_ func(fakeLock) error                  = (*locker.FakePreemptableLock).Cause
		_ func(fakeLock, time.Duration) error   = (*locker.FakePreemptableLock).Shield
		_ func(fakeLock)                        = (*locker.FakePreemptableLock).Unshield

		_ func(locker.PostgresEnvLock) string        = locker.PostgresEnvLock.Columns
		_ func(locker.PostgresEnvLock) []interface{} = locker.PostgresEnvLock.ScanValues
	)
}

var (
	_ io.Closer              = (*locker.PostgresLockProvider)(nil)
	_ io.Closer              = (*locker.FakeLockProvider)(nil)
	_ locker.LockProvider    = (*locker.PostgresLockProvider)(nil)
	_ locker.LockProvider    = (*locker.FakeLockProvider)(nil)
	_ locker.PreemptableLock = (*locker.PostgresLock)(nil)
	_ locker.PreemptableLock = (*locker.FakePreemptableLock)(nil)
)

// The interfaces have these methods and no others: each of two types can be assigned to the other.
type (
	providerMethods interface {
		New(ctx context.Context, key int64, event string) (locker.PreemptableLock, error)
		LockKey(ctx context.Context, repo string, pr uint) (int64, error)
	}
	lockMethods interface {
		Lock(ctx context.Context) (<-chan locker.NotificationPayload, error)
		Unlock(ctx context.Context) error
		Notify(ctx context.Context) error
	}
)

var (
	_ providerMethods        = locker.LockProvider(nil)
	_ locker.LockProvider    = providerMethods(nil)
	_ lockMethods            = locker.PreemptableLock(nil)
	_ locker.PreemptableLock = lockMethods(nil)
)

// The underlying types of the remaining types.
var (
	_ = locker.LockProviderKind(int(0))
	_ = locker.ObservationKind(int(0))
	_ = locker.OperationKind(int(0))

	_ func(locker.ObservationKind) string = locker.ObservationKind.String
	_ func(locker.OperationKind) string   = locker.OperationKind.String

	_ func(context.Context, locker.Operation) (context.Context, func(locker.OperationEnd)) = locker.Tracer(nil)

	_ = locker.Operation{Kind: locker.OperationKind(0), Repo: "", PullRequest: uint(0), Event: "",
		Statement: "", Query: "", Database: "", Host: "", Port: int(0)}
	_ = locker.OperationEnd{Err: error(nil), Key: int64(0), Token: int64(0)}

	_ = locker.Observation{Kind: locker.ObservationKind(0), Key: int64(0), Event: "", After: time.Duration(0),
		Kept: int(0), Lost: int(0), Err: error(nil)}
	_ = locker.Stats{Queued: int(0), Held: int(0), Waiting: int(0), Connected: false, Suspended: time.Time{},
		LastHeartbeat: time.Time{}, Listening: false}
	_ = locker.LockStatus{Key: int64(0), Repo: "", PullRequest: uint(0), Event: "", Host: "", PID: int(0), Application: "",
		Since: time.Time{}, Token: int64(0), Alive: false, NewestEvent: "", NewestHost: "", NewestPID: int(0),
		NewestApplication: "", NewestAt: time.Time{}, Waiting: false}

	_ func(*locker.LockProviderConfig)                                  = locker.LockProviderOption(nil)
	_ func(*locker.PreemptiveLockerConfig)                              = locker.PreemptiveLockerOption(nil)
	_ func(repo string, pr uint, event string) *locker.PreemptiveLocker = locker.PreemptiveLockerFactory(nil)

	_ = locker.NotificationPayload{ID: uuid.UUID{}, Message: "", LockKey: int64(0)}
	_ = locker.PostgresEnvLock{LockKey: int64(0), Repo: "", PullRequest: uint(0)}
)

// exported lists all names above. A name that is added to the package has to be added here, and
// above, deliberately, because it stays forever.
var exported = []string{
	"const FakeLockProviderKind",
	"const LetFinish",
	"const ObservedAcquired",
	"const ObservedFailed",
	"const ObservedLost",
	"const ObservedNotified",
	"const ObservedReconnected",
	"const ObservedReleased",
	"const ObservedRevoked",
	"const ObservedSkipped",
	"const ObservedSuperseded",
	"const ObservedSuspended",
	"const OperationLock",
	"const OperationRelease",
	"const OperationStatement",
	"const OutcomeBusy",
	"const OutcomeCanceled",
	"const OutcomeClosed",
	"const OutcomeCompleted",
	"const OutcomeExpired",
	"const OutcomeFailed",
	"const OutcomeLost",
	"const OutcomeOutdated",
	"const OutcomePreempted",
	"const OutcomeStopped",
	"const OutcomeSuperseded",
	"const OutcomeTimeout",
	"const PostgresLockProviderKind",
	"const Preempt",
	"const SkipIfBusy",
	"const UnknownLockProviderKind",
	"func ContextWithLabels",
	"func ContextWithMode",
	"func ContextWithSequence",
	"func LabelsFromContext",
	"func ModeFromContext",
	"func NewFakePreemptiveLockerFactory",
	"func NewFakeProvider",
	"func NewLockProvider",
	"func NewPostgresLock",
	"func NewPostgresPreemptiveLockerFactory",
	"func NewPostgresProvider",
	"func NewPreemptiveLockerFactory",
	"func OutcomeOf",
	"func SequenceFromContext",
	"func TokenFromContext",
	"func WithAPMServiceName",
	"func WithClaimMode",
	"func WithIdleTimeout",
	"func WithLockDelay",
	"func WithLockTimeout",
	"func WithLogger",
	"func WithMaxLockDuration",
	"func WithObserver",
	"func WithOriginalReplicas",
	"func WithPostgresBackend",
	"func WithPostgresURI",
	"func WithPreemptionTimeout",
	"func WithProgress",
	"func WithSessionTimeout",
	"func WithTracer",
	"type ClaimInfo",
	"type ClaimInfo, field Event",
	"type ClaimInfo, field Host",
	"type ClaimInfo, field ID",
	"type ClaimInfo, field Labels",
	"type ClaimInfo, field PID",
	"type ClaimInfo, field Since",
	"type ClaimInfo, field Token",
	"type ClaimInfo, method String",
	"type ClaimMode",
	"type ClaimMode, method MarshalText",
	"type ClaimMode, method String",
	"type ClaimMode, method UnmarshalText",
	"type ConflictError",
	"type ConflictError, field Err",
	"type ConflictError, field Foreign",
	"type ConflictError, field Holder",
	"type ConflictError, field Key",
	"type ConflictError, field PullRequest",
	"type ConflictError, field Repo",
	"type ConflictError, field Waiter",
	"type ConflictError, field Winner",
	"type ConflictError, method Cause",
	"type ConflictError, method Error",
	"type ConflictError, method Other",
	"type ConflictError, method Unwrap",
	"type FakeLockProvider",
	"type FakeLockProvider, method Close",
	"type FakeLockProvider, method LockKey",
	"type FakeLockProvider, method New",
	"type FakeLockProvider, method Ping",
	"type FakePreemptableLock",
	"type FakePreemptableLock, method Cause",
	"type FakePreemptableLock, method Lock",
	"type FakePreemptableLock, method Notify",
	"type FakePreemptableLock, method Shield",
	"type FakePreemptableLock, method Token",
	"type FakePreemptableLock, method Unlock",
	"type FakePreemptableLock, method Unshield",
	"type ForeignLock",
	"type ForeignLock, field Application",
	"type ForeignLock, field PID",
	"type ForeignLock, field User",
	"type LockProvider",
	"type LockProvider, method LockKey",
	"type LockProvider, method New",
	"type LockProviderConfig",
	"type LockProviderKind",
	"type LockProviderOption",
	"type LockStatus",
	"type LockStatus, field Alive",
	"type LockStatus, field Application",
	"type LockStatus, field Event",
	"type LockStatus, field Host",
	"type LockStatus, field Key",
	"type LockStatus, field Labels",
	"type LockStatus, field NewestApplication",
	"type LockStatus, field NewestAt",
	"type LockStatus, field NewestEvent",
	"type LockStatus, field NewestHost",
	"type LockStatus, field NewestLabels",
	"type LockStatus, field NewestPID",
	"type LockStatus, field PID",
	"type LockStatus, field PullRequest",
	"type LockStatus, field Repo",
	"type LockStatus, field Since",
	"type LockStatus, field SparedUntil",
	"type LockStatus, field StopAsked",
	"type LockStatus, field Streak",
	"type LockStatus, field Token",
	"type LockStatus, field Waiting",
	"type NotificationPayload",
	"type NotificationPayload, field ID",
	"type NotificationPayload, field LockKey",
	"type NotificationPayload, field Message",
	"type Observation",
	"type Observation, field After",
	"type Observation, field Err",
	"type Observation, field Event",
	"type Observation, field Kept",
	"type Observation, field Key",
	"type Observation, field Kind",
	"type Observation, field Labels",
	"type Observation, field Lost",
	"type ObservationKind",
	"type ObservationKind, method String",
	"type Operation",
	"type Operation, field Database",
	"type Operation, field Event",
	"type Operation, field Host",
	"type Operation, field Kind",
	"type Operation, field Port",
	"type Operation, field PullRequest",
	"type Operation, field Query",
	"type Operation, field Repo",
	"type Operation, field Statement",
	"type OperationEnd",
	"type OperationEnd, field Err",
	"type OperationEnd, field Key",
	"type OperationEnd, field Token",
	"type OperationKind",
	"type OperationKind, method String",
	"type Outcome",
	"type Outcome, method String",
	"type PostgresEnvLock",
	"type PostgresEnvLock, field LockKey",
	"type PostgresEnvLock, field PullRequest",
	"type PostgresEnvLock, field Repo",
	"type PostgresEnvLock, method Columns",
	"type PostgresEnvLock, method ScanValues",
	"type PostgresLock",
	"type PostgresLock, method Cause",
	"type PostgresLock, method Lock",
	"type PostgresLock, method Notify",
	"type PostgresLock, method Shield",
	"type PostgresLock, method Token",
	"type PostgresLock, method Unlock",
	"type PostgresLock, method Unshield",
	"type PostgresLockProvider",
	"type PostgresLockProvider, method Close",
	"type PostgresLockProvider, method ListLocks",
	"type PostgresLockProvider, method LockKey",
	"type PostgresLockProvider, method New",
	"type PostgresLockProvider, method Ping",
	"type PostgresLockProvider, method RequestStop",
	"type PostgresLockProvider, method ResetSequence",
	"type PostgresLockProvider, method Stats",
	"type PreemptableLock",
	"type PreemptableLock, method Lock",
	"type PreemptableLock, method Notify",
	"type PreemptableLock, method Unlock",
	"type PreemptiveLocker",
	"type PreemptiveLocker, method Do",
	"type PreemptiveLocker, method Labels",
	"type PreemptiveLocker, method Lock",
	"type PreemptiveLocker, method Mode",
	"type PreemptiveLocker, method Release",
	"type PreemptiveLocker, method Sequence",
	"type PreemptiveLocker, method Shield",
	"type PreemptiveLocker, method Token",
	"type PreemptiveLocker, method Wait",
	"type PreemptiveLockerConfig",
	"type PreemptiveLockerFactory",
	"type PreemptiveLockerOption",
	"type Stats",
	"type Stats, field Connected",
	"type Stats, field Held",
	"type Stats, field LastHeartbeat",
	"type Stats, field Listening",
	"type Stats, field Queued",
	"type Stats, field Suspended",
	"type Stats, field Waiting",
	"type Tracer",
	"var ErrClaimOutdated",
	"var ErrLockBusy",
	"var ErrLockLost",
	"var ErrLockNested",
	"var ErrLockPreempted",
	"var ErrLockTimeout",
	"var ErrMaxLockDuration",
	"var ErrProviderClosed",
	"var ErrStopRequested",
	"var SchemaSQL",
}

func TestAPINothingElseIsExported(t *testing.T) {
	entries, err := os.ReadDir(".")
	require.NoError(t, err)
	var files []*ast.File
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".go") && !strings.HasSuffix(e.Name(), "_test.go") {
			f, err := parser.ParseFile(token.NewFileSet(), e.Name(), nil, parser.SkipObjectResolution)
			require.NoError(t, err)
			files = append(files, f)
		}
	}
	found := exportedNames(files)
	slices.Sort(found)
	require.Equal(t, exported, found)
}

// exportedNames returns the names that the files export. Of exported types it also returns the
// methods and fields, including those that come from an embedded unexported struct.
func exportedNames(files []*ast.File) []string {
	var names []string
	types := map[string]ast.Expr{}
	methods := map[string][]string{} // of every type
	for _, f := range files {
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				switch {
				case !d.Name.IsExported():
				case d.Recv == nil:
					names = append(names, "func "+d.Name.Name)
				default:
					recv := typeName(d.Recv.List[0].Type)
					methods[recv] = append(methods[recv], d.Name.Name)
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.TypeSpec:
						types[s.Name.Name] = s.Type
					case *ast.ValueSpec:
						for _, n := range s.Names {
							if n.IsExported() {
								names = append(names, d.Tok.String()+" "+n.Name)
							}
						}
					}
				}
			}
		}
	}

	var members func(name string) []string
	members = func(name string) []string {
		var all []string
		for _, m := range methods[name] {
			all = append(all, "method "+m)
		}
		switch typ := types[name].(type) {
		case *ast.InterfaceType:
			for _, m := range typ.Methods.List {
				for _, n := range m.Names {
					all = append(all, "method "+n.Name)
				}
			}
		case *ast.StructType:
			for _, f := range typ.Fields.List {
				for _, n := range f.Names {
					if n.IsExported() {
						all = append(all, "field "+n.Name)
					}
				}
				if embedded := typeName(f.Type); len(f.Names) == 0 {
					all = append(all, members(embedded)...)
					if ast.IsExported(embedded) {
						all = append(all, "field "+embedded)
					}
				}
			}
		}
		return all
	}
	for name := range types {
		if ast.IsExported(name) {
			names = append(names, "type "+name)
			for _, m := range members(name) {
				names = append(names, "type "+name+", "+m)
			}
		}
	}
	return names
}

// typeName returns the name of a type of this package, or of the type that a pointer points to.
func typeName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return typeName(e.X)
	case *ast.SelectorExpr:
		return e.Sel.Name
	case *ast.Ident:
		return e.Name
	}
	return ""
}

func TestAPIKinds(t *testing.T) {
	require.Equal(t, []int{0, 1, 2},
		[]int{locker.UnknownLockProviderKind, locker.PostgresLockProviderKind, locker.FakeLockProviderKind})
}

func TestAPIObservationKinds(t *testing.T) {
	for i, want := range []string{"unknown", "acquired", "superseded", "failed", "notified", "released", "revoked", "lost",
		"suspended", "reconnected", "skipped", "unknown"} {
		require.Equal(t, want, locker.ObservationKind(i).String())
	}
	require.Equal(t, "unknown", locker.ObservationKind(-1).String())
	require.Equal(t, []locker.ObservationKind{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, []locker.ObservationKind{locker.ObservedAcquired,
		locker.ObservedSuperseded, locker.ObservedFailed, locker.ObservedNotified, locker.ObservedReleased,
		locker.ObservedRevoked, locker.ObservedLost, locker.ObservedSuspended, locker.ObservedReconnected, locker.ObservedSkipped})
}

func TestAPIOperationKinds(t *testing.T) {
	for i, want := range []string{"unknown", "lock", "release", "statement", "unknown"} {
		require.Equal(t, want, locker.OperationKind(i).String())
	}
	require.Equal(t, "unknown", locker.OperationKind(-1).String())
	require.Equal(t, []locker.OperationKind{1, 2, 3}, []locker.OperationKind{locker.OperationLock, locker.OperationRelease, locker.OperationStatement})
}

func TestAPIErrors(t *testing.T) {
	require.Equal(t, "lock was preemptepd while waiting for the lock", locker.ErrLockPreempted.Error())

	sentinels := []error{locker.ErrLockPreempted, locker.ErrLockTimeout, locker.ErrLockLost,
		locker.ErrMaxLockDuration, locker.ErrProviderClosed, locker.ErrStopRequested, locker.ErrLockNested, context.Canceled}
	for i, a := range sentinels {
		for j, b := range sentinels {
			require.Equal(t, i == j, errors.Is(a, b), "%v, %v", a, b)
		}
	}
	require.ErrorIs(t, locker.ErrClaimOutdated, locker.ErrLockPreempted)
	for _, e := range append(sentinels, locker.ErrClaimOutdated) {
		require.Equal(t, e == locker.ErrClaimOutdated, errors.Is(e, locker.ErrClaimOutdated), "%v", e)
		require.Equal(t, e == locker.ErrLockTimeout, errors.Is(e, context.DeadlineExceeded), "%v", e)
	}
	var timeout interface{ Timeout() bool }
	require.ErrorAs(t, locker.ErrLockTimeout, &timeout)
	require.True(t, timeout.Timeout())
}

func TestAPINotificationPayload(t *testing.T) {
	type field struct {
		name, tag string
		typ       reflect.Type
	}
	var fields []field
	for _, f := range reflect.VisibleFields(reflect.TypeFor[locker.NotificationPayload]()) {
		fields = append(fields, field{f.Name, string(f.Tag), f.Type})
	}
	require.Equal(t, []field{
		{"ID", `json:"id"`, reflect.TypeFor[uuid.UUID]()},
		{"Message", `json:"event"`, reflect.TypeFor[string]()},
		{"LockKey", `json:"lockKey"`, reflect.TypeFor[int64]()},
	}, fields)

	payload := locker.NotificationPayload{
		ID: uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8"), Message: "synchronize", LockKey: -1 << 63,
	}
	text, err := json.Marshal(payload)
	require.NoError(t, err)
	require.Equal(t, `{"id":"6ba7b810-9dad-11d1-80b4-00c04fd430c8","event":"synchronize","lockKey":-9223372036854775808}`, string(text))
}

func TestAPIPostgresEnvLock(t *testing.T) {
	var columns, tags []string
	for _, f := range reflect.VisibleFields(reflect.TypeFor[locker.PostgresEnvLock]()) {
		columns = append(columns, f.Name)
		tags = append(tags, f.Tag.Get("db"))
	}
	require.Equal(t, []string{"LockKey", "Repo", "PullRequest"}, columns)
	require.Equal(t, "lock_key, repo, pull_request", locker.PostgresEnvLock{}.Columns())
	require.Equal(t, locker.PostgresEnvLock{}.Columns(), strings.Join(tags, ", "), "sqlx finds the columns by their tags")

	key, repo, pr := int64(-7), "a/b", uint(3)
	row := locker.PostgresEnvLock{LockKey: key, Repo: repo, PullRequest: pr}
	require.Equal(t, []interface{}{&key, &repo, &pr}, row.ScanValues())
}

func TestAPISchemaSQL(t *testing.T) {
	file, err := os.ReadFile("schema.sql")
	require.NoError(t, err)
	require.Equal(t, string(file), locker.SchemaSQL)
	for _, name := range []string{"env_locks", "env_lock_state", "env_lock_sessions"} {
		require.Contains(t, locker.SchemaSQL, "IF NOT EXISTS "+name)
	}
}

// With the tag nodatadog a program that uses the library links nothing of Datadog's, and no package
// for tests. Without the tag, version 1 of Datadog's tracer links testify as well.
func TestAPIClosure(t *testing.T) {
	for _, tag := range []string{"", "nodatadog"} {
		out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags", tag, ".").Output()
		require.NoError(t, err)
		packages := strings.Fields(string(out))
		require.Contains(t, packages, "github.com/lib/pq")
		datadog := 0
		for _, p := range packages {
			if tag == "nodatadog" {
				require.NotContains(t, p, "testify")
			}
			if strings.Contains(strings.ToLower(p), "datadog") {
				datadog++
			}
		}
		require.Equal(t, tag == "", datadog > 0, "tag %q: %d packages of Datadog's", tag, datadog)
	}
}
