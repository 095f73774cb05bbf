package locker

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

const (
	reopenMin    = 50 * time.Millisecond // between two attempts to connect, doubled with each
	reopenMax    = time.Second
	loginMin     = 250 * time.Millisecond // the same after a failed login: too many of them lock an account
	loginMax     = time.Minute
	proofTimeout = 3 * time.Second // for a NOTIFY to arrive
	sweepBeats   = 20              // heartbeats between two looks for sessions that are dead
)

// session is the backend of a postgres provider's locks. It consists of
//
//   - the session's own connection, which has the advisory lock that shows others
//     that this process lives, and carries nothing but heartbeats;
//   - the listener, on which notifications arrive;
//   - two workers, which carry out operations, each on a connection that is opened
//     when it is needed and closed when it is idle: one for statements that wait for
//     the disk, one for all others.
//
// The first two connect when there is something to do: an operation, or a lock that
// waits or holds. If one of them is lost, it connects again. All goroutines start
// with the first operation and end with close.
type session struct {
	dsn     dsnFunc
	conf    LockProviderConfig
	log     *slog.Logger
	hub     *hub
	trust   *trust
	watches watches
	keys    keyLocks // with WithOriginalReplicas

	mu       sync.Mutex                  // guards everything below, and what the workers say it guards; never held across I/O
	disk     *worker                     // claims: announcements and acquires
	swift    *worker                     // everything else
	own      *line                       // the session's connection; nil while there is none
	doom     error                       // why own was closed
	trouble  error                       // why the session's connection could not be opened the last time; nil since it could
	refusal  error                       // why a provider that has never worked was refused
	retryAt  time.Time                   // refused: no attempt before
	proven   bool                        // the provider has worked once
	prepared bool                        // the schema was there when the session was opened the last time
	admitted bool                        // the server lets the session's connection in
	mute     bool                        // NOTIFY fails: statements go without, and holders learn from their rows
	checking sessionRef                  // the session for which a check of rows is queued
	proofs   map[uuid.UUID]chan struct{} // of notifications that are expected; closed when they arrive
	listens  bool
	deaf     error     // why the listener does not listen, the last time
	unsure   time.Time // when the answer to a statement that may have taken keys was lost the last time
	used     time.Time // when the provider was in use the last time
	resting  bool      // the session has ended because the provider was idle
	started  bool
	closing  bool

	connections int64 // of the session, also attempts

	cursor int // of the check of rows; the swift worker's own

	work    chan struct{} // capacity 1: the session's connection may be needed
	listen  chan struct{} // capacity 1: the listener may be needed
	running sync.WaitGroup
	ctx     context.Context // ends with close, once the workers have ended
	stop    context.CancelFunc
}

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
	s.trust.lost = func() { s.dropOwn(errors.New("the session is lost")) }
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
	default: // it has been woken already
	}
}

// wakeUp lets every goroutine of the session look for what it can do.
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
	busy := s.queuedLocked() + len(s.proofs) // a Ping is in no queue most of the time
	s.mu.Unlock()
	holds, waits := s.hub.counts()
	return busy+holds+waits > 0
}

func (s *session) queuedLocked() int { return s.disk.queuedLocked() + s.swift.queuedLocked() }

// close returns when everything has been given back, and all connections and
// goroutines have ended. Queued operations still run, for as long as a Release may
// take.
func (s *session) close() {
	s.mu.Lock()
	first := !s.closing
	s.closing = true
	started := s.started
	s.mu.Unlock()
	s.wakeUp()
	if started {
		limit := time.AfterFunc(releaseTimeout, func() {
			s.disk.abort()
			s.swift.abort()
		})
		<-s.disk.done
		<-s.swift.done
		limit.Stop()
	}
	if first {
		s.trust.end()
	}
	s.stop()
	s.running.Wait()
	s.mu.Lock()
	s.listens = false
	s.mu.Unlock()
}

