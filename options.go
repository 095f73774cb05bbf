package locker

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"
	"unicode/utf8"
)

// Every default and every fixed bound of the package. What follows from the session
// timeout is in trust.go.
const (
	defaultLockTimeout       = 20 * time.Second
	defaultMaxLockDuration   = 30*time.Minute + 30*time.Second
	defaultPreemptionTimeout = 10 * time.Second
	defaultSessionTimeout    = 10 * time.Second

	minSessionTimeout = time.Second
	maxSessionTimeout = time.Hour
	minIdleTimeout    = time.Second

	releaseTimeout = 5 * time.Second // longest that Release and Unlock block
	pollInterval   = time.Second     // longest sleep of a waiter between two attempts

	maxPullRequest = 1<<31 - 1 // the column is a PostgreSQL integer
)

// LockProviderConfig sets configuration values that can be shared between
// LockProvider implementations. Its zero value is valid and means every
// default. It is filled by the LockProviderOptions.
type LockProviderConfig struct {
	lockTimeout       time.Duration
	finishTimeout     time.Duration // the lock timeout of claims that let the holder finish
	maxLockDuration   time.Duration
	preemptionTimeout time.Duration
	sessionTimeout    time.Duration
	idleTimeout       time.Duration
	progress          progress
	originalReplicas  bool
	postgres          *postgresTarget
	tracer            Tracer // of all statements, see apmTracer
	postgresURI       *uriSource
	logger            *slog.Logger
	observer          func(Observation)
}

// progress is what WithProgress says. It is off if n is 0.
type progress struct {
	n   int
	max time.Duration
}

// postgresTarget is kept behind a pointer so that printing a configuration
// never prints a password.
type postgresTarget struct {
	uri         string
	serviceName string
}

// LockProviderOption allows clients to configure different aspects of the
// LockProvider that NewLockProvider returns. Options are checked there, not
// where they are made.
type LockProviderOption func(*LockProviderConfig)

// WithLockTimeout sets how long Lock waits for the key before it returns an error that
// matches [ErrLockTimeout]. A negative duration is an error. Zero means the default, 20 s.
// The default is longer where claims wait for a holder that is not notified: with
// [WithProgress] by its max, and for a claim in the mode [LetFinish] it is the max lock
// duration, the preemption timeout and 20 s together. [PreemptiveLocker.Wait] bounds the
// wait of one claim.
func WithLockTimeout(lockWait time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.lockTimeout = lockWait }
}

// WithMaxLockDuration sets how long a lock may be held before its holder is
// notified with ErrMaxLockDuration; like every notification it is followed by
// revocation after the preemption timeout. It protects against a holder that
// is blocked. Zero means the default, 30 min 30 s; a negative duration is
// refused.
func WithMaxLockDuration(duration time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.maxLockDuration = duration }
}

// WithPreemptionTimeout sets how long a holder has, after its notification and
// whatever its cause, until the lock is taken from it, read or unread. Zero
// means the default, 10 s; a negative duration is refused.
func WithPreemptionTimeout(duration time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.preemptionTimeout = duration }
}

// WithSessionTimeout sets how long a provider may be cut off from PostgreSQL without
// losing its locks, and how long others wait for a process that has crashed. It is
// between one second and one hour. Zero means the default, 10 s.
//
// A provider that loses its connection is suspended: it connects again, and all its
// holds continue as if nothing had happened. If it has had no contact for 0.9 of the
// timeout, its holders are notified with [ErrLockLost]. Other processes, whatever
// timeout they have, take its keys over after they have watched its session being
// dead for the whole timeout. With a longer timeout a deployment survives a longer
// failover, and a crash costs its successor that much more time.
func WithSessionTimeout(timeout time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.sessionTimeout = timeout }
}

// WithIdleTimeout lets the provider end its session and close its connections when it
// has had no holds, no waiters and no calls for the given time, so that a serverless
// database can sleep. The next call connects again, which takes some milliseconds, or
// as long as the database needs to wake up. It is at least one second. Zero, the
// default, keeps the session until the provider is closed. The fake provider ignores
// it.
func WithIdleTimeout(timeout time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.idleTimeout = timeout }
}

