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

// These are all defaults and fixed bounds of the package. What is derived from the session timeout
// is in trust.go.
const (
	defaultLockTimeout       = 20 * time.Second
	defaultMaxLockDuration   = 30*time.Minute + 30*time.Second
	defaultPreemptionTimeout = 10 * time.Second
	defaultSessionTimeout    = 10 * time.Second

	minSessionTimeout = time.Second
	maxSessionTimeout = time.Hour
	minIdleTimeout    = time.Second

	// Release and Unlock block for no longer than this.
	releaseTimeout = 5 * time.Second
	// A waiter sleeps for no longer than this between two attempts.
	pollInterval = time.Second

	// The column is a PostgreSQL integer.
	maxPullRequest = 1<<31 - 1
	// In bytes. An entry of the index of env_locks has at most 2,704.
	maxRepo = 2_000
)

// LockProviderConfig is the configuration of a [LockProvider]. The [LockProviderOption] functions
// fill it. The zero value is valid and means the default of every option.
type LockProviderConfig struct {
	lockTimeout time.Duration
	// The lock timeout of claims that let the holder finish.
	finishTimeout     time.Duration
	maxLockDuration   time.Duration
	preemptionTimeout time.Duration
	sessionTimeout    time.Duration
	idleTimeout       time.Duration
	progress          progress
	originalReplicas  bool
	postgres          *postgresTarget
	tracer            Tracer // of all statements: see apmTracer
	postgresURI       *uriSource
	logger            *slog.Logger
	observer          func(Observation)
}

// progress is the argument of WithProgress. It is off if n is 0.
type progress struct {
	n   int
	max time.Duration
}

// postgresTarget is the argument of WithPostgresBackend. It is kept behind a pointer so that
// printing a configuration never prints a password.
type postgresTarget struct {
	uri         string
	serviceName string
}

// A LockProviderOption sets one value of a provider's configuration. [NewLockProvider],
// [NewPostgresProvider] and [NewFakeProvider] accept options, apply them in order, and return an
// error for a value that is not valid.
type LockProviderOption func(*LockProviderConfig)

// WithLockTimeout sets how long Lock waits for the key before it returns an error that matches
// [ErrLockTimeout]. Zero means the default. A negative duration is an error.
//
// The default is 20 s or, with a session timeout above 10 s ([WithSessionTimeout]), 10 s more than
// that, so that a waiter outlasts a crash of the holder. It is longer for claims that may wait for a
// holder that is not notified. With [WithProgress] it is longer by max. For a claim in the mode
// [LetFinish] it is longer by the max lock duration and the preemption timeout.
// [PreemptiveLocker.Wait] bounds the wait of one claim.
func WithLockTimeout(lockWait time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.lockTimeout = lockWait }
}

// WithMaxLockDuration sets how long a lock may be held before its holder is notified with
// [ErrMaxLockDuration]. As after every notification, the lock is revoked if it is still held when
// the preemption timeout has passed. This protects against a holder that is blocked. Zero means the
// default, 30 min 30 s. A negative duration is an error.
func WithMaxLockDuration(duration time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.maxLockDuration = duration }
}

// WithPreemptionTimeout sets how long a notified holder may take to release the lock before the
// lock is revoked. Neither the cause of the notification nor whether it was read matters. Zero
// means the default, 10 s. A negative duration is an error.
func WithPreemptionTimeout(duration time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.preemptionTimeout = duration }
}

// WithSessionTimeout sets for how long a provider may be cut off from PostgreSQL without losing its
// locks, and for how long others wait for a process that has crashed. It is between one second and
// one hour: any other duration is an error. Zero means the default, 10 s.
//
// A provider that loses its connection is suspended: it connects again, and all its holds continue.
// If no heartbeat has succeeded for 0.9 of the timeout, its holders are notified with
// [ErrLockLost]. Other processes take its keys over after they have watched its session being dead
// for the whole timeout, whatever their own timeout is. With a longer timeout a deployment survives
// a longer failover, and a successor waits that much longer after a crash.
//
// The database keeps the timeout in the session's row. If that row does not exist, for example
// because an operator has deleted it, the timeout of the holder is not known. The successor then
// waits for its own session timeout or the longest of all sessions, but at least 10 s.
func WithSessionTimeout(timeout time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.sessionTimeout = timeout }
}

// WithIdleTimeout makes the provider end its session and close its connections when it has had no
// holds, no waiters and no calls for the given time, so that a serverless database can sleep. The
// next call connects again. That takes some milliseconds, or as long as the database needs to wake
// up.
//
// The timeout is at least one second: a shorter one is an error. Zero, the default, keeps the
// session until the provider is closed. The fake provider ignores this option.
func WithIdleTimeout(timeout time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.idleTimeout = timeout }
}

