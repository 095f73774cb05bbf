package locker

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
)

// A PostgresLockProvider creates locks on PostgreSQL, version 14 or later. All processes that use
// the same database share the locks. Create it with [NewPostgresProvider] or [NewLockProvider], and
// close it when the service ends. The methods of the zero value return errors. All methods are safe
// for concurrent use.
//
// It uses two connections when it is idle and three while it holds locks, and never more than four,
// however many locks it holds or waits for. It connects when it is first used, and again when it
// has lost a connection. Its holds continue meanwhile: see [WithSessionTimeout].
type PostgresLockProvider struct {
	conf    LockProviderConfig
	session *session
	hints   keyHints
}

// keyHints remembers the keys that LockKey has returned. The rows belong to the operator and can
// change, so the statement that announces a claim checks the key. That saves a separate statement.
type keyHints struct {
	mu   sync.Mutex // guards keys
	keys map[pullRequest]int64
}

// When there are more, all of them are forgotten.
const maxHints = 10_000

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

// PostgresLock is the lock that [PostgresLockProvider.New] and [NewPostgresLock] return. The
// methods of its zero value return errors.
type PostgresLock struct {
	lock
}

var (
	_ LockProvider    = (*PostgresLockProvider)(nil)
	_ PreemptableLock = (*PostgresLock)(nil)
)

// A PostgresEnvLock is a row of the table env_locks: the key of a pull request.
type PostgresEnvLock struct {
	LockKey     int64  `db:"lock_key"`
	Repo        string `db:"repo"`
	PullRequest uint   `db:"pull_request"`
}

// Columns returns the names of the columns, in the order of [PostgresEnvLock.ScanValues].
func (el PostgresEnvLock) Columns() string {
	return "lock_key, repo, pull_request"
}

// ScanValues returns pointers for Scan of sql.Rows, in the order of [PostgresEnvLock.Columns]. They
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

// New creates a lock for key. Every int64 is a valid key. The event is the reason for the claim. It
// is shown to the holders and waiters that lose to the claim. New sends nothing to the server. It
// returns ctx's error if ctx is done, and [ErrProviderClosed] after Close.
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

// LockKey returns the key of a repo's pull request. It is not zero, is the same for the same pair
// in every process, and differs between pairs. LockKey writes to the database only when a pair is
// seen for the first time.
//
// It returns an error immediately if repo or pr is not valid. If the server cannot be reached, it
// waits, within ctx and the lock timeout, and then returns an error that matches ctx's error or
// [ErrLockTimeout]. It returns [ErrProviderClosed] after Close.
func (plp *PostgresLockProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	key, err := plp.lockKey(ctx, repo, pr, plp.conf.lockTimeout)
	return key, annotate(err, "locker: lock key of %q#%d", repo, pr)
}

// lockKey is LockKey, but waits no longer than wait instead of the lock timeout.
func (plp *PostgresLockProvider) lockKey(ctx context.Context, repo string, pr uint, wait time.Duration) (int64, error) {
	if plp.session == nil {
		return 0, errProviderZero
	}
	if err := checkLockKey(ctx, plp.session.hub, repo, pr); err != nil {
		return 0, err
	}
	var key int64
	err := within(ctx, wait, func(stop <-chan struct{}) (err error) {
		key, err = plp.session.lookup(ctx, stop, repo, pr)
		return err
	})
	if err == nil {
		plp.hints.set(pullRequest{repo, pr}, key)
	}
	return key, err
}

// Close notifies every holder with [ErrProviderClosed], and ends every wait with that error. It
// returns when all holds have ended, by release or by revocation after the preemption timeout, and
// all connections and goroutines with them. Every later use returns ErrProviderClosed. A further
// Close does no harm.
func (plp *PostgresLockProvider) Close() error {
	if plp.session == nil {
		return errProviderZero
	}
	plp.session.hub.close()
	plp.session.close()
	return nil
}

// NewPostgresLock creates a single lock without a provider. The lock has a separate session, which
// connects to connInfo when it is first used and is closed when the lock has ended: two connections
// for each lock. Prefer a provider.
//
// The db must be open: NewPostgresLock pings it and does not keep it. The message is the lock's
// event. The conf is a configuration that [LockProviderOption] functions have filled. Its zero
// value means the default of every option. To fill conf:
//
//	var c LockProviderConfig
//	WithLockTimeout(time.Minute)(&c)
//
// A [WithPostgresBackend] in conf sets only the APM service: the lock connects to connInfo. A
// [WithPostgresURI] in conf is an error.
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
		// A release that is queued runs first.
		s.hub.close()
		s.close()
	})
	return pl, nil
}

// dbError explains why a caller's db cannot be used. A driver that cannot parse its connection
// string quotes it, including the password, so only errors that cannot contain one are shown.
func dbError(ctx context.Context, err error) error {
	var network *net.OpError
	if ctx.Err() == nil && pq.As(err) == nil && !errors.As(err, &network) && err.Error() != "sql: database is closed" {
		err = errors.New("it cannot connect (why is not shown because it may hold a password)")
	}
	return annotate(err, "locker: db is not usable")
}
