package locker

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

const (
	proofTimeout = 3 * time.Second // the time within which a NOTIFY must arrive
	sweepBeats   = 20              // heartbeats between two searches for dead sessions
)

// session is the backend of a postgres provider's locks. It consists of
//
//   - the session's own connection, which has the advisory lock that shows others that this process
//     lives, and carries only heartbeats,
//   - the listener, on which notifications arrive, and
//   - two workers, which run operations, each on a connection that is opened when it is needed and
//     closed when it is idle: one for statements that wait for the disk, one for all others.
//
// The first two connect when an operation is queued or a lock waits or holds. If one of them is
// lost, it connects again. All goroutines start with the first operation and end with close.
type session struct {
	dsn     dsnFunc
	conf    LockProviderConfig
	log     *slog.Logger
	hub     *hub
	trust   *trust
	watches watches
	keys    keyLocks // with WithOriginalReplicas

	// mu guards the fields from here to connections, and the fields of the workers and operations
	// that say so. It is not held across I/O.
	mu    sync.Mutex
	disk  *worker // for claims: announcements and acquires
	swift *worker // for everything else
	own   *line   // the session's connection, or nil while there is none
	doom  error   // the reason why own was closed
	// The error of the last attempt to open the session's connection, or nil after a success.
	trouble error
	// The error with which a provider that has never worked was rejected.
	refusal error
	retryAt time.Time // with refusal: the time of the next attempt
	proven  bool      // whether the provider has worked once
	// Whether the schema was complete when the session was opened the last time.
	prepared bool
	admitted bool // whether the server lets the session's connection in
	// Whether NOTIFY fails. Then statements do not use it, and holders are notified by the check of
	// their rows.
	mute     bool
	checking sessionRef // the session for which a check of rows is queued
	// Notifications that are expected, whose channels are closed when they arrive.
	proofs  map[uuid.UUID]chan struct{}
	listens bool
	deaf    error // the last error of the listener, or nil while it listens
	// When the reply to a statement that may have taken keys for this session was lost the last
	// time, or zero.
	unsure  time.Time
	used    time.Time // when the provider was in use the last time
	resting bool      // whether the session has ended because the provider was idle
	// Whether close has given up a release.
	unreleased bool
	started    bool
	closing    bool

	// The number of attempts to connect the session, including those that have failed.
	connections int64

	// The position of the check of rows. Only the swift worker uses it.
	cursor int

	work    chan struct{} // capacity 1: the session's connection may be needed
	listen  chan struct{} // capacity 1: the listener may be needed
	running sync.WaitGroup
	ctx     context.Context // canceled by close, once the workers have ended
	stop    context.CancelFunc
}

// newSession returns a session that has no connection and no goroutine yet.
func newSession(dsn dsnFunc, conf LockProviderConfig) *session {
	s := &session{
		dsn:    dsn,
		conf:   conf,
		log:    conf.logger,
		hub:    newHub(),
		proofs: map[uuid.UUID]chan struct{}{},
		work:   make(chan struct{}, 1),
		listen: make(chan struct{}, 1),
	}
	s.trust = newTrust(&s.conf, s.hub)
	s.trust.lost = func() { s.dropOwn(errSessionLost) }
	s.disk, s.swift = newWorker(s), newWorker(s)
	s.ctx, s.stop = context.WithCancel(context.Background())
	return s
}

func (s *session) events() *hub { return s.hub }

func (s *session) newID() uuid.UUID { return uuid.New() }

// signal wakes the receiver of a channel of capacity 1.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
		// The receiver has been woken already.
	}
}

// wakeUp makes every goroutine of the session check whether it has something to do.
func (s *session) wakeUp() {
	signal(s.work)
	signal(s.listen)
	signal(s.disk.wake)
	signal(s.swift.wake)
}

// startLocked starts the goroutines, which end with close.
func (s *session) startLocked() {
	if s.started {
		return
	}
	s.started = true
	s.running.Add(2)
	go s.keepSession()
	go s.keepListener()
	go s.disk.run()
	go s.swift.run()
}

// wanted reports whether the provider is in use.
func (s *session) wanted() bool {
	s.mu.Lock()
	// A Ping is in no queue most of the time.
	busy := s.queuedLocked() + len(s.proofs)
	s.mu.Unlock()
	holds, waits := s.hub.counts()
	return busy+holds+waits > 0
}