// WithProgress bounds how often claims can end the work on a key. When n holds in a row were ended
// by a newer claim, the next one is spared: no claim notifies it until max has passed since it
// began. After max it is notified if a claim has asked for that meanwhile, and the hold after it is
// spared. Claims still supersede each other while they wait. An operator's stop, the loss of the
// session, the context, the max lock duration and Close still end a spared hold.
//
// If all providers that use the key have this option, then of any n + 1 successive holds of the key
// at least one is not notified because of a claim, if it ends within max. A hold counts as ended by
// a newer claim if a claim that preempts was announced while it was held.
//
// A negative n is an error, and so is a max that is not positive. Without the option, or if n is 0,
// no hold is spared. A claim may have to wait for max, so the default of [WithLockTimeout] is
// longer by max. Choose a max below the max lock duration.
func WithProgress(n int, max time.Duration) LockProviderOption {
	return func(c *LockProviderConfig) { c.progress = progress{n, max} }
}

// WithOriginalReplicas makes locks exclude those of the original library as well, for a rolling
// deployment in which replicas of both use one database. Remove the option when the last replica of
// the original has ended. The fake provider ignores it.
//
// With this option every hold has the session-level advisory lock of its key. That costs up to two
// statements for each attempt to take a key, one for each release, and an entry in the server's
// lock table for each hold. If a replica of the original takes the key while the session of a hold
// is suspended, the hold is lost.
func WithOriginalReplicas() LockProviderOption {
	return func(c *LockProviderConfig) { c.originalReplicas = true }
}

// WithPostgresBackend sets the PostgreSQL server of a postgres provider. postgresURI is a URL
// (postgres://user:password@host/db) or a list of key=value pairs, in a form that github.com/lib/pq
// accepts. It may name several hosts (postgres://a:5432,b:5433/db): the provider uses the one that
// accepts writes, and finds it again after a failover. Connections use TLS unless the URI or the
// environment has a setting for it (sslmode). docs/connect.md in the repository has all forms. With
// [WithPostgresURI] postgresURI must be empty. An invalid string is an error, which never quotes
// the string.
//
// With a non-empty apmServiceName the SQL statements that serve a traced Lock or Release are
// recorded as Datadog APM spans of that service. In a program that was built with the tag nodatadog
// a non-empty name is an error.
func WithPostgresBackend(postgresURI string, apmServiceName string) LockProviderOption {
	return func(c *LockProviderConfig) {
		// With an empty URI the option only names the service.
		if postgresURI == "" && c.postgres != nil {
			postgresURI = c.postgres.uri
		}
		c.postgres = &postgresTarget{uri: postgresURI, serviceName: apmServiceName}
	}
}

// WithPostgresURI makes a postgres provider call f for the connection string before each of its
// connections, for passwords, tokens and addresses that change. f returns a string that
// [WithPostgresBackend] accepts. f must be safe for concurrent use, and must return when its
// context is done, which is at most 8 s after the call.
//
// An error of f is treated like a server that cannot be reached: claims wait, within the lock
// timeout, until f succeeds, and their errors include its text. A string that is not valid is an
// error at first use.
//
// When the server has refused a login, the provider calls f every second. If f returns another
// string, the provider tries that string immediately, but at most five times in a row. Otherwise
// the pause between two attempts grows up to a minute.
//
// f is not called when the provider is created. It runs on goroutines of the provider, so a panic
// in it ends the process.
func WithPostgresURI(f func(ctx context.Context) (string, error)) LockProviderOption {
	return func(c *LockProviderConfig) {
		c.postgresURI = &uriSource{ask: f, slots: make(chan struct{}, maxAsks)}
	}
}

// WithLogger sets the logger to which the provider reports what an operator must know, such as a
// session that is suspended, lost or rejected, and a lock that is revoked. docs/operations.md in
// the repository lists the messages. Without this option, or with nil, nothing is logged.
func WithLogger(logger *slog.Logger) LockProviderOption {
	return func(c *LockProviderConfig) { c.logger = logger }
}

// WithObserver registers f to be called for every [Observation] of the provider's locks and of its
// session, for example to record metrics. f must be safe for concurrent use. It is called on the
// goroutine on which the event happens, possibly between two notifications, so it must return
// immediately, and must not call Close. Observations of one lock come in order, unless two of its
// events happen concurrently. Without this option, or with nil, nothing is counted.
func WithObserver(f func(Observation)) LockProviderOption {
	return func(c *LockProviderConfig) { c.observer = f }
}

// An Observation is one event in the life of a lock, or of the session of all locks.
type Observation struct {
	Kind   ObservationKind
	Key    int64             // 0 for a session, and for a Lock that failed before the key was known
	Event  string            // of the lock's claim
	Labels map[string]string // of the lock's claim
	// After is the time since Lock was called, since the hold began, or since the session was
	// suspended. See the kind.
	After time.Duration
	// Kept and Lost count holds. For [ObservedSuspended] Kept is the number of holds of the
	// session. For [ObservedReconnected] they are the holds that the session has kept and has lost.
	Kept, Lost int
	// Err is the reason, or nil if there is none. It matches a sentinel or a context's error,
	// except for an error of the database, and for that of a wait that Release has ended.
	// [OutcomeOf] reads it.
	Err error
}

// An ObservationKind is a kind of [Observation].
type ObservationKind int

