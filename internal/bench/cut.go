package main

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/preemptable/locker"
)

// cut measures many busy callers of a provider whose connections are ended again and again.
func (b *bench) cut() {
	const callers, times = 256, 8
	uri, drop := b.database()
	defer drop()
	admin := openAdmin(uri)
	defer func() { _ = admin.Close() }()
	p := newProvider(uri, locker.WithLockTimeout(20*time.Second))
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	check(each(callers, func(i int) error { return cycle(b.ctx, f, uint(i)) }))

	between := max(300*time.Millisecond, b.span(time.Second))
	undisturbed := b.busy(f, callers, func() { time.Sleep(3 * between) })
	ended := 0
	cut := b.busy(f, callers, func() {
		for range times {
			time.Sleep(between)
			ended += b.terminate(admin, uri)
		}
		time.Sleep(between)
	})
	if undisturbed.first != nil || cut.first != nil {
		fmt.Fprintln(os.Stderr, "bench: the first errors of busy callers:", undisturbed.first, "and, cut:", cut.first)
	}
	group := fmt.Sprintf("%d busy callers, whose connections are ended %d times", callers, times)
	b.result.add(
		row{Group: group, Name: "errors", Ours: value(float64(cut.errors)), Floor: value(float64(undisturbed.errors)), What: "without cuts", Target: atMost(0)},
		row{Group: group, Name: "connections ended", Ours: value(float64(ended))},
		row{Group: group, Name: "cycles per second", Unit: "/s", Ours: value(cut.rate), Floor: value(undisturbed.rate), What: "without cuts"},
		row{Group: group, Name: "longest cycle", Unit: "ms", Ours: value(ms(cut.longest)), Floor: value(ms(undisturbed.longest)), What: "without cuts"},
	)
}

// business is the result of busy callers.
type business struct {
	errors  int
	first   error
	rate    float64 // per second
	longest time.Duration
}

// busy lets callers lock and release, each a separate key, until during returns.
func (b *bench) busy(f locker.PreemptiveLockerFactory, callers int, during func()) business {
	var over atomic.Bool
	var mu sync.Mutex // guards result and cycles
	var result business
	cycles := 0
	call := func(pr uint) {
		start := time.Now()
		err := cycle(b.ctx, f, pr)
		took := time.Since(start)
		mu.Lock()
		defer mu.Unlock()
		result.longest = max(result.longest, took)
		if err == nil {
			cycles++
			return
		}
		result.errors++
		if result.first == nil {
			result.first = err
		}
	}
	var running sync.WaitGroup
	start := time.Now()
	for i := range callers {
		running.Go(func() {
			for !over.Load() {
				call(uint(i + 1))
			}
		})
	}
	err := caught(during)
	over.Store(true)
	running.Wait()
	check(err)
	result.rate = float64(cycles) / time.Since(start).Seconds()
	return result
}

// connected counts the connections of a provider, at work and when it is idle.
func (b *bench) connected() {
	uri, drop := b.database()
	defer drop()
	admin := openAdmin(uri)
	defer func() { _ = admin.Close() }()
	timeout := max(time.Second, b.span(10*time.Second)) // 10 s is the default
	p := newProvider(uri, locker.WithSessionTimeout(timeout))
	defer func() { _ = p.Close() }()
	f := newFactory(p)
	peak := b.watchConnections(admin, uri)
	perSecond(256, b.span(3*time.Second), func(i int) error { return cycle(b.ctx, f, uint(i+1)) })
	most := peak()

	// Connections that are not needed are closed after the session timeout.
	time.Sleep(timeout + 2*time.Second)
	idle, err := b.connections(admin, uri)
	check(err)
	heartbeat := timeout * 3 / 10
	const group = "Connections of one provider"
	b.result.add(
		row{Group: group, Name: "256 callers, at most", Ours: value(float64(most)), Target: atMost(4)},
		row{Group: group, Name: "idle, nothing held", Ours: value(float64(idle)), Target: atMost(2)},
		row{
			Group: group, Name: "transactions per second, idle, nothing held", Unit: "/s", Ours: value(b.transactions(admin, uri, 9*time.Second)),
			Floor: value(2 / heartbeat.Seconds()), What: "a heartbeat on each of 2 connections",
		},
	)
}
