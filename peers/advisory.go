package main

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// advisoryClient is a lock written by hand: a pool, and pg_advisory_lock on a connection that the
// hold keeps.
type advisoryClient struct{ pool *pgxpool.Pool }

// openPool returns a pool with the connections that the options ask for.
func openPool(ctx context.Context, uri string, o options) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(uri)
	if err != nil {
		return nil, err
	}
	config.MaxConns = int32(o.Connections)
	return pgxpool.NewWithConfig(ctx, config)
}

func openAdvisory(ctx context.Context, uri string, o options) (client, error) {
	pool, err := openPool(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	return &advisoryClient{pool}, nil
}

func (c *advisoryClient) lock(ctx context.Context, key int) (hold, error) {
	conn, err := c.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "SELECT pg_advisory_lock($1)", int64(key)); err != nil {
		// Release closes the connection if the context has ended the statement.
		conn.Release()
		return nil, err
	}
	return &advisoryHold{conn, int64(key)}, nil
}

func (c *advisoryClient) try(ctx context.Context, key int) (hold, error) {
	conn, err := c.pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	var got bool
	err = conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1)", int64(key)).Scan(&got)
	if err == nil && !got {
		err = errHeld
	}
	if err != nil {
		conn.Release()
		return nil, err
	}
	return &advisoryHold{conn, int64(key)}, nil
}

func (c *advisoryClient) Close() error {
	c.pool.Close()
	return nil
}

type advisoryHold struct {
	conn *pgxpool.Conn
	key  int64
}

// release returns the connection to the pool in any case. The pool closes it if it is broken.
func (h *advisoryHold) release(ctx context.Context) error {
	defer h.conn.Release()
	var was bool
	if err := h.conn.QueryRow(ctx, "SELECT pg_advisory_unlock($1)", h.key).Scan(&was); err != nil {
		return err
	}
	if !was {
		return errors.New("the lock was not held")
	}
	return nil
}

func (h *advisoryHold) token() int64 { return 0 }

// alive pings the connection, because nothing else reports its end.
func (h *advisoryHold) alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return h.conn.Ping(ctx) == nil
}