const (
	// ObservedAcquired means that Lock has succeeded. After is the time of the wait.
	ObservedAcquired ObservationKind = iota + 1
	// ObservedSuperseded means that a waiter was superseded, or that its claim was outdated. After
	// is the time of the wait.
	ObservedSuperseded
	// ObservedFailed means that Lock has failed for another reason. After is the time of the wait.
	ObservedFailed
	// ObservedNotified means that the holder was notified. After is the time since the hold began,
	// and Err is the cause.
	ObservedNotified
	// ObservedReleased means that the holder has released the lock. After is the duration of the
	// hold. Err is the cause if the holder had been notified, and otherwise nil.
	ObservedReleased
	// ObservedRevoked means that the lock was revoked. After is the duration of the hold, and Err
	// is the cause of the notification.
	ObservedRevoked
	// ObservedLost means that the hold was lost: its session was lost, or the key was taken from
	// it. After is the duration of the hold.
	ObservedLost
	// ObservedSuspended means that the session has lost its connection. Its holds continue.
	ObservedSuspended
	// ObservedReconnected means that the session has a connection again. After is the time for
	// which it was suspended.
	ObservedReconnected
	// ObservedSkipped means that Lock has returned [ErrLockBusy]. After is the time of the wait.
	ObservedSkipped
)

// String returns the kind in lower case, such as "acquired", for the label of a metric.
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

// checked returns the configuration with its defaults filled in, or an error if a value is not
// valid. It may be called again with its own result.
func (c LockProviderConfig) checked() (LockProviderConfig, error) {
	// It is 0 if no option has set it.
	waits := c.lockTimeout
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
	// Otherwise the configuration has been checked before.
	if c.finishTimeout == 0 {
		c.finishTimeout = waits
		if waits == 0 {
			// After a crash a waiter needs the session timeout, and a little more.
			c.lockTimeout = defaultLockTimeout + max(0, c.sessionTimeout-defaultSessionTimeout)
			c.finishTimeout = sum(sum(c.maxLockDuration, c.preemptionTimeout), c.lockTimeout)
			c.lockTimeout = sum(c.lockTimeout, c.progress.max)
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

// sum returns a + b, or the longest duration if the sum overflows. Neither is negative.
func sum(a, b time.Duration) time.Duration {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// PreemptiveLockerConfig is the configuration of the lockers that a [PreemptiveLockerFactory]
// creates. The [PreemptiveLockerOption] functions fill it.
type PreemptiveLockerConfig struct {
	lockDelay      time.Duration
	mode           ClaimMode
	apmServiceName string
	tracer         Tracer // of WithTracer: also called for the statements that serve a call
	calls          Tracer // for Lock and Release: Datadog's tracer and the one above
}

// A PreemptiveLockerOption sets one value of the configuration of the lockers that a factory
// creates. [NewPreemptiveLockerFactory] applies the options in order, and returns an error for a
// value that is not valid.
type PreemptiveLockerOption func(*PreemptiveLockerConfig)

// WithLockDelay sets how long [PreemptiveLocker.Lock] waits after the key was granted, already
// holding the lock, before it returns. Zero, the default, means no delay. A negative duration is an
// error.
//
// Use it if a predecessor may still be cleaning up after its session was lost: the key is granted
// once the predecessor has been notified, not once it has stopped.
func WithLockDelay(lockDelay time.Duration) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.lockDelay = lockDelay }
}

// WithClaimMode sets the mode of claims for which neither [PreemptiveLocker.Mode] nor
// [ContextWithMode] sets one. The default is [Preempt]. An unknown mode is an error.
func WithClaimMode(mode ClaimMode) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.mode = mode }
}

// WithAPMServiceName makes every Lock and Release a Datadog APM span of the service with that name.
// The spans are named "lock" and "release". Without this option, or with an empty name, nothing is
// recorded. In a program that was built with the tag nodatadog a non-empty name is an error.
func WithAPMServiceName(name string) PreemptiveLockerOption {
	return func(c *PreemptiveLockerConfig) { c.apmServiceName = name }
}

// WithTracer registers tracer to be called at the start of every Lock and Release, and of every SQL
// statement that serves them. Only a [PostgresLockProvider] has such statements. Without this
// option, or with nil, nothing is called. The option is independent of [WithAPMServiceName].
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

// checkRepo returns an error for a repo or a pull request that the table env_locks cannot hold.
func checkRepo(repo string, pr uint) error {
	switch {
	case !utf8.ValidString(repo):
		return fmt.Errorf("locker: repo %q is not valid UTF-8", repo)
	case len(repo) > maxRepo:
		return fmt.Errorf("locker: repo %.50q… is longer than %d bytes", repo, maxRepo)
	case strings.ContainsRune(repo, 0):
		return fmt.Errorf("locker: repo %q contains a NUL", repo)
	case pr > maxPullRequest:
		return fmt.Errorf("locker: pull request %d is beyond the column's range (%d): put a larger number into the repo, with pull request 0", pr, maxPullRequest)
	}
	return nil
}