// queuedLocked returns the number of operations that are queued.
func (s *session) queuedLocked() int { return s.disk.queuedLocked() + s.swift.queuedLocked() }

// close ends the session. It returns when everything was given back, and all connections and
// goroutines have ended. Queued operations still run, for at most releaseTimeout.
func (s *session) close() {
	s.mu.Lock()
	first := !s.closing
	s.closing = true
	started := s.started
	s.mu.Unlock()
	s.wakeUp()
	if started {
		limit := time.AfterFunc(releaseTimeout, func() {
			s.disk.cancel()
			s.swift.cancel()
		})
		<-s.disk.done
		<-s.swift.done
		limit.Stop()
	}
	s.stop()
	if first {
		s.trust.end()
	}
	s.running.Wait()
}

// kept is one of the two connections that are open as long as the provider is in use.
type kept struct {
	name string
	wake <-chan struct{}
	way  *way
	// Whether the connection may be opened. When that changes, wake is signaled.
	allowed func() bool
	open    func() (*line, error)
	// Called once in each heartbeat interval. An error ends the connection.
	beat func(l *line, start time.Time) error
	// Called before the connection is closed, because it has failed, with errIdle, or because s.ctx
	// is done.
	ended  func(l *line, err error)
	failed func(err error, pause time.Duration) // called after open has failed, before the next attempt
}

// keep opens a connection whenever it is wanted and not open. It ends with s.ctx, which close
// cancels.
func (s *session) keep(k kept) {
	defer s.running.Done()
	failing := false
	for s.ctx.Err() == nil {
		if !s.wanted() || !k.allowed() {
			select {
			case <-k.wake:
			case <-s.ctx.Done():
			}
			continue
		}
		l, err := k.open()
		failed := err != nil
		if !failed {
			opened := time.Now()
			err = s.serve(l, k.beat)
			k.ended(l, err)
			l.close()
			failing = false
			// Otherwise a proxy may be at fault that closes each new connection.
			if err == errIdle || time.Since(opened) >= reopenMax {
				k.way.connected()
				continue
			}
		}
		if s.ctx.Err() != nil {
			return
		}
		pause := k.way.next(err, s.urgent())
		if failed {
			if !failing {
				s.log.Warn("locker: cannot connect; trying again", slog.String("connection", k.name), slog.String("error", err.Error()))
			}
			failing = true
			k.failed(err, pause)
		}
		if k.way.rest(s.ctx, pause, err) {
			s.mu.Lock()
			s.retryAt = time.Time{}
			s.mu.Unlock()
		}
	}
}

// serve calls beat once in each heartbeat interval, until it or the connection fails or s.ctx is
// done.
func (s *session) serve(l *line, beat func(l *line, start time.Time) error) error {
	tick := time.NewTicker(heartbeatInterval(s.conf.sessionTimeout))
	defer tick.Stop()
	for {
		if closing, err := l.await(s.ctx, tick); closing {
			return err
		}
		if err := beat(l, time.Now()); err != nil {
			return err
		}
	}
}

// urgent returns the session timeout if the session is suspended, and otherwise zero. Pauses are
// shorter while the session is suspended, because it may have holds to lose.
func (s *session) urgent() time.Duration {
	if _, suspended, _ := s.trust.state(); suspended.IsZero() {
		return 0
	}
	return s.conf.sessionTimeout
}

// admit records whether the server lets the session's connection in. While it does not, no other
// connection is tried, because too many attempts lock an account.
func (s *session) admit(admitted bool) {
	s.mu.Lock()
	changed := s.admitted != admitted
	s.admitted = admitted
	s.mu.Unlock()
	if changed && admitted {
		s.wakeUp()
	}
}

// isAdmitted reports whether the server lets the session's connection in.
func (s *session) isAdmitted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admitted
}

// isRefusal reports whether err is a reason why a session cannot work on this server.
func isRefusal(err error) bool {
	var refusal refusedError
	return errors.As(err, &refusal)
}