// kept is one of the two connections that are open as long as the provider is in use.
type kept struct {
	name    string
	wake    <-chan struct{}
	way     *way
	allowed func() bool // to be opened; when that changes, wake is signaled
	open    func() (*line, error)
	serve   func(*line) error                    // until it fails, or s.ctx ends
	ended   func(err error)                      // after serve has failed
	failed  func(err error, pause time.Duration) // after open has failed, and before the next attempt
}

// keep opens a connection whenever it is wanted and not open. It ends with s.ctx.
func (s *session) keep(k kept) {
	defer s.running.Done()
	var wait backoff
	failing := false
	for {
		for !s.wanted() || !k.allowed() {
			select {
			case <-k.wake:
			case <-s.ctx.Done():
				return
			}
		}
		l, err := k.open()
		var pause time.Duration
		if err == nil {
			opened := time.Now()
			err = k.serve(l)
			l.close()
			wait = backoff{}
			k.way.connected()
			if time.Since(opened) < reopenMax { // it does not last
				pause = wait.next(err, s.urgent())
			}
			if s.ctx.Err() != nil {
				return
			}
			failing = false
			if err == errIdle {
				continue
			}
			k.ended(err)
		} else {
			if s.ctx.Err() != nil {
				return
			}
			pause = wait.next(err, s.urgent())
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
		if s.ctx.Err() != nil {
			return
		}
	}
}

// urgent returns the session timeout if the session is suspended, otherwise zero. The
// pauses are short then, since the session may have holds to lose.
func (s *session) urgent() time.Duration {
	if _, suspended, _ := s.trust.state(); suspended.IsZero() {
		return 0
	}
	return s.conf.sessionTimeout
}

// backoff is the pause before the next attempt to connect.
type backoff struct{ last time.Duration }

func (b *backoff) next(err error, urgent time.Duration) time.Duration {
	least, most := reopenMin, reopenMax
	if isLogin(err) {
		least, most = loginMin, loginMax
		urgent *= 3
	}
	if urgent > 0 {
		most = min(most, urgent/20)
	}
	b.last = min(max(2*b.last, least), most)
	return b.last*3/4 + rand.N(b.last/2) // so that the processes of a service do not connect all together
}

// isLogin reports whether the server has refused a login.
func isLogin(err error) bool { return strings.HasPrefix(sqlState(err), "28") }

// admit notes whether the server lets the session's connection in. As long as it does
// not, no other connection is tried: too many attempts lock an account.
func (s *session) admit(admitted bool) {
	s.mu.Lock()
	changed := s.admitted != admitted
	s.admitted = admitted
	s.mu.Unlock()
	if changed && admitted {
		s.wakeUp()
	}
}

func (s *session) isAdmitted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admitted
}

func isRefusal(err error) bool {
	var refusal refusedError
	return errors.As(err, &refusal)
}

