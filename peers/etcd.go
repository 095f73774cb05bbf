package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

// etcdClient is one client with one session, whose lease is shared by all locks of the process.
type etcdClient struct {
	client  *clientv3.Client
	session *concurrency.Session
}

func openEtcd(ctx context.Context, address string, o options) (client, error) {
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{address}, DialTimeout: 5 * time.Second, Context: ctx, Logger: zap.NewNop(),
	})
	if err != nil {
		return nil, err
	}
	s, err := concurrency.NewSession(c, concurrency.WithTTL(int(o.TTL.Seconds())))
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return &etcdClient{c, s}, nil
}

func (c *etcdClient) mutex(key int) *concurrency.Mutex {
	return concurrency.NewMutex(c.session, fmt.Sprintf("/peers/%d", key))
}

func (c *etcdClient) lock(ctx context.Context, key int) (hold, error) {
	m := c.mutex(key)
	if err := m.Lock(ctx); err != nil {
		return nil, err
	}
	return &etcdHold{c.session, m}, nil
}

func (c *etcdClient) try(ctx context.Context, key int) (hold, error) {
	m := c.mutex(key)
	err := m.TryLock(ctx)
	if errors.Is(err, concurrency.ErrLocked) {
		return nil, errHeld
	}
	if err != nil {
		return nil, err
	}
	return &etcdHold{c.session, m}, nil
}

func (c *etcdClient) Close() error {
	err := c.session.Close()
	return errors.Join(err, c.client.Close())
}

type etcdHold struct {
	session *concurrency.Session
	mutex   *concurrency.Mutex
}

func (h *etcdHold) release(ctx context.Context) error { return h.mutex.Unlock(ctx) }

// token returns the revision of the response that granted the lock. Revisions only grow.
func (h *etcdHold) token() int64 { return h.mutex.Header().Revision }

func (h *etcdHold) alive(context.Context) bool {
	select {
	case <-h.session.Done():
		return false
	default:
		return true
	}
}
