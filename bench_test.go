package locker

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/stretchr/testify/require"
)

// The benchmarks come in pairs: one of the library, and one of the equivalent raw PostgreSQL
// operations (…Floor), its lower bound. `make bench` runs these and more, and prints the ratios.

func benchProvider(b *testing.B, uri string, options ...LockProviderOption) LockProvider {
	b.Helper()
	p, err := NewLockProvider(PostgresLockProviderKind, append([]LockProviderOption{
		WithPostgresBackend(uri, ""), WithLockTimeout(time.Minute), WithPreemptionTimeout(time.Minute),
	}, options...)...)
	require.NoError(b, err)
	b.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
	return p
}

func benchFactory(b *testing.B, uri string, options ...LockProviderOption) PreemptiveLockerFactory {
	b.Helper()
	f, err := NewPreemptiveLockerFactory(benchProvider(b, uri, options...))
	require.NoError(b, err)
	return f
}

func lockAndRelease(f PreemptiveLockerFactory, pr uint) error {
	return goRound(f("r", pr, "benchmark"))
}

func goRound(l *PreemptiveLocker) error {
	if _, err := l.Lock(context.Background()); err != nil {
		return err
	}
	return l.Release(context.Background())
}

func cycle(b *testing.B, f PreemptiveLockerFactory, pr uint) {
	if err := lockAndRelease(f, pr); err != nil {
		b.Error(err)
	}
}

func BenchmarkCycle(b *testing.B) {
	f := benchFactory(b, newDatabase(b))
	cycle(b, f, 1)
	b.ReportAllocs()
	for b.Loop() {
		cycle(b, f, 1)
	}
}

// newRawPair returns a function that locks and unlocks an advisory lock on a separate connection.
func newRawPair(b *testing.B, uri string) func(key int64) error {
	b.Helper()
	ctx := context.Background()
	db, err := sql.Open("postgres", uri)
	require.NoError(b, err)
	b.Cleanup(func() { _ = db.Close() })
	conn, err := db.Conn(ctx)
	require.NoError(b, err)
	b.Cleanup(func() { _ = conn.Close() })
	lock, err := conn.PrepareContext(ctx, "SELECT pg_advisory_lock($1)")
	require.NoError(b, err)
	unlock, err := conn.PrepareContext(ctx, "SELECT pg_advisory_unlock($1)")
	require.NoError(b, err)
	return func(key int64) error {
		if _, err := lock.ExecContext(ctx, key); err != nil {
			return err
		}
		_, err := unlock.ExecContext(ctx, key)
		return err
	}
}

func BenchmarkCycleFloor(b *testing.B) {
	pair := newRawPair(b, newDatabase(b))
	for b.Loop() {
		if err := pair(42); err != nil {
			b.Error(err)
		}
	}
}

// share distributes b.N calls of f over n workers.
func share(b *testing.B, n int, f func(worker int) error) {
	var next atomic.Int64
	var group sync.WaitGroup
	for w := range n {
		group.Go(func() {
			for next.Add(1) <= int64(b.N) {
				if err := f(w); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
}

var benchWorkers = []int{1, 16, 256, 1024}

func BenchmarkWorkers(b *testing.B) {
	f := benchFactory(b, newDatabase(b))
	for _, n := range benchWorkers {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			share(b, n, func(w int) error { return lockAndRelease(f, uint(w+1)) })
		})
	}
}

func BenchmarkWorkersFloor(b *testing.B) {
	const conns = 64
	uri := newDatabase(b)
	pool := make(chan func(key int64) error, conns)
	for range conns {
		pool <- newRawPair(b, uri)
	}
	for _, n := range benchWorkers {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			share(b, n, func(w int) error {
				pair := <-pool
				err := pair(int64(w))
				pool <- pair
				return err
			})
		})
	}
}

// BenchmarkHeld measures a cycle while the same provider holds other locks.
func BenchmarkHeld(b *testing.B) {
	// Close revokes the locks.
	f := benchFactory(b, newDatabase(b), WithPreemptionTimeout(time.Millisecond))
	const other = 1 << 20
	cycle(b, f, other)
	before, goroutines := heapInUse(), runtime.NumGoroutine()
	var held []*PreemptiveLocker
	for _, n := range []int{1, 10, 100, 1000, 10_000} {
		from := len(held)
		held = append(held, make([]*PreemptiveLocker, n-from)...)
		var next atomic.Int64
		var group sync.WaitGroup
		for range min(256, n-from) {
			group.Go(func() {
				for i := from + int(next.Add(1)) - 1; i < n; i = from + int(next.Add(1)) - 1 {
					held[i] = f("r", uint(i+1), "benchmark")
					if _, err := held[i].Lock(context.Background()); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		group.Wait()
		bytes := (heapInUse() - before) / float64(n)
		more := runtime.NumGoroutine() - goroutines
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				cycle(b, f, other)
			}
			// The memory of fewer locks is small compared to the rest of the heap.
			if n >= 1000 {
				b.ReportMetric(bytes, "B/lock")
			}
			b.ReportMetric(float64(more), "goroutines")
		})
	}
	runtime.KeepAlive(held)
}

func heapInUse() float64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// BenchmarkSoak uses a thousand keys in turn. With -benchtime=1000000x it is the whole soak.
func BenchmarkSoak(b *testing.B) {
	const keys = 1000
	uri := newDatabase(b)
	f := benchFactory(b, uri)
	db, err := sql.Open("postgres", uri)
	require.NoError(b, err)
	defer func() { _ = db.Close() }()
	b.ResetTimer()
	var next atomic.Int64
	share(b, 100, func(int) error { return lockAndRelease(f, uint(next.Add(1)%keys)) })
	b.StopTimer()
	var size float64
	require.NoError(b, db.QueryRow("SELECT pg_total_relation_size('env_lock_state')").Scan(&size))
	b.ReportMetric(size/1024, "KiB-table")
	b.ReportMetric(heapInUse()/1024, "KiB-heap")
}

func BenchmarkFakeCycle(b *testing.B) {
	f, err := NewFakePreemptiveLockerFactory(nil)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		cycle(b, f, 1)
	}
}

