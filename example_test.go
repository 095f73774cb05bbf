package locker_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/preemptable/locker"
)

// Work on a pull request runs under its lock. It has to stop when newer work on the same pull
// request is announced, in this process or in another one.
func Example() {
	// In production, use locker.NewPostgresPreemptiveLockerFactory(uri, "", nil).
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}

	l := newLocker("octo/cat", 42, "synchronize")
	err = l.Do(context.Background(), func(ctx context.Context) error {
		// The deployment has to stop soon after ctx is done.
		fmt.Println("deploying octo/cat#42")
		return nil
	})
	fmt.Println("error:", err)
	// Output:
	// deploying octo/cat#42
	// error: <nil>
}

// OutcomeOf returns how a Do has ended. If several things went wrong, it returns the worst. Here
// the deployment was preempted, then its lock was revoked because it did not stop in time, and then
// it failed. A test for ErrLockPreempted alone would hide the other two.
func ExampleOutcomeOf() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		locker.WithPreemptionTimeout(10 * time.Millisecond),
	})
	if err != nil {
		log.Fatal(err)
	}
	deploy := func(event string, f func(ctx context.Context) error) error {
		err := newLocker("octo/cat", 42, event).Do(context.Background(), f)
		switch outcome, finished := locker.OutcomeOf(err); outcome {
		case locker.OutcomeCompleted:
			fmt.Printf("%s: done\n", event)
		case locker.OutcomeSuperseded, locker.OutcomePreempted:
			fmt.Printf("%s: newer work took over: nothing to do\n", event)
		case locker.OutcomeLost:
			fmt.Printf("%s: two may have run concurrently: look what is half done (finished: %v)\n", event, finished)
		// The name of an outcome can also be the value of a metric's label.
		default:
			fmt.Printf("%s: %v: %v\n", event, outcome, err)
		}
		return err
	}

	newerRuns, olderEnded, newerEnded := make(chan bool), make(chan bool), make(chan bool)
	err = deploy("opened", func(context.Context) error {
		// The next delivery usually arrives in another process.
		go func() {
			defer close(newerEnded)
			_ = deploy("synchronize", func(context.Context) error {
				close(newerRuns)
				<-olderEnded
				return nil
			})
		}()
		// This deployment ignores its context.
		<-newerRuns
		return errors.New("health check failed")
	})
	fmt.Println("preempted:", errors.Is(err, locker.ErrLockPreempted), "lost:", errors.Is(err, locker.ErrLockLost))
	close(olderEnded)
	<-newerEnded
	// Output:
	// opened: two may have run concurrently: look what is half done (finished: false)
	// preempted: true lost: true
	// synchronize: done
}

// The function's context is canceled when newer work is announced. The newer work starts when the
// function has returned.
func ExamplePreemptiveLocker_Do() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()

	newer := make(chan error)
	err = newLocker("octo/cat", 42, "opened").Do(ctx, func(ctx context.Context) error {
		// The next delivery usually arrives in another process.
		go func() {
			newer <- newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(context.Context) error {
				return nil // starts when the function above has returned
			})
		}()
		<-ctx.Done()
		cause, _ := locker.OutcomeOf(context.Cause(ctx))
		fmt.Println("stopping:", cause)
		return ctx.Err()
	})
	outcome, finished := locker.OutcomeOf(err)
	fmt.Printf("stopped: %v, finished: %v\n", outcome, finished)
	fmt.Println("newer:", <-newer)
	// Output:
	// stopping: preempted
	// stopped: preempted, finished: false
	// newer: <nil>
}

// Without Do, the channel that Lock returns reports when to stop.
func ExamplePreemptiveLocker_Lock() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()

	l := newLocker("octo/cat", 42, "opened")
	stop, err := l.Lock(ctx)
	if err != nil {
		log.Fatal(err)
	}
	newer := newLocker("octo/cat", 42, "synchronize")
	locked := make(chan error)
	go func() {
		// Lock announces a claim, and waits.
		_, err := newer.Lock(ctx)
		locked <- err
	}()

	// The work is done in steps.
	step := time.NewTicker(time.Hour)
	defer step.Stop()
work:
	for {
		select {
		case <-step.C:
			fmt.Println("a step")
		case n := <-stop:
			fmt.Printf("stopping: %s\n", n.Message)
			break work
		}
	}
	fmt.Println("released:", l.Release(ctx))
	fmt.Println("the newer one has the lock:", <-locked)
	fmt.Println("released:", newer.Release(ctx))
	// Output:
	// stopping: synchronize
	// released: <nil>
	// the newer one has the lock: <nil>
	// released: <nil>
}

