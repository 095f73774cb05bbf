package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/lib/pq"

	"github.com/preemptable/locker"
)

// The parts of the floors: database/sql, lib/pq, and prepared statements.

func openDB(uri string, conns int) *sql.DB {
	connector, err := pq.NewConnector(uri)
	check(err)
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db
}

// statement is a prepared statement on a separate connection.
type statement struct {
	db   *sql.DB
	conn *sql.Conn
	stmt *sql.Stmt
}

func prepare(uri, text string) *statement {
	s := &statement{db: openDB(uri, 1)}
	var err error
	s.conn, err = s.db.Conn(context.Background())
	check(err)
	s.stmt, err = s.conn.PrepareContext(context.Background(), text)
	check(err)
	return s
}

func (s *statement) run(args ...any) error {
	_, err := s.stmt.ExecContext(context.Background(), args...)
	return err
}

func (s *statement) close() {
	_ = s.conn.Close()
	_ = s.db.Close()
}

// newUpdate returns an UPDATE of one row, whose commit waits for the disk or not, depending on
// synchronousCommit.
func newUpdate(uri, synchronousCommit string) *statement {
	s := prepare(uri, "SELECT 1")
	table := "bench_row_" + synchronousCommit
	_, err := s.conn.ExecContext(context.Background(), fmt.Sprintf(
		"SET synchronous_commit = %[2]s; CREATE TABLE IF NOT EXISTS %[1]s (id int PRIMARY KEY, n bigint) WITH (fillfactor = 50); "+
			"INSERT INTO %[1]s VALUES (1, 0) ON CONFLICT DO NOTHING", table, synchronousCommit))
	check(err)
	s.stmt, err = s.conn.PrepareContext(context.Background(), "UPDATE "+table+" SET n = n + 1 WHERE id = 1")
	check(err)
	return s
}

// rawPair is one connection that alternates between two statements. They lock and unlock an
// advisory lock, or acquire and release a row.
type rawPair struct {
	db           *sql.DB
	conn         *sql.Conn
	lock, unlock *sql.Stmt
}

func newRawPair(uri string) *rawPair {
	return newPair(uri, "SELECT pg_advisory_lock($1)", "SELECT pg_advisory_unlock($1)")
}

// newRowPair returns a pair that acquires and releases a row. The commit of the first statement
// waits for the disk, as it must for every lock whose token must not be returned twice. makeRows
// creates the rows.
func newRowPair(uri string) *rawPair {
	return newPair(uri, "UPDATE bench_rows SET n = n + 1 WHERE id = $1",
		"UPDATE bench_rows SET n = n + 1 WHERE id = $1 RETURNING set_config('synchronous_commit', 'off', true)")
}

// newBatchPair is like newRowPair, for the n rows from the key on.
func newBatchPair(uri string, n int) *rawPair {
	update := fmt.Sprintf("UPDATE bench_rows SET n = n + 1 WHERE id >= $1::bigint AND id < $1::bigint + %d", n)
	return newPair(uri, update, update+" RETURNING set_config('synchronous_commit', 'off', true)")
}

// makeRows creates the rows of newRowPair and newBatchPair, from 0 on.
func makeRows(uri string, n int) {
	db := openDB(uri, 1)
	defer func() { _ = db.Close() }()
	_, err := db.Exec(fmt.Sprintf("CREATE TABLE bench_rows (id bigint PRIMARY KEY, n bigint) WITH (fillfactor = 50); "+
		"INSERT INTO bench_rows SELECT i, 0 FROM generate_series(0, %d) AS i", n-1))
	check(err)
}

func newPair(uri, lock, unlock string) *rawPair {
	ctx := context.Background()
	r := &rawPair{db: openDB(uri, 1)}
	var err1, err2, err3 error
	r.conn, err1 = r.db.Conn(ctx)
	check(err1)
	r.lock, err2 = r.conn.PrepareContext(ctx, lock)
	r.unlock, err3 = r.conn.PrepareContext(ctx, unlock)
	check(errors.Join(err2, err3))
	return r
}

func (r *rawPair) run(key int64) error {
	if _, err := r.lock.ExecContext(context.Background(), key); err != nil {
		return err
	}
	_, err := r.unlock.ExecContext(context.Background(), key)
	return err
}

func (r *rawPair) close() {
	_ = r.conn.Close()
	_ = r.db.Close()
}

// rawPool is a pool of raw pairs.
type rawPool struct {
	all  []*rawPair
	free chan *rawPair
}

