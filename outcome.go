package locker

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// An Outcome is how a [PreemptiveLocker.Do] has ended, or another call whose error was given to
// [OutcomeOf]. The constants are ordered: a larger one is worse.
type Outcome int

const (
	// OutcomeCompleted means that the function returned nil and was not notified.
	OutcomeCompleted Outcome = iota + 1
	// OutcomeBusy means that the claim was skipped. See [ErrLockBusy].
	OutcomeBusy
	// OutcomeOutdated means that the claim came too late, or was a repeat. See [ErrClaimOutdated].
	OutcomeOutdated
	// OutcomeSuperseded means that a newer claim won before the function was called. See
	// [ErrLockPreempted].
	OutcomeSuperseded
	// OutcomePreempted means that the function was notified because of a newer claim. Its work may
	// be half done. See [ErrLockPreempted].
	OutcomePreempted
	// OutcomeCanceled means that the caller's context was done.
	OutcomeCanceled
	// OutcomeTimeout means that the key did not become free in time. See [ErrLockTimeout].
	OutcomeTimeout
	// OutcomeStopped means that an operator has asked the holder to stop. See [ErrStopRequested].
	OutcomeStopped
	// OutcomeClosed means that the provider was closed. See [ErrProviderClosed].
	OutcomeClosed
	// OutcomeExpired means that the lock was held for the max lock duration. See
	// [ErrMaxLockDuration].
	OutcomeExpired
	// OutcomeFailed means that the function has failed, or that the lock could not be acquired for
	// a reason that no other outcome names: the database or the input.
	OutcomeFailed
	// OutcomeLost means that the lock was lost or revoked while the function ran. Another holder
	// may have run concurrently. See [ErrLockLost].
	OutcomeLost
)

// String returns the outcome in lower case, such as "completed", for the label of a metric.
func (o Outcome) String() string {
	names := [...]string{"unknown", "completed", "busy", "outdated", "superseded", "preempted", "canceled", "timeout", "stopped", "closed", "expired", "failed", "lost"}
	if o < 0 || int(o) >= len(names) {
		o = 0
	}
	return names[o]
}

// OutcomeOf returns the worst outcome in the error of a [PreemptiveLocker.Do], and reports whether
// Do's function was called and returned nil.
//
// The error of one Do can match several sentinels. If a deployment was preempted, was cut off while
// it was stopping, and then failed, the error matches [ErrLockPreempted], [ErrLockLost] and the
// deployment's own error. A chain of [errors.Is] that begins with ErrLockPreempted would call that
// harmless.
//
// An error of the function is a failure, unless the function was notified and has stopped because
// of that: then the error matches the cause, [context.Canceled] or [context.DeadlineExceeded], or
// is that of a command which a signal has ended (exec.CommandContext in os/exec). If the function
// has completed, and only its release was not confirmed in time, the outcome is [OutcomeCompleted]:
// the key is given back in the background, and err is worth a line in a log.
//
// OutcomeOf also accepts the errors of Lock, Unlock, Release and Notify, the cause of a context of
// Do, the error of an [Observation], and errors that wrap or join any of these. For these, finished
// is true only if err is nil. Errors of other locks that the function returns are errors of the
// function: if it fails because an inner Do was preempted, the outer one has failed.
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
	// Only the error's own method As may lead to d.
	outcome, finished = d.outcome(), d.work == nil
	for _, part := range parts {
		if part != nil {
			o, f := OutcomeOf(part)
			outcome, finished = max(outcome, o), finished && f
		}
	}
	return outcome, finished
}

// outcome returns the worst outcome of the parts.
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

// stopped reports whether the function was notified and has returned because of that.
func (e *doError) stopped() bool {
	if e.cause == nil {
		return false
	}
	// An exec.ExitError has this method.
	var command interface{ ExitCode() int }
	if errors.As(e.work, &command) && !isNil(command) {
		switch command.ExitCode() {
		case -1, 128 + 2, 128 + 9, 128 + 15:
			// The command was ended by a signal, or it is a shell that reports one.
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

// classify returns the worst outcome that an error matches. For nil it returns OutcomeCompleted.
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
	case errors.As(err, &delayed):
		// The function was never called.
		if outcome == OutcomeLost {
			outcome = OutcomeFailed
		}
	case outcome == OutcomeSuperseded && errors.As(err, &conflict) && conflict.Holder != nil:
		// It is the cause of a holder.
		outcome = OutcomePreempted
	}
	return outcome
}

// delayError is the error of a Lock that has failed during the lock delay.
type delayError struct{ err error }

func (e *delayError) Error() string { return "during the lock delay: " + e.err.Error() }
func (e *delayError) Unwrap() error { return e.err }
func (e *delayError) Cause() error  { return e.err }

// doError is the error of a Do. It has up to three parts, each of which may be nil: work, cause and
// release.
type doError struct {
	hold    string // describes the hold, for the text
	work    error  // the function's error
	cause   error  // why the function was notified
	told    error  // the cause of the function's context, which is that of the caller's context if that was canceled
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

// error returns e, or nil if all parts are nil.
func (e *doError) error() error {
	if len(e.parts()) == 0 {
		return nil
	}
	return e
}

// Error returns the texts of the parts. The cause is left out if the function has returned it.
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

// Cause returns the first part. The function Cause of github.com/pkg/errors calls it.
func (e *doError) Cause() error { return e.parts()[0] }
