package main

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/preemptable/locker"
)

// held: what 1 … 10,000 locks that one provider holds cost.
func (b *bench) held() {
	uri, drop := b.database()
	defer drop()
	// A second provider holds one lock in a database of its own: cycles there are the yardstick at each level.
	smallURI, dropSmall := b.database()
	defer dropSmall()
	admin := b.admin(smallURI)
	defer func() { _ = admin.Close() }()
	database := strings.TrimPrefix(must(url.Parse(uri)).Path, "/")

	small := newProvider(smallURI)
	defer func() { _ = small.Close() }()
	smallFactory := newFactory(small)
	one := smallFactory("org/repo", 1, "benchmark")
	_, err := one.Lock(b.ctx)
	check(err)
	raw := newRawPair(smallURI)
	defer raw.close()

	goroutines := runtime.NumGoroutine()
	listener := newRawNotify(smallURI)
	time.Sleep(50 * time.Millisecond)
	rawGoroutines := runtime.NumGoroutine() - goroutines
	listener.close()
	rawBytes := barestBytes(10_000)
	time.Sleep(50 * time.Millisecond)

	goroutines = runtime.NumGoroutine()
	p := newProvider(uri, locker.WithPreemptionTimeout(time.Millisecond)) // Close takes the locks away
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	// The context is one that can end, as that of a service is.
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	const other = 1 << 20 // the pull request of the extra cycle
	check(each(512, func(i int) error { return cycle(ctx, f, uint(other+i)) }))
	for range 100 {
		check(cycle(ctx, smallFactory, other))
		check(raw.run(42))
	}
	memory := heap()

	const top = 10_000
	atOne := 0 // goroutines with one lock held
	locks := make([]*locker.PreemptiveLocker, 0, 2*top)
	for level := 1; level <= top; level *= 10 {
		from := len(locks)
		locks = locks[:level]
		took := timed(func() {
			check(each(level-from, func(i int) error {
				l := f("org/repo", uint(from+i), "benchmark")
				locks[from+i-1] = l
				_, err := l.Lock(ctx)
				return err
			}))
		})
		bytes := (heap() - memory) / float64(level)
		count := runtime.NumGoroutine() - goroutines
		if level == 1 {
			atOne = count
		}

		compare := func(d time.Duration) (c, toRaw *comparison) {
			c, toRaw = newComparison(), newComparison()
			for start := time.Now(); time.Since(start) < max(b.span(d), 400*time.Millisecond); {
				c.begin()
				toRaw.begin()
				for range 25 {
					c.ours.add(timed(func() { check(cycle(ctx, f, other+1)) }))
					c.floor.add(timed(func() { check(cycle(ctx, smallFactory, other)) }))
					toRaw.floor.add(timed(func() { check(raw.run(42)) }))
				}
			}
			toRaw.ours = c.ours
			return c, toRaw
		}
		early, _ := compare(time.Second)
		settled := b.settle(admin, database)
		c, toRaw := compare(4 * time.Second) // longer than a heartbeat, so that one of them is in it

		// What came before reaches the statistics with the next heartbeat.
		idle := 15 * time.Second
		if b.scale < 1 {
			idle = 3 * time.Second
		}
		time.Sleep(5 * time.Second)
		before, begin := b.transactions(admin, database), time.Now()
		time.Sleep(idle)
		transactions := (b.transactions(admin, database) - before) / time.Since(begin).Seconds()
		var connections float64
		check(admin.QueryRowContext(b.ctx,
			`SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'`, database).Scan(&connections))

		group := fmt.Sprintf("%s held by one provider", plural(level, "lock"))
		last := func(t *target) *target {
			if level < top {
				return nil
			}
			return t
		}
		all := slices.Concat(c.ours...)
		worst := ms(slices.Max(all))
		b.result.add(
			row{
				Group: group, Name: "one more Lock + Release", X: float64(level), Unit: "ms", Ours: c.ours.figure(), Floor: c.floor.figure(),
				What: "with 1 held", Ratio: c.ratio(), Target: last(ratioAtMost(1.5)), Extra: &worst,
			},
			row{
				Group: group, Name: "the same to a raw pair", X: float64(level), Unit: "ms", Ours: c.ours.figure(), Floor: toRaw.floor.figure(),
				What: "pg_advisory_lock + unlock", Ratio: toRaw.ratio(),
			},
			row{Group: group, Name: "connections", Ours: value(connections), Floor: value(1), What: "a session", Target: last(atMost(4))},
			row{
				Group: group, Name: "goroutines", Ours: value(float64(count)), Floor: value(float64(rawGoroutines)),
				What: "a lib/pq connection and listener", Target: last(atMost(float64(atOne + 2))),
			},
		)
		if level >= 1000 { // fewer are not parked, and are lost in the rest of the heap
			b.result.add(row{
				Group: group, Name: "one more, in the first second", X: float64(level), Unit: "ms", Ours: early.ours.figure(), Floor: early.floor.figure(),
				What: "with 1 held", Ratio: early.ratio(),
			}, row{
				Group: group, Name: "time until most are on the third connection", Unit: "ms", Ours: value(ms(settled)), Floor: value(3000), What: "a heartbeat",
			}, row{
				Group: group, Name: "memory a lock", Unit: "B", Ours: value(bytes), Floor: value(rawBytes),
				What: "a channel, a timer, two map entries", Target: last(atMost(2048)),
			})
		}
		b.result.add(row{
			Group: group, Name: "transactions a second, idle", Unit: "/s", Ours: value(transactions), Floor: value(1.0 / 3),
			What: "one heartbeat in 3 s", Target: last(atMost(1)),
		})
		if level == top {
			b.result.add(row{Group: group, Name: "time to take nine tenths of them", Unit: "ms", Ours: value(ms(took))})
		}
		runtime.KeepAlive(locks)
	}
	b.fill(ctx, f, len(locks))
	check(one.Release(b.ctx))
}

