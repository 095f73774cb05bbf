package locker_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/preemptable/locker"
)

// A redelivery has the same sequence number as the original delivery. While the original is at
// work, the redelivery is rejected. Afterwards it runs, so a failed deployment can be tried again.
func ExamplePreemptiveLocker_Sequence_redelivery() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	deliver := func(order int64, work func()) {
		err := newLocker("octo/cat", 42, fmt.Sprintf("push %d", order)).Sequence(order).
			Do(context.Background(), func(context.Context) error {
				work()
				return nil
			})
		// The outcome of this error is OutcomeOutdated.
		if errors.Is(err, locker.ErrClaimOutdated) {
			fmt.Println("outdated:", order)
		}
	}

	deliver(7, func() {
		fmt.Println("deploying 7")
		// The first delivery is still at work.
		deliver(7, func() { fmt.Println("never printed") })
	})
	deliver(7, func() { fmt.Println("deploying 7 once more") })
	deliver(6, func() { fmt.Println("never printed") })
	// Output:
	// deploying 7
	// outdated: 7
	// deploying 7 once more
	// outdated: 6
}

// Work that belongs to no pull request, such as an environment, gets a name and pull request 0. A
// number above 2^31 has to be a part of the name, too.
func ExamplePreemptiveLocker_withoutPullRequest() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	environment := func(name, event string) *locker.PreemptiveLocker {
		return newLocker("github.com/186853002/env/"+name, 0, event)
	}
	newer := make(chan error)
	err = environment("production", "release 1.4.0").Do(context.Background(), func(ctx context.Context) error {
		err := environment("staging", "release 1.5.0-rc1").Do(context.Background(), func(context.Context) error { return nil })
		fmt.Println("another environment:", err, ctx.Err())
		go func() {
			newer <- environment("production", "release 1.4.1").Do(context.Background(), func(context.Context) error { return nil })
		}()
		<-ctx.Done()
		return nil
	})
	outcome, _ := locker.OutcomeOf(err)
	fmt.Println("older:", outcome)
	fmt.Println("newer:", <-newer)
	// Output:
	// another environment: <nil> <nil>
	// older: preempted
	// newer: <nil>
}

// A step that must not be interrupted runs to its end, even if its holder is notified in the
// middle. After the notification no other step begins.
func ExamplePreemptiveLocker_Shield() {
	newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
	if err != nil {
		log.Fatal(err)
	}
	newer := make(chan error)
	l := newLocker("octo/cat", 42, "opened")
	err = l.Do(context.Background(), func(ctx context.Context) error {
		err := l.Shield(ctx, time.Minute, func(step context.Context) error {
			// The next delivery usually arrives in another process.
			go func() {
				newer <- newLocker("octo/cat", 42, "synchronize").Do(context.Background(), func(context.Context) error {
					return nil // starts when the holder's function has returned
				})
			}()
			<-ctx.Done()
			fmt.Println("notified; the migration goes on:", step.Err() == nil)
			return nil
		})
		fmt.Println("the migration ended with:", err)

		err = l.Shield(ctx, time.Minute, func(context.Context) error {
			fmt.Println("never printed")
			return nil
		})
		outcome, _ := locker.OutcomeOf(err)
		fmt.Println("a second one is not begun:", outcome)
		return err
	})
	outcome, _ := locker.OutcomeOf(err)
	fmt.Println("older:", outcome)
	fmt.Println("newer:", <-newer)
	// Output:
	// notified; the migration goes on: true
	// the migration ended with: <nil>
	// a second one is not begun: preempted
	// older: preempted
	// newer: <nil>
}