// The mode of the newer claim decides what happens to the holder while the key is held. Here all
// three claims fail, because the holder does not release.
func ExamplePreemptiveLocker_Mode() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	holder := newLocker("octo/cat", 42, "release 1.4.0")
	notified, err := holder.Lock(ctx)
	if err != nil {
		log.Fatal(err)
	}

	for _, mode := range []locker.ClaimMode{locker.SkipIfBusy, locker.LetFinish, locker.Preempt} {
		_, err := newLocker("octo/cat", 42, "release 1.4.1").Mode(mode).Wait(10 * time.Millisecond).Lock(ctx)
		outcome, _ := locker.OutcomeOf(err)
		fmt.Printf("%v: %v\n", mode, outcome)
		if mode != locker.Preempt {
			fmt.Println("  notifications:", len(notified))
		}
	}
	fmt.Println("  notified:", (<-notified).Message)
	fmt.Println("released:", holder.Release(ctx))
	// Output:
	// skip_if_busy: busy
	//   notifications: 0
	// let_finish: timeout
	//   notifications: 0
	// preempt: timeout
	//   notified: release 1.4.1
	// released: <nil>
}

// Wait bounds the wait of one claim. The error of a timeout names the claim that holds the key.
// Unlike a deadline of the context, the bound does not end the hold.
func ExamplePreemptiveLocker_Wait() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	const patience = 10 * time.Millisecond
	first := newLocker("octo/cat", 42, "opened").Wait(patience)
	err = first.Do(ctx, func(ctx context.Context) error {
		time.Sleep(2 * patience)
		fmt.Println("still undisturbed:", ctx.Err() == nil)

		second := newLocker("octo/cat", 42, "labeled").Mode(locker.LetFinish).Wait(patience)
		_, err := second.Lock(context.Background())
		fmt.Println("timeout:", errors.Is(err, locker.ErrLockTimeout))
		var conflict *locker.ConflictError
		if errors.As(err, &conflict) && conflict.Holder != nil {
			fmt.Println("held by:", conflict.Holder.Event)
		}
		return nil
	})
	fmt.Println("error:", err)
	// Output:
	// still undisturbed: true
	// timeout: true
	// held by: opened
	// error: <nil>
}

// The labels of a claim are part of the error of each claim that loses to it, in any process.
func ExamplePreemptiveLocker_Labels() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	push := func(commit string) *locker.PreemptiveLocker {
		return newLocker("octo/cat", 42, "synchronize").Labels(map[string]string{
			"commit": commit,
			"url":    "https://github.com/octo/cat/commit/" + commit,
		})
	}
	newer := make(chan error)
	err = push("1111111").Do(context.Background(), func(ctx context.Context) error {
		// The next push usually arrives in another process.
		go func() {
			newer <- push("2222222").Do(context.Background(), func(context.Context) error { return nil })
		}()
		<-ctx.Done()
		return ctx.Err()
	})
	var conflict *locker.ConflictError
	// Winner is nil if the newer claim is not known, for example after an outage.
	if errors.As(err, &conflict) && conflict.Winner != nil {
		fmt.Println("superseded by", conflict.Winner.Labels["url"])
	}
	fmt.Println("newer:", <-newer)
	// Output:
	// superseded by https://github.com/octo/cat/commit/2222222
	// newer: <nil>
}

// Webhooks may arrive late, or twice. With a sequence number that comes from the event itself, late
// and repeated deliveries are rejected. The number here is a counter of pushes. (GitHub's
// updated_at alone is too coarse: see docs/webhook.md.)
func ExamplePreemptiveLocker_Sequence() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, delivery := range []struct {
		event string
		push  int64
	}{
		{"synchronize", 2},
		{"opened", 1}, // arrives late
	} {
		l := newLocker("octo/cat", 42, delivery.event).Sequence(delivery.push)
		err := l.Do(context.Background(), func(context.Context) error { return nil })
		fmt.Println(delivery.event, "came too late:", errors.Is(err, locker.ErrClaimOutdated))
	}
	// Output:
	// synchronize came too late: false
	// opened came too late: true
}

