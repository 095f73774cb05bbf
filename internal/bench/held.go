package main

import (
	"context"
	"database/sql"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/preemptable/locker"
	"github.com/preemptable/locker/internal/table"
)

// other is the pull request of the cycle that runs while the locks are held.
const other = 1 << 20

// heldBench is one provider that holds more and more locks. A second provider, in a separate
// database, holds one lock. At each level the cycles are compared with those of the second
// provider.
type heldBench struct {
	*bench
	uri     string
	admin   *sql.DB
	factory locker.PreemptiveLockerFactory
	small   locker.PreemptiveLockerFactory
	raw     *rawPair
	ctx     context.Context // one that can be canceled, like that of a service

	locks         []*locker.PreemptiveLocker // those from held on are nil
	held          int
	memory        float64 // before the first lock
	goroutines    int     // before the provider
	atOne         int     // goroutines of the provider with one lock held
	rawGoroutines int
	rawBytes      float64
}

// holding measures the cost of 1 … 100,000 locks that one provider holds.
func (b *bench) holding() {
	top := 100_000
	if b.scale < 1 {
		top = 10_000
	}
	uri, drop := b.database()
	defer drop()
	smallURI, dropSmall := b.database()
	defer dropSmall()
	h := &heldBench{bench: b, uri: uri, admin: openAdmin(uri), locks: make([]*locker.PreemptiveLocker, top)}
	defer func() { _ = h.admin.Close() }()
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	h.ctx = ctx

	small := newProvider(smallURI)
	defer func() { _ = small.Close() }()
	h.small = newFactory(small)
	one := h.small("org/repo", 1, "benchmark")
	_, err := one.Lock(b.ctx)
	check(err)
	h.raw = newRawPair(smallURI)
	defer h.raw.close()
	h.measureFloors(smallURI)

	h.goroutines = runtime.NumGoroutine()
	// Close revokes the locks.
	p := newProvider(uri, locker.WithPreemptionTimeout(time.Millisecond))
	defer func() { _ = p.Close() }()
	h.factory = newFactory(p)
	h.warmUp()
	for level := 1; level <= top; level *= 10 {
		h.level(level, top)
	}
	check(one.Release(b.ctx))
}

// measureFloors measures a connection with a listener, and the barest lock.
func (h *heldBench) measureFloors(uri string) {
	before := runtime.NumGoroutine()
	listener := newRawNotify(uri)
	time.Sleep(50 * time.Millisecond)
	h.rawGoroutines = runtime.NumGoroutine() - before
	listener.close()
	h.rawBytes = barestBytes(10_000)
	time.Sleep(50 * time.Millisecond)
}

func (h *heldBench) warmUp() {
	check(each(512, func(i int) error { return cycle(h.ctx, h.factory, uint(other+i)) }))
	for range 100 {
		check(cycle(h.ctx, h.small, other))
		check(h.raw.run(42))
	}
	h.memory = heap()
}

// level takes locks up to a number of them, and measures.
func (h *heldBench) level(level, top int) {
	before := level - h.held
	peak := h.watchConnections(h.admin, h.uri)
	took := timed(func() { h.fill(level) })
	most := peak()

	// The first second is measured, too. The provider needs no pause after so many locks.
	first, firstRaw := h.compare(time.Second)
	// The time is longer than the interval of heartbeats, so that one of them is in it.
	rest, restRaw := h.compare(4 * time.Second)
	h.addCycles(level, first, joined(first, rest), joined(firstRaw, restRaw))

	bytes := (heap() - h.memory) / float64(level)
	count := runtime.NumGoroutine() - h.goroutines
	if level == 1 {
		h.atOne = count
	}
	h.addSizes(level, top, most, count, bytes)
	if level >= 1000 {
		h.addIdle(level)
	}
	if level == top {
		h.result.add(row{Group: heldGroup(level), Name: "acquired per second, 256 workers", Unit: "/s", Ours: value(float64(before) / took.Seconds())})
	}
	runtime.KeepAlive(h.locks)
}

func (h *heldBench) fill(level int) {
	from := h.held
	check(each(level-from, func(i int) error {
		l := h.factory("org/repo", uint(from+i), "benchmark")
		h.locks[from+i-1] = l
		_, err := l.Lock(h.ctx)
		return err
	}))
	h.held = level
}