// WithProgress bounds how often claims can end the work on a key. When n holds in a row
// were ended by a newer claim, the next one is spared: no claim notifies it for max after
// it has begun. Claims go on superseding each other while they wait. If the hold has not
// ended after max, it is notified if a claim has asked for that meanwhile, and the one
// after it is spared. Everything else that ends a hold still does: an operator's stop, the
// loss of the session, the context, the max lock duration and Close.
//
// So of n + 1 holds of a key in a row at least one is not notified because of a claim,
// if it ends within max. That holds if all providers that use the key have this option.
// A hold counts as ended by a newer claim if a claim that preempts was announced while it
// was held. n and max are positive. Without the option, or with n 0, no hold is spared.
//
// A claim may have to wait for max, so the default of [WithLockTimeout] is longer by max.
// Choose max below the max lock duration.
func WithProgress(n int, max time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.progress = progress{n, max} }
}

// WithOriginalReplicas makes locks exclude those of the original library, too, for a
// rolling deployment in which replicas of both work on one database. Every hold then
// also has the session-level advisory lock on its key, which costs up to two statements
// for each attempt to take a key, one for each release, and an entry in the server's
// lock table for each hold. A hold whose session is suspended is lost if a replica of
// the original takes the key meanwhile. Remove the option when the last of them has
// ended. The fake provider ignores it.
func WithOriginalReplicas() LockProviderOption {
	return func(c *LockProviderConfig) { c.originalReplicas = true }
}

// WithPostgresBackend names the PostgreSQL server of a postgres provider, as a
// URL (postgres://user:password@host/db) or as key=value pairs, in the form
// that github.com/lib/pq takes. Several hosts may be named (postgres://a:5432,b:5433/db);
// the one that takes writes is used, also after a failover. Connections use TLS unless the
// URI or the environment says otherwise (sslmode). docs/connect.md has all forms. With a
// non-empty apmServiceName the SQL statements that serve a traced Lock or Release are
// recorded as Datadog APM spans of that service; in a program that was built with the tag
// nodatadog such a name is an error. With [WithPostgresURI] the postgresURI is empty.
func WithPostgresBackend(postgresURI string, apmServiceName string) LockProviderOption {
	return func(c *LockProviderConfig) {
		c.postgres = &postgresTarget{uri: postgresURI, serviceName: apmServiceName}
	}
}

// WithPostgresURI has a postgres provider ask f for the connection string before each of
// its connections, for passwords, tokens and addresses that change. f returns what
// [WithPostgresBackend] takes. It is called concurrently, and has to return when its
// context is done, 8 s after the call at the latest.
//
// An error of f is treated like a server that cannot be reached: claims wait for the end of
// it, within the lock timeout, and their error has its text. A string that is not valid is
// an error at first use. When the server has refused a login, f is asked every second. If
// it returns another string, that is tried immediately, five times in a row at most;
// otherwise the pause between two attempts grows up to a minute. f is not asked when the
// provider is made. It runs on goroutines of the provider, so a panic in it ends the
// process.
func WithPostgresURI(f func(ctx context.Context) (string, error)) LockProviderOption {
	return func(c *LockProviderConfig) {
		c.postgresURI = &uriSource{ask: f, slots: make(chan struct{}, maxAsks)}
	}
}

// WithLogger sets where the provider reports what an operator must know: a session that
// is suspended, lost or refused, a revoked lock, and what docs/operations.md lists.
// Without it, or with nil, nothing is logged.
func WithLogger(logger *slog.Logger) LockProviderOption {
	return func(c *LockProviderConfig) { c.logger = logger }
}

// WithObserver has f called for everything that happens to the provider's locks, for
// metrics. f is called concurrently, on the goroutine on which it happens, and must
// return immediately: it may run between two notifications. Without it nothing is counted
// and nothing is spent.
func WithObserver(f func(Observation)) LockProviderOption {
	return func(c *LockProviderConfig) { c.observer = f }
}

