package locker_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/preemptable/locker"
)

// Work on a pull request under its lock. Newer work on the same pull request,
// here or in another process, makes this work stop.
func Example() {
	// In production: locker.NewPostgresPreemptiveLockerFactory(uri, "", nil)
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}

	l := newLocker("octo/cat", 42, "synchronize")
	err = l.Do(context.Background(), func(ctx context.Context) error {
		fmt.Println("deploying octo/cat#42") // and stop soon after ctx is done
		return nil
	})
	fmt.Println("error:", err)
	// Output:
	// deploying octo/cat#42
	// error: <nil>
}

// One value says how a Do has ended, the worst first. Here three things went wrong: the
// deployment was preempted, was cut off because it did not stop in time, and then
// failed. To test for ErrLockPreempted first would hide the other two.
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
		default: // its name is also fit for a metric's label
			fmt.Printf("%s: %v: %v\n", event, outcome, err)
		}
		return err
	}

	newerRuns, olderEnded, newerEnded := make(chan bool), make(chan bool), make(chan bool)
	err = deploy("opened", func(context.Context) error {
		go func() { // the next delivery, usually in another process
			defer close(newerEnded)
			_ = deploy("synchronize", func(context.Context) error {
				close(newerRuns)
				<-olderEnded
				return nil
			})
		}()
		<-newerRuns // this deployment does not mind its context
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

// The function's context is canceled when newer work is announced, and the
// newer work starts once the function has returned.
func ExamplePreemptiveLocker_Do() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()

	newer := make(chan error)
	err = newLocker("octo/cat", 42, "opened").Do(ctx, func(ctx context.Context) error {
		go func() { // the next delivery, usually in another process
			newer <- newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(context.Context) error {
				return nil // starts once the function above has returned
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

// Lock and Release by hand: the channel says when to stop.
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
		_, err := newer.Lock(ctx) // announces itself, and waits
		locked <- err
	}()

	step := time.NewTicker(time.Hour) // the work, in steps
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

// What a claim does to others while the key is held: the newer claim decides. Here all
// three wait in vain, because the holder does not release.
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

// A bound for one wait. The error says which claim holds the key. The bound does not end
// the hold, as the end of the context would.
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

// What a claim says about itself reaches those that it displaces, in any process.
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
		go func() { // the next push, usually in another process
			newer <- push("2222222").Do(context.Background(), func(context.Context) error { return nil })
		}()
		<-ctx.Done()
		return ctx.Err()
	})
	var conflict *locker.ConflictError
	if errors.As(err, &conflict) && conflict.Winner != nil { // nil if it is not known, as after an outage
		fmt.Println("superseded by", conflict.Winner.Labels["url"])
	}
	fmt.Println("newer:", <-newer)
	// Output:
	// superseded by https://github.com/octo/cat/commit/2222222
	// newer: <nil>
}

// Webhooks may arrive late, or twice. With an order that comes from the event
// itself, here a counter of pushes, they are turned away, whatever their arrival.
// (GitHub's updated_at alone is too coarse: docs/webhook.md.)
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
		{"opened", 1}, // late
	} {
		l := newLocker("octo/cat", 42, delivery.event).Sequence(delivery.push)
		err := l.Do(context.Background(), func(context.Context) error { return nil })
		fmt.Println(delivery.event, "came too late:", errors.Is(err, locker.ErrClaimOutdated))
	}
	// Output:
	// synchronize came too late: false
	// opened came too late: true
}

// A holder that was frozen, and does not know yet that it lost its lock, cannot
// do harm to a resource that refuses older tokens.
func ExamplePreemptiveLocker_Token() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	var newest int64 // kept with the resource
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

// Code that knows nothing of locks can send the fencing token of the hold with what it
// writes.
func ExampleTokenFromContext() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	var newest int64 // kept with the resource
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

// Deployer is a small service that is to be tested.
type Deployer struct {
	Lockers locker.PreemptiveLockerFactory
	Run     func(ctx context.Context, repo string, pr uint) error
}

// Deploy is called for every webhook. Being superseded by a newer one is no
// failure.
func (d *Deployer) Deploy(ctx context.Context, repo string, pr uint, event string) error {
	err := d.Lockers(repo, pr, event).Do(ctx, func(ctx context.Context) error { return d.Run(ctx, repo, pr) })
	if outcome, _ := locker.OutcomeOf(err); outcome == locker.OutcomeSuperseded || outcome == locker.OutcomePreempted {
		return nil
	}
	return err
}

// The unit test of a service needs no database: the fake provider keeps the same
// promises as the one on PostgreSQL.
func ExampleNewFakePreemptiveLockerFactory() {
	lockers, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	runs := 0 // guarded by the lock
	started := make(chan struct{})
	d := &Deployer{Lockers: lockers, Run: func(ctx context.Context, repo string, pr uint) error {
		runs++
		if runs == 1 {
			close(started)
			<-ctx.Done() // the first deployment hangs until it is notified
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

// verbose is a custom LockProvider: it prints what another one is asked for.
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

// Any LockProvider will do, also one that wraps another.
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

// A provider made by hand can be closed, and shared by several factories. New
// with a key of one's own needs neither repo nor pull request.
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
	// No Notify: this one waits for its turn and disturbs no other.
	if _, err := lock.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println("reporting")
	fmt.Println("error:", lock.Unlock(ctx))
	// Output:
	// reporting
	// error: <nil>
}

// A lock delay gives the predecessor's last requests time to arrive, wherever
// they go. Every Lock then takes that long.
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

// A max lock duration ends the undisturbed time of a holder that got stuck.
func ExampleWithMaxLockDuration() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		locker.WithMaxLockDuration(10 * time.Millisecond),
	})
	if err != nil {
		log.Fatal(err)
	}
	err = newLocker("octo/cat", 42, "opened").Do(context.Background(), func(ctx context.Context) error {
		<-ctx.Done() // stuck, but it minds its context
		return ctx.Err()
	})
	outcome, _ := locker.OutcomeOf(err)
	fmt.Println(outcome)
	// Output: expired
}

// Claims arrive faster than the work ends. After one hold that a newer claim has ended,
// the next one is let finish.
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

// Locks that every process with the same database shares.
func ExampleNewPostgresPreemptiveLockerFactory() {
	newLocker, err := locker.NewPostgresPreemptiveLockerFactory(
		"postgres://app:password@db.example.com/app?sslmode=verify-full",
		"", // or the service name for Datadog APM
		[]locker.LockProviderOption{locker.WithLockTimeout(time.Minute)},
	)
	if err != nil {
		log.Fatal(err) // a bad option; the database is not asked before the first Lock
	}
	err = newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(ctx context.Context) error {
		return deploy(ctx, "octo/cat", 42)
	})
	if outcome, _ := locker.OutcomeOf(err); outcome > locker.OutcomePreempted { // the larger, the worse
		log.Print(err)
	}
}

// A provider on PostgreSQL that is closed when the service ends.
func ExampleNewPostgresProvider() {
	provider, err := locker.NewPostgresProvider("postgres://app:password@db.example.com/app?sslmode=verify-full")
	if err != nil {
		log.Fatal(err)
	}
	// Notifies every holder, and waits until all have stopped.
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
