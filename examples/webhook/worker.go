package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/preemptable/locker"
)

// errShutdown is the cause with which running work is canceled when the service ends.
var errShutdown = errors.New("the service is shutting down")

// steps is the number of parts of a simulated job. Between two of them the job checks whether it
// has to stop.
const steps = 10

// worker runs one job per delivery, each in a separate goroutine, under the lock of the delivery's
// pull request.
//
// It needs no queue and no limit on goroutines. For each pull request at most one job runs and one
// waits, because every other claim is superseded as soon as a newer one is announced.
type worker struct {
	newLocker locker.PreemptiveLockerFactory
	modes     modes
	duration  time.Duration // of a job that is not notified
	windDown  time.Duration // the time that a notified job takes to leave everything in order
	events    *slog.Logger

	ctx     context.Context // of all jobs, canceled at shutdown
	cancel  context.CancelCauseFunc
	running sync.WaitGroup

	mu      sync.Mutex // guards everything below, and makes "received" events follow the order of arrival
	closed  bool
	arrival time.Time // of the last delivery
}

func newWorker(provider locker.LockProvider, modes modes, duration, windDown time.Duration, events *slog.Logger) (*worker, error) {
	w := &worker{modes: modes, duration: duration, windDown: windDown, events: events}
	newLocker, err := locker.NewPreemptiveLockerFactory(provider)
	if err != nil {
		return nil, err
	}
	w.newLocker = newLocker
	w.ctx, w.cancel = context.WithCancelCause(context.Background())
	return w, nil
}

// accept starts the delivery's job and returns immediately. Once shutdown has begun, it returns
// false and does nothing.
func (w *worker) accept(d delivery) bool {
	log := w.events.With("repo", d.name, "lock", d.repo, "pr", d.pr, "job", d.job(), "event", d.event(), "delivery", d.id,
		"mode", w.modes.of(d).String())
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	d.arrived = time.Now()
	// No two deliveries may arrive within the resolution of an order.
	if next := w.arrival.Add(time.Microsecond); d.arrived.Before(next) {
		d.arrived = next
	}
	w.arrival = d.arrived
	log.Info("received")
	w.running.Go(func() { w.run(d, log) })
	return true
}

// run claims the pull request's lock, works while it is held, and logs the result.
func (w *worker) run(d delivery, log *slog.Logger) {
	started := false
	err := w.claim(d).Do(w.ctx, func(ctx context.Context) error {
		started = true
		// A real job passes the token to every resource that it changes. The resource can then
		// reject a write by a holder that was cut off and does not know it yet.
		return w.work(ctx, log.With("token", locker.TokenFromContext(ctx)))
	})
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	switch outcome, _ := locker.OutcomeOf(err); outcome {
	case locker.OutcomeCompleted:
	case locker.OutcomeBusy:
		log.Info("skipped", "reason", reason, "by", rival(err).Labels["delivery"])
	case locker.OutcomeOutdated, locker.OutcomeSuperseded, locker.OutcomePreempted, locker.OutcomeCanceled, locker.OutcomeStopped:
		switch {
		case started:
			// The work itself has logged that it was notified, and the reason.
		case errors.Is(err, locker.ErrClaimOutdated):
			// A newer delivery came before, or this one is a redelivery of the one at work. No
			// other job was notified.
			by := rival(err).Labels["delivery"]
			log.Info("outdated", "reason", reason, "by", by)
			if by == d.id {
				// The delivery at work reports.
				return
			}
		case w.ctx.Err() != nil && outcome == locker.OutcomeCanceled:
			log.Info("left", "reason", context.Cause(w.ctx).Error())
		default:
			log.Info("left", "reason", reason, "by", rival(err).Labels["delivery"])
		}
	default:
		// OutcomeLost: the job lost its lock, or continued for so long after its notification that
		// the lock was revoked. Another job may have run concurrently. OutcomeTimeout: the lock was
		// not free in time. GitHub can deliver again. A service that must not miss the newest state
		// keeps its deliveries in a table and retries them itself.
		log.Error("failed", "outcome", outcome.String(), "reason", reason)
	}
	conclusion, summary := report(err)
	log.Info("reports", "conclusion", conclusion, "summary", summary)
}

// claim returns the delivery's claim.
func (w *worker) claim(d delivery) *locker.PreemptiveLocker {
	mode := w.modes.of(d)
	lock := w.newLocker(d.repo, d.pr, d.event()).Mode(mode).Labels(d.labels())
	// A claim that skips is compared with no other claim, so it has no sequence number.
	if mode != locker.SkipIfBusy {
		lock.Sequence(d.order())
	}
	if mode == locker.LetFinish {
		lock.Wait(patience)
	}
	return lock
}

// rival returns the other claim of an error. All its fields are zero if it is not known, for
// example after an outage.
func rival(err error) locker.ClaimInfo {
	var conflict *locker.ConflictError
	if errors.As(err, &conflict) {
		return conflict.Other()
	}
	return locker.ClaimInfo{}
}

// report returns what the check of the delivery's commit should show, in the words of GitHub's API
// for check runs. A real service sends it there.
func report(err error) (conclusion, summary string) {
	switch outcome, finished := locker.OutcomeOf(err); outcome {
	case locker.OutcomeCompleted:
		return "success", "done"
	case locker.OutcomeBusy:
		return "skipped", "skipped: busy with " + about(err)
	case locker.OutcomeOutdated, locker.OutcomeSuperseded, locker.OutcomePreempted:
		return "cancelled", "superseded by " + about(err)
	case locker.OutcomeCanceled, locker.OutcomeClosed:
		return "cancelled", "the service was shut down"
	case locker.OutcomeStopped:
		return "cancelled", "an operator has stopped it"
	case locker.OutcomeTimeout:
		return "timed_out", "had to wait for too long for " + about(err)
	case locker.OutcomeExpired:
		return "timed_out", "ran for too long"
	case locker.OutcomeLost:
		if finished {
			return "failure", "done, but another job may have run concurrently"
		}
		return "failure", "broken off, and another job may have run concurrently"
	default:
		return "failure", "failed"
	}
}

// about describes the other claim of an error to people: by the URL in its labels, if there is one.
func about(err error) string {
	other := rival(err)
	return cmp.Or(other.Labels["url"], other.Event, "another delivery")
}

// work stands for the deployment. It runs while the lock is held, and everything that it logs is
// logged before the lock is released.
func (w *worker) work(ctx context.Context, log *slog.Logger) error {
	log.Info("started")
	for range steps {
		select {
		case <-time.After(w.duration / steps):
		case <-ctx.Done():
			cause := context.Cause(ctx)
			outcome, _ := locker.OutcomeOf(cause)
			log.Info("notified", "reason", cause.Error(), "outcome", outcome.String(), "by", rival(cause).Labels["delivery"])
			// The lock is still held, for the preemption timeout at most. Winding down must not
			// take longer.
			time.Sleep(w.windDown)
			log.Info("stopped")
			return fmt.Errorf("job stopped early: %w", ctx.Err())
		}
	}
	log.Info("finished")
	return nil
}

func (w *worker) stopping() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.closed
}

// stop makes accept reject further deliveries, and cancels everything that runs or waits.
func (w *worker) stop() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cancel(errShutdown)
}

// wait returns when every job has ended and released its lock, or with ctx's error if that comes
// first.
func (w *worker) wait(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		w.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("jobs are still running: %w", ctx.Err())
	}
}
