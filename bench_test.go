package locker

import (
	"context"
	"database/sql"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/stretchr/testify/require"
)

// The benchmarks come in pairs: what the library does, and the floor that raw
// PostgreSQL sets for it (…Floor). `make bench` runs the same and more and
// prints the ratios.

func benchFactory(b *testing.B, uri string) PreemptiveLockerFactory {
	b.Helper()
	p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresBackend(uri, ""), WithLockTimeout(time.Minute))
	require.NoError(b, err)
	b.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
	f, err := NewPreemptiveLockerFactory(p)
	require.NoError(b, err)
	return f
}

func cycle(b *testing.B, f PreemptiveLockerFactory, repo string, pr uint) {
	ctx := context.Background()
	l := f(repo, pr, "benchmark")
	if _, err := l.Lock(ctx); err != nil {
		b.Error(err)
		return
	}
	if err := l.Release(ctx); err != nil {
		b.Error(err)
	}
}

func BenchmarkCycle(b *testing.B) {
	f := benchFactory(b, newDatabase(b))
	cycle(b, f, "r", 1)
	b.ReportAllocs()
	for b.Loop() {
		cycle(b, f, "r", 1)
	}
}

func rawPair(b *testing.B, lock, unlock *sql.Stmt, key int64) {
	ctx := context.Background()
	if _, err := lock.ExecContext(ctx, key); err != nil {
		b.Error(err)
	}
	if _, err := unlock.ExecContext(ctx, key); err != nil {
		b.Error(err)
	}
}

func BenchmarkCycleFloor(b *testing.B) {
	ctx := context.Background()
	db, err := sql.Open("postgres", newDatabase(b))
	require.NoError(b, err)
	defer func() { _ = db.Close() }()
	conn, err := db.Conn(ctx)
	require.NoError(b, err)
	defer func() { _ = conn.Close() }()
	lock, err := conn.PrepareContext(ctx, "SELECT pg_advisory_lock($1)")
	require.NoError(b, err)
	unlock, err := conn.PrepareContext(ctx, "SELECT pg_advisory_unlock($1)")
	require.NoError(b, err)
	for b.Loop() {
		rawPair(b, lock, unlock, 42)
	}
}

func BenchmarkWorkers(b *testing.B) {
	for _, n := range []int{1, 16, 256, 1024} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			f := benchFactory(b, newDatabase(b))
			var next atomic.Int64
			b.SetParallelism(max(1, n/2)) // × GOMAXPROCS
			b.RunParallel(func(pb *testing.PB) {
				pr := uint(next.Add(1))
				for pb.Next() {
					cycle(b, f, "r", pr)
				}
			})
		})
	}
}

func BenchmarkWorkersFloor(b *testing.B) {
	for _, n := range []int{1, 16, 256, 1024} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			db, err := sql.Open("postgres", newDatabase(b))
			require.NoError(b, err)
			defer func() { _ = db.Close() }()
			db.SetMaxOpenConns(64)
			db.SetMaxIdleConns(64)
			var next atomic.Int64
			b.SetParallelism(max(1, n/2))
			b.RunParallel(func(pb *testing.PB) {
				ctx := context.Background()
				key := next.Add(1)
				for pb.Next() {
					conn, err := db.Conn(ctx)
					if err != nil {
						b.Error(err)
						return
					}
					_, err1 := conn.ExecContext(ctx, "SELECT pg_advisory_lock($1)", key)
					_, err2 := conn.ExecContext(ctx, "SELECT pg_advisory_unlock($1)", key)
					if err1 != nil || err2 != nil {
						b.Error(err1, err2)
					}
					_ = conn.Close()
				}
			})
		})
	}
}

func BenchmarkFakeCycle(b *testing.B) {
	f, err := NewFakePreemptiveLockerFactory(nil)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		cycle(b, f, "r", 1)
	}
}

// BenchmarkPreemption is the time from a claim to the holder's channel, between
// two providers.
func BenchmarkPreemption(b *testing.B) {
	uri := newDatabase(b)
	f, g := benchFactory(b, uri), benchFactory(b, uri)
	ctx := context.Background()
	holder := f("r", 1, "first")
	ch, err := holder.Lock(ctx)
	require.NoError(b, err)
	for b.Loop() {
		next := g("r", 1, "next")
		done := make(chan (<-chan NotificationPayload), 1)
		go func() {
			c, err := next.Lock(ctx)
			if err != nil {
				b.Error(err)
			}
			done <- c
		}()
		<-ch
		b.StopTimer()
		if err := holder.Release(ctx); err != nil {
			b.Error(err)
		}
		ch = <-done
		holder = next
		f, g = g, f
		b.StartTimer()
	}
	_ = holder.Release(ctx)
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
