package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/bsm/redislock"
	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"
)

// quiet discards the messages of go-redis about connections that were cut deliberately.
type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

func openRedis(ctx context.Context, address string) (*redis.Client, error) {
	redis.SetLogger(quiet{})
	c := redis.NewClient(&redis.Options{Addr: address})
	if err := c.Ping(ctx).Err(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// redsyncClient is one Redsync on one Redis server. With one server the quorum is that server.
type redsyncClient struct {
	redis *redis.Client
	sync  *redsync.Redsync
	o     options
}

func openRedsync(ctx context.Context, address string, o options) (client, error) {
	c, err := openRedis(ctx, address)
	if err != nil {
		return nil, err
	}
	return &redsyncClient{c, redsync.New(goredis.NewPool(c)), o}, nil
}

func (c *redsyncClient) take(ctx context.Context, key int, lock func(*redsync.Mutex, context.Context) error) (hold, error) {
	m := c.sync.NewMutex(fmt.Sprintf("redsync:%d", key), redsync.WithExpiry(c.o.TTL), redsync.WithTries(1_000_000))
	if err := lock(m, ctx); err != nil {
		return nil, err
	}
	h := &redsyncHold{mutex: m}
	if c.o.Keep {
		h.keeper = keep(c.o.TTL, h.refresh)
	}
	return h, nil
}

func (c *redsyncClient) lock(ctx context.Context, key int) (hold, error) {
	return c.take(ctx, key, (*redsync.Mutex).LockContext)
}

func (c *redsyncClient) try(ctx context.Context, key int) (hold, error) {
	h, err := c.take(ctx, key, (*redsync.Mutex).TryLockContext)
	if taken := new(redsync.ErrTaken); errors.As(err, &taken) {
		return nil, errHeld
	}
	return h, err
}

func (c *redsyncClient) Close() error { return c.redis.Close() }

type redsyncHold struct {
	mutex  *redsync.Mutex
	keeper *keeper // nil if it is not refreshed
}

// refresh returns false if the lock is not held any longer, or an error if that is not known.
func (h *redsyncHold) refresh(ctx context.Context) (bool, error) {
	ok, err := h.mutex.ExtendContext(ctx)
	if taken := new(redsync.ErrTaken); errors.As(err, &taken) {
		return false, nil
	}
	return ok, err
}

func (h *redsyncHold) release(ctx context.Context) error {
	h.keeper.stop()
	ok, err := h.mutex.UnlockContext(ctx)
	if err == nil && !ok {
		err = errors.New("the lock was not held")
	}
	return err
}

func (h *redsyncHold) alive(context.Context) bool { return h.keeper.alive() }
func (h *redsyncHold) token() int64               { return 0 }

// redislockClient is one client of redislock.
type redislockClient struct {
	redis *redis.Client
	lease *redislock.Client
	o     options
}

func openRedislock(ctx context.Context, address string, o options) (client, error) {
	c, err := openRedis(ctx, address)
	if err != nil {
		return nil, err
	}
	return &redislockClient{c, redislock.New(c), o}, nil
}

func (c *redislockClient) take(ctx context.Context, key int, retry redislock.RetryStrategy) (hold, error) {
	l, err := c.lease.Obtain(ctx, fmt.Sprintf("redislock:%d", key), c.o.TTL, &redislock.Options{RetryStrategy: retry})
	if err != nil {
		return nil, err
	}
	h := &redislockHold{lock: l, ttl: c.o.TTL}
	if c.o.Keep {
		h.keeper = keep(c.o.TTL, h.refresh)
	}
	return h, nil
}

func (c *redislockClient) lock(ctx context.Context, key int) (hold, error) {
	// Without a deadline Obtain would give up after the TTL.
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Hour)
		defer cancel()
	}
	return c.take(ctx, key, redislock.LinearBackoff(100*time.Millisecond))
}

func (c *redislockClient) try(ctx context.Context, key int) (hold, error) {
	h, err := c.take(ctx, key, redislock.NoRetry())
	if errors.Is(err, redislock.ErrNotObtained) {
		return nil, errHeld
	}
	return h, err
}

func (c *redislockClient) Close() error { return c.redis.Close() }

type redislockHold struct {
	lock   *redislock.Lock
	ttl    time.Duration
	keeper *keeper // nil if it is not refreshed
}

func (h *redislockHold) refresh(ctx context.Context) (bool, error) {
	err := h.lock.Refresh(ctx, h.ttl, nil)
	if errors.Is(err, redislock.ErrNotObtained) {
		return false, nil
	}
	return err == nil, err
}

func (h *redislockHold) release(ctx context.Context) error {
	h.keeper.stop()
	return h.lock.Release(ctx)
}

func (h *redislockHold) alive(context.Context) bool { return h.keeper.alive() }
func (h *redislockHold) token() int64               { return 0 }

// keeper refreshes a hold whose library leaves that to its user: every third of the TTL, and more
// often while a refresh fails.
type keeper struct {
	cancel context.CancelFunc
	done   chan struct{}
	lost   chan struct{} // closed when the hold is lost
}

func keep(ttl time.Duration, refresh func(context.Context) (held bool, err error)) *keeper {
	ctx, cancel := context.WithCancel(context.Background())
	k := &keeper{cancel: cancel, done: make(chan struct{}), lost: make(chan struct{})}
	go k.run(ctx, ttl, refresh)
	return k
}

func (k *keeper) run(ctx context.Context, ttl time.Duration, refresh func(context.Context) (bool, error)) {
	defer close(k.done)
	// good is when the last good refresh began. The lease is known to last until a TTL later.
	good := time.Now()
	pause := ttl / 3
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		began := time.Now()
		attempt, cancel := context.WithTimeout(ctx, ttl/5)
		held, err := refresh(attempt)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case held:
			good, pause = began, ttl/3
		case err == nil || time.Since(good) > ttl:
			close(k.lost)
			return
		default:
			pause = ttl / 20
		}
	}
}

// stop ends the refreshing, and waits for a refresh that is in flight.
func (k *keeper) stop() {
	if k != nil {
		k.cancel()
		<-k.done
	}
}

func (k *keeper) alive() bool {
	if k == nil {
		return true
	}
	select {
	case <-k.lost:
		return false
	default:
		return true
	}
}