// A holder that was frozen, and does not know yet that it has lost its lock, can do no harm to a
// resource that rejects older tokens.
func ExamplePreemptiveLocker_Token() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	// The resource keeps the newest token that it has seen.
	var newest int64
	write := func(token int64, text string) {
		if token < newest {
			fmt.Println("refused:", text)
			return
		}
		newest = token
		fmt.Println("written:", text)
	}

	var old int64
	for _, event := range []string{"opened", "synchronize"} {
		l := newLocker("octo/cat", 42, event)
		err := l.Do(context.Background(), func(context.Context) error {
			write(l.Token(), event)
			return nil
		})
		if err != nil {
			log.Fatal(err)
		}
		if old == 0 {
			old = l.Token()
		}
	}
	write(old, "opened, too late")
	// Output:
	// written: opened
	// written: synchronize
	// refused: opened, too late
}

// Code that does not know about locks can send the fencing token of the hold with each write.
func ExampleTokenFromContext() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	// The resource keeps the newest token that it has seen.
	var newest int64
	write := func(ctx context.Context, text string) {
		if token := locker.TokenFromContext(ctx); token < newest {
			fmt.Println("refused:", text)
		} else {
			newest = token
			fmt.Println("written:", text)
		}
	}

	var old context.Context
	for _, event := range []string{"opened", "synchronize"} {
		err := newLocker("octo/cat", 42, event).Do(context.Background(), func(ctx context.Context) error {
			write(ctx, event)
			if old == nil {
				old = ctx
			}
			return nil
		})
		if err != nil {
			log.Fatal(err)
		}
	}
	write(old, "opened, too late")
	// Output:
	// written: opened
	// written: synchronize
	// refused: opened, too late
}

// Deployer is a small service with a unit test.
type Deployer struct {
	Lockers locker.PreemptiveLockerFactory
	Run     func(ctx context.Context, repo string, pr uint) error
}

// Deploy is called for every webhook. A deployment that was superseded by a newer one is no
// failure.
func (d *Deployer) Deploy(ctx context.Context, repo string, pr uint, event string) error {
	err := d.Lockers(repo, pr, event).Do(ctx, func(ctx context.Context) error { return d.Run(ctx, repo, pr) })
	if outcome, _ := locker.OutcomeOf(err); outcome == locker.OutcomeSuperseded || outcome == locker.OutcomePreempted {
		return nil
	}
	return err
}

// The unit test of a service needs no database. The fake provider keeps the same promises as the
// one on PostgreSQL.
func ExampleNewFakePreemptiveLockerFactory() {
	lockers, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	runs := 0 // protected by the lock
	started := make(chan struct{})
	d := &Deployer{Lockers: lockers, Run: func(ctx context.Context, repo string, pr uint) error {
		runs++
		if runs == 1 {
			close(started)
			// The first deployment runs until it is notified.
			<-ctx.Done()
		}
		return nil
	}}

	first := make(chan error)
	go func() { first <- d.Deploy(context.Background(), "octo/cat", 42, "opened") }()
	<-started
	fmt.Println("second:", d.Deploy(context.Background(), "octo/cat", 42, "synchronize"))
	fmt.Println("first:", <-first)
	fmt.Println("runs:", runs)
	// Output:
	// second: <nil>
	// first: <nil>
	// runs: 2
}

// verbose is a custom LockProvider. It prints the calls of another one.
type verbose struct {
	locker.LockProvider
}

func (v verbose) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	key, err := v.LockProvider.LockKey(ctx, repo, pr)
	fmt.Printf("key of %s#%d, error: %v\n", repo, pr, err)
	return key, err
}

func (v verbose) New(ctx context.Context, key int64, event string) (locker.PreemptableLock, error) {
	lock, err := v.LockProvider.New(ctx, key, event)
	fmt.Printf("new lock for %q, error: %v\n", event, err)
	return lock, err
}

// The factory accepts any LockProvider, including one that wraps another.
func ExampleNewPreemptiveLockerFactory() {
	provider, err := locker.NewFakeProvider()
	if err != nil {
		log.Fatal(err)
	}
	newLocker, err := locker.NewPreemptiveLockerFactory(verbose{provider})
	if err != nil {
		log.Fatal(err)
	}
	err = newLocker("octo/cat", 42, "labeled").Do(context.Background(), func(context.Context) error {
		fmt.Println("working")
		return nil
	})
	fmt.Println("error:", err)
	// Output:
	// key of octo/cat#42, error: <nil>
	// new lock for "labeled", error: <nil>
	// working
	// error: <nil>
}

