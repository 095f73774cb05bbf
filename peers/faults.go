package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// faults kills processes, restarts stores and cuts a network. All peers meet a fault together,
// because most of the time is spent waiting.
func (b *bench) faults(stores map[storeKind]store) error {
	f := &faultBench{bench: b, stores: stores}
	err := f.silenceResetAndKill()
	if !b.quick {
		err = errors.Join(err, f.restart(true))
	}
	return errors.Join(err, f.restart(false))
}

type faultBench struct {
	*bench
	stores map[storeKind]store
	next   int // the next unused key
}

// keys returns the first of n unused keys.
func (f *faultBench) keys(n int) int {
	f.next += n
	return f.next - n
}

// together runs a function for all peers concurrently, and inTurn for one after the other.
func (f *faultBench) together(do func(*subject) error) error { return f.forEach(len(f.peers), do) }
func (f *faultBench) inTurn(do func(*subject) error) error   { return f.forEach(1, do) }

func (f *faultBench) forEach(concurrently int, do func(*subject) error) error {
	return each(len(f.peers), concurrently, func(i int) error {
		if err := do(f.peers[i]); err != nil {
			return fmt.Errorf("%s: %w", f.peers[i].Name, err)
		}
		return nil
	})
}

// victim is a process that holds locks, behind a separate network.
type victim struct {
	net   *relay
	child *child
	first int // key
}

func (f *faultBench) victim(p *subject, first int) (*victim, error) {
	s := f.stores[p.store]
	net, err := newRelay(s.address())
	if err != nil {
		return nil, err
	}
	c, err := startChild(f.ctx, childSpec{
		Peer: p.ID, URI: s.uri(net.address), First: first, Count: f.holds,
		Options: options{TTL: f.ttl, Keep: true, Connections: f.holds + 4},
	})
	if err != nil {
		net.close()
		return nil, err
	}
	return &victim{net, c, first}, nil
}

func (v *victim) close() {
	if v != nil {
		v.child.kill()
		v.net.close()
	}
}

// victims creates one for each peer.
func (f *faultBench) victims() (map[string]*victim, func(), error) {
	var mu sync.Mutex // guards all
	all := map[string]*victim{}
	first := map[string]int{}
	for _, p := range f.peers {
		first[p.ID] = f.keys(f.holds)
	}
	err := f.together(func(p *subject) error {
		v, err := f.victim(p, first[p.ID])
		mu.Lock()
		defer mu.Unlock()
		all[p.ID] = v
		return err
	})
	closeAll := func() {
		for _, v := range all {
			v.close()
		}
	}
	if err != nil {
		closeAll()
		return nil, nil, err
	}
	return all, closeAll, nil
}

// survivors counts the holds that are not affected: their holder may continue, another process does
// not get the lock, and the release reports that it was held.
func (f *faultBench) survivors(p *subject, v *victim) (*survival, error) {
	s := f.stores[p.store]
	stranger, err := p.open(f.ctx, s.uri(s.address()), options{TTL: f.ttl, Connections: 16})
	if err != nil {
		return nil, err
	}
	defer func() { _ = stranger.Close() }()
	alive, err := v.child.ask(askAlive)
	if err != nil {
		return nil, err
	}
	taken := make([]bool, f.holds)
	err = each(f.holds, 50, func(i int) error {
		ctx, cancel := context.WithTimeout(f.ctx, 20*time.Second)
		defer cancel()
		h, err := stranger.try(ctx, v.first+i)
		// The response of the last attempt took too long.
		for tries := 0; err != nil && !errors.Is(err, errHeld) && tries < 3; tries++ {
			h, err = stranger.try(ctx, v.first+i)
		}
		if errors.Is(err, errHeld) {
			return nil
		}
		if err != nil {
			return err
		}
		taken[i] = true
		return h.release(ctx)
	})
	if err != nil {
		return nil, err
	}
	released, err := v.child.ask(askRelease)
	if err != nil {
		return nil, err
	}
	result := &survival{Of: f.holds}
	for i := range f.holds {
		switch {
		case alive[i] && !taken[i] && released[i]:
			result.Survived++
		case alive[i] && taken[i]:
			result.Unaware++
		}
	}
	return result, nil
}

// restart ends the stores, cleanly or by SIGKILL, and starts them again. The holds are counted
// after all leases that are not refreshed have ended.
func (f *faultBench) restart(clean bool) error {
	victims, closeVictims, err := f.victims()
	if err != nil {
		return err
	}
	defer closeVictims()
	time.Sleep(f.ttl / 10)
	down := map[storeKind]time.Duration{}
	// The stores restart one after the other, so that each has the whole machine.
	for kind, s := range f.stores {
		start := time.Now()
		if err := errors.Join(s.stop(clean), s.start(f.ctx)); err != nil {
			return err
		}
		down[kind] = time.Since(start)
	}
	time.Sleep(f.ttl + f.ttl/5)
	return f.inTurn(func(p *subject) error {
		r, err := f.survivors(p, victims[p.ID])
		if err != nil {
			return err
		}
		r.LastedMS = ms(down[p.store])
		if clean {
			p.result.Restart = r
		} else {
			p.result.Crash = r
		}
		return nil
	})
}

