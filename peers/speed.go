package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// runner is a subject with two clients, like those of two processes.
type runner struct {
	*subject
	uri  string
	a, b client

	cycles, handOver, notified rounds
	rates                      map[int][]float64
}

// pooled is the number of connections of a pool that needs one for each hold.
const pooled = 64

var levels = []int{16, 256}

// speed measures callers with separate keys first, and then one that waits for the other.
func (b *bench) speed() (err error) {
	stores, closeStores, err := b.stores(speedConnections)
	if err != nil {
		return err
	}
	defer closeStores()
	pg := stores[postgres]
	if err := b.flush(pg.uri(pg.address())); err != nil {
		return err
	}
	var all []*runner
	defer func() {
		for _, r := range all {
			for _, c := range []io.Closer{r.a, r.b} {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	floor := &subject{&peer{ID: "floor", Name: floorName, store: postgres, open: openFloor}, &peerResult{ID: "floor", Name: floorName}}
	for _, p := range append(b.peers, floor) {
		r := &runner{subject: p, uri: stores[p.store].uri(stores[p.store].address()), rates: map[int][]float64{}}
		if r.a, err = p.open(b.ctx, r.uri, options{TTL: b.ttl, Connections: pooled}); err != nil {
			return fmt.Errorf("%s: %w", p.Name, err)
		}
		// The second client waits, and does little else.
		if r.b, err = p.open(b.ctx, r.uri, options{TTL: b.ttl, Connections: 4}); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", p.Name, err), r.a.Close())
		}
		all = append(all, r)
	}
	for _, section := range []func([]*runner) error{b.warmUp, b.alone, b.many, b.handOvers, b.preemption} {
		if err := section(all); err != nil {
			return err
		}
	}
	for _, r := range all {
		r.result.CycleMS, r.result.HandOverMS, r.result.NotifiedMS = r.cycles.figure(), r.handOver.figure(), r.notified.figure()
		r.result.Rates = map[int]*figure{}
		for level, rates := range r.rates {
			r.result.Rates[level] = spread(rates)
		}
	}
	b.result.Floor = floor.result
	return nil
}

// floorName is the name of the row of the tables that is not a lock.
const floorName = "*floor: raw rows of PostgreSQL*"

func cycle(ctx context.Context, c client, key int) error {
	h, err := c.lock(ctx, key)
	if err != nil {
		return err
	}
	return h.release(ctx)
}

// warmUp opens the connections and creates the rows.
func (b *bench) warmUp(all []*runner) error {
	for _, r := range all {
		if err := each(512, 256, func(i int) error { return cycle(b.ctx, r.a, i) }); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
		if err := each(16, 2, func(i int) error { return cycle(b.ctx, r.b, i) }); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
	}
	return nil
}

// alone measures one caller and one lock, in blocks that take turns.
func (b *bench) alone(all []*runner) error {
	for range 9 {
		for _, r := range all {
			r.cycles.begin()
		}
		for range b.count(16) {
			for _, r := range all {
				for range 10 {
					start := time.Now()
					if err := cycle(b.ctx, r.a, 1); err != nil {
						return fmt.Errorf("%s: %w", r.Name, err)
					}
					r.cycles.add(time.Since(start))
				}
			}
		}
	}
	return nil
}

// many measures many callers in one process, each with a separate key.
func (b *bench) many(all []*runner) error {
	d, repeat := 700*time.Millisecond, 5
	if b.quick {
		d, repeat = 150*time.Millisecond, 1
	}
	for range repeat {
		for _, level := range levels {
			for _, r := range all {
				rate, err := perSecond(level, d, func(i int) error { return cycle(b.ctx, r.a, i) })
				if err != nil {
					return fmt.Errorf("%s: %w", r.Name, err)
				}
				r.rates[level] = append(r.rates[level], rate)
			}
		}
	}
	return nil
}

// perSecond lets n workers repeat f for a while, and returns how often it ran per second.
func perSecond(n int, d time.Duration, f func(worker int) error) (float64, error) {
	var total atomic.Int64
	start := time.Now()
	err := each(n, n, func(i int) error {
		for time.Since(start) < d {
			if err := f(i); err != nil {
				return err
			}
			total.Add(1)
		}
		return nil
	})
	return float64(total.Load()) / time.Since(start).Seconds(), err
}

// handOvers measures one process that holds and another one that waits, from the release to the
// lock of the waiter.
func (b *bench) handOvers(all []*runner) error {
	var floor *floorHandOver
	defer func() {
		if floor != nil {
			floor.close()
		}
	}()
	for range b.count(5) {
		for _, r := range all {
			r.handOver.begin()
		}
		for range b.count(6) {
			for _, r := range all {
				if r.ID == "floor" {
					if floor == nil {
						f, err := newFloorHandOver(b.ctx, r.uri)
						if err != nil {
							return err
						}
						floor = f
					}
					took, err := floor.once(b.ctx)
					if err != nil {
						return err
					}
					r.handOver.add(took)
					continue
				}
				took, err := handOver(b.ctx, r.a, r.b)
				if err != nil {
					return fmt.Errorf("%s: %w", r.Name, err)
				}
				r.handOver.add(took)
			}
		}
	}
	return nil
}

func handOver(ctx context.Context, from, to client) (time.Duration, error) {
	const key = 600
	h, err := from.lock(ctx, key)
	if err != nil {
		return 0, err
	}
	type arrival struct {
		hold hold
		at   time.Time
		err  error
	}
	waiter := make(chan arrival, 1)
	go func() {
		h, err := to.lock(ctx, key)
		waiter <- arrival{h, time.Now(), err}
	}()
	// The waiter waits by then. If it polls, it is at some moment between two polls.
	time.Sleep(20*time.Millisecond + rand.N(60*time.Millisecond))
	start := time.Now()
	if err := h.release(ctx); err != nil {
		return 0, err
	}
	a := <-waiter
	if a.err != nil {
		return 0, a.err
	}
	return a.at.Sub(start), a.hold.release(ctx)
}

// preemption measures how soon a holder is notified of a newer claim. No other peer notifies its
// holders.
func (b *bench) preemption(all []*runner) error {
	for _, r := range all {
		if r.ID != "locker" {
			continue
		}
		for range 5 {
			r.notified.begin()
			for range b.count(24) {
				took, err := notified(b.ctx, r.a, r.b)
				if err != nil {
					return err
				}
				r.notified.add(took)
			}
		}
	}
	return nil
}

func notified(ctx context.Context, from, to client) (time.Duration, error) {
	const key = 601
	h, err := from.lock(ctx, key)
	if err != nil {
		return 0, err
	}
	// All earlier work has ended by then.
	time.Sleep(5 * time.Millisecond)
	waiter := make(chan error, 1)
	start := time.Now()
	go func() {
		h, err := to.lock(ctx, key)
		if err == nil {
			err = h.release(ctx)
		}
		waiter <- err
	}()
	select {
	case <-h.(*lockerHold).stop:
	case err := <-waiter:
		return 0, errors.Join(errors.New("the waiter returned before the release"), err)
	}
	took := time.Since(start)
	return took, errors.Join(h.release(ctx), <-waiter)
}