// A provider that a program creates itself can be closed, and shared by several factories. Its
// method New takes any key, without a repo and a pull request.
func ExampleNewFakeProvider() {
	provider, err := locker.NewFakeProvider(
		locker.WithLockTimeout(time.Minute),
		locker.WithPreemptionTimeout(5*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = provider.Close() }()

	ctx := context.Background()
	const nightlyReport = 7
	lock, err := provider.New(ctx, nightlyReport, "cron")
	if err != nil {
		log.Fatal(err)
	}
	// Without Notify the lock waits until the key is free, and no holder is notified.
	if _, err := lock.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println("reporting")
	fmt.Println("error:", lock.Unlock(ctx))
	// Output:
	// reporting
	// error: <nil>
}

// A lock delay gives the predecessor's last requests time to arrive. Every Lock then takes that
// long.
func ExampleWithLockDelay() {
	const delay = 20 * time.Millisecond
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil, locker.WithLockDelay(delay))
	if err != nil {
		log.Fatal(err)
	}
	start := time.Now()
	err = newLocker("octo/cat", 42, "opened").Do(context.Background(), func(context.Context) error {
		fmt.Println("waited first:", time.Since(start) >= delay)
		return nil
	})
	fmt.Println("error:", err)
	// Output:
	// waited first: true
	// error: <nil>
}

// A max lock duration notifies a holder that is stuck.
func ExampleWithMaxLockDuration() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		locker.WithMaxLockDuration(10 * time.Millisecond),
	})
	if err != nil {
		log.Fatal(err)
	}
	err = newLocker("octo/cat", 42, "opened").Do(context.Background(), func(ctx context.Context) error {
		// The function is stuck, but it ends with its context.
		<-ctx.Done()
		return ctx.Err()
	})
	outcome, _ := locker.OutcomeOf(err)
	fmt.Println(outcome)
	// Output: expired
}

// Claims arrive faster than the work ends. After one hold that was ended by a newer claim, the next
// one may finish.
func ExampleWithProgress() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		locker.WithProgress(1, time.Minute),
	})
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	first, second := newLocker("octo/cat", 42, "push 1"), newLocker("octo/cat", 42, "push 2")
	notified, err := first.Lock(ctx)
	if err != nil {
		log.Fatal(err)
	}
	var undisturbed <-chan locker.NotificationPayload
	locked := make(chan error)
	go func() {
		var err error
		undisturbed, err = second.Lock(ctx)
		locked <- err
	}()
	fmt.Println("the first is notified of", (<-notified).Message)
	fmt.Println("released:", first.Release(ctx))
	fmt.Println("the second has the lock:", <-locked)

	_, err = newLocker("octo/cat", 42, "push 3").Wait(10 * time.Millisecond).Lock(ctx)
	outcome, _ := locker.OutcomeOf(err)
	fmt.Println("the third:", outcome)
	fmt.Println("notifications of the second:", len(undisturbed))
	fmt.Println("released:", second.Release(ctx))
	// Output:
	// the first is notified of push 2
	// released: <nil>
	// the second has the lock: <nil>
	// the third: timeout
	// notifications of the second: 0
	// released: <nil>
}

// All processes with the same database share these locks.
func ExampleNewPostgresPreemptiveLockerFactory() {
	newLocker, err := locker.NewPostgresPreemptiveLockerFactory(
		"postgres://app:password@db.example.com/app?sslmode=verify-full",
		"", // or a service name for Datadog APM
		[]locker.LockProviderOption{locker.WithLockTimeout(time.Minute)},
	)
	if err != nil {
		// The error is that of a bad option. The factory does not connect to the database before
		// the first Lock.
		log.Fatal(err)
	}
	err = newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(ctx context.Context) error {
		return deploy(ctx, "octo/cat", 42)
	})
	// A larger outcome is a worse one.
	if outcome, _ := locker.OutcomeOf(err); outcome > locker.OutcomePreempted {
		log.Print(err)
	}
}

// A service closes its provider when it ends.
func ExampleNewPostgresProvider() {
	provider, err := locker.NewPostgresProvider("postgres://app:password@db.example.com/app?sslmode=verify-full")
	if err != nil {
		log.Fatal(err)
	}
	// Close notifies every holder, and waits until all of them have stopped.
	defer func() { _ = provider.Close() }()

	newLocker, err := locker.NewPreemptiveLockerFactory(provider)
	if err != nil {
		log.Print(err)
		return
	}
	err = newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(ctx context.Context) error {
		return deploy(ctx, "octo/cat", 42)
	})
	if err != nil {
		log.Print(err)
	}
}

func deploy(context.Context, string, uint) error { return nil }
