package locker

import (
	"context"
	"errors"
)

// Outcome is how a [PreemptiveLocker.Do] ended, or another call whose error [OutcomeOf]
// was given. The constants are in order: the larger, the worse.
type Outcome int

const (
	// OutcomeCompleted means that the function ran to its end undisturbed.
	OutcomeCompleted Outcome = iota + 1
	// OutcomeBusy means that the claim was skipped: see [ErrLockBusy].
	OutcomeBusy
	// OutcomeSuperseded means that a newer claim won, before the function was run or
	// while it ran: see [ErrLockPreempted].
	OutcomeSuperseded
	// OutcomeCanceled means that the caller's context was done.
	OutcomeCanceled
	// OutcomeTimeout means that the key was not free in time: see [ErrLockTimeout].
	OutcomeTimeout
	// OutcomeStopped means that an operator has asked the holder to stop: see
	// [ErrStopRequested].
	OutcomeStopped
	// OutcomeClosed means that the provider was closed: see [ErrProviderClosed].
	OutcomeClosed
	// OutcomeExpired means that the function ran into [ErrMaxLockDuration].
	OutcomeExpired
	// OutcomeFailed means that the function has failed, or that the lock could not be
	// had for a reason that no other outcome names: the database or the input.
	OutcomeFailed
	// OutcomeLost means that the lock was lost while the function ran: see
	// [ErrLockLost]. Another holder may have run concurrently.
	OutcomeLost
)

// String returns a name that is fit for a metric's label, such as "completed".
func (o Outcome) String() string {
	names := [...]string{"unknown", "completed", "busy", "superseded", "canceled", "timeout", "stopped", "closed", "expired", "failed", "lost"}
	if o < 0 || int(o) >= len(names) {
		o = 0
	}
	return names[o]
}

// OutcomeOf returns the worst that the error of a [PreemptiveLocker.Do] says, and reports
// whether Do's function was run and returned nil. The error of one Do can match several
// sentinels: that of a deployment which was preempted, was cut off while it wound down,
// and then failed, matches [ErrLockPreempted], [ErrLockLost] and the deployment's own
// error. A chain of errors.Is that begins with ErrLockPreempted would call that harmless.
//
// An error of the function is a failure, unless it matches the cause of its notification,
// [context.Canceled] or [context.DeadlineExceeded] and the function was notified: then
// the function has stopped because it was told to. If only the release of a completed
// function was not confirmed in time, the outcome is [OutcomeCompleted]: the key is
// given back all the same, and the error is worth a line in a log.
//
// OutcomeOf also accepts the errors of Lock, Unlock, Release and Notify, the cause of a
// context of Do, and the error of an [Observation]. For them finished is true if err is
// nil.
func OutcomeOf(err error) (outcome Outcome, finished bool) {
	if err == nil {
		return OutcomeCompleted, true
	}
	var d *doError
	if !errors.As(err, &d) {
		return classify(err), false
	}
	outcome = OutcomeCompleted
	if d.work != nil && !(d.cause != nil && stopping(d.work, d.cause)) {
		outcome = OutcomeFailed
	}
	if d.cause != nil {
		outcome = max(outcome, classify(d.cause))
	}
	if errors.Is(d.release, ErrLockLost) {
		outcome = OutcomeLost
	}
	return outcome, d.work == nil
}

// stopping reports whether a function that was notified has returned err because of it.
func stopping(err, cause error) bool {
	return errors.Is(err, cause) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// classify returns the worst that an error matches.
func classify(err error) Outcome {
	for _, c := range []struct {
		sentinel error
		outcome  Outcome
	}{
		{ErrLockLost, OutcomeLost},
		{ErrMaxLockDuration, OutcomeExpired},
		{ErrProviderClosed, OutcomeClosed},
		{ErrStopRequested, OutcomeStopped},
		{ErrLockTimeout, OutcomeTimeout},
		{context.Canceled, OutcomeCanceled},
		{context.DeadlineExceeded, OutcomeCanceled},
		{ErrLockPreempted, OutcomeSuperseded},
		{ErrLockBusy, OutcomeBusy},
	} {
		if errors.Is(err, c.sentinel) {
			return c.outcome
		}
	}
	return OutcomeFailed
}

// doError is the error of a Do: up to three parts, each of which may be nil.
type doError struct {
	work    error // the function's
	cause   error // why the function was notified
	release error
}

func (e *doError) parts() []error {
	var parts []error
	for _, err := range []error{e.work, e.cause, e.release} {
		if err != nil {
			parts = append(parts, err)
		}
	}
	return parts
}

// error returns nil if there is no part.
func (e *doError) error() error {
	if len(e.parts()) == 0 {
		return nil
	}
	return e
}

func (e *doError) Error() string {
	text := ""
	for i, err := range e.parts() {
		if i > 0 {
			text += "; "
		}
		text += err.Error()
	}
	return text
}

// Unwrap returns the parts.
func (e *doError) Unwrap() []error { return e.parts() }

// Cause returns the first part, for github.com/pkg/errors.
func (e *doError) Cause() error { return e.parts()[0] }
