package locker

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"math/rand/v2"
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
	dsn         string
	serviceName string
	conf        LockProviderConfig
	log         *slog.Logger
	hub         *hub
	trust       *trust
	watches     watches

	mu       sync.Mutex // guards everything below, and what the workers say it guards; never held across I/O
	disk     *worker    // takes and acquires
	swift    *worker    // everything else
	own      *line      // the session's connection; nil while there is none
	keys     keyLocks   // of own
	trouble  error      // why the session's connection could not be opened the last time; nil since it could
	refusal  error      // why a provider that has never worked was refused
	retryAt  time.Time  // refused: no attempt before
	proven   bool       // the server and the schema have been checked
	worked   bool       // the provider has worked once: what refuses it now passes
	mute     bool       // NOTIFY fails: statements go without, and holders learn from their rows
	checking bool       // a check of rows is queued or running
	proof    uuid.UUID  // of the notification that is expected
	proved   chan struct{}
	listens  bool
	deaf     error // why the listener does not listen, the last time
	started  bool
	closing  bool

	cursor int // of the check of rows; the swift worker's own

	work    chan struct{} // capacity 1: the session's connection may be needed
	listen  chan struct{} // capacity 1: the listener may be needed
	running sync.WaitGroup
	ctx     context.Context // ends with close, once the workers have ended
	stop    context.CancelFunc
}

func newSession(dsn string, conf LockProviderConfig) *session {
	s := &session{
		dsn:    dsn,
		conf:   conf,
		log:    conf.logger,
		hub:    newHub(),
		work:   make(chan struct{}, 1),
		listen: make(chan struct{}, 1),
		keys:   keyLocks{},
	}
	s.trust = newTrust(&s.conf, s.hub)
	s.trust.lost = s.dropOwn
	s.disk, s.swift = newWorker(s), newWorker(s)
	s.ctx, s.stop = context.WithCancel(context.Background())
	if conf.postgres != nil {
		s.serviceName = conf.postgres.serviceName
	}
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
	queued := s.queuedLocked()
	s.mu.Unlock()
	holds, waits := s.hub.counts()
	return queued+holds+waits > 0
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
}

// keepLine keeps a connection open as long as it is wanted. open returns it, serve
// uses it until it fails or s.ctx ends, and failed is called with each failure to open
// it and each end, and with the pause that follows.
func (s *session) keepLine(wake <-chan struct{}, open func() (*line, error), serve func(*line) error, failed func(err error, opened bool, pause time.Duration)) {
	defer s.running.Done()
	var wait backoff
	for {
		for !s.wanted() {
			select {
			case <-wake:
			case <-s.ctx.Done():
				return
			}
		}
		l, err := open()
		opened := err == nil
		if opened {
			start := time.Now()
			err = serve(l)
			l.close()
			if time.Since(start) > reopenMax {
				wait = backoff{}
			}
		}
		if s.ctx.Err() != nil {
			return
		}
		pause := wait.next(err)
		failed(err, opened, pause)
		select {
		case <-time.After(pause):
		case <-s.ctx.Done():
			return
		}
	}
}

// backoff is the pause before the next attempt to connect. The first attempt follows
// immediately.
type backoff struct{ last time.Duration }

func (b *backoff) next(err error) time.Duration {
	least, most := reopenMin, reopenMax
	if strings.HasPrefix(sqlState(err), "28") {
		least, most = loginMin, loginMax
	}
	if b.last == 0 && least == reopenMin {
		b.last = reopenMin / 2
		return rand.N(10 * time.Millisecond)
	}
	b.last = min(max(2*b.last, least), most)
	return b.last*3/4 + rand.N(b.last/2) // so that the processes of a service do not connect all together
}

func isRefusal(err error) bool {
	var refusal refusedError
	return errors.As(err, &refusal)
}

