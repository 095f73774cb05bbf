package locker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The sentinels. Every error of a wait or a hold that ends matches one of them, or the
// error of a context, with errors.Is. [OutcomeOf] reads them in the right order.
var (
	// ErrLockPreempted is returned by Lock when a newer claim was announced while it
	// waited, and is the cause of a holder that is notified because of one. It is also
	// matched by [ErrClaimOutdated], and by nothing else. Its text is that of the
	// published API, misspelling included: programs compare it.
	ErrLockPreempted = errors.New("lock was preemptepd while waiting for the lock")
	// ErrClaimOutdated is returned by Lock and Notify when the claim has a sequence
	// number ([PreemptiveLocker.Sequence]), and a claim with a higher one was announced
	// for the key, or one with the same number that still waits or holds. It also
	// matches [ErrLockPreempted].
	ErrClaimOutdated error = outdatedError{}
	// ErrLockTimeout is returned by Lock when it has waited for the lock timeout, or for
	// the bound of [PreemptiveLocker.Wait]. It also matches [context.DeadlineExceeded].
	ErrLockTimeout error = timeoutError{}
	// ErrLockBusy is returned by Lock when the claim's mode is [SkipIfBusy] and the key
	// is held or waited for.
	ErrLockBusy = errors.New("the key is held or waited for")
	// ErrLockNested is returned by Lock, Do and Notify if the context comes from the
	// function of a [PreemptiveLocker.Do] that holds the same key, by the same provider:
	// the claim would stop the hold that waits for it. Nothing is sent and no holder is
	// notified. It matches no other sentinel.
	ErrLockNested = errors.New("the key is held by the Do whose function makes this claim")
	// ErrLockLost is the cause of a holder whose session was lost, and is returned by
	// Release when the hold had ended without it: by such a loss, or because the lock was
	// revoked after its notification. Another holder may have run concurrently.
	ErrLockLost = errors.New("lock was lost while it was held")
	// ErrMaxLockDuration is the cause of a holder that is notified because the max lock
	// duration was reached.
	ErrMaxLockDuration = errors.New("max lock duration was reached")
	// ErrProviderClosed is returned when the provider was closed, and is the cause of a
	// holder that is notified because it is being closed.
	ErrProviderClosed = errors.New("lock provider is closed")
	// ErrStopRequested is the cause of a holder that an operator has asked to stop, with
	// [PostgresLockProvider.RequestStop] or a NOTIFY by hand.
	ErrStopRequested = errors.New("holder was asked to stop")
)

// Errors that no program needs to match.
var (
	errProviderZero = errors.New("locker: PostgresLockProvider was not made by NewLockProvider")
	errLockZero     = errors.New("locker: lock was not made by a provider")
	errContextNil   = errors.New("locker: context is nil")
	errLockTwice    = errors.New("Lock was called before on this lock (locks are single use)")
	errNotLocked    = errors.New("Unlock before Lock")
	errReleasedWait = errors.New("released while waiting")
)

type outdatedError struct{}

func (outdatedError) Error() string   { return "claim came too late" }
func (outdatedError) Is(e error) bool { return e == ErrLockPreempted }

type timeoutError struct{}

func (timeoutError) Error() string   { return "lock timeout was reached while waiting for the lock" }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Is(e error) bool { return e == context.DeadlineExceeded }

// ConflictError describes the other claim of an error: find it with errors.As. It is in
// the errors of this package's locks that match [ErrLockPreempted], [ErrLockTimeout] and
// [ErrLockBusy], also in the cause of a holder that was notified because of a newer claim.
// It is not in an error that came before the key was known. What is not known is nil or
// zero: after an outage, for example, a timeout has no holder.
type ConflictError struct {
	// Err is the sentinel that the error matches.
	Err error
	Key int64
	// Repo and PullRequest are those of the [PreemptiveLocker], and zero for a lock that
	// was made for a key.
	Repo        string
	PullRequest uint
	// Winner is the newer claim that has won, in an error that matches
	// [ErrLockPreempted]. It may be superseded itself before it holds the key. A holder
	// that learns of a claim from its row is told the newest.
	Winner *ClaimInfo
	// Waiter is the newest claim that waits for the key, in an error that matches
	// [ErrLockTimeout] or [ErrLockBusy].
	Waiter *ClaimInfo
	// Holder is the claim that holds the key. For the cause of a holder it is the holder
	// itself.
	Holder *ClaimInfo
	// Foreign is the server process of another program, if that has taken the advisory
	// lock of the key.
	Foreign *ForeignLock

	detail string // "" if the fields above say everything
}