// keepSession keeps the session's own connection. It ends with close.
func (s *session) keepSession() {
	var ref sessionRef
	var last time.Time // when the last heartbeat of the connection began
	beats := 0
	way := &way{ask: s.dsn}
	s.keep(kept{
		name:    "session",
		wake:    s.work,
		way:     way,
		allowed: func() bool { return true },
		open: func() (l *line, err error) {
			l, ref, err = s.openOwn(way)
			last, beats = time.Now(), 0
			return l, err
		},
		beat: func(l *line, start time.Time) error {
			// The monotonic clock stands still while the machine is suspended.
			if slept := suspendedFor(last, start); slept > s.conf.sessionTimeout/2 {
				return errors.Errorf("the machine was suspended for %v", slept.Round(time.Second))
			}
			last = start
			beats++
			return s.beat(l, ref, start, beats)
		},
		ended: func(l *line, err error) {
			s.mu.Lock()
			if s.doom != nil {
				err = s.doom
			}
			s.own, s.doom = nil, nil
			s.mu.Unlock()
			if s.ctx.Err() != nil || err == errIdle {
				s.endOwn(l, ref)
			} else {
				s.trust.suspend(ref, err)
			}
		},
		failed: func(err error, pause time.Duration) {
			if isLogin(err) {
				s.admit(false)
			}
			s.mu.Lock()
			s.trouble = err
			refused := !s.proven && isRefusal(err)
			s.mu.Unlock()
			if refused {
				s.refuse(err, pause)
			}
		},
	})
}

// refuse fails all queued operations of a provider that has never worked, and those that follow
// before the next attempt.
func (s *session) refuse(err error, pause time.Duration) {
	s.log.Error("locker: session refused", slog.String("error", err.Error()))
	s.mu.Lock()
	s.refusal, s.retryAt = err, time.Now().Add(pause)
	failed := append(s.disk.drainLocked(), s.swift.drainLocked()...)
	s.mu.Unlock()
	finish(failed, err)
}

// openOwn opens the session's connection and makes the session known with a new advisory lock.
// Others see the session live from the commit of its row on.
func (s *session) openOwn(way *way) (_ *line, ref sessionRef, err error) {
	s.mu.Lock()
	proven, prepared := s.proven, s.prepared
	s.connections++
	connection := s.connections
	s.mu.Unlock()
	if !prepared {
		if err := s.prepare(way); err != nil {
			return nil, ref, err
		}
	}
	ref, _ = s.trust.current()
	ref.lock = randomKey()
	l, err := openLine(s.ctx, way.dsn, s.conf.sessionTimeout, ref.lock, func(string) {})
	if err != nil {
		return nil, ref, err
	}
	s.admit(true)
	defer context.AfterFunc(s.ctx, l.end)()
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	deadline := heartbeatDeadline(s.conf.sessionTimeout)
	// This is a separate statement: a pool in transaction mode runs it in another server session.
	if err := l.exec(deadline, fmt.Sprintf(sqlHeartbeat, ref.lock)); err != nil {
		return nil, ref, heartbeatError(err)
	}
	var lost int
	if s.conf.originalReplicas {
		if lost, err = s.relockKeys(l, ref); err != nil {
			return nil, ref, err
		}
	}
	start := time.Now()
	_, _, good := s.trust.state()
	upsert := sessionUpsert(ref, connection, s.conf.sessionTimeout, !good.IsZero())
	if err := l.exec(max(deadline, statementTimeout), upsert); err != nil {
		if isMissingTable(err) {
			s.unprepare()
		} else if proven && sqlState(err) == "" {
			s.killOwn(ref)
		}
		return nil, ref, errors.Wrap(err, "locker: write the session's row")
	}
	if !proven {
		if err := s.proveNotify(way); err != nil {
			return nil, ref, err
		}
	}
	suspended, ok := s.trust.connect(ref, start)
	// Other processes will sweep its row.
	if !ok {
		return nil, ref, errors.New("locker: the session was lost while it reconnected")
	}
	s.trust.beat(ref, start)
	s.mu.Lock()
	s.own, s.trouble, s.refusal, s.proven, s.prepared, s.resting = l, nil, nil, true, true, false
	if suspended.IsZero() {
		s.unsure = time.Time{}
	}
	s.mu.Unlock()
	s.wakeUp()
	// It may have been lost before dropOwn could close this connection.
	if !s.trust.connectedAs(ref) {
		s.dropOwn(errSessionLost)
	}
	if suspended.IsZero() && ref.generation > 1 {
		s.log.Info("locker: another session is open")
	}
	s.reconcile(ref, suspended, lost)
	if s.conf.originalReplicas {
		s.settleKeys(l)
	}
	return l, ref, nil
}

