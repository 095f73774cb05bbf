package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/preemptable/locker"
)

// claimOrder makes the claims on one pull request follow the order in which its deliveries arrived at this
// replica.
//
// The database puts claims in the order in which they are announced. Do announces and then waits for the lock
// in one call, so of two goroutines started a moment apart either might announce first. Therefore a delivery
// waits for its predecessor to have announced, which takes a millisecond; it does not wait for the
// predecessor's lock. Between replicas there is no such order, and GitHub promises none.
type claimOrder struct {
	mu   sync.Mutex
	last map[pullRequest]*turn // the last turn taken, while it has not been passed on
}

type pullRequest struct {
	repo string
	pr   uint
}

// turn is one delivery's place in the order.
type turn struct {
	before *turn         // nil when there was nobody to wait for
	passed chan struct{} // closed once the claim has been announced, or has failed to be
	pass   func()        // closes it; may be called more than once
}

// join takes the next place in the order of a pull request.
func (o *claimOrder) join(repo string, pr uint) *turn {
	key := pullRequest{repo, pr}
	o.mu.Lock()
	defer o.mu.Unlock()
	t := &turn{before: o.last[key], passed: make(chan struct{})}
	t.pass = sync.OnceFunc(func() {
		close(t.passed)
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.last[key] == t {
			delete(o.last, key)
		}
	})
	if o.last == nil {
		o.last = make(map[pullRequest]*turn)
	}
	o.last[key] = t
	return t
}

// wait returns when the predecessor's claim has been announced. It needs no context: a predecessor whose
// context ends passes its turn.
func (t *turn) wait() {
	if t.before != nil {
		<-t.before.passed
		t.before = nil // or the whole history would stay reachable
	}
}

type turnKey struct{}

// context carries the turn to the locks of a turnProvider.
func (t *turn) context(ctx context.Context) context.Context {
	return context.WithValue(ctx, turnKey{}, t)
}

// turnProvider is a provider whose locks pass their delivery's turn on once they have announced its claim.
type turnProvider struct{ locker.LockProvider }

func (p turnProvider) New(ctx context.Context, key int64, event string) (locker.PreemptableLock, error) {
	inner, err := p.LockProvider.New(ctx, key, event)
	if err != nil {
		return nil, err
	}
	whole, ok := inner.(wholeLock)
	if !ok {
		return nil, fmt.Errorf("%T lacks a method of wholeLock", inner)
	}
	t, _ := ctx.Value(turnKey{}).(*turn)
	return turnLock{whole, t}, nil
}

// wholeLock is a lock with all that PreemptiveLocker makes use of. A wrapper that hid the optional methods
// would cost the fencing token and, worse, the lock delay after a predecessor that died.
type wholeLock interface {
	locker.PreemptableLock
	Token() int64
	Drain() time.Duration
	Cause() error
}

type turnLock struct {
	wholeLock
	turn *turn
}

func (l turnLock) Notify(ctx context.Context) error {
	err := l.wholeLock.Notify(ctx)
	if l.turn != nil {
		l.turn.pass()
	}
	return err
}
