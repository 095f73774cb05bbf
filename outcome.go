package locker

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Outcome is how a [PreemptiveLocker.Do] ended, or another call whose error [OutcomeOf]
// was given. The constants are in order: the larger, the worse.
type Outcome int

const (
	// OutcomeCompleted means that the function ran to its end undisturbed.
	OutcomeCompleted Outcome = iota + 1
	// OutcomeBusy means that the claim was skipped: see [ErrLockBusy].
	OutcomeBusy
	// OutcomeOutdated means that the claim came too late, or once more: see
	// [ErrClaimOutdated].
	OutcomeOutdated
	// OutcomeSuperseded means that a newer claim won before the function was run: see
	// [ErrLockPreempted].
	OutcomeSuperseded
	// OutcomePreempted means that the function was notified because of a newer claim:
	// see [ErrLockPreempted]. Its work may be half done.
	OutcomePreempted
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
	names := [...]string{"unknown", "completed", "busy", "outdated", "superseded", "preempted", "canceled", "timeout", "stopped", "closed", "expired", "failed", "lost"}
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
// An error of the function is a failure, unless the function was notified and has stopped
// because of that: the error matches the cause, [context.Canceled] or
// [context.DeadlineExceeded], or is that of a command which a signal has ended
// (os/exec.CommandContext). If only the release of a completed
// function was not confirmed in time, the outcome is [OutcomeCompleted]: the key is
// given back all the same, and the error is worth a line in a log.
//
// OutcomeOf also accepts the errors of Lock, Unlock, Release and Notify, the cause of a
// context of Do, the error of an [Observation], and errors that wrap or join any of these.
// For them finished is true if err is nil. What the function says about other locks is
// the function's: if it fails because an inner Do was preempted, the outer one has failed.
func OutcomeOf(err error) (outcome Outcome, finished bool) {
	if err == nil {
		return OutcomeCompleted, true
	}
	if d, ok := err.(*doError); ok {
		return d.outcome(), d.work == nil
	}
	var d *doError
	if !errors.As(err, &d) {
		return classify(err), false
	}
	var parts []error
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		parts = []error{e.Unwrap()}
	case interface{ Unwrap() []error }:
		parts = e.Unwrap()
	}
	outcome, finished = d.outcome(), d.work == nil // it may be reached by the error's own method As alone
	for _, part := range parts {
		if part != nil {
			o, f := OutcomeOf(part)
			outcome, finished = max(outcome, o), finished && f
		}
	}
	return outcome, finished
}

// outcome returns the worst of the parts.
func (e *doError) outcome() Outcome {
	outcome := OutcomeCompleted
	if e.work != nil && !e.stopped() {
		outcome = OutcomeFailed
	}
	if e.cause != nil {
		outcome = max(outcome, classify(e.cause))
	}
	if outcome == OutcomeSuperseded {
		outcome = OutcomePreempted
	}
	if errors.Is(e.release, ErrLockLost) {
		outcome = OutcomeLost
	}
	return outcome
}

// stopped reports whether the function was notified and has returned because of it.
func (e *doError) stopped() bool {
	if e.cause == nil {
		return false
	}
	var command interface{ ExitCode() int } // an exec.ExitError
	if errors.As(e.work, &command) && !isNil(command) {
		switch command.ExitCode() {
		case -1, 128 + 2, 128 + 9, 128 + 15: // ended by a signal, or by one that a shell reports
			return true
		}
	}
	for _, reason := range []error{e.cause, e.told, context.Canceled, context.DeadlineExceeded} {
		if reason != nil && errors.Is(e.work, reason) {
			return true
		}
	}
	return false
}

// classify returns the worst that an error matches, and OutcomeCompleted for nil.
func classify(err error) Outcome {
	if err == nil {
		return OutcomeCompleted
	}
	outcome := OutcomeFailed
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
		{ErrClaimOutdated, OutcomeOutdated},
		{ErrLockPreempted, OutcomeSuperseded},
		{ErrLockBusy, OutcomeBusy},
	} {
		if errors.Is(err, c.sentinel) {
			outcome = c.outcome
			break
		}
	}
	var delayed *delayError
	var conflict *ConflictError
	switch {
	case errors.As(err, &delayed): // the function was never run
		if outcome == OutcomeLost {
			outcome = OutcomeFailed
		}
	case outcome == OutcomeSuperseded && errors.As(err, &conflict) && conflict.Holder != nil:
		outcome = OutcomePreempted // it is the cause of a holder
	}
	return outcome
}

// delayError is why Lock has failed during the lock delay.
type delayError struct{ err error }

func (e *delayError) Error() string { return "during the lock delay: " + e.err.Error() }
func (e *delayError) Unwrap() error { return e.err }
func (e *delayError) Cause() error  { return e.err }

// doError is the error of a Do: up to three parts, each of which may be nil.
type doError struct {
	hold    string // which hold it was, for the text
	work    error  // the function's
	cause   error  // why the function was notified
	told    error  // the cause of the function's context, which is the caller's own if that was canceled
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

// Error returns the texts of the parts. A function that has returned the cause of its
// context has told it already.
func (e *doError) Error() string {
	var texts []string
	if e.work != nil {
		texts = append(texts, e.work.Error())
	}
	if e.cause != nil && !errors.Is(e.work, e.cause) && !(e.told != nil && errors.Is(e.work, e.told)) {
		texts = append(texts, fmt.Sprintf("locker: hold %s: %v", e.hold, e.cause))
	}
	if e.release != nil {
		texts = append(texts, e.release.Error())
	}
	return strings.Join(texts, "; ")
}

// Unwrap returns the parts.
func (e *doError) Unwrap() []error { return e.parts() }

// Cause returns the first part, for github.com/pkg/errors.
func (e *doError) Cause() error { return e.parts()[0] }
