package locker

import (
	"cmp"
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
)

// PostgresLockProvider creates locks on PostgreSQL, 14 or later. Every process that
// names the same database shares them. It uses two connections when it is idle, three
// while it holds locks, and never more than four, however many locks it holds or waits
// for. It connects when it is first used, and again after it has lost a connection:
// its holds continue, see [WithSessionTimeout]. Create it with [NewLockProvider]; the
// zero value returns errors. All methods may be called concurrently.
type PostgresLockProvider struct {
	conf    LockProviderConfig
	session *session
	hints   keyHints
}

// keyHints are the keys that pull requests had when LockKey was last asked. The
// rows belong to the operator, so a claim with such a key is checked against them
// by the statement that announces it: that saves a statement of its own.
type keyHints struct {
	mu   sync.Mutex // guards keys
	keys map[pullRequest]int64
}

const maxHints = 10_000 // then they are forgotten

func (h *keyHints) get(pull pullRequest) (key int64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	key, ok = h.keys[pull]
	return key, ok
}

func (h *keyHints) set(pull pullRequest, key int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, known := h.keys[pull]; !known && (h.keys == nil || len(h.keys) >= maxHints) {
		h.keys = map[pullRequest]int64{}
	}
	h.keys[pull] = key
}

// PostgresLock is the lock that [PostgresLockProvider.New] and [NewPostgresLock] return.
// The methods of its zero value return errors.
type PostgresLock struct {
	lock
}

var (
	_ LockProvider    = (*PostgresLockProvider)(nil)
	_ PreemptableLock = (*PostgresLock)(nil)
)

// PostgresEnvLock models a distributed lock associated with a unique repo/PR
// combination: a row of the table env_locks.
type PostgresEnvLock struct {
	LockKey     int64  `db:"lock_key"`
	Repo        string `db:"repo"`
	PullRequest uint   `db:"pull_request"`
}

// Columns names the columns, in the order of ScanValues.
func (el PostgresEnvLock) Columns() string {
	return "lock_key, repo, pull_request"
}

// ScanValues returns pointers for sql.Rows.Scan, in the order of Columns. They
// point into the copy that the method was called on.
func (el PostgresEnvLock) ScanValues() []interface{} {
	return []interface{}{&el.LockKey, &el.Repo, &el.PullRequest}
}

func newPostgresLockProvider(conf LockProviderConfig) (*PostgresLockProvider, error) {
	dsn, err := dsnOf(&conf)
	if err != nil {
		return nil, err
	}
	return &PostgresLockProvider{conf: conf, session: newSession(dsn, conf)}, nil
}

// New creates a lock for key. Any key is valid. The event says why the lock is wanted:
// holders and waiters that lose to it are told. Nothing is sent to the server. New returns
// ctx's error if ctx is done, and [ErrProviderClosed] after Close.
func (plp *PostgresLockProvider) New(ctx context.Context, key int64, event string) (PreemptableLock, error) {
	if plp.session == nil {
		return nil, errProviderZero
	}
	l := &PostgresLock{}
	if err := newLock(ctx, &l.lock, plp.session, &plp.conf, key, event); err != nil {
		return nil, err
	}
	return l, nil
}

// LockKey returns the key of a repo's pull request: non-zero, the same for the same pair
// in every process, and different for different pairs. It writes to the database only the
// first time a pair is seen.
func (plp *PostgresLockProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	key, err := plp.lockKey(ctx, repo, pr, 0)
	return key, annotate(err, "locker: lock key of %q#%d", repo, pr)
}

// lockKey is LockKey, and waits for at most wait instead of the lock timeout, unless it
// is 0.
func (plp *PostgresLockProvider) lockKey(ctx context.Context, repo string, pr uint, wait time.Duration) (int64, error) {
	if plp.session == nil {
		return 0, errProviderZero
	}
	if err := checkLockKey(ctx, plp.session.hub, repo, pr); err != nil {
		return 0, err
	}
	var key int64
	err := within(ctx, cmp.Or(wait, plp.conf.lockTimeout), func(stop <-chan struct{}) (err error) {
		key, err = plp.session.lookup(ctx, stop, repo, pr)
		return err
	})
	if err == nil {
		plp.hints.set(pullRequest{repo, pr}, key)
	}
	return key, err
}

// Close notifies every holder with [ErrProviderClosed] and ends every wait. It returns
// when all of them are gone, released by their holders or revoked after the preemption
// timeout, and with them all connections and goroutines. Every later use returns
// ErrProviderClosed. Closing again is harmless.
func (plp *PostgresLockProvider) Close() error {
	if plp.session == nil {
		return errProviderZero
	}
	plp.session.hub.close()
	plp.session.close()
	return nil
}

// NewPostgresLock creates a single lock without a provider. The lock has a session
// of its own, which connects to connInfo when it is first used and is closed
// when the lock is over: two connections for each lock. Prefer a provider.
//
// db is only checked, not kept: it must be open. message is the lock's event.
// conf is a configuration as the LockProviderOptions fill it; its zero value
// means every default. To fill conf:
//
//	var c LockProviderConfig
//	WithLockTimeout(time.Minute)(&c)
//
// A WithPostgresBackend in it names only the APM service; connInfo is what counts. A
// WithPostgresURI in it is an error.
func NewPostgresLock(ctx context.Context, db *sqlx.DB, key int64, connInfo, message string, conf LockProviderConfig) (pl *PostgresLock, err error) {
	if ctx == nil {
		return nil, errContextNil
	}
	if db == nil || db.DB == nil {
		return nil, errors.New("locker: db is nil")
	}
	conf, err = conf.checked()
	if err != nil {
		return nil, err
	}
	if conf.postgresURI != nil {
		return nil, errors.New("locker: NewPostgresLock takes no WithPostgresURI: use a provider")
	}
	dsn, err := staticDSN(connInfo)
	if err != nil {
		return nil, annotate(err, "locker: connInfo")
	}
	if err := db.PingContext(ctx); err != nil {
		return nil, dbError(ctx, err)
	}
	s := newSession(dsn, conf)
	pl = &PostgresLock{}
	if err := newLock(ctx, &pl.lock, s, &conf, key, message); err != nil {
		return nil, err
	}
	pl.onOver = sync.OnceFunc(func() {
		s.hub.close() // a release on its way goes first
		s.close()
	})
	return pl, nil
}

// dbError says why a caller's db is not usable. A driver that cannot parse its
// connection string quotes it, password included, so only errors that cannot
// hold one are shown.
func dbError(ctx context.Context, err error) error {
	var network *net.OpError
	if ctx.Err() == nil && pq.As(err) == nil && !errors.As(err, &network) && err.Error() != "sql: database is closed" {
		err = errors.New("it cannot connect (why is not shown because it may hold a password)")
	}
	return annotate(err, "locker: db is not usable")
}