// Observation is one thing that happened to a lock, or to the session of all locks.
type Observation struct {
	Kind   ObservationKind
	Key    int64             // 0 for a session
	Event  string            // of the lock's claim
	Labels map[string]string // of the lock's claim
	// After is the time since Lock was called, since the hold began, or since the session
	// was suspended: each kind says which.
	After time.Duration
	// Kept and Lost count holds: those of a session that is suspended, or those that a
	// session which has reconnected has kept and has lost.
	Kept, Lost int
	// Err is the reason, if there is one. It matches a sentinel or a context's error, or
	// neither if it is the database's or Release has ended the wait. [OutcomeOf] reads it.
	Err error
}

// ObservationKind enumerates what can happen to a lock, or to a session.
type ObservationKind int

const (
	// ObservedAcquired means that Lock succeeded, After a wait.
	ObservedAcquired ObservationKind = iota + 1
	// ObservedSuperseded means that a waiter was superseded, After a wait.
	ObservedSuperseded
	// ObservedFailed means that Lock failed for another reason, After a wait.
	ObservedFailed
	// ObservedNotified means that the holder was notified, After a part of the hold. Err
	// is the cause.
	ObservedNotified
	// ObservedReleased means that the holder has released, After the hold. Err is the
	// cause of its notification, or nil.
	ObservedReleased
	// ObservedRevoked means that the lock was taken from its holder, After the hold. Err
	// is the cause of its notification.
	ObservedRevoked
	// ObservedLost means that the session was lost, or that the key was taken from it,
	// After the hold.
	ObservedLost
	// ObservedSuspended means that the session has no connection. Its holds continue.
	ObservedSuspended
	// ObservedReconnected means that the session is connected again, After having been
	// suspended.
	ObservedReconnected
	// ObservedSkipped means that Lock returned [ErrLockBusy].
	ObservedSkipped
)

// String returns a name that is fit for a metric's label.
func (k ObservationKind) String() string {
	names := [...]string{"unknown", "acquired", "superseded", "failed", "notified", "released", "revoked", "lost", "suspended", "reconnected", "skipped"}
	if k < 0 || int(k) >= len(names) {
		k = 0
	}
	return names[k]
}

func newLockProviderConfig(options []LockProviderOption) (LockProviderConfig, error) {
	var c LockProviderConfig
	for i, option := range options {
		if option == nil {
			return c, fmt.Errorf("locker: provider option %d is nil", i)
		}
		option(&c)
	}
	return c.checked()
}

