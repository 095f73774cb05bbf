package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// floorClient is no lock. It is the minimum that PostgreSQL has to do for a durable one: an UPDATE
// of a row whose commit waits for the disk, and one whose commit does not. A waiter is woken by
// NOTIFY.
type floorClient struct{ pool *pgxpool.Pool }

const (
	floorTake = "UPDATE peers_floor SET n = n + 1 WHERE id = $1"
	floorFree = "UPDATE peers_floor SET n = n + 1 WHERE id = $1 RETURNING set_config('synchronous_commit', 'off', true)"
	floorWake = "UPDATE peers_floor SET n = n + 1 WHERE id = $1 " +
		"RETURNING set_config('synchronous_commit', 'off', true), pg_notify('peers_floor', '')"
	floorKeys = 1024
)

func openFloor(ctx context.Context, uri string, o options) (client, error) {
	pool, err := openPool(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	_, err = pool.Exec(ctx, fmt.Sprintf(`
		CREATE TABLE IF NOT EXISTS peers_floor (id bigint PRIMARY KEY, n bigint) WITH (fillfactor = 50);
		INSERT INTO peers_floor SELECT i, 0 FROM generate_series(0, %d) AS i ON CONFLICT DO NOTHING`, floorKeys-1))
	if err != nil {
		pool.Close()
		return nil, err
	}
	return &floorClient{pool}, nil
}

func (c *floorClient) lock(ctx context.Context, key int) (hold, error) {
	_, err := c.pool.Exec(ctx, floorTake, int64(key%floorKeys))
	return &floorHold{c, key}, err
}

func (c *floorClient) try(ctx context.Context, key int) (hold, error) { return c.lock(ctx, key) }

func (c *floorClient) Close() error {
	c.pool.Close()
	return nil
}

type floorHold struct {
	client *floorClient
	key    int
}

func (h *floorHold) release(ctx context.Context) error {
	_, err := h.client.pool.Exec(ctx, floorFree, int64(h.key%floorKeys))
	return err
}

func (h *floorHold) alive(context.Context) bool { return true }
func (h *floorHold) token() int64               { return 0 }

// floorHandOver has one session that frees a row and wakes another one, which takes the row
// durably.
type floorHandOver struct{ holder, listener, waiter *pgx.Conn }

func newFloorHandOver(ctx context.Context, uri string) (*floorHandOver, error) {
	f := &floorHandOver{}
	for _, c := range []**pgx.Conn{&f.holder, &f.listener, &f.waiter} {
		var err error
		if *c, err = pgx.Connect(ctx, uri); err != nil {
			f.close()
			return nil, err
		}
	}
	if _, err := f.listener.Exec(ctx, "LISTEN peers_floor"); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *floorHandOver) once(ctx context.Context) (time.Duration, error) {
	done := make(chan error, 1)
	go func() {
		_, err := f.listener.WaitForNotification(ctx)
		if err == nil {
			_, err = f.waiter.Exec(ctx, floorTake, int64(1))
		}
		done <- err
	}()
	// The listener has begun to wait by then.
	time.Sleep(5 * time.Millisecond)
	start := time.Now()
	if _, err := f.holder.Exec(ctx, floorWake, int64(1)); err != nil {
		return 0, err
	}
	err := <-done
	return time.Since(start), err
}

func (f *floorHandOver) close() {
	for _, c := range []*pgx.Conn{f.holder, f.listener, f.waiter} {
		if c != nil {
			_ = c.Close(context.Background())
		}
	}
}
