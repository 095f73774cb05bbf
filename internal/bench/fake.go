package main

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/preemptable/locker"
)

// fake measures the in-memory provider, with one worker and with two that take the key from each
// other.
func (b *bench) fake() {
	p, err := locker.NewLockProvider(locker.FakeLockProviderKind, locker.WithPreemptionTimeout(time.Hour),
		locker.WithLockTimeout(2*time.Second))
	check(err)
	f := newFactory(p)
	var mu sync.Mutex
	n := b.count(20_000)
	c := &series{}
	for range 10 {
		// A context that cannot end costs nothing to watch.
		c.round(n, func() { check(cycle(context.Background(), f, 1)) }, func() {
			mu.Lock()
			mu.Unlock() //lint:ignore SA2001 the pair is what is measured
		})
	}
	bare := &series{}
	held := map[int64]uuid.UUID{}
	// last keeps the compiler from removing the unused result.
	var last any
	for range 10 {
		bare.round(n, func() { check(cycle(context.Background(), f, 1)) }, func() { last = barest(held) })
	}
	runtime.KeepAlive(last)
	const group = "The fake"
	b.result.add(
		row{Group: group, Name: "Lock + Release", Unit: "ns", Ours: spread(c.ours), Floor: spread(c.floor), What: "sync.Mutex", Target: atMost(2000)},
		row{Group: group, Name: "Lock + Release, against its parts", Unit: "ns", Ours: spread(bare.ours), Floor: spread(bare.floor), What: "an ID, 2 channels, 2 structs, 3 looks at the clock, a map entry"},
		row{Group: group, Name: "allocations per cycle", Ours: value(c.allocations), Target: atMost(12)},
	)

	// In the contended case each Lock notifies the other worker, which releases.
	c = &series{}
	for range 10 {
		c.contended(b, f, n/2)
	}
	b.result.add(
		row{Group: group, Name: "contended: Lock, be notified, Release", Unit: "ns", Ours: spread(c.ours), Floor: spread(c.floor), What: "two goroutines, two channels"},
		row{Group: group, Name: "allocations per contended cycle", Ours: value(c.allocations)},
		row{Group: group, Name: "holders that were not notified", Ours: value(float64(c.deaf.Load())), Target: atMost(0)},
	)
}

// barest does the minimum that a cycle needs.
func barest(held map[int64]uuid.UUID) any {
	type lock struct {
		ch    chan locker.NotificationPayload
		stop  chan struct{}
		times [3]time.Time
		_     [256]byte
	}
	l := &lock{ch: make(chan locker.NotificationPayload, 1), stop: make(chan struct{})}
	owner := &struct {
		l *lock
		_ [160]byte
	}{l: l}
	held[1] = uuid.New()
	for i := range l.times {
		l.times[i] = time.Now()
	}
	close(l.ch)
	delete(held, 1)
	return owner
}

// series contains nanoseconds per operation, by rounds.
type series struct {
	ours, floor []float64
	allocations float64
	deaf        atomic.Int64 // claims that waited in vain, because the holder was not notified
}

func (c *series) measure(n int, f func()) float64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	took := timed(f)
	runtime.ReadMemStats(&after)
	c.allocations = float64(after.Mallocs-before.Mallocs) / float64(n)
	return float64(took) / float64(n)
}

func (c *series) round(n int, ours, floor func()) {
	c.floor = append(c.floor, c.measure(n, func() {
		for range n {
			floor()
		}
	}))
	c.ours = append(c.ours, c.measure(n, func() {
		for range n {
			ours()
		}
	}))
}

func (c *series) contended(b *bench, f locker.PreemptiveLockerFactory, n int) {
	c.floor = append(c.floor, c.measure(n, func() {
		ping, pong := make(chan int), make(chan int)
		go func() {
			for i := range ping {
				pong <- i
			}
		}()
		for i := range n {
			ping <- i
			<-pong
		}
		close(ping)
	}))
	c.ours = append(c.ours, c.measure(n, func() {
		// The first worker that is done closes over, because the other one may wait in vain.
		over := make(chan struct{})
		var once sync.Once
		check(parallel(2, func(int) error {
			defer once.Do(func() { close(over) })
			for range n / 2 {
				l := f("org/repo", 1, "benchmark")
				ch, err := l.Lock(b.ctx)
				if errors.Is(err, locker.ErrLockPreempted) {
					continue
				}
				if errors.Is(err, locker.ErrLockTimeout) {
					c.deaf.Add(1)
					continue
				}
				if err != nil {
					return err
				}
				select {
				case <-ch:
				case <-over:
				}
				if err := l.Release(b.ctx); err != nil {
					return err
				}
			}
			return nil
		}))
	}))
}