// keepSession keeps the session's own connection.
func (s *session) keepSession() {
	var ref sessionRef
	way := &way{ask: s.dsn}
	s.keep(kept{
		name:    "session",
		wake:    s.work,
		way:     way,
		allowed: func() bool { return true },
		open: func() (l *line, err error) {
			l, ref, err = s.openOwn(way)
			return l, err
		},
		serve: func(l *line) error {
			err := s.serveOwn(l, ref)
			s.mu.Lock()
			if s.doom != nil {
				err = s.doom
			}
			s.own, s.doom = nil, nil
			s.mu.Unlock()
			if s.ctx.Err() != nil || err == errIdle {
				s.endOwn(l, ref)
			}
			return err
		},
		ended: func(err error) { s.trust.suspend(ref, err) },
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

// refuse fails every operation of a provider that has never worked, and those that
// follow until the next attempt.
func (s *session) refuse(err error, pause time.Duration) {
	s.log.Error("locker: session refused", slog.String("error", err.Error()))
	s.mu.Lock()
	s.refusal, s.retryAt = err, time.Now().Add(pause)
	failed := append(s.disk.drainLocked(), s.swift.drainLocked()...)
	s.mu.Unlock()
	finish(failed, err)
}

// openOwn opens the session's connection and makes the session known with a new
// advisory lock: from the commit of its row on, others see it live.
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
	// Another statement: a pooler in transaction mode carries it out elsewhere.
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
		} else if sqlState(err) == "" {
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
	if !ok { // its row is swept later
		return nil, ref, errors.New("locker: the session was lost while it reconnected")
	}
	s.trust.beat(ref, start)
	s.mu.Lock()
	s.own, s.trouble, s.refusal, s.proven, s.prepared, s.resting = l, nil, nil, true, true, false
	s.mu.Unlock()
	s.wakeUp()
	if suspended.IsZero() && ref.generation > 1 {
		s.log.Info("locker: another session is open")
	}
	s.reconcile(ref, suspended, lost)
	return l, ref, nil
}

// prepare checks the server and creates the schema, on a connection of its own.
func (s *session) prepare(way *way) error {
	l, err := openLink(s.ctx, way.dsn, nil, s.conf.sessionTimeout)
	if err != nil {
		return err
	}
	defer l.close()
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	defer context.AfterFunc(s.ctx, l.kill)()
	if err := l.check(ctx); err != nil {
		return err
	}
	var repo string
	var pull int64
	_ = l.each(ctx, sqlTwins, nil, []any{&repo, &pull}, func() { // a table that is too large to look through is fine
		s.log.Error("locker: two rows for one pull request", slog.String("repo", repo), slog.Int64("pull_request", pull))
	})
	return nil
}

// unprepare has the schema looked after before the session is opened again.
func (s *session) unprepare() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prepared = false
}

// serveOwn sends heartbeats until one fails or the connection ends.
func (s *session) serveOwn(l *line, ref sessionRef) error {
	interval := heartbeatInterval(s.conf.sessionTimeout)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	last := time.Now()
	if s.conf.originalReplicas {
		s.settleKeys(l)
	}
	for beats := 1; ; beats++ {
		if over, err := l.await(s.ctx, tick); over {
			return err
		}
		// The monotonic clock stands still while the machine is suspended.
		start := time.Now()
		if slept := start.Round(0).Sub(last.Round(0)) - start.Sub(last); slept > s.conf.sessionTimeout/2 {
			return errors.Errorf("the machine was suspended for %v", slept.Round(time.Second))
		}
		last = start
		if err := l.exec(heartbeatDeadline(s.conf.sessionTimeout), fmt.Sprintf(sqlHeartbeat, ref.lock)); err != nil {
			return heartbeatError(err)
		}
		s.trust.beat(ref, start)
		if s.rest(ref) {
			return errIdle
		}
		s.lookAfterRows(ref, beats)
	}
}

// rest ends the session if the provider has been idle for the idle timeout, and
// reports whether it has. Nothing is under way then that the session could still be
// needed for.
func (s *session) rest(ref sessionRef) bool {
	if s.conf.idleTimeout == 0 {
		return false
	}
	inUse := s.wanted()
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); inUse || s.queuedLocked() > 0 || !s.disk.begun.IsZero() || !s.swift.begun.IsZero() {
		s.used = now
		return false
	} else if now.Sub(s.used) < s.conf.idleTimeout {
		return false
	}
	s.resting = true
	s.trust.rest(ref)
	s.log.Info("locker: idle: the session has ended until the next call")
	return true
}

var errIdle = errors.New("locker: the provider is idle")

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

// endOwn deletes the session's row, unless it is still needed: a hold that could
// not be given back is taken over when its session is seen dead.
func (s *session) endOwn(l *line, ref sessionRef) {
	s.mu.Lock()
	clean := s.resting || s.queuedLocked() == 0
	s.mu.Unlock()
	if clean {
		_ = l.exec(heartbeatDeadline(s.conf.sessionTimeout), fmt.Sprintf(sqlSessionEnd, ref.id)) // what is left is swept by others
	}
}

// killOwn ends the server's end of a connection that was closed during a commit. If that
// waits for a synchronous standby, the server does not notice that it was closed, and
// each further attempt would leave another one behind.
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

// dropOwn closes the session's connection; keepSession opens another one.
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