// fill takes locks until the server's lock table is full.
func (b *bench) fill(ctx context.Context, f locker.PreemptiveLockerFactory, have int) {
	if b.scale < 1 {
		return
	}
	for have < 1_000_000 {
		errs := make(chan error, 100)
		for i := range 100 {
			go func() {
				_, err := f("org/repo", uint(have+i+1), "benchmark").Lock(ctx)
				errs <- err
			}()
		}
		got := 0
		var refusal error
		for range 100 {
			if err := <-errs; err == nil {
				got++
			} else {
				refusal = err
			}
		}
		have += got
		if refusal != nil {
			if !strings.Contains(refusal.Error(), "lock table") {
				check(refusal)
			}
			break
		}
	}
	b.result.add(row{
		Group: "The server's lock table", Name: "locks held when it is full", Ours: value(float64(have)), Floor: value(float64(b.result.LockTable)),
		What: "max_locks_per_transaction × max_connections",
	})
}

// settle waits until the provider has moved to its second connection what lasts, if it is that many. What is there is held
// in share mode.
func (b *bench) settle(admin *sql.DB, database string) time.Duration {
	start := time.Now()
	for time.Since(start) < time.Minute {
		var first int
		check(admin.QueryRowContext(b.ctx, `SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
			WHERE d.datname = $1 AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.mode = 'ExclusiveLock'`, database).Scan(&first))
		if first <= 512 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(start)
}

// admin is a connection that does not count among those of the databases that are measured.
func (b *bench) admin(uri string) *sql.DB {
	u := must(url.Parse(uri))
	u.Path = "/postgres"
	return openDB(u.String(), 1)
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

func (b *bench) transactions(admin *sql.DB, database string) (n float64) {
	check(admin.QueryRowContext(b.ctx,
		`SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1`, database).Scan(&n))
	return n
}

// heap is what is in use after a collection, goroutines' stacks included.
func heap() float64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// barestBytes is the memory of what a lock cannot do without: the holder's channel, a timer, an entry for its key and one
// for its owner.
func barestBytes(n int) float64 {
	type bare struct {
		ch    chan locker.NotificationPayload
		timer *time.Timer
	}
	before := heap()
	all, owners := map[int64]bare{}, map[int64]uuid.UUID{}
	for i := range n {
		all[int64(i)] = bare{make(chan locker.NotificationPayload, 1), time.AfterFunc(time.Hour, func() {})}
		owners[int64(i)] = uuid.New()
	}
	bytes := (heap() - before) / float64(n)
	for _, a := range all {
		a.timer.Stop()
	}
	runtime.KeepAlive(owners)
	return bytes
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return short(float64(n)) + " " + word + "s"
}