// compare times one more cycle, alternating with one of the provider that holds one lock, and with
// a raw pair.
func (h *heldBench) compare(d time.Duration) (toOne, toRaw *comparison) {
	toOne, toRaw = newComparison(), newComparison()
	for start := time.Now(); time.Since(start) < max(h.span(d), 400*time.Millisecond); {
		toOne.begin()
		toRaw.begin()
		for range 25 {
			toOne.ours.add(timed(func() { check(cycle(h.ctx, h.factory, other+1)) }))
			toOne.floor.add(timed(func() { check(cycle(h.ctx, h.small, other)) }))
			toRaw.floor.add(timed(func() { check(h.raw.run(42)) }))
		}
	}
	toRaw.ours = toOne.ours
	return toOne, toRaw
}

func joined(a, b *comparison) *comparison {
	return &comparison{ours: slices.Concat(a.ours, b.ours), floor: slices.Concat(a.floor, b.floor)}
}

func heldGroup(level int) string {
	return fmt.Sprintf("%s held by one provider", plural(level, "lock"))
}

func (h *heldBench) addCycles(level int, first, toOne, toRaw *comparison) {
	t := map[int]*target{10_000: ratioAtMost(1.15), 100_000: ratioAtMost(1.3)}[level]
	worst := ms(slices.Max(slices.Concat(toOne.ours...)))
	h.result.add(
		row{
			Group: heldGroup(level), Name: "one more Lock + Release", X: float64(level), Unit: "ms", Ours: toOne.ours.figure(),
			Floor: toOne.floor.figure(), What: "with 1 held", Ratio: toOne.ratio(), Target: t, Extra: &worst,
		},
		row{
			Group: heldGroup(level), Name: "one more Lock + Release, against a raw pair", X: float64(level), Unit: "ms", Ours: toRaw.ours.figure(),
			Floor: toRaw.floor.figure(), What: "pg_advisory_lock + unlock", Ratio: toRaw.ratio(),
		},
	)
	if level >= 1000 {
		h.result.add(row{
			Group: heldGroup(level), Name: "one more, in the first second", X: float64(level), Unit: "ms", Ours: first.ours.figure(),
			Floor: first.floor.figure(), What: "with 1 held", Ratio: first.ratio(), Target: t,
		})
	}
}

func (h *heldBench) addSizes(level, top, most, goroutines int, bytes float64) {
	last := func(t *target) *target {
		if level < top {
			return nil
		}
		return t
	}
	group := heldGroup(level)
	h.result.add(
		row{Group: group, Name: "connections, at most", Ours: value(float64(most)), Floor: value(1), What: "a session", Target: last(atMost(4))},
		row{
			Group: group, Name: "goroutines", Ours: value(float64(goroutines)), Floor: value(float64(h.rawGoroutines)),
			What: "a lib/pq connection and listener", Target: last(atMost(float64(h.atOne + 2))),
		},
	)
	// The memory of fewer locks is small compared to the rest of the heap.
	if level < 1000 {
		return
	}
	h.result.add(
		row{
			Group: group, Name: "memory per lock", Unit: "B", Ours: value(bytes), Floor: value(h.rawBytes),
			What: "a channel, a timer, two map entries", Target: last(atMost(1.3 * 1024)),
		},
		row{
			Group: group, Name: "entries in the server's lock table", Ours: value(float64(h.advisoryLocks(h.admin, h.uri))),
			Floor: value(float64(level)), What: "an advisory lock for each", Target: last(atMost(1)),
		},
	)
}

func (h *heldBench) addIdle(level int) {
	idle := 9 * time.Second
	if h.scale < 1 {
		idle = 3 * time.Second
	}
	// Earlier work has ended by then.
	time.Sleep(time.Second)
	h.result.add(row{
		Group: heldGroup(level), Name: "transactions per second, idle", Unit: "/s", Ours: value(h.transactions(h.admin, h.uri, idle)),
		Floor: value(1), What: "one in 3 s on each of 3 connections",
	})
}

// heap returns the memory in use after a collection, including the stacks of goroutines.
func heap() float64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// barestBytes returns the memory of the minimum that a lock needs: the holder's channel, a timer,
// an entry for its key and one for its owner.
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
	return table.Number(float64(n)) + " " + word + "s"
}
