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

// The sentinels. The error of every wait that ends and the cause of every notification match one of
// them, or the error of a context, with [errors.Is], unless the input or the database is at fault.
// One error can match several: [OutcomeOf] reads them in the right order.
var (
	// ErrLockPreempted is returned by Lock when a newer claim was announced while it waited. It is
	// the cause of a holder that is notified because of a newer claim. No other sentinel matches it
	// except [ErrClaimOutdated]. Its text, including the misspelling, is that of the published API,
	// because programs compare it.
	ErrLockPreempted = errors.New("lock was preemptepd while waiting for the lock")
	// ErrClaimOutdated is returned by Lock and Notify when the claim has a sequence number
	// ([PreemptiveLocker.Sequence]), and a claim with a higher number was announced for the key, or
	// one with the same number still waits or holds. It also matches [ErrLockPreempted].
	ErrClaimOutdated error = outdatedError{}
	// ErrLockTimeout is returned by Lock when it has waited for the lock timeout
	// ([WithLockTimeout]), or for the bound of [PreemptiveLocker.Wait]. It also matches
	// [context.DeadlineExceeded].
	ErrLockTimeout error = timeoutError{}
	// ErrLockBusy is returned by Lock when the claim's mode is [SkipIfBusy] and the key
	// is held or waited for.
	ErrLockBusy = errors.New("the key is held or waited for")
	// ErrLockNested is returned by Lock, Do and Notify when their context comes from the function
	// of a [PreemptiveLocker.Do] that holds the same key by the same provider. Such a claim would
	// stop the hold that waits for it. Nothing is sent, and no holder is notified. It matches no
	// other sentinel.
	ErrLockNested = errors.New("the key is held by the Do whose function makes this claim")
	// ErrLockLost is the cause of a holder whose session was lost, or whose key was taken from it. It
	// is returned by Release and Unlock when the hold had ended before, by such a loss or because the
	// lock was revoked. Another holder may have run concurrently.
	ErrLockLost = errors.New("lock was lost while it was held")
	// ErrMaxLockDuration is the cause of a holder that has held the lock for the max lock duration
	// ([WithMaxLockDuration]).
	ErrMaxLockDuration = errors.New("max lock duration was reached")
	// ErrProviderClosed is returned by every use of a provider that was closed, and by a Lock that
	// waits when Close is called. It is the cause of a holder whose provider is being closed.
	ErrProviderClosed = errors.New("lock provider is closed")
	// ErrStopRequested is the cause of a holder that an operator has asked to stop, with
	// [PostgresLockProvider.RequestStop] or with a NOTIFY by hand.
	ErrStopRequested = errors.New("holder was asked to stop")
)

// These are errors that no program needs to match.
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

// A ConflictError describes the other claims in an error. Find it with [errors.As]. It is in the
// errors of this package's locks that match [ErrLockPreempted], [ErrLockTimeout] or [ErrLockBusy],
// including the cause of a holder that was notified because of a newer claim. It is not in the
// error of a Notify that has timed out, nor in one that occurred before the key was known.
//
// A field whose value is not known is nil or zero. After an outage, for example, the error of a
// timeout has no holder.
type ConflictError struct {
	// Err is the sentinel that the error matches.
	Err error
	Key int64
	// Repo and PullRequest are those of the [PreemptiveLocker]. They are zero for a lock that was
	// created for a key.
	Repo        string
	PullRequest uint
	// Winner is the newer claim, in an error that matches [ErrLockPreempted]. It may be superseded
	// itself before it holds the key. If a holder was notified because of its row, Winner is the
	// newest claim.
	Winner *ClaimInfo
	// Waiter is the newest claim that waits for the key, in an error that matches
	// [ErrLockTimeout] or [ErrLockBusy].
	Waiter *ClaimInfo
	// Holder is the claim that holds the key. In the cause of a holder it is the claim of that
	// holder.
	Holder *ClaimInfo
	// Foreign is the server process of another program that has the advisory lock of the key, or
	// nil.
	Foreign *ForeignLock

	detail string // "" if the fields above say everything
}

// A ClaimInfo describes a claim, which may be that of another process.
type ClaimInfo struct {
	ID     uuid.UUID
	Event  string
	Labels map[string]string // see [PreemptiveLocker.Labels]
	Host   string            // the host of the process, or "" if it is not known
	PID    int
	// Since is the time at which the claim was made or, for a holder, granted the key. It is by the
	// clock of the database server, except for the holder in its own cause.
	Since time.Time
	// Token is the fencing token of a holder, and otherwise zero.
	Token int64
}

// A ForeignLock describes the server process of a program that does not use this library, and that
// has the advisory lock of a key.
type ForeignLock struct {
	PID         int // the server process, as in pg_stat_activity
	Application string
	User        string
}

// Other returns the claim that is in the way: the winner, otherwise the holder, otherwise the
// waiter. It returns the zero ClaimInfo if none of them is known.
func (e *ConflictError) Other() ClaimInfo {
	other := cmp.Or(e.Winner, e.Holder, e.Waiter)
	if other == nil {
		return ClaimInfo{}
	}
	return *other
}

// Error returns the text of Err, preceded by a description of the claim that is in the way, if that
// is known.
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

// Cause returns Err. The function Cause of github.com/pkg/errors calls it.
func (e *ConflictError) Cause() error { return e.Err }

func (c *ClaimInfo) clone() *ClaimInfo {
	if c == nil {
		return nil
	}
	copied := *c
	copied.Labels = maps.Clone(c.Labels)
	return &copied
}

// String returns the claim's event and, if it is known, its process, as the texts of errors have
// them.
func (c *ClaimInfo) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q", c.Event)
	if c.Host != "" {
		fmt.Fprintf(&b, " (process %d on %s)", c.PID, c.Host)
	}
	return b.String()
}

// annotated is an error with a description of the call that has failed. Unlike the errors of
// github.com/pkg/errors it has no stack, so every log shows it as one sentence. The name of the
// package begins that sentence and is removed from the inner error.
type annotated struct {
	doing string
	err   error
}

func (e *annotated) Error() string {
	return e.doing + ": " + strings.TrimPrefix(e.err.Error(), "locker: ")
}

func (e *annotated) Unwrap() error { return e.err }
func (e *annotated) Cause() error  { return e.err }

// annotate returns err with a description of the call that has failed, or nil if err is nil.
func annotate(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &annotated{fmt.Sprintf(format, args...), err}
}

// joinedError matches two errors. Cause returns the first of them.
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

// contextError returns the context's own error. The text includes the context's cause, but the
// error does not match it: a context that ended because another lock was preempted did not preempt
// this one.
func contextError(ctx context.Context) error {
	err := ctx.Err()
	if cause := context.Cause(ctx); cause != err {
		return &annotated{cause.Error(), err}
	}
	return err
}