// ClaimInfo describes a claim of any process.
type ClaimInfo struct {
	ID     uuid.UUID
	Event  string
	Labels map[string]string // see [PreemptiveLocker.Labels]
	Host   string            // of the process; "" if it is not known
	PID    int
	// Since is when the claim was made or, of a holder, when it was granted the key. It is
	// by the clock of the database server, except for the holder in its own cause.
	Since time.Time
	// Token is the fencing token of a holder.
	Token int64
}

// ForeignLock describes the server process of a program that does not use this library.
type ForeignLock struct {
	PID         int // of the server process, as in pg_stat_activity
	Application string
	User        string
}

// Other returns the claim that is in the way: the winner, otherwise the holder, otherwise
// the waiter. Its fields are zero if none is known.
func (e *ConflictError) Other() ClaimInfo {
	other := cmp.Or(e.Winner, e.Holder, e.Waiter)
	if other == nil {
		return ClaimInfo{}
	}
	return *other
}

// Error returns which claim is in the way, if that is known, and the text of Err.
func (e *ConflictError) Error() string {
	detail := e.detail
	if detail == "" && e.Winner != nil {
		verb := "superseded"
		if e.Holder != nil {
			verb = "preempted"
		}
		detail = verb + " by the newer claim " + e.Winner.String()
	}
	switch {
	case e.Err == nil:
		return detail
	case detail == "":
		return e.Err.Error()
	}
	return detail + ": " + e.Err.Error()
}

// Unwrap returns Err.
func (e *ConflictError) Unwrap() error { return e.Err }

// Cause returns Err, for github.com/pkg/errors.
func (e *ConflictError) Cause() error { return e.Err }

func (c *ClaimInfo) clone() *ClaimInfo {
	if c == nil {
		return nil
	}
	copied := *c
	copied.Labels = maps.Clone(c.Labels)
	return &copied
}

// String names the claim as errors do.
func (c *ClaimInfo) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q", c.Event)
	if c.Host != "" {
		fmt.Fprintf(&b, " (process %d on %s)", c.PID, c.Host)
	}
	return b.String()
}

// annotated is an error with what was being done. It has no stack, unlike the errors of
// github.com/pkg/errors, so every log shows it as one sentence. That begins with the
// name of the package once: the inner error's is left out.
type annotated struct {
	doing string
	err   error
}

func (e *annotated) Error() string {
	return e.doing + ": " + strings.TrimPrefix(e.err.Error(), "locker: ")
}

func (e *annotated) Unwrap() error { return e.err }
func (e *annotated) Cause() error  { return e.err }

// annotate returns err with what was being done, or nil if err is nil.
func annotate(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &annotated{fmt.Sprintf(format, args...), err}
}

// joinedError matches two errors; pkg/errors' Cause follows the first.
type joinedError struct{ first, second error }

func (e *joinedError) Error() string   { return e.first.Error() + "; " + e.second.Error() }
func (e *joinedError) Cause() error    { return e.first }
func (e *joinedError) Unwrap() []error { return []error{e.first, e.second} }

func joinErrors(first, second error) error {
	switch {
	case first == nil:
		return second
	case second == nil || first == second:
		return first
	}
	return &joinedError{first, second}
}

// contextError is the context's own error. Its cause is told, not matched: a context
// that ended because another lock was preempted did not preempt this one.
func contextError(ctx context.Context) error {
	err := ctx.Err()
	if cause := context.Cause(ctx); cause != err {
		return &annotated{cause.Error(), err}
	}
	return err
}
