package main

import (
	"database/sql"
	"net/url"
	"strings"
	"time"
)

// The functions of this file ask the server about the connections to a database, on a connection to
// another database.

// openAdmin connects to the server of a database, but not to that database, so that the connection
// does not count.
func openAdmin(uri string) *sql.DB {
	u := must(url.Parse(uri))
	u.Path = "/postgres"
	return openDB(u.String(), 1)
}

func must[T any](v T, err error) T {
	check(err)
	return v
}

func databaseOf(uri string) string { return strings.TrimPrefix(must(url.Parse(uri)).Path, "/") }

const clients = ` FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'`

func (b *bench) connections(admin *sql.DB, uri string) (n int, err error) {
	err = admin.QueryRowContext(b.ctx, `SELECT count(*)`+clients, databaseOf(uri)).Scan(&n)
	return n, err
}

// watchConnections counts the connections again and again. The function that it returns stops that
// and returns the largest number.
func (b *bench) watchConnections(admin *sql.DB, uri string) func() int {
	stop, done := make(chan struct{}), make(chan struct{})
	var most int
	var failed error
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			n, err := b.connections(admin, uri)
			if err != nil {
				failed = err
				return
			}
			most = max(most, n)
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	return func() int {
		close(stop)
		<-done
		check(failed)
		return most
	}
}

// transactions returns how many statements per second run on the connections to a database. Each
// statement is a separate transaction, with a different start. The server's own count cannot be
// used, because it omits transactions that have no statistics to report.
func (b *bench) transactions(admin *sql.DB, uri string, d time.Duration) float64 {
	last := b.queryStarts(admin, uri)
	n, start := 0, time.Now()
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for time.Since(start) < d {
		<-tick.C
		for pid, at := range b.queryStarts(admin, uri) {
			if !at.Equal(last[pid]) {
				n++
			}
			last[pid] = at
		}
	}
	return float64(n) / time.Since(start).Seconds()
}

// queryStarts returns when the last statement of each idle connection began. It leaves out
// connections that are at work, because each part of their statement has a separate start.
func (b *bench) queryStarts(admin *sql.DB, uri string) map[int]time.Time {
	rows, err := admin.QueryContext(b.ctx, `SELECT pid, query_start`+clients+` AND state = 'idle'`, databaseOf(uri))
	check(err)
	defer func() { _ = rows.Close() }()
	starts := map[int]time.Time{}
	for rows.Next() {
		var pid int
		var at time.Time
		check(rows.Scan(&pid, &at))
		starts[pid] = at
	}
	check(rows.Err())
	return starts
}

// advisoryLocks returns the number of a database's entries for advisory locks in the server's lock
// table.
func (b *bench) advisoryLocks(admin *sql.DB, uri string) (n int) {
	check(admin.QueryRowContext(b.ctx, `SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
		WHERE d.datname = $1 AND l.locktype = 'advisory'`, databaseOf(uri)).Scan(&n))
	return n
}

// terminate ends all connections to a database and returns their number.
func (b *bench) terminate(admin *sql.DB, uri string) (n int) {
	check(admin.QueryRowContext(b.ctx, `SELECT count(pg_terminate_backend(pid))`+clients, databaseOf(uri)).Scan(&n))
	return n
}
