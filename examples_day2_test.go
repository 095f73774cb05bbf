package locker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/preemptable/locker"
)

// A redelivery has the same order as its original. While that one is at work it
// is turned away; after that it runs, which is how a failed deployment is tried
// again.
func ExamplePreemptiveLocker_Order_redelivery() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	deliver := func(order int64, work func()) {
		err := newLocker("octo/cat", 42, fmt.Sprintf("push %d", order)).Order(order).
			Do(context.Background(), func(context.Context) error {
				work()
				return nil
			})
		if errors.Is(err, locker.ErrClaimOutdated) {
			fmt.Println("turned away:", order)
		}
	}

	deliver(7, func() {
		fmt.Println("deploying 7")
		deliver(7, func() { fmt.Println("never printed") }) // while the first is at work
	})
	deliver(7, func() { fmt.Println("deploying 7 once more") })
	deliver(6, func() { fmt.Println("never printed") })
	// Output:
	// deploying 7
	// turned away: 7
	// deploying 7 once more
	// turned away: 6
}

// A step that must not be cut in half ends in peace, though its holder is told to
// stop at once. Nothing else is begun after that.
func ExamplePreemptiveLocker_Shield() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	newer := make(chan error)
	l := newLocker("octo/cat", 42, "opened")
	err = l.Do(context.Background(), func(ctx context.Context) error {
		err := l.Shield(ctx, time.Minute, func(step context.Context) error {
			go func() { // the next delivery, usually in another process
				newer <- newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(context.Context) error {
					return nil // starts once the holder's function has returned
				})
			}()
			<-ctx.Done()
			fmt.Println("told to stop; the migration goes on:", step.Err() == nil)
			return nil
		})
		fmt.Println("the migration ended with:", err)

		err = l.Shield(ctx, time.Minute, func(context.Context) error {
			fmt.Println("never printed")
			return nil
		})
		fmt.Println("a second one is not begun:", errors.Is(err, locker.ErrLockPreempted))
		return err
	})
	fmt.Println("preempted:", errors.Is(err, locker.ErrLockPreempted))
	fmt.Println("newer:", <-newer)
	// Output:
	// told to stop; the migration goes on: true
	// the migration ended with: <nil>
	// a second one is not begun: true
	// preempted: true
	// newer: <nil>
}

// Metrics: count what happens to the locks of a provider. examples/prometheus
// does it for Prometheus.
func ExampleWithObserver() {
	var mu sync.Mutex
	count := map[string]int{}
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		locker.WithObserver(func(o locker.Observation) { // on any goroutine
			mu.Lock()
			defer mu.Unlock()
			count[o.Kind.String()]++
		}),
	})
	if err != nil {
		log.Fatal(err)
	}

	newer := make(chan error)
	_ = newLocker("octo/cat", 42, "opened").Do(context.Background(), func(ctx context.Context) error {
		go func() {
			newer <- newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(context.Context) error { return nil })
		}()
		<-ctx.Done()
		return nil
	})
	if err := <-newer; err != nil {
		log.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	fmt.Println(count)
	// Output: map[acquired:2 notified:1 released:2]
}

// Who holds which lock, in any process: for a page or a command for operators.
func ExamplePostgresLockProvider_Holders() {
	provider, err := locker.NewLockProvider(locker.PostgresLockProviderKind,
		locker.WithPostgresBackend("postgres://app:password@db.example.com/app?sslmode=verify-full", ""))
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = provider.(io.Closer).Close() }()

	holders, err := provider.(*locker.PostgresLockProvider).Holders(context.Background())
	if err != nil {
		log.Print(err)
		return
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, h := range holders {
		state := "free"
		switch {
		case h.Alive:
			state = "held for " + time.Since(h.Since).Round(time.Second).String()
		case h.Event != "":
			state = "its holder died"
		}
		if h.Waiting {
			state += ", waited for by " + h.NewestEvent
		}
		fmt.Fprintf(w, "%s#%d\t%s\t%s:%d\t%s\n", h.Repo, h.PullRequest, h.Event, h.Host, h.PID, state)
	}
	_ = w.Flush()
}

// Asking a holder to stop, wherever it runs: its context is cancelled with a
// cause that matches ErrStopRequested and quotes the reason.
func ExamplePostgresLockProvider_Stop() {
	provider, err := locker.NewLockProvider(locker.PostgresLockProviderKind,
		locker.WithPostgresBackend("postgres://app:password@db.example.com/app?sslmode=verify-full", ""))
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = provider.(io.Closer).Close() }()

	asked, err := provider.(*locker.PostgresLockProvider).Stop(context.Background(), "octo/cat", 42, "database maintenance")
	switch {
	case err != nil:
		log.Print(err)
	case asked:
		fmt.Println("asked; it has the preemption timeout to stop")
	default:
		fmt.Println("nobody holds the lock")
	}
}