func newRawPool(uri string, n int, pair func(uri string) *rawPair) *rawPool {
	p := &rawPool{free: make(chan *rawPair, n)}
	for range n {
		r := pair(uri)
		p.all = append(p.all, r)
		p.free <- r
	}
	return p
}

func (p *rawPool) run(key int64) error {
	r := <-p.free
	err := r.run(key)
	p.free <- r
	return err
}

func (p *rawPool) close() {
	for _, r := range p.all {
		r.close()
	}
}

// rawNotify is one connection that sends and one that listens.
type rawNotify struct {
	send     *statement
	listener *pq.Listener
}

func newRawNotify(uri string) *rawNotify {
	r := &rawNotify{send: prepare(uri, "SELECT pg_notify('floor', $1)"), listener: pq.NewListener(uri, time.Second, time.Second, nil)}
	check(r.listener.Listen("floor"))
	return r
}

// once returns the time from the call until a goroutine that waits for the notification has it.
func (r *rawNotify) once() time.Duration {
	return r.until(func() { check(r.send.run("x")) }, func() {})
}

// until calls send, which sends a notification. It returns the time until a goroutine that waits for
// the notification has it, and has called then.
func (r *rawNotify) until(send, then func()) time.Duration {
	end := make(chan time.Time, 1)
	go func() {
		<-r.listener.Notify
		then()
		end <- time.Now()
	}()
	start := time.Now()
	send()
	return (<-end).Sub(start)
}

func (r *rawNotify) close() {
	r.send.close()
	_ = r.listener.Close()
}

// rawHandOver is rawNotify with two more connections: one releases a row and notifies, the other
// acquires the row.
type rawHandOver struct {
	*rawNotify
	release, acquire *statement
}

func newRawHandOver(uri string) *rawHandOver {
	makeRows(uri, 1)
	return &rawHandOver{
		rawNotify: newRawNotify(uri),
		release: prepare(uri, "UPDATE bench_rows SET n = n + 1 WHERE id = 0 "+
			"RETURNING set_config('synchronous_commit', 'off', true), pg_notify('floor', '')"),
		acquire: prepare(uri, "UPDATE bench_rows SET n = n + 1 WHERE id = 0"),
	}
}

// handOver returns the time from the release until the goroutine that waits for the notification has
// acquired the row, durably.
func (r *rawHandOver) handOver() time.Duration {
	return r.until(func() { check(r.release.run()) }, func() { check(r.acquire.run()) })
}

func (r *rawHandOver) close() {
	r.release.close()
	r.acquire.close()
	r.rawNotify.close()
}

// The parts of the library's side.

// newProvider creates a provider whose timeouts do not interfere. Its Close waits for holders for
// an hour.
func newProvider(uri string, options ...locker.LockProviderOption) *locker.PostgresLockProvider {
	p, err := locker.NewLockProvider(locker.PostgresLockProviderKind, append([]locker.LockProviderOption{
		locker.WithPostgresBackend(uri, ""), locker.WithLockTimeout(time.Minute), locker.WithPreemptionTimeout(time.Hour),
	}, options...)...)
	check(err)
	return p.(*locker.PostgresLockProvider)
}

func newFactory(p locker.LockProvider) locker.PreemptiveLockerFactory {
	f, err := locker.NewPreemptiveLockerFactory(p)
	check(err)
	return f
}

// cycle locks and releases.
func cycle(ctx context.Context, f locker.PreemptiveLockerFactory, pr uint) error {
	l := f("org/repo", pr, "benchmark")
	if _, err := l.Lock(ctx); err != nil {
		return err
	}
	return l.Release(ctx)
}

// parallel runs f(0) … f(n-1) concurrently and returns the first error.
func parallel(n int, f func(i int) error) error {
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- f(i) }()
	}
	var first error
	for range n {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// perSecond lets n workers repeat f for a while and returns how often it ran per second.
func perSecond(n int, d time.Duration, f func(worker int) error) float64 {
	var total atomic.Int64
	start := time.Now()
	check(parallel(n, func(i int) error {
		for time.Since(start) < d {
			if err := f(i); err != nil {
				return err
			}
			total.Add(1)
		}
		return nil
	}))
	return float64(total.Load()) / time.Since(start).Seconds()
}

// each runs f for 1 … n, some calls concurrently.
func each(n int, f func(i int) error) error {
	var next atomic.Int64
	return parallel(min(n, 256), func(int) error {
		for i := int(next.Add(1)); i <= n; i = int(next.Add(1)) {
			if err := f(i); err != nil {
				return err
			}
		}
		return nil
	})
}
