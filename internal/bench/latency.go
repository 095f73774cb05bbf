package main

import (
	"time"

	"github.com/preemptable/locker"
)

// cycle measures one lock without contention.
func (b *bench) cycle() {
	uri, drop := b.database()
	defer drop()
	p := newProvider(uri)
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	raw := newRawPair(uri)
	defer raw.close()
	ours := func() { check(cycle(b.ctx, f, 1)) }
	floor := func() { check(raw.run(42)) }
	for range 50 {
		ours()
		floor()
	}
	alternating, blocks := newComparison(), newComparison()
	for range 15 {
		alternating.round(b.count(400), 1, ours, floor)
		blocks.round(b.count(400), b.count(400), ours, floor)
	}
	makeRows(uri, 1)
	rows := newRowPair(uri)
	defer rows.close()
	durable := newComparison()
	for range 15 {
		durable.round(b.count(400), 1, ours, func() { check(rows.run(0)) })
	}
	add := func(name, what string, c *comparison, t *target) {
		b.result.add(row{
			Group: "One lock, uncontended", Name: name, Unit: "ms", Ours: c.ours.figure(), Floor: c.floor.figure(),
			What: what, Ratio: c.ratio(), Target: t,
		})
	}
	const raw2 = "pg_advisory_lock + unlock"
	add("Lock + Release, alternating with the floor", raw2, alternating, ratioAtMost(4.2))
	add("Lock + Release, against a raw lock in a row, which is durable", "two one-row UPDATEs, one flush", durable, nil)
	// A backend that does nothing else stays in the processor's caches and responds faster.
	add("Lock + Release, each many times in a row", raw2, blocks, nil)
}

// pause lets all work end before a sample, of the library or of the floor.
const pause = 5 * time.Millisecond

// attempt is a Lock that runs in a separate goroutine.
type attempt struct {
	lock locker.PreemptableLock
	done chan arrival
	held <-chan locker.NotificationPayload
}

type arrival struct {
	at  time.Time
	ch  <-chan locker.NotificationPayload
	err error
}

func (b *bench) attempt(p locker.LockProvider, key int64) *attempt {
	l, err := p.New(b.ctx, key, "benchmark")
	check(err)
	return &attempt{lock: l, done: make(chan arrival, 1)}
}

// claim announces a claim, and returns when the call began.
func (b *bench) claim(a *attempt) time.Time {
	start := time.Now()
	check(a.lock.Notify(b.ctx))
	return start
}

func (b *bench) wait(a *attempt) {
	go func() {
		ch, err := a.lock.Lock(b.ctx)
		a.done <- arrival{time.Now(), ch, err}
	}()
}

// told returns a channel that receives the time at which a goroutine that waits for the holder's
// channel gets the payload.
func told(ch <-chan locker.NotificationPayload) <-chan time.Time {
	at := make(chan time.Time, 1)
	go func() {
		<-ch
		at <- time.Now()
	}()
	return at
}

// events measures how fast messages travel between two providers. The floor uses another database,
// because a NOTIFY wakes all listeners of a database.
func (b *bench) events() {
	uri, drop := b.database()
	defer drop()
	rawURI, dropRaw := b.database()
	defer dropRaw()
	raw := newRawHandOver(rawURI)
	defer raw.close()
	p, q := newProvider(uri), newProvider(uri)
	defer func() { _ = p.Close(); _ = q.Close() }()

	preemption, displacement, handOver, durable, whole := newComparison(), newComparison(), newComparison(), newComparison(), newComparison()
	sample := func(c *comparison, ours func() time.Duration) time.Duration {
		time.Sleep(pause)
		c.floor.add(raw.once())
		time.Sleep(pause)
		took := ours()
		c.ours.add(took)
		return took
	}
	const key = 7
	holder := b.attempt(p, key)
	b.claim(holder)
	b.wait(holder)
	first := <-holder.done
	check(first.err)
	holder.held = first.ch
	// In one turn a holds at p, b claims at q and waits, c claims at p, d claims at q, a releases,
	// and d holds.
	turn := func() {
		var second, third, fourth *attempt
		displace := func(old, new *attempt) func() time.Duration {
			return func() time.Duration {
				start := b.claim(new)
				gone := <-old.done
				if gone.err == nil {
					check(old.lock.Unlock(b.ctx))
				}
				return gone.at.Sub(start)
			}
		}
		second = b.attempt(q, key)
		at := told(holder.held)
		sample(preemption, func() time.Duration {
			start := b.claim(second)
			return (<-at).Sub(start)
		})
		b.wait(second)
		third = b.attempt(p, key)
		sample(displacement, displace(second, third))
		b.wait(third)
		fourth = b.attempt(q, key)
		sample(displacement, displace(third, fourth))
		b.wait(fourth)
		time.Sleep(pause)
		durable.floor.add(raw.handOver())
		durable.ours.add(sample(handOver, func() time.Duration {
			start := time.Now()
			check(holder.lock.Unlock(b.ctx))
			a := <-fourth.done
			check(a.err)
			fourth.held = a.ch
			return a.at.Sub(start)
		}))
		holder = fourth
		p, q = q, p
	}
	// The same preemption is measured for a user of a PreemptiveLocker, including the look-up of
	// the key.
	f, g := newFactory(p), newFactory(q)
	old := f("org/repo", 1, "benchmark")
	oldCh, err := old.Lock(b.ctx)
	check(err)
	wholeTurn := func() {
		next := g("org/repo", 1, "benchmark")
		at, done := told(oldCh), make(chan arrival, 1)
		sample(whole, func() time.Duration {
			start := time.Now()
			go func() {
				ch, err := next.Lock(b.ctx)
				done <- arrival{ch: ch, err: err}
			}()
			return (<-at).Sub(start)
		})
		check(old.Release(b.ctx))
		a := <-done
		check(a.err)
		old, oldCh = next, a.ch
		f, g = g, f
	}
	all := []*comparison{preemption, displacement, handOver, durable, whole}
	for i := range 9 {
		for _, c := range all {
			c.begin()
		}
		n := b.count(25)
		if i == 0 {
			n = 5
		}
		for range n {
			turn()
			wholeTurn()
		}
		// The first round is for warming up.
		if i == 0 {
			for _, c := range all {
				c.ours, c.floor = nil, nil
			}
		}
	}
	check(holder.lock.Unlock(b.ctx))
	check(old.Release(b.ctx))

	const group = "Notifications between two providers"
	add := func(name string, c *comparison, t *target) {
		what := "pg_notify → receive"
		if c == durable {
			what = "one-row UPDATE with pg_notify → receive → one-row UPDATE, one flush"
		}
		b.result.add(row{
			Group: group, Name: name, Unit: "ms", Ours: c.ours.figure(), Floor: c.floor.figure(),
			What: what, Ratio: c.ratio(), Target: t,
		})
	}
	add("preemption: claim → holder's channel", preemption, ratioAtMost(2.1))
	add("preemption, from PreemptiveLocker.Lock on", whole, nil)
	add("superseding: claim → older waiter is back", displacement, ratioAtMost(3.3))
	add("hand-over: release → waiter is back", handOver, ratioAtMost(4.5))
	add("hand-over, against that of a raw lock in a row, which is durable", durable, nil)
}