// keepSession keeps the session's own connection.
func (s *session) keepSession() {
	var ref sessionRef
	s.keepLine(s.work, func() (l *line, err error) {
		l, ref, err = s.openOwn()
		return l, err
	}, func(l *line) error {
		err := s.serveOwn(l, ref)
		s.mu.Lock()
		s.own = nil
		s.mu.Unlock()
		if s.ctx.Err() != nil {
			s.endOwn(l, ref)
		}
		return err
	}, func(err error, opened bool, pause time.Duration) {
		s.mu.Lock()
		s.trouble = err
		refused := !s.worked && isRefusal(err)
		s.mu.Unlock()
		switch {
		case opened:
			s.trust.suspend(ref, err)
		case refused:
			s.refuse(err, pause)
		}
		s.wakeUp()
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
func (s *session) openOwn() (_ *line, ref sessionRef, err error) {
	s.mu.Lock()
	proven := s.proven
	s.mu.Unlock()
	if !proven {
		if err := s.prepare(); err != nil {
			return nil, ref, err
		}
	}
	l, err := openLine(s.dsn, s.conf.sessionTimeout, func(string) {})
	if err != nil {
		return nil, ref, err
	}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	ref, _ = s.trust.current()
	ref.lock = randomKey()
	deadline := heartbeatDeadline(s.conf.sessionTimeout)
	if err := l.exec(deadline, fmt.Sprintf(sqlSessionLock, ref.lock)); err != nil {
		return nil, ref, errors.Wrap(err, "locker: take the session's advisory lock")
	}
	// Another statement: a pooler in transaction mode carries it out elsewhere.
	if err := l.exec(deadline, fmt.Sprintf(sqlHeartbeat, ref.lock)); err != nil {
		return nil, ref, heartbeatError(err)
	}
	if s.conf.originalReplicas {
		s.relockKeys(l)
	}
	start := time.Now()
	_, _, good := s.trust.state()
	if err := l.exec(max(deadline, statementTimeout), sessionUpsert(ref, s.conf.sessionTimeout, !good.IsZero())); err != nil {
		if isMissingTable(err) {
			s.unprove()
		} else if sqlState(err) == "" {
			s.killOwn(ref)
		}
		return nil, ref, errors.Wrap(err, "locker: write the session's row")
	}
	if !proven {
		if err := s.proveNotify(); err != nil {
			return nil, ref, err
		}
	}
	suspended, ok := s.trust.connect(ref, start)
	if !ok {
		_ = l.exec(deadline, fmt.Sprintf(sqlSessionEnd, ref.id)) // what fails here is swept later
		return nil, ref, errors.New("locker: the session was lost while it reconnected")
	}
	s.trust.beat(ref, start)
	s.mu.Lock()
	s.own, s.trouble, s.refusal, s.proven, s.worked = l, nil, nil, true, true
	s.mu.Unlock()
	s.wakeUp()
	s.reconcile(ref, suspended)
	return l, ref, nil
}

// prepare checks the server and creates the schema, on a connection of its own.
func (s *session) prepare() error {
	l, err := openLink(s.ctx, s.dsn, "", s.conf.sessionTimeout)
	if err != nil {
		return err
	}
	defer l.close()
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	defer context.AfterFunc(s.ctx, l.kill)()
	return l.check(ctx)
}

// unprove has the schema looked after before the session is opened again.
func (s *session) unprove() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven = false
}

// serveOwn sends heartbeats until one fails or the connection ends.
func (s *session) serveOwn(l *line, ref sessionRef) error {
	interval := heartbeatInterval(s.conf.sessionTimeout)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	last := time.Now()
	for beats := 1; ; beats++ {
		select {
		case <-s.ctx.Done():
			return nil
		case <-l.down:
			return errors.Wrap(l.conn.Err(), "the connection ended")
		case <-tick.C:
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
		s.lookAfterRows(ref, beats)
	}
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

// endOwn deletes the session's row, unless it is still needed: a hold that could
// not be given back is taken over when its session is seen dead.
func (s *session) endOwn(l *line, ref sessionRef) {
	s.mu.Lock()
	clean := s.queuedLocked() == 0
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
	o.call = func(ctx context.Context, l *link) error { return l.exec(ctx, sqlSessionKill, ref.lock) }
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enqueueLocked(o)
}

// dropOwn closes the session's connection; keepSession opens another one.
func (s *session) dropOwn() {
	s.mu.Lock()
	l := s.own
	s.mu.Unlock()
	if l != nil {
		_ = l.conn.Close() // it fails only if the connection has ended
	}
}

// keepListener keeps the connection on which notifications arrive. Only speed
// depends on it.
func (s *session) keepListener() {
	first := true
	s.keepLine(s.listen, func() (*line, error) {
		l, err := openLine(s.dsn, s.conf.sessionTimeout, s.heard)
		if err != nil {
			return nil, err
		}
		if err := l.exec(openTimeout, sqlListen); err != nil {
			l.close()
			return nil, errors.Wrap(err, "locker: LISTEN")
		}
		s.mu.Lock()
		was := s.deaf
		s.listens, s.deaf = true, nil
		s.mu.Unlock()
		if was != nil {
			s.log.Info("locker: listening again")
		}
		if !first {
			s.catchUp()
		}
		first = false
		return l, nil
	}, func(l *line) error {
		tick := time.NewTicker(heartbeatInterval(s.conf.sessionTimeout))
		defer tick.Stop()
		for {
			select {
			case <-s.ctx.Done():
				return nil
			case <-l.down:
				return errors.Wrap(l.conn.Err(), "the connection ended")
			case <-tick.C:
			}
			err := l.exec(max(heartbeatDeadline(s.conf.sessionTimeout), time.Second), sqlListening)
			if sqlState(err) == "22012" {
				return errors.New("the channel is not registered in this server session any longer")
			}
			if err != nil {
				return err
			}
		}
	}, func(err error, _ bool, _ time.Duration) {
		s.mu.Lock()
		first := s.deaf == nil
		s.listens, s.deaf = false, err
		s.mu.Unlock()
		if first {
			s.log.Warn("locker: not listening: notifications arrive late", slog.String("error", err.Error()))
		}
	})
}

// heard receives a payload from the listener.
func (s *session) heard(payload string) {
	m, err := decodeMessage(payload)
	if err != nil {
		s.log.Debug("locker: foreign notification ignored", slog.String("error", err.Error()))
		return
	}
	switch m.Kind {
	case kindCheck:
		s.mu.Lock()
		if s.proof == m.ID && m.ID != uuid.Nil {
			s.proof = uuid.Nil
			close(s.proved)
		}
		s.mu.Unlock()
	case kindClaim:
		s.hub.dispatch(m.LockKey, event{kind: evClaimed, from: standing{m.Claim, m.ID}, message: m.Event})
	case kindReleased:
		s.hub.dispatch(m.LockKey, event{kind: evReleased})
	case kindManual:
		s.hub.dispatch(m.LockKey, event{kind: evManual, message: m.Event})
	}
}

// proveNotify proves that notifications that the workers' connections send arrive
// at the listener.
func (s *session) proveNotify() error {
	nonce := uuid.New()
	proved := make(chan struct{})
	s.mu.Lock()
	s.proof, s.proved = nonce, proved
	s.mu.Unlock()
	l, err := openLink(s.ctx, s.dsn, "", s.conf.sessionTimeout)
	if err != nil {
		return err
	}
	defer l.close()
	defer context.AfterFunc(s.ctx, l.kill)()
	payload := `{"kind":"` + kindCheck + `","id":"` + nonce.String() + `"}`
	deadline := time.After(proofTimeout)
	for pause := 5 * time.Millisecond; ; pause *= 2 {
		ctx, cancel := context.WithTimeout(context.Background(), statementTimeout)
		err := l.exec(ctx, sqlNotify, payload)
		cancel()
		switch {
		case err != nil && broken(err):
			return poolerError(errors.Wrap(err, "locker: prove that NOTIFY arrives"))
		case err != nil:
			s.muted(err)
			return nil
		}
		select {
		case <-proved:
			return nil
		case <-s.ctx.Done():
			return ErrProviderClosed
		case <-time.After(min(pause, proofTimeout/12)): // the listener may not have been there yet
		case <-deadline:
			s.mu.Lock()
			deaf := s.deaf
			s.mu.Unlock()
			if deaf != nil {
				return errors.WithMessage(deaf, "locker: listen for notifications")
			}
			return refused("a NOTIFY to this process did not arrive within %v: a proxy in transaction-pooling mode is in between; connect to PostgreSQL directly or to a pool in session mode", proofTimeout)
		}
	}
}

// poolerError marks the errors of prepared statements that are not in the backend
// that they were prepared in, or are there though they were not.
func poolerError(err error) error {
	if state := sqlState(err); state == "26000" || state == "42P05" {
		return refusedError{errors.WithMessage(err, errPooler.Error())}
	}
	return err
}

// muted switches to working without NOTIFY, until one succeeds again.
func (s *session) muted(err error) {
	s.mu.Lock()
	was := s.mute
	s.mute = true
	s.mu.Unlock()
	if !was {
		s.log.Warn("locker: NOTIFY fails: holders and waiters learn from the rows", slog.String("error", err.Error()))
	}
}

// catchUp looks up what notifications may have been missed: waiters try again, and
// all rows of holds are checked.
func (s *session) catchUp() {
	s.hub.broadcast(event{kind: evReleased})
	ref, connected := s.trust.current()
	if connected {
		s.enqueueCheck(ref, func(ctx context.Context, l *link) error {
			_, err := s.checkRows(ctx, l, ref, true)
			return err
		})
	}
}

// lookAfterRows has some of the rows of holds checked with each heartbeat.
func (s *session) lookAfterRows(ref sessionRef, beats int) {
	holds, _ := s.hub.counts()
	s.mu.Lock()
	mute, checking := s.mute, s.checking
	s.checking = s.checking || holds > 0 || mute
	s.mu.Unlock()
	if checking || holds == 0 && !mute {
		return
	}
	s.enqueueCheck(ref, func(ctx context.Context, l *link) error {
		s.mu.Lock()
		s.checking = false
		s.mu.Unlock()
		if mute && l.exec(ctx, sqlNotify, `{"kind":"`+kindCheck+`"}`) == nil {
			s.mu.Lock()
			s.mute = false
			s.mu.Unlock()
			s.log.Info("locker: NOTIFY works again")
		}
		if _, err := s.checkRows(ctx, l, ref, mute); err != nil {
			return err
		}
		if beats%sweepBeats == 0 {
			return s.sweep(ctx, l, ref)
		}
		return nil
	})
}

// reconcile compares the rows with the holds after a reconnect, in both directions,
// and then reports how the session got through. A new session only looks for dead
// ones.
func (s *session) reconcile(ref sessionRef, suspended time.Time) {
	after := time.Since(suspended)
	s.hub.broadcast(event{kind: evReleased})
	s.enqueueCheck(ref, func(ctx context.Context, l *link) error {
		if suspended.IsZero() {
			return s.sweep(ctx, l, ref)
		}
		lost, err := s.checkRows(ctx, l, ref, true)
		if err == nil {
			err = s.releaseForgotten(ctx, l, ref)
		}
		if err == nil {
			holds, _ := s.hub.counts()
			s.trust.reconnected(after, holds, lost)
		}
		return err
	})
}

const maxChecked = 1_000 // rows of holds that one heartbeat checks

// checkRows checks rows of holds: maxChecked of them, or all. A holder whose row
// does not name it any longer has lost the key, one whose key has a newer claim is
// notified. It returns the number of the former.
func (s *session) checkRows(ctx context.Context, l *link, ref sessionRef, all bool) (lost int, err error) {
	cursor := &s.cursor
	if all {
		cursor = new(int)
	}
	for {
		claims, more := s.hub.held(cursor, maxChecked)
		keys, ids := claimArrays(claims)
		type found struct {
			key int64
			ev  event
		}
		var alive, first bool
		var news []found
		var same bool
		var key, number sql.NullInt64
		var id, newest uuid.NullUUID
		var text sql.NullString
		first = true
		err := l.each(ctx, sqlCheck, []any{keys, ids, ref.id, ref.lock}, []any{&same, &key, &id, &number, &newest, &text}, func() {
			switch {
			case first:
				alive, first = same, false
			case !same:
				news = append(news, found{key.Int64, event{kind: evGone, from: standing{id: id.UUID},
					cause: errors.New("the row of the key does not name the hold any longer")}})
			default:
				news = append(news, found{key.Int64, event{kind: evNewest, from: standing{number.Int64, newest.UUID}, message: text.String}})
			}
		})
		if err != nil {
			return lost, err
		}
		if now, connected := s.trust.current(); now != ref || !connected {
			return lost, nil // the next connection is followed by a check of its own
		}
		if !alive {
			s.suspect(ref, errors.New("the server of the rows does not see the session"))
			return lost, nil
		}
		for _, n := range news {
			if n.ev.kind == evGone {
				lost++
			}
			s.hub.dispatch(n.key, n.ev)
		}
		if !all || !more {
			return lost, nil
		}
	}
}

// suspect ends the session's connection, because it does not do what it is there
// for.
func (s *session) suspect(ref sessionRef, cause error) {
	if now, connected := s.trust.current(); now == ref && connected {
		s.log.Warn("locker: session connects again", slog.String("cause", cause.Error()))
		s.dropOwn()
	}
}

// releaseForgotten releases what the rows say the session holds, and no lock of it
// does: releases that a crash of the server forgot.
func (s *session) releaseForgotten(ctx context.Context, l *link, ref sessionRef) error {
	var key int64
	var id uuid.UUID
	var forgotten []claim
	err := l.each(ctx, sqlHolds, []any{ref.id}, []any{&key, &id}, func() {
		if !s.hub.knows(key, id) {
			forgotten = append(forgotten, claim{key: key, id: id})
		}
	})
	for _, c := range forgotten {
		s.release(context.Background(), c)
	}
	return err
}

// sweep deletes the rows of sessions that were watched being dead and hold nothing.
func (s *session) sweep(ctx context.Context, l *link, ref sessionRef) error {
	var lock int64
	var timeout float64
	var over []int64
	err := l.each(ctx, sqlDeadSessions, []any{ref.id}, []any{&lock, &timeout}, func() {
		s.watches.dead(lock, seconds(timeout))
		if s.watches.over(lock) {
			over = append(over, lock)
		}
	})
	if err == nil && len(over) > 0 {
		err = l.exec(ctx, sqlSweep, int64Array(over))
	}
	return err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
