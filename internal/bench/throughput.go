package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/preemptable/locker"
)

const pooled = 64 // the number of the floor's connections

// throughput measures many workers on separate keys, and then many that compete for keys.
func (b *bench) throughput() {
	uri, drop := b.database()
	defer drop()
	p := newProvider(uri)
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	// The cycles create the rows.
	check(each(1024, func(i int) error { return cycle(b.ctx, f, uint(i)) }))
	pool := newRawPool(uri, pooled, newRawPair)
	floor := func(workers int, d time.Duration) float64 {
		return perSecond(workers, d, func(i int) error { return pool.run(int64(i)) })
	}
	const repeat = 5
	d := b.span(time.Second)

	levels := []int{1, 16, 256, 1024}
	results := make([]rates, len(levels))
	for range repeat {
		for i, n := range levels {
			results[i].ours = append(results[i].ours, perSecond(n, d, func(w int) error { return cycle(b.ctx, f, uint(w+1)) }))
			results[i].floor = append(results[i].floor, floor(n, d))
		}
	}
	add := func(group, name string, x int, r rates, what string, t *target) {
		b.result.add(row{
			Group: group, Name: name, X: float64(x), Unit: "/s", Ours: spread(r.ours), Floor: spread(r.floor),
			What: what, Ratio: r.ratio(), Target: t,
		})
	}
	for i, n := range levels {
		t := ratioAtLeast(2)
		if n != 256 {
			t = nil
		}
		add("Cycles per second, one provider", plural(n, "worker"), n, results[i], fmt.Sprintf("pairs on %d connections", pooled), t)
	}

	pool.close()
	makeRows(uri, 256)
	for _, n := range []int{4, 16} {
		b.severalProviders(uri, n, d)
	}
	b.fights(d)
}

// severalProviders measures n providers and, after each round, raw locks: advisory locks, and
// locks in rows, one by one and as many at a time as a provider has workers. Together they would
// need more connections than a stock server has, so each side connects anew.
func (b *bench) severalProviders(uri string, n int, d time.Duration) {
	const workers = 256
	share := workers / n
	floors := []struct {
		suffix, what     string
		connections, per int
		pair             func(uri string) *rawPair
		rates            rates
	}{
		{"", "pairs", pooled, 1, newRawPair, rates{}},
		{", against raw locks in rows, which are durable", "two one-row UPDATEs, one flush,", pooled, 1, newRowPair, rates{}},
		{
			fmt.Sprintf(", against raw locks in rows, %d at a time", share), fmt.Sprintf("two %d-row UPDATEs, one flush,", share), n, share,
			func(uri string) *rawPair { return newBatchPair(uri, share) }, rates{},
		},
	}
	for range 3 {
		ours := b.providers(uri, n, workers, d)
		for i := range floors {
			f := &floors[i]
			pool := newRawPool(uri, f.connections, f.pair)
			pair := func(w int) error { return pool.run(int64(w * f.per)) }
			perSecond(workers/f.per, d/4, pair)
			f.rates.ours = append(f.rates.ours, ours)
			f.rates.floor = append(f.rates.floor, perSecond(workers/f.per, d, pair)*float64(f.per))
			pool.close()
		}
	}
	for _, f := range floors {
		var t *target
		if n == 16 && f.suffix == "" {
			t = ratioAtLeast(1.1)
		}
		b.result.add(row{
			Group: "Cycles per second, several providers", Name: fmt.Sprintf("%d workers on %d providers%s", workers, n, f.suffix), X: float64(n), Unit: "/s",
			Ours: spread(f.rates.ours), Floor: spread(f.rates.floor), What: fmt.Sprintf("%s on %d connections", f.what, f.connections),
			Ratio: f.rates.ratio(), Target: t,
		})
	}
}

// providers returns the cycles per second of workers on n providers.
func (b *bench) providers(uri string, n, workers int, d time.Duration) float64 {
	var factories []locker.PreemptiveLockerFactory
	for range n {
		p := newProvider(uri)
		defer func() { check(p.Close()) }()
		factories = append(factories, newFactory(p))
	}
	work := func(w int) error { return cycle(b.ctx, factories[w%n], uint(w+1)) }
	check(parallel(workers, work)) // connects, however long that takes
	perSecond(workers, d/4, work)  // for warming up
	return perSecond(workers, d, work)
}

// fights lets two workers at two providers take each key from each other again and again.
func (b *bench) fights(d time.Duration) {
	const keys, senders = 64, 64
	uri, drop := b.database()
	defer drop()
	rawURI, dropRaw := b.database()
	defer dropRaw()
	p, q := newProvider(uri), newProvider(uri)
	defer func() { _ = p.Close(); _ = q.Close() }()
	factories := []locker.PreemptiveLockerFactory{newFactory(p), newFactory(q)}
	for _, f := range factories {
		check(each(keys, func(i int) error { return cycle(b.ctx, f, uint(i)) }))
	}
	raw := newRawNotify(rawURI)
	defer raw.close()
	go func() {
		// The loop ends when the listener is closed.
		for range raw.listener.Notify {
		}
	}()
	var stmts []*statement
	for range senders {
		stmts = append(stmts, prepare(rawURI, "SELECT pg_notify('floor', $1)"))
	}
	defer func() {
		for _, s := range stmts {
			s.close()
		}
	}()
	var r rates
	for range 3 {
		start := time.Now()
		r.ours = append(r.ours, perSecond(2*keys, d, func(w int) error {
			l := factories[w%2]("org/repo", uint(w/2+1), "benchmark")
			ch, err := l.Lock(b.ctx)
			if errors.Is(err, locker.ErrLockPreempted) {
				return nil
			}
			if err != nil {
				return err
			}
			select {
			case <-ch:
			// The other worker has ended.
			case <-time.After(d + 100*time.Millisecond - time.Since(start)):
			}
			return l.Release(b.ctx)
		}))
		r.floor = append(r.floor, perSecond(senders, d, func(w int) error { return stmts[w].run("x") }))
	}
	b.result.add(row{
		Group: "Cycles per second, contended", Name: fmt.Sprintf("claims on %d keys, two providers on each", keys), Unit: "/s",
		Ours: spread(r.ours), Floor: spread(r.floor), What: fmt.Sprintf("pg_notify on %d connections", senders), Ratio: r.ratio(),
	})
}