// prepare checks the server and creates the schema, on a separate connection.
func (s *session) prepare(way *way) error {
	l, err := openLink(s.ctx, way.dsn, nil, s.conf.sessionTimeout)
	if err != nil {
		return err
	}
	defer l.close()
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	if err := l.check(ctx); err != nil {
		return err
	}
	var repo string
	var pull int64
	// An error is ignored: the table may be too large to read.
	_ = l.each(ctx, sqlTwins, nil, []any{&repo, &pull}, func() {
		s.log.Error("locker: two rows for one pull request", slog.String("repo", repo), slog.Int64("pull_request", pull))
	})
	return nil
}

// unprepare makes the next attempt to open the session call prepare.
func (s *session) unprepare() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prepared = false
}

// beat sends a heartbeat. It fails as well if the session was lost, or is idle.
func (s *session) beat(l *line, ref sessionRef, start time.Time, beats int) error {
	if err := l.exec(heartbeatDeadline(s.conf.sessionTimeout), fmt.Sprintf(sqlHeartbeat, ref.lock)); err != nil {
		return heartbeatError(err)
	}
	if !s.trust.beat(ref, start) {
		return errSessionLost
	}
	if s.rest(ref) {
		return errIdle
	}
	s.lookAfterRows(ref, beats)
	return nil
}

// rest ends the session if the provider has been idle for the idle timeout, and reports whether it
// has. At that moment no operation is in flight that could need the session.
func (s *session) rest(ref sessionRef) bool {
	if s.conf.idleTimeout == 0 {
		return false
	}
	inUse, now := s.wanted(), time.Now()
	s.mu.Lock()
	if inUse || s.queuedLocked() > 0 || !s.disk.begun.IsZero() || !s.swift.begun.IsZero() {
		s.used = now
	}
	idle := now.Sub(s.used) >= s.conf.idleTimeout
	if idle {
		s.resting = true
		s.trust.rest(ref)
	}
	s.mu.Unlock()
	if idle {
		s.log.Info("locker: idle: the session has ended until the next call")
	}
	return idle
}

var (
	errIdle        = errors.New("locker: the provider is idle")
	errSessionLost = errors.New("the session is lost")
	errElsewhere   = errors.New("the server of the rows does not see the session")
)

// suspendedFor returns how long the machine was suspended between two times. The monotonic clock
// stands still meanwhile. A step of the wall clock counts as well.
func suspendedFor(from, to time.Time) time.Duration {
	return to.Round(0).Sub(from.Round(0)) - to.Sub(from)
}

// heartbeatError explains the errors of sqlHeartbeat.
func heartbeatError(err error) error {
	switch sqlState(err) {
	case "22012":
		return errPooler
	case "2201E":
		return refusedError{errors.WithMessage(err, "locker: the server has become read-only")}
	}
	return errors.Wrap(err, "locker: heartbeat")
}

var errPooler = refused("the session's advisory lock is not where it was taken: a proxy in between runs statements of one connection in several server sessions; connect to PostgreSQL directly or to a pool in session mode")

// endOwn deletes the session's row, unless it is still needed: a hold that could not be given back
// is taken over when its session is seen dead.
func (s *session) endOwn(l *line, ref sessionRef) {
	s.mu.Lock()
	// A release may have been queued after the worker had ended.
	needed := s.unreleased || len(s.swift.queues[opRelease]) > 0
	s.mu.Unlock()
	if !needed {
		// If this fails, others sweep the row.
		_ = l.exec(heartbeatDeadline(s.conf.sessionTimeout), fmt.Sprintf(sqlSessionEnd, ref.id))
	}
}

// killOwn ends the server's side of a connection that was closed during a commit. If the commit
// waits for a synchronous standby, the server does not notice the close, and each further attempt
// would leave another server process behind.
func (s *session) killOwn(ref sessionRef) {
	o := newOp(context.Background(), opCall, claim{})
	o.once = true
	o.call = func(ctx context.Context, l *link) error {
		_, err := l.conn.ExecContext(ctx, fmt.Sprintf(sqlSessionKill, strconv.FormatInt(ref.lock, 10)))
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enqueueLocked(o)
}

// dropOwn closes the session's connection. Then keepSession opens another one.
func (s *session) dropOwn(cause error) {
	s.mu.Lock()
	l := s.own
	if l != nil && s.doom == nil {
		s.doom = cause
	}
	s.mu.Unlock()
	if l != nil {
		l.end()
	}
}