// checked returns the configuration with its defaults filled in.
func (c LockProviderConfig) checked() (LockProviderConfig, error) {
	waits := c.lockTimeout // if it is given
	for _, d := range []struct {
		name  string
		value *time.Duration
		def   time.Duration
	}{
		{"lock timeout", &c.lockTimeout, defaultLockTimeout},
		{"max lock duration", &c.maxLockDuration, defaultMaxLockDuration},
		{"preemption timeout", &c.preemptionTimeout, defaultPreemptionTimeout},
		{"session timeout", &c.sessionTimeout, defaultSessionTimeout},
	} {
		if *d.value < 0 {
			return c, fmt.Errorf("locker: %s is negative: %v", d.name, *d.value)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if c.sessionTimeout < minSessionTimeout || c.sessionTimeout > maxSessionTimeout {
		return c, fmt.Errorf("locker: session timeout is not between %v and %v: %v", minSessionTimeout, maxSessionTimeout, c.sessionTimeout)
	}
	if c.idleTimeout != 0 && c.idleTimeout < minIdleTimeout {
		return c, fmt.Errorf("locker: idle timeout is below %v: %v", minIdleTimeout, c.idleTimeout)
	}
	switch p := c.progress; {
	case p.n < 0, p.n > math.MaxInt32:
		return c, fmt.Errorf("locker: progress: the number of holds is not between 0 and %d: %d", math.MaxInt32, p.n)
	case p.n == 0:
		c.progress = progress{}
	case p.max <= 0:
		return c, fmt.Errorf("locker: progress: max is not positive: %v", p.max)
	}
	if c.finishTimeout == 0 { // otherwise it was checked before
		c.finishTimeout = waits
		if waits == 0 {
			c.lockTimeout = sum(defaultLockTimeout, c.progress.max)
			c.finishTimeout = sum(sum(c.maxLockDuration, c.preemptionTimeout), defaultLockTimeout)
		}
	}
	if c.logger == nil {
		c.logger = slog.New(slog.DiscardHandler)
	}
	if c.postgres != nil {
		var err error
		if c.tracer, err = apmTracer(c.postgres.serviceName); err != nil {
			return c, err
		}
	}
	return c, nil
}

// sum adds durations that are not negative, and returns the longest one there is if their
// sum is longer.
func sum(a, b time.Duration) time.Duration {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// PreemptiveLockerConfig contains values for adjusting how the
// PreemptiveLocker behaves. It is filled by the PreemptiveLockerOptions.
type PreemptiveLockerConfig struct {
	lockDelay      time.Duration
	mode           ClaimMode
	apmServiceName string
	tracer         Tracer // of WithTracer; also of the statements that serve a call
	calls          Tracer // of Lock and Release: Datadog's and tracer
}

// PreemptiveLockerOption configures the PreemptiveLockers that a factory makes.
type PreemptiveLockerOption func(*PreemptiveLockerConfig)

// WithLockDelay sets how long [PreemptiveLocker.Lock] waits, already holding the
// lock, before it returns. Zero, the default, waits not at all. A negative duration is
// an error. Use it for a predecessor that may still clean up after its session was
// lost: the key is granted once the predecessor has been notified, not once it has
// stopped.
func WithLockDelay(lockDelay time.Duration) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.lockDelay = lockDelay }
}

// WithClaimMode sets the mode of claims that [PreemptiveLocker.Mode] gives no other. The
// default is [Preempt]. An unknown mode is an error.
func WithClaimMode(mode ClaimMode) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.mode = mode }
}

// WithAPMServiceName records every Lock and Release as a Datadog APM span,
// named "lock" and "release", of the service with that name. Without it, or
// with an empty name, nothing is recorded. In a program that was built with the tag
// nodatadog a name is an error.
func WithAPMServiceName(name string) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.apmServiceName = name }
}

// WithTracer has tracer called at the start of every Lock and Release, and of every SQL
// statement that serves them. With another provider than [PostgresLockProvider] there
// are no statements. Without it, or with nil, nothing is called and nothing is spent.
// It is independent of WithAPMServiceName.
func WithTracer(tracer Tracer) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.tracer = tracer }
}

func newPreemptiveLockerConfig(options []PreemptiveLockerOption) (PreemptiveLockerConfig, error) {
	var c PreemptiveLockerConfig
	for i, option := range options {
		if option == nil {
			return c, fmt.Errorf("locker: locker option %d is nil", i)
		}
		option(&c)
	}
	if c.lockDelay < 0 {
		return c, fmt.Errorf("locker: lock delay is negative: %v", c.lockDelay)
	}
	if err := (terms{mode: c.mode}).check(); err != nil {
		return c, annotate(err, "locker: claim mode")
	}
	apm, err := apmTracer(c.apmServiceName)
	if err != nil {
		return c, err
	}
	c.calls = bothTracers(apm, c.tracer)
	return c, nil
}

// checkRepo returns an error for what the table env_locks cannot hold.
func checkRepo(repo string, pr uint) error {
	switch {
	case !utf8.ValidString(repo):
		return fmt.Errorf("locker: repo %q is not valid UTF-8", repo)
	case strings.ContainsRune(repo, 0):
		return fmt.Errorf("locker: repo %q contains a NUL", repo)
	case pr > maxPullRequest:
		return fmt.Errorf("locker: pull request %d is beyond the column's range (%d): put a larger number into the repo, with pull request 0", pr, maxPullRequest)
	}
	return nil
}