// An observer counts the events of a provider's locks. The package examples/prometheus exports such
// counters to Prometheus.
func ExampleWithObserver() {
	var mu sync.Mutex
	count := map[string]int{}
	newLocker, err := locker.NewFakePreemptiveLockerFactory([]locker.LockProviderOption{
		// The observer may be called on any goroutine.
		locker.WithObserver(func(o locker.Observation) {
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

// ListLocks returns the process that holds each lock, for a page or a command for operators.
func ExamplePostgresLockProvider_ListLocks() {
	provider, err := locker.NewPostgresProvider("postgres://app:password@db.example.com/app?sslmode=verify-full")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = provider.Close() }()

	holders, err := provider.ListLocks(context.Background())
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
		case !h.Since.IsZero():
			state = "its holder is suspended or has crashed"
		}
		if h.Waiting {
			state += ", waited for by " + h.NewestEvent
		}
		fmt.Fprintf(w, "%s#%d\t%s\t%s:%d\t%s\n", h.Repo, h.PullRequest, h.Event, h.Host, h.PID, state)
	}
	_ = w.Flush()
}

// RequestStop asks a holder to stop, in whatever process it runs. The context of the holder is
// canceled with a cause that matches ErrStopRequested and quotes the reason.
func ExamplePostgresLockProvider_RequestStop() {
	provider, err := locker.NewPostgresProvider("postgres://app:password@db.example.com/app?sslmode=verify-full")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = provider.Close() }()

	asked, err := provider.RequestStop(context.Background(), "octo/cat", 42, "database maintenance")
	switch {
	case err != nil:
		log.Print(err)
	case asked:
		fmt.Println("asked; it has the preemption timeout to stop")
	default:
		fmt.Println("no connected session holds the lock")
	}
}

// TestNewerWorkWins is the test of docs/testing.md.
func TestNewerWorkWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		provider, err := locker.NewFakeProvider()
		require.NoError(t, err)
		defer provider.Close()
		newLocker, err := locker.NewPreemptiveLockerFactory(provider)
		require.NoError(t, err)

		older := make(chan error, 1)
		go func() {
			older <- newLocker("o/r", 1, "older").Do(t.Context(), func(ctx context.Context) error {
				<-ctx.Done()                // notified
				time.Sleep(9 * time.Second) // cleaning up, within the preemption timeout
				return nil
			})
		}()
		synctest.Wait() // the older one works

		start := time.Now()
		err = newLocker("o/r", 1, "newer").Do(t.Context(), func(context.Context) error { return nil })
		require.NoError(t, err)
		require.Equal(t, 9*time.Second, time.Since(start))
		require.ErrorIs(t, <-older, locker.ErrLockPreempted)
	})
}

// TestEndsInTests brings about the outcomes that docs/testing.md describes.
func TestEndsInTests(t *testing.T) {
	for name, tc := range map[string]struct {
		hold  func(ctx context.Context, l *locker.PreemptiveLocker) error
		other bool // another locker claims meanwhile
		want  error
		whose string // the one of the two that gets the error
	}{
		"ignores its notification": {func(context.Context, *locker.PreemptiveLocker) error {
			time.Sleep(11 * time.Second)
			return nil
		}, true, locker.ErrLockLost, "holder"},
		"stuck": {func(ctx context.Context, _ *locker.PreemptiveLocker) error {
			<-ctx.Done()
			return nil
		}, false, locker.ErrMaxLockDuration, "holder"},
		"shielded for too long": {func(ctx context.Context, l *locker.PreemptiveLocker) error {
			return l.Shield(ctx, time.Minute, func(context.Context) error {
				time.Sleep(30 * time.Second)
				return nil
			})
		}, true, locker.ErrLockTimeout, "other"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				newLocker, err := locker.NewFakePreemptiveLockerFactory(nil)
				require.NoError(t, err)
				errs := map[string]chan error{"holder": make(chan error, 1), "other": make(chan error, 1)}
				go func() {
					l := newLocker("o/r", 1, "holder")
					errs["holder"] <- l.Do(t.Context(), func(ctx context.Context) error { return tc.hold(ctx, l) })
				}()
				synctest.Wait()
				if tc.other {
					errs["other"] <- newLocker("o/r", 1, "other").Do(t.Context(), func(context.Context) error { return nil })
				}
				require.ErrorIs(t, <-errs[tc.whose], tc.want)
				// Until then both have ended.
				time.Sleep(time.Minute)
			})
		})
	}
}

// TestLogLines requires that docs/operations.md lists every line that the library logs, with its
// level and its keys.
func TestLogLines(t *testing.T) {
	page, err := os.ReadFile("docs/operations.md")
	require.NoError(t, err)
	rows := map[string]string{}
	for line := range strings.Lines(string(page)) {
		if f := strings.SplitN(line, "|", 5); len(f) == 5 && strings.Contains(f[2], "`locker: ") {
			keys := strings.NewReplacer("`", "", ",", "").Replace(f[3])
			rows[strings.Trim(f[2], " `")] = strings.Join(strings.Fields(f[1]+keys), " ")
		}
	}
	call := regexp.MustCompile(`(?s)log(?:ger)?\.(Debug|Info|Warn|Error)\("(locker: [^"]*)"(.*?)\)\n`)
	key := regexp.MustCompile(`slog\.\w+\("(\w+)"`)
	sources, err := filepath.Glob("*.go")
	require.NoError(t, err)
	found := map[string]string{}
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		text, err := os.ReadFile(source)
		require.NoError(t, err)
		for _, m := range call.FindAllStringSubmatch(string(text), -1) {
			line := strings.ToLower(m[1])
			for _, k := range key.FindAllStringSubmatch(m[3], -1) {
				line += " " + k[1]
			}
			found[m[2]] = line
		}
	}
	require.NotEmpty(t, found)
	require.Equal(t, found, rows)
}