// silenceResetAndKill makes, in the same time, the network of one victim silent and resets that of
// another, and kills processes of a third.
func (f *faultBench) silenceResetAndKill() error {
	silent, closeSilent, err := f.victims()
	if err != nil {
		return err
	}
	defer closeSilent()
	refused, closeRefused, err := f.victims()
	if err != nil {
		return err
	}
	defer closeRefused()
	killed := make(chan error, 1)
	go func() { killed <- f.kills() }()
	time.Sleep(f.ttl / 10)
	err = each(len(f.peers), len(f.peers), func(i int) error {
		// The pause prevents that all peers reconnect at the same moment.
		time.Sleep(time.Duration(i) * f.cut / 20)
		p := f.peers[i]
		return f.cutOff(p, silent[p.ID], refused[p.ID])
	})
	if err == nil {
		time.Sleep(f.ttl - f.cut + f.ttl/5)
		err = f.inTurn(func(p *subject) error {
			silence, err1 := f.survivors(p, silent[p.ID])
			reset, err2 := f.survivors(p, refused[p.ID])
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			silence.LastedMS, reset.LastedMS = p.result.Silence.LastedMS, p.result.Reset.LastedMS
			p.result.Silence, p.result.Reset = silence, reset
			return nil
		})
	}
	return errors.Join(err, <-killed)
}

// cutOff makes the network of one victim silent for some time, and resets that of another one.
func (f *faultBench) cutOff(p *subject, silent, refused *victim) error {
	p.result.Silence, p.result.Reset = &survival{}, &survival{}
	var running sync.WaitGroup
	running.Go(func() {
		start := time.Now()
		silent.net.setSilent(true)
		time.Sleep(f.cut)
		silent.net.setSilent(false)
		p.result.Silence.LastedMS = ms(time.Since(start))
	})
	start := time.Now()
	refused.net.refuse()
	time.Sleep(f.cut - time.Since(start))
	err := refused.net.admit()
	p.result.Reset.LastedMS = ms(time.Since(start))
	running.Wait()
	return err
}

// kills kills a process that holds a lock by SIGKILL, while another process waits for the lock.
func (f *faultBench) kills() error {
	type key struct {
		peer string
		n    int
	}
	victims := 3
	if f.quick {
		victims = 1
	}
	keys := map[key]int{}
	for _, p := range f.peers {
		for n := range victims {
			keys[key{p.ID, n}] = f.keys(1)
		}
	}
	return f.together(func(p *subject) error {
		s := f.stores[p.store]
		c, err := p.open(f.ctx, s.uri(s.address()), options{TTL: f.ttl, Connections: victims + 1})
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		waits := make([]float64, victims)
		fenced := make([]bool, victims)
		tokens := make([][2]int64, victims)
		err = each(victims, victims, func(n int) error {
			// The holders are killed one after the other, so that they are not killed at the same
			// time after a refresh.
			age := time.Duration(n+1) * f.ttl / 8
			var err error
			waits[n], tokens[n], err = f.killed(p, c, keys[key{p.ID, n}], age)
			fenced[n] = tokens[n][0] != 0 && tokens[n][1] > tokens[n][0]
			return err
		})
		if err != nil {
			return err
		}
		p.result.Kill = &killResult{Seconds: spread(waits), Fenced: !slices.Contains(fenced, false), Tokens: tokens[0]}
		return nil
	})
}

func (f *faultBench) killed(p *subject, c client, key int, age time.Duration) (seconds float64, tokens [2]int64, err error) {
	s := f.stores[p.store]
	holder, err := startChild(f.ctx, childSpec{
		Peer: p.ID, URI: s.uri(s.address()), Options: options{TTL: f.ttl, Keep: true, Connections: 2}, First: key, Count: 1,
	})
	if err != nil {
		return 0, tokens, err
	}
	time.Sleep(age)
	type arrival struct {
		hold hold
		at   time.Time
		err  error
	}
	ctx, cancel := context.WithTimeout(f.ctx, 4*f.ttl)
	defer cancel()
	waiter := make(chan arrival, 1)
	go func() {
		h, err := c.lock(ctx, key)
		waiter <- arrival{h, time.Now(), err}
	}()
	// The waiter has begun to wait by then.
	time.Sleep(100 * time.Millisecond)
	start := time.Now()
	holder.kill()
	a := <-waiter
	if a.err != nil {
		return 0, tokens, a.err
	}
	tokens = [2]int64{holder.report.Token, a.hold.token()}
	return a.at.Sub(start).Seconds(), tokens, a.hold.release(ctx)
}
