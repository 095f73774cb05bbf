package main

import (
	"context"
	"errors"
	"io"
	"runtime/debug"
	"time"
)

// client is an object that a process opens once for all of its locks, as the library's
// documentation recommends.
type client interface {
	// lock waits until it has the lock of a key.
	lock(ctx context.Context, key int) (hold, error)
	// try takes the lock if it is free, and returns errHeld if it is not.
	try(ctx context.Context, key int) (hold, error)
	io.Closer
}

// hold is a lock that is held.
type hold interface {
	// release releases the lock. An error may report that it was not held any longer.
	release(ctx context.Context) error
	// alive reports whether the holder may continue, according to everything that the library
	// offers to find out.
	alive(ctx context.Context) bool
	// token returns the fencing token, which is larger for each later hold of the key, or 0 if
	// there is none.
	token() int64
}

var errHeld = errors.New("the lock is held")

// options are the settings with which a client is opened.
type options struct {
	TTL         time.Duration // of the lease, or the session timeout
	Keep        bool          // whether holds are longer than the TTL, and so have to be refreshed
	Connections int           // of a pool that needs one for each hold
}

// peer is one way to lock.
type peer struct {
	ID      string // names it in the results
	Name    string
	store   storeKind
	modules []string // of the client, the library first
	Client  string   // settings of the client
	Refresh string   // how, and by which part, a long hold is refreshed
	Expiry  string   // what ends the hold of a process that has died, where %s is the TTL
	Durable string   // whether Lock waits for the disk before it returns, and whether Release does
	open    func(ctx context.Context, address string, o options) (client, error)
	LeftOut string // the reason if it is not measured
}

const byHand = "its user: the benchmark calls `Extend` or `Refresh` every TTL/3, and more often while that fails"

// peers returns the peers in the order of the tables.
func peers() []*peer {
	redisAlways := "yes (AOF, fsync); yes"
	redisStock := "no; no"
	redsync := []string{"github.com/go-redsync/redsync/v4", "github.com/redis/go-redis/v9"}
	redislock := []string{"github.com/bsm/redislock", "github.com/redis/go-redis/v9"}
	redsyncClient := "one go-redis client, stock pool; stock retry delay of 50 to 250 ms; `WithTries` raised, so that a waiter waits"
	redislockClient := "one go-redis client, stock pool; `LinearBackoff(100ms)`"
	return []*peer{
		{
			ID: "locker", Name: "locker", store: postgres, open: openLocker, modules: []string{"github.com/preemptable/locker", "github.com/lib/pq"},
			Client: "one provider", Refresh: "the library", Expiry: "session timeout %s",
			Durable: "yes (WAL, fsync); no: a release that a crash forgets is repeated",
		},
		{
			ID: "advisory", Name: "pg_advisory_lock", store: postgres, open: openAdvisory, modules: []string{"github.com/jackc/pgx/v5"},
			Client:  "pgxpool, a connection for each hold, at most 64 where the speed is measured",
			Refresh: "not needed: the lock is the connection's", Expiry: "the end of the connection", Durable: "no: memory of the server; no",
		},
		{
			ID: "pglock", Name: "cirello.io/pglock", store: postgres, modules: []string{"cirello.io/pglock"},
			LeftOut: "its module could not be downloaded when this was written; what its source says is in the table of features",
		},
		{
			ID: "river", Name: "River's leader election", store: postgres, modules: []string{"github.com/riverqueue/river"},
			LeftOut: "it is internal to River, one leader for a schema, with no call that locks",
		},
		{
			ID: "etcd", Name: "etcd concurrency.Mutex", store: etcd, open: openEtcd, modules: []string{"go.etcd.io/etcd/client/v3"},
			Client: "one client, one session", Refresh: "the library", Expiry: "lease %s", Durable: "yes (WAL, fsync); yes",
		},
		{
			ID: "redsync-always", Name: "redsync, `always`", store: redisAlwaysKind, open: openRedsync, modules: redsync,
			Client: redsyncClient, Refresh: byHand, Expiry: "TTL %s", Durable: redisAlways,
		},
		{
			ID: "redislock-always", Name: "redislock, `always`", store: redisAlwaysKind, open: openRedislock, modules: redislock,
			Client: redislockClient, Refresh: byHand, Expiry: "TTL %s", Durable: redisAlways,
		},
		{
			ID: "redsync-stock", Name: "redsync, stock Redis", store: redisStockKind, open: openRedsync, modules: redsync,
			Client: redsyncClient, Refresh: byHand, Expiry: "TTL %s", Durable: redisStock,
		},
		{
			ID: "redislock-stock", Name: "redislock, stock Redis", store: redisStockKind, open: openRedislock, modules: redislock,
			Client: redislockClient, Refresh: byHand, Expiry: "TTL %s", Durable: redisStock,
		},
	}
}

// peerByID returns the peer with an ID, or nil if there is none.
func peerByID(id string) *peer {
	for _, p := range peers() {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// versions returns the modules of a peer with the versions that are linked.
func (p *peer) versions() string {
	info, _ := debug.ReadBuildInfo()
	text := ""
	for _, path := range p.modules {
		if info == nil {
			break
		}
		for _, m := range info.Deps {
			if m.Path != path {
				continue
			}
			if text != "" {
				text += ", "
			}
			text += path
			if m.Replace == nil {
				text += " " + m.Version
			}
		}
	}
	return text
}
