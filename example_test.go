package locker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// Which sentinel an error matches says what happened.
func Example_errors() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		locker.WithLockTimeout(10 * time.Millisecond),
	})
	if err != nil {
		log.Fatal(err)
	}
	work := func(ctx context.Context) error {
		return newLocker("octo/cat", 42, "opened").Do(ctx, func(context.Context) error { return nil })
	}

	// Another claim holds the lock and does not stop.
	holder := newLocker("octo/cat", 42, "closed")
	if _, err := holder.Lock(context.Background()); err != nil {
		log.Fatal(err)
	}
	switch err := work(context.Background()); {
	case errors.Is(err, locker.ErrLockPreempted):
		fmt.Println("newer work took over: nothing to do")
	case errors.Is(err, locker.ErrLockTimeout):
		fmt.Println("the lock was not free in time: try again later")
	case errors.Is(err, locker.ErrLockLost):
		fmt.Println("the lock was lost while working: look what is half done")
	case err != nil:
		fmt.Println("something else:", err)
	}

	// A context that is done is another error than the lock timeout.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err = work(ctx)
	fmt.Println(errors.Is(err, context.Canceled), errors.Is(err, locker.ErrLockTimeout))

	if err := holder.Release(context.Background()); err != nil {
		log.Fatal(err)
	}
	// Output:
	// the lock was not free in time: try again later
	// true false
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
		fmt.Println("stopping, preempted:", errors.Is(context.Cause(ctx), locker.ErrLockPreempted))
		return nil
	})
	fmt.Println("stopped, preempted:", errors.Is(err, locker.ErrLockPreempted))
	fmt.Println("newer:", <-newer)
	// Output:
	// stopping, preempted: true
	// stopped, preempted: true
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

// Deployer is a small service that is to be tested.
type Deployer struct {
	Lockers locker.PreemptiveLockerFactory
	Run     func(ctx context.Context, repo string, pr uint) error
}

// Deploy is called for every webhook. Being displaced by a newer one is no
// failure.
func (d *Deployer) Deploy(ctx context.Context, repo string, pr uint, event string) error {
	err := d.Lockers(repo, pr, event).Do(ctx, func(ctx context.Context) error { return d.Run(ctx, repo, pr) })
	if errors.Is(err, locker.ErrLockPreempted) {
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
			<-ctx.Done() // the first deployment hangs until it is displaced
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
	provider, err := locker.NewLockProvider(locker.FakeLockProviderKind)
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
func ExampleNewLockProvider() {
	provider, err := locker.NewLockProvider(locker.FakeLockProviderKind,
		locker.WithLockTimeout(time.Minute),
		locker.WithPreemptionTimeout(5*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = provider.(io.Closer).Close() }()

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
		return context.Cause(ctx)
	})
	fmt.Println(errors.Is(err, locker.ErrMaxLockDuration))
	// Output: true
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
	if err != nil && !errors.Is(err, locker.ErrLockPreempted) {
		log.Print(err)
	}
}

// A provider on PostgreSQL that is closed when the service ends.
func ExampleNewLockProvider_postgres() {
	provider, err := locker.NewLockProvider(locker.PostgresLockProviderKind,
		locker.WithPostgresBackend("postgres://app:password@db.example.com/app?sslmode=verify-full", ""))
	if err != nil {
		log.Fatal(err)
	}
	// Notifies every holder, and waits until all have stopped.
	defer func() { _ = provider.(io.Closer).Close() }()

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