// BenchmarkFakeContended measures two workers that take the key from each other.
func BenchmarkFakeContended(b *testing.B) {
	f, err := NewFakePreemptiveLockerFactory(nil)
	require.NoError(b, err)
	b.ReportAllocs()
	// The first worker that is done closes over, because the other one may wait in vain.
	over := make(chan struct{})
	var once sync.Once
	var next atomic.Int64
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			defer once.Do(func() { close(over) })
			for next.Add(1) <= int64(b.N) {
				l := f("r", 1, "benchmark")
				ch, err := l.Lock(context.Background())
				if errors.Is(err, ErrLockPreempted) {
					continue
				}
				if err != nil {
					b.Error(err)
					return
				}
				select {
				case <-ch:
				case <-over:
				}
				if err := l.Release(context.Background()); err != nil {
					b.Error(err)
				}
			}
		})
	}
	group.Wait()
}

// The next three measure how long a claim or a release takes to reach another provider. Their ns/op
// is only that time, without the operations in between.

func BenchmarkPreemption(b *testing.B) {
	benchEvents(b, func(e *benchEvent) time.Duration { return e.preemption })
}

func BenchmarkDisplacement(b *testing.B) {
	benchEvents(b, func(e *benchEvent) time.Duration { return e.displacement })
}

func BenchmarkHandOver(b *testing.B) {
	benchEvents(b, func(e *benchEvent) time.Duration { return e.handOver })
}

type benchEvent struct{ preemption, displacement, handOver time.Duration }

type benchWaiter struct {
	lock PreemptableLock
	ch   <-chan NotificationPayload
	back chan time.Time
	err  error
}

// benchEvents repeats these steps: one lock holds, a second claims and waits, a third supersedes
// the second and waits, a fourth supersedes the third and waits, the first releases, and the fourth
// holds. Successive locks belong to different providers.
func benchEvents(b *testing.B, pick func(*benchEvent) time.Duration) {
	const key = 7
	ctx := context.Background()
	uri := newDatabase(b)
	providers := [2]LockProvider{benchProvider(b, uri), benchProvider(b, uri)}
	turn := 0
	claim := func() (*benchWaiter, time.Time) {
		l, err := providers[turn%2].New(ctx, key, "benchmark")
		require.NoError(b, err)
		turn++
		start := time.Now()
		require.NoError(b, l.Notify(ctx))
		return &benchWaiter{lock: l, back: make(chan time.Time, 1)}, start
	}
	wait := func(w *benchWaiter) {
		go func() {
			w.ch, w.err = w.lock.Lock(ctx)
			w.back <- time.Now()
		}()
		// The lock has begun to wait by then.
		time.Sleep(5 * time.Millisecond)
	}
	holder, _ := claim()
	wait(holder)
	<-holder.back
	require.NoError(b, holder.err)
	var total time.Duration
	for b.Loop() {
		var e benchEvent
		told := make(chan time.Time, 1)
		ch := holder.ch
		go func() {
			<-ch
			told <- time.Now()
		}()
		second, start := claim()
		e.preemption = (<-told).Sub(start)
		wait(second)
		third, start := claim()
		e.displacement = (<-second.back).Sub(start)
		require.ErrorIs(b, second.err, ErrLockPreempted)
		wait(third)
		// The fourth lock is at another provider than the holder.
		fourth, _ := claim()
		<-third.back
		wait(fourth)
		start = time.Now()
		require.NoError(b, holder.lock.Unlock(ctx))
		e.handOver = (<-fourth.back).Sub(start)
		require.NoError(b, fourth.err)
		holder = fourth
		total += pick(&e)
	}
	b.ReportMetric(float64(total)/float64(b.N), "ns/op")
	require.NoError(b, holder.lock.Unlock(ctx))
}

func BenchmarkNotifyFloor(b *testing.B) {
	uri := newDatabase(b)
	l := pq.NewListener(uri, time.Second, time.Second, nil)
	defer func() { _ = l.Close() }()
	require.NoError(b, l.Listen("floor"))
	db, err := sql.Open("postgres", uri)
	require.NoError(b, err)
	defer func() { _ = db.Close() }()
	stmt, err := db.Prepare("SELECT pg_notify('floor', $1)")
	require.NoError(b, err)
	for b.Loop() {
		if _, err := stmt.Exec("x"); err != nil {
			b.Error(err)
		}
		<-l.Notify
	}
}
