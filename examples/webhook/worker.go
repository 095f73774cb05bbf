package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/preemptable/locker"
)

// errShutdown is what running work is told when the service ends.
var errShutdown = errors.New("the service is shutting down")

// steps is the number of parts into which a simulated job is cut; between two of them it looks whether it
// should stop.
const steps = 10

// worker runs one job per delivery, each in a goroutine of its own, under the lock of the delivery's pull
// request.
//
// There is no queue and no limit on goroutines: of one pull request at most one job runs and one waits, because
// every other claim is displaced as soon as a newer one is announced.
type worker struct {
	newLocker locker.PreemptiveLockerFactory
	duration  time.Duration // of one undisturbed job
	windDown  time.Duration // that a job takes to leave things tidy once it has been told to stop
	events    *slog.Logger

	ctx     context.Context // of all jobs; ends at shutdown
	cancel  context.CancelCauseFunc
	running sync.WaitGroup

	mu      sync.Mutex // guards everything below, and makes "received" events follow the order of arrival
	closed  bool
	arrival time.Time // of the last delivery
}

func newWorker(provider locker.LockProvider, duration, windDown time.Duration, events *slog.Logger) (*worker, error) {
	w := &worker{duration: duration, windDown: windDown, events: events}
	newLocker, err := locker.NewPreemptiveLockerFactory(provider)
	if err != nil {
		return nil, err
	}
	w.newLocker = newLocker
	w.ctx, w.cancel = context.WithCancelCause(context.Background())
	return w, nil
}

// accept starts the delivery's job and returns at once. It answers false, and does nothing, once shutdown has
// begun.
func (w *worker) accept(d delivery) bool {
	log := w.events.With("repo", d.name, "lock", d.repo, "pr", d.pr, "job", d.job(), "event", d.event(), "delivery", d.id)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	d.arrived = time.Now()
	if next := w.arrival.Add(time.Microsecond); d.arrived.Before(next) { // no two within what an order can tell apart
		d.arrived = next
	}
	w.arrival = d.arrived
	log.Info("received")
	w.running.Go(func() { w.run(d, log) })
	return true
}

// run claims the pull request's lock, works while it is held, and tells how it went.
func (w *worker) run(d delivery, log *slog.Logger) {
	started := false
	lock := w.newLocker(d.repo, d.pr, d.event()).Sequence(d.order())
	err := lock.Do(w.ctx, func(ctx context.Context) error {
		started = true
		// A real job hands the token to whatever it changes, so that a write by a holder that was cut off and
		// does not know it yet can be refused there.
		return w.work(ctx, log.With("token", lock.Token()))
	})
	switch {
	case err == nil:
	case errors.Is(err, locker.ErrLockLost):
		// The job lost its lock, or went on for so long after it was told to stop that the lock was taken away:
		// another one may have run beside it.
		log.Error("failed", "reason", err.Error())
	case started && (errors.Is(err, locker.ErrLockPreempted) || w.ctx.Err() != nil):
		// The work itself has said that it was told to stop, and why.
	case errors.Is(err, locker.ErrClaimOutdated):
		// A newer delivery was here before, or this one is a redelivery of what is at work. Nobody was disturbed.
		log.Info("turned away", "reason", err.Error())
	case !started && errors.Is(err, locker.ErrLockPreempted):
		log.Info("left", "reason", err.Error())
	case !started && w.ctx.Err() != nil:
		log.Info("left", "reason", context.Cause(w.ctx).Error())
	default:
		// No lock within the lock timeout, say. GitHub can deliver again; a service that must not miss the newest
		// state keeps its deliveries in a table and tries again by itself.
		log.Error("failed", "reason", err.Error())
	}
}

// work stands for the deployment. It runs while the lock is held, and everything it says is said before the
// lock is released.
func (w *worker) work(ctx context.Context, log *slog.Logger) error {
	log.Info("started")
	for range steps {
		select {
		case <-time.After(w.duration / steps):
		case <-ctx.Done():
			cause := context.Cause(ctx)
			log.Info("told to stop", "reason", cause.Error())
			// Still under the lock: it stays ours for the preemption timeout, and winding down has to fit in
			// there.
			time.Sleep(w.windDown)
			log.Info("stopped")
			return fmt.Errorf("job stopped early: %w", cause)
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

// stop makes accept refuse further deliveries and tells everything that runs or waits to end.
func (w *worker) stop() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cancel(errShutdown)
}

// wait returns when every job has ended and given back its lock, or with ctx's error if that comes first.
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
