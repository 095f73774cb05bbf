package main

import (
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/preemptable/locker/internal/table"
)

// soaked runs many cycles over a thousand keys. Nothing may grow.
func (b *bench) soaked() {
	const keys, workers, parts = 1000, 100, 4
	uri, drop := b.database()
	defer drop()
	p := newProvider(uri)
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	admin := openDB(uri, 1)
	defer func() { _ = admin.Close() }()

	type state struct {
		locks, states, dead, hot, updates, goHeap, rss float64
	}
	look := func() (s state) {
		// Backends report with their next statement, which is the heartbeat.
		time.Sleep(4 * time.Second)
		check(admin.QueryRowContext(b.ctx, `
SELECT pg_total_relation_size('env_locks'), pg_total_relation_size('env_lock_state'),
    (SELECT sum(n_dead_tup) FROM pg_stat_user_tables), n_tup_hot_upd, n_tup_upd
FROM pg_stat_user_tables WHERE relname = 'env_lock_state'`).Scan(&s.locks, &s.states, &s.dead, &s.hot, &s.updates))
		s.goHeap = heap()
		s.rss = residentBytes()
		return s
	}
	run := func(n int) {
		var next atomic.Int64
		check(parallel(workers, func(int) error {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				if err := cycle(b.ctx, f, uint(i%keys)); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	n := b.soak
	if b.scale < 1 {
		n = max(5*keys, int(float64(n)*b.scale))
	}
	warm := min(n/10, 20*keys)
	run(max(warm, keys))
	first := look()
	middle := first
	var busy time.Duration
	for i := range parts {
		busy += timed(func() { run((n - warm) / parts) })
		if i == parts/2-1 {
			middle = look()
		}
	}
	last := look()

	group := fmt.Sprintf("Soak: %s over %s keys; the floor is after the first %s", plural(n, "cycle"), table.Number(keys), table.Number(float64(max(warm, keys))))
	flat := func(name, unit string, t *target, get func(state) float64, div float64) {
		f := value(get(last) / div)
		m := get(middle) / div
		f.Min, f.Max = min(f.Value, m), max(f.Value, m)
		b.result.add(row{Group: group, Name: name, Unit: unit, Ours: f, Floor: value(get(first) / div), Target: t})
	}
	b.result.add(row{Group: group, Name: fmt.Sprintf("cycles per second, %d workers", workers), Unit: "/s", Ours: value(float64(n-warm) / busy.Seconds())})
	flat("size of env_locks with indexes", "KiB", ratioAtMost(1.5), func(s state) float64 { return s.locks }, 1024)
	flat("size of env_lock_state with index", "KiB", ratioAtMost(1.5), func(s state) float64 { return s.states }, 1024)
	flat("dead tuples", "", nil, func(s state) float64 { return s.dead }, 1)
	flat("HOT updates of all", "%", &target{Bound: 90, AtLeast: true}, func(s state) float64 { return 100 * s.hot / max(1, s.updates) }, 1)
	flat("heap of this process", "MiB", ratioAtMost(1.5), func(s state) float64 { return s.goHeap }, 1<<20)
	if last.rss > 0 {
		flat("resident memory of this process", "MiB", ratioAtMost(1.5), func(s state) float64 { return s.rss }, 1<<20)
	}
}

// residentBytes returns this process's memory according to the system, or 0 if the system does not
// provide it.
func residentBytes() float64 {
	text, err := os.ReadFile("/proc/self/statm")
	var total, resident float64
	if _, scanErr := fmt.Sscan(string(text), &total, &resident); err != nil || scanErr != nil {
		return 0
	}
	return resident * float64(os.Getpagesize())
}
